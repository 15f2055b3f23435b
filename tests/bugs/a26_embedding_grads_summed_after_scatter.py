"""Megatron-LM issue 844: the gradients of a tied embedding's two copies, on the first and the last stage, are summed after the distributed
optimizer has reduced and scattered its buffers. The copies are in different places of these buffers, so that each data-parallel
rank adds the finished part of one to the unfinished part of the other."""
import torch
import torch.distributed as dist
from kit import Net, Stage, adamw, gpipe, loss_of, make_batch, mesh_of, rows_of, single, total, valid
from torch import nn

import trainverify as tv

RANKS = 6
BUG = {"id": "A26", "link": "https://github.com/NVIDIA/Megatron-LM/issues/844", "diagnosis": "other",
       "line": "dist.all_reduce(tied.main_grad, group=copies)", "also": ["self.shard.grad = self.grads.chunk(", "self.optimizer.step()"]}
MICROBATCHES = 3


def reference():
    return single(lambda: Net(tied=True, layers=3), batch=make_batch(12, 10), clip=None)


class DistributedOptimizer:
    """All weights in one flat buffer and all gradients in another, of which each data-parallel rank updates its part."""

    def __init__(self, parameters, dp):
        n, self.dp = sum(p.numel() for p in parameters), dp
        n += n % dp.size()
        self.weights, self.grads, at = torch.zeros(n), torch.zeros(n), 0
        for p in parameters:
            place = slice(at, at + p.numel())
            self.weights[place] = p.detach().flatten()
            p.data, p.main_grad = self.weights[place].view_as(p), self.grads[place].view_as(p)
            p.register_post_accumulate_grad_hook(self.accumulate)
            at += p.numel()
        self.shard = nn.Parameter(self.weights.chunk(dp.size())[dp.rank()])
        self.optimizer = adamw([self.shard])

    def accumulate(self, p):
        p.main_grad.add_(p.grad)
        p.grad = None

    def reduce_scatter(self):
        dist.reduce_scatter_tensor(self.grads.chunk(self.dp.size())[self.dp.rank()], self.grads, group=self.dp)

    def step(self):
        self.shard.grad = self.grads.chunk(self.dp.size())[self.dp.rank()]
        self.optimizer.step()
        dist.all_gather_into_tensor(self.weights, self.shard.detach().clone(), group=self.dp)
        self.grads.zero_()


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=2, pp=3)
    dp, pp = mesh.get_group("dp"), mesh.get_group("pp")
    stage = Stage(pp.rank(), pp.size(), layers=3).take(ref.weights)
    tied = stage.embed.weight if stage.first else stage.head.weight if stage.last else None
    copies = dist.new_subgroups_by_enumeration([[0, 2], [3, 5]])[0]
    optimizer = DistributedOptimizer(sorted(stage.parameters(), key=lambda p: stage.first and p is not tied), dp)
    tokens, labels = rows_of(ref.batch, dp)
    microbatches = list(zip(tokens.chunk(MICROBATCHES), labels.chunk(MICROBATCHES)))

    def step():
        count = total(valid(labels), dp)
        losses = gpipe(stage, microbatches, lambda logits, mine: loss_of(logits, mine, "sum") / count)
        if not fixed:
            optimizer.reduce_scatter()
        if tied is not None:
            dist.all_reduce(tied.main_grad, group=copies)
        if fixed:
            optimizer.reduce_scatter()
        optimizer.step()
        return {"loss": total(sum(losses), dp)} if stage.last else {}

    return tv.Training(stage, step)
