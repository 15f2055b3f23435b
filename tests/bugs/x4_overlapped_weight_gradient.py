"""TransformerEngine issue 1616: with overlapped communication the gradient of a weight is accumulated chunk by chunk, as the gathered input
arrives, and differs a little between versions. Equal over the real numbers: a negative control."""
import torch
import torch.nn.functional as F
from kit import TP_SHARDS, ReduceScatter, SequenceNet, TpMlp, all_gather, finalize, load, mark, mesh_of, reduce_scatter, replicated, single, tp_training

RANKS = 6
BUG = {"id": "X4", "link": "https://github.com/NVIDIA/TransformerEngine/issues/1616", "control": True}
reference = single


class GatherLinear(torch.autograd.Function):
    """All-gather of the sequence and a linear layer; the weight's gradient is the sum over chunks, newest first unless fixed."""

    @staticmethod
    def forward(ctx, x, weight, bias, tp, fixed):
        ctx.save_for_backward(x, weight)
        ctx.tp, ctx.fixed = tp, fixed
        return F.linear(all_gather(x, tp, 1), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        chunks = list(zip(all_gather(x, ctx.tp, 1).chunk(ctx.tp.size(), 1), grad.chunk(ctx.tp.size(), 1)))
        start = 0 if ctx.fixed else ctx.tp.rank()
        grad_weight = torch.zeros_like(weight)
        for i in range(len(chunks)):
            part, g = chunks[(start - i) % len(chunks)]
            grad_weight += g.flatten(0, 1).T @ part.flatten(0, 1)
        return reduce_scatter(grad @ weight, ctx.tp, 1), grad_weight, grad.sum((0, 1)), None, None


class OverlapMlp(TpMlp):
    fixed = False

    def forward(self, x):
        y = F.gelu(GatherLinear.apply(x, self.up.weight, self.up.bias, self.tp, self.fixed))
        return ReduceScatter.apply(F.linear(y, self.down.weight), self.tp, 1) + self.down.bias


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=2, tp=3)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    OverlapMlp.fixed = fixed
    model = load(SequenceNet(tp, mlp=lambda: OverlapMlp(tp)), ref.weights, tp, TP_SHARDS)
    mark(*(p for p in replicated(model) if p is not model.head.weight))
    return tp_training(ref, model, dp, tp, after=lambda: finalize(model, tp, dp))
