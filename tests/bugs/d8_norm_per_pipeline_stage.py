"""torchtitan issue 596: clip_grad_norm_ ran on the parameters of each pipeline stage. Every stage clips by its own norm, so that the
gradients of different stages are scaled differently. The fix sums the squares over the pipeline."""
import torch.distributed as dist
from kit import MAX_NORM, Net, Stage, gpipe, loss_of, single, total, training, valid
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

RANKS = 3
MICROBATCHES = 2
BUG = {"id": "D8", "link": "https://github.com/pytorch/torchtitan/issues/596", "diagnosis": "partial sum",
       "line": "total_norm = get_total_norm(", "also": ["clip_grads_with_norm_("]}


def reference():
    return single(lambda: Net(layers=3))


def clip_grad_norm(parameters, across_stages):
    total_norm = get_total_norm([p.grad for p in parameters])
    if across_stages:
        total_norm = total(total_norm ** 2).sqrt()
    clip_grads_with_norm_(parameters, MAX_NORM, total_norm)
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
