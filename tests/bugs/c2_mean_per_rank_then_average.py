"""torchtitan PR 2206: every rank and every microbatch took the mean over its own tokens, FSDP averaged the ranks and the loss was
divided by the accumulation steps. The fix counts the tokens of all of them first, divides each sum by that count, and tells FSDP
not to divide."""
import torch.distributed as dist
import torch.nn.functional as F
from kit import IGNORE, Net, load, make_batch, mesh_of, rows_of, single, total, training, valid
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import clip_grad_norm_

RANKS = 3
STEPS = 2
BUG = {"id": "C2", "link": "https://github.com/pytorch/torchtitan/pull/2206", "diagnosis": "reweighted",
       "line": "return F.cross_entropy(", "also": ["(loss / STEPS).backward()"]}


def reference():
    return single(batch=make_batch(rows=12, length=10))


def cross_entropy(pred, labels, reduction="mean"):
    return F.cross_entropy(pred.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction=reduction)


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=3)
    model = load(Net(), ref.weights)
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh)
        if fixed:
            module.set_gradient_divide_factor(1.0)
    tokens, labels = rows_of(ref.batch, mesh.get_group())
    microbatches = list(zip(tokens.chunk(STEPS), labels.chunk(STEPS)))

    def backward():
        global_tokens = total(valid(labels))
        reported = 0.0
        for inputs, target in microbatches:
            if fixed:
                loss = cross_entropy(model(inputs), target, "sum") / global_tokens
                loss.backward()
            else:
                loss = cross_entropy(model(inputs), target)
                (loss / STEPS).backward()
            reported = reported + loss.detach()
        return total(reported) if fixed else total(reported) / (STEPS * dist.get_world_size())

    return training(model, backward, clip=lambda ps: clip_grad_norm_(ps, 0.1).full_tensor())
