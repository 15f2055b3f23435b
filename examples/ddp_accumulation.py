"""Data parallelism with gradient accumulation: DDP over 2 ranks, 3 microbatches each, one all-reduce per step.

The microbatches count different numbers of tokens, so every token must weigh the same: the sum of the losses is
divided by the tokens of the whole batch, and multiplied by the number of ranks because DDP averages gradients.
"""
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

import trainverify as tv
from models.llama import IGNORE, Config, Llama, random_batch, token_loss

RANKS = 2
MICROBATCHES = 3
CONFIG = Config()
MAX_NORM = 0.5


def reference():
    torch.manual_seed(0)
    model = Llama(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    batch = random_batch(rows=12, length=5, vocab=CONFIG.vocab)

    def step():
        loss = token_loss(model(batch["tokens"]), batch["labels"])
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss, "grad_norm": norm}

    return tv.Training(model, step, batch=batch)


def microbatches(batch):
    """This rank's rows, in MICROBATCHES parts: pairs of tokens and labels."""
    rank, world = dist.get_rank(), dist.get_world_size()
    tokens, labels = (batch[k].chunk(world)[rank] for k in ("tokens", "labels"))
    return list(zip(tokens.chunk(MICROBATCHES), labels.chunk(MICROBATCHES)))


def microbatch_loss(logits, labels, total_tokens):
    """This microbatch's share of the mean loss over all tokens of the batch."""
    return token_loss(logits, labels, reduction="sum") / total_tokens


def parallel(ref, microbatches=microbatches, microbatch_loss=microbatch_loss):
    dist.init_process_group("nccl")
    world = dist.get_world_size()
    model = Llama(CONFIG)
    model.load_state_dict(ref.weights)
    model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    parts = microbatches(ref.batch)

    def step():
        total_tokens = sum((labels != IGNORE).sum() for _, labels in parts)
        dist.all_reduce(total_tokens)
        loss = 0.0
        for i, (tokens, labels) in enumerate(parts):
            last = i == MICROBATCHES - 1
            with nullcontext() if last else model.no_sync():
                part = microbatch_loss(model(tokens), labels, total_tokens)
                (part * world).backward()
            loss = loss + part.detach()
        norm = clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": tv.local(loss, reduce="sum"), "grad_norm": norm}

    return tv.Training(model, step)
