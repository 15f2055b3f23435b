"""torchtitan PR 649: the first version of the gradient norm over pipeline stages added up the stages' norms to the p-th power. That does
not hold for the infinity norm, which is the largest of the stages' norms; the final version reduces it with MAX."""
import math

import torch.distributed as dist
from kit import MAX_NORM, Net, Stage, gpipe, loss_of, single, training, valid
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

RANKS = 3
MICROBATCHES = 2
NORM = math.inf
LIMIT = MAX_NORM / 20
BUG = {"id": "D24", "link": "https://github.com/pytorch/torchtitan/pull/649", "diagnosis": "other",
       "line": "dist.all_reduce(total_norm)", "also": ["total_norm = get_total_norm("]}


def reference():
    return single(lambda: Net(layers=3), clip=lambda ps: clip_grad_norm_(ps, LIMIT, NORM))


def clip_grad_norm(parameters, fixed):
    total_norm = get_total_norm([p.grad for p in parameters], NORM)
    if fixed:
        dist.all_reduce(total_norm, op=dist.ReduceOp.MAX)
    else:
        dist.all_reduce(total_norm)
    clip_grads_with_norm_(parameters, LIMIT, total_norm)
    return total_norm


def parallel(ref, fixed=False):
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    stage = Stage(rank, RANKS, 3).take(ref.weights)
    tokens, labels = ref.batch["tokens"], ref.batch["labels"]
    microbatches = list(zip(tokens.chunk(MICROBATCHES), labels.chunk(MICROBATCHES)))

    def backward():
        losses = gpipe(stage, microbatches, lambda y, t: loss_of(y, t, "sum") / valid(labels))
        return {"loss": sum(losses)} if stage.last else {}

    return training(stage, backward, clip=lambda ps: clip_grad_norm(ps, fixed))
