"""Transformers PR 34191: with gradient accumulation the model averaged over the tokens of one microbatch and the trainer averaged
those means, so that a token of a short microbatch counted more. Since then the loss gets the number of items of the whole
accumulated batch, summed over the ranks, and the averaging that DDP does is undone (issue 35203, PR 35207)."""
from contextlib import nullcontext

import torch.distributed as dist
import torch.nn.functional as F
from kit import IGNORE, Net, load, make_batch, rows_of, single, total, training, valid
from torch.nn.parallel import DistributedDataParallel

RANKS = 2
MICROBATCHES = 3
BUG = {"id": "C1", "link": "https://github.com/huggingface/transformers/pull/34191", "diagnosis": "reweighted",
       "line": "return F.cross_entropy(", "also": ["loss = loss / MICROBATCHES"]}


def reference():
    return single(batch=make_batch(rows=12, length=10))


def loss_function(logits, labels, items):
    logits, labels = logits.flatten(0, 1), labels.flatten()
    if items is None:
        return F.cross_entropy(logits, labels, ignore_index=IGNORE)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") / items


def parallel(ref, fixed=False):
    dist.init_process_group("nccl")
    world = dist.get_world_size()
    model = DistributedDataParallel(load(Net(), ref.weights))
    tokens, labels = rows_of(ref.batch, None)
    microbatches = list(zip(tokens.chunk(MICROBATCHES), labels.chunk(MICROBATCHES)))

    def training_step(inputs, target, items):
        loss = loss_function(model(inputs), target, items)
        if items is None:
            loss = loss / MICROBATCHES
        else:
            loss = loss * world
        loss.backward()
        return loss.detach()

    def backward():
        items, loss = total(valid(labels)) if fixed else None, 0.0
        for i, (inputs, target) in enumerate(microbatches):
            with nullcontext() if i == MICROBATCHES - 1 else model.no_sync():
                loss = loss + training_step(inputs, target, items)
        return total(loss) / world

    return training(model, backward)
