"""PyTorch pull request 115967: DTensor.from_local of a replicated value is the identity. Its backward turned the gradient from replicated to
partial, and divided it by the number of ranks on the way."""
import torch
import torch.nn.functional as F
from kit import TP_SHARDS, Net, Reduce, TpMlp, load, mesh_of, single, total, tp_training

RANKS = 6
BUG = {"id": "B32", "link": "https://github.com/pytorch/pytorch/pull/115967", "diagnosis": "multiple",
       "line": "return grad / ctx.ranks, None, None",
       "also": ["x = FromLocal.apply(x, self.tp, self.fixed)", "norm = (square + nn.utils.get_total_norm(rest)"]}
reference = single


class FromLocal(torch.autograd.Function):
    """A replicated value enters the distributed region, whose gradients with respect to it are partial."""

    @staticmethod
    def forward(ctx, x, group, fixed):
        ctx.group, ctx.ranks = group, 1 if fixed else group.size()
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = total(grad, ctx.group)
        return grad / ctx.ranks, None, None


class DtensorMlp(TpMlp):
    fixed = True

    def forward(self, x):
        x = FromLocal.apply(x, self.tp, self.fixed)
        return Reduce.apply(F.linear(F.gelu(self.up(x)), self.down.weight), self.tp) + self.down.bias


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=2, tp=3)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    DtensorMlp.fixed = fixed
    model = load(Net(mlp=lambda: DtensorMlp(tp)), ref.weights, tp, TP_SHARDS)
    return tp_training(ref, model, dp, tp)
