"""Megatron-LM PR 7227: with pipeline parallelism the tied embedding has a copy in the first and one in the last stage, whose gradients
are brought together. The copy carries a mark so that the gradient norm counts it once; the sharded optimizer of Megatron FSDP
lost the mark and counted both."""
import torch
import torch.distributed as dist
from kit import MAX_NORM, Net, Stage, gpipe, loss_of, single, training, valid

RANKS = 3
MICROBATCHES = 2
BUG = {"id": "D21", "link": "https://github.com/NVIDIA/Megatron-LM/pull/7227", "diagnosis": "additive term",
       "line": "squares = [", "also": ["square = torch.stack(squares).sum()", "dist.all_reduce(square)"]}


def reference():
    return single(lambda: Net(layers=3, tied=True))


def clip_grad_norm(parameters):
    squares = [p.grad.square().sum() for p in parameters if not getattr(p, "shared", False)]
    square = torch.stack(squares).sum()
    dist.all_reduce(square)
    norm = square.sqrt()
    torch._foreach_mul_([p.grad for p in parameters], (MAX_NORM / (norm + 1e-6)).clamp(max=1.0))
    return norm


def parallel(ref, fixed=False):
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    embedding_group = dist.new_group([0, RANKS - 1])
    stage = Stage(rank, RANKS, 3).take(ref.weights)
    if stage.last and fixed:
        stage.head.weight.shared = True
    tokens, labels = ref.batch["tokens"], ref.batch["labels"]
    microbatches = list(zip(tokens.chunk(MICROBATCHES), labels.chunk(MICROBATCHES)))

    def backward():
        losses = gpipe(stage, microbatches, lambda y, t: loss_of(y, t, "sum") / valid(labels))
        if stage.first or stage.last:
            dist.all_reduce((stage.embed if stage.first else stage.head).weight.grad, group=embedding_group)
        return {"loss": sum(losses)} if stage.last else {}

    return training(stage, backward, clip=clip_grad_norm)
