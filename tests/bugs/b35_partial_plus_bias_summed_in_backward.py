"""torchtitan pull request 2106: a partial product plus a share of a replicated bias is summed over the ranks. The gradient that comes back is whole
on all of them, but was marked partial like the product, and summed once more."""
import torch
import torch.nn.functional as F
from kit import TP_SHARDS, Copy, Net, TpMlp, load, mesh_of, single, total, tp_training

RANKS = 6
BUG = {"id": "B35", "link": "https://github.com/pytorch/torchtitan/pull/2106", "diagnosis": "multiple",
       "line": "grad = grad if ctx.fixed else total(grad, ctx.group)",
       "also": ["y = F.linear(F.gelu(self.up(Copy.apply(x, self.tp))), self.down.weight)", "x = x.detach().clone()", "dist.all_reduce(x, group=group)"]}
reference = single


class AddAndReduce(torch.autograd.Function):
    """The sum over the ranks of their products, each with its share of the bias."""

    @staticmethod
    def forward(ctx, product, bias, group, fixed):
        ctx.group, ctx.fixed = group, fixed
        return total(product + bias / group.size(), group)

    @staticmethod
    def backward(ctx, grad):
        whole = grad.sum((0, 1))
        grad = grad if ctx.fixed else total(grad, ctx.group)
        return grad, whole, None, None


class BiasedMlp(TpMlp):
    fixed = False

    def forward(self, x):
        y = F.linear(F.gelu(self.up(Copy.apply(x, self.tp))), self.down.weight)
        return AddAndReduce.apply(y, self.down.bias, self.tp, self.fixed)


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=3, tp=2)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    BiasedMlp.fixed = fixed
    model = load(Net(mlp=lambda: BiasedMlp(tp)), ref.weights, tp, TP_SHARDS)
    return tp_training(ref, model, dp, tp)
