"""Megatron-LM issue 7452, finding 4 (PR 7403): full recomputation with distributed saved activations keeps a slice of a layer's input on
each tensor-parallel rank and gathers the slices in the backward. The prediction layers pass groups of their own, and the
gather took the default group instead: slices of other replicas end up in the recomputed input."""
import torch
from kit import TP_SHARDS, Net, TpMlp, all_gather, load, make_batch, mesh_of, single, tp_training

RANKS = 4
BUG = {"id": "F12", "link": "https://github.com/NVIDIA/Megatron-LM/issues/7452", "diagnosis": "other",
       "line": "x = all_gather(own_slice, ctx.gather_group, 0)", "also": ["y.backward(grad)", "y = F.linear(F.gelu(self.up(x)), self.down.weight)"]}


class Recompute(torch.autograd.Function):
    """Runs `run` without keeping activations; each rank of the group keeps a slice of the input's rows."""

    @staticmethod
    def forward(ctx, x, run, tp, gather_group):
        ctx.run, ctx.gather_group = run, gather_group
        ctx.save_for_backward(x.chunk(tp.size(), 0)[tp.rank()].clone())
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx, grad):
        own_slice, = ctx.saved_tensors
        x = all_gather(own_slice, ctx.gather_group, 0)
        x.requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x)
        y.backward(grad)
        return x.grad, None, None, None


class RecomputingNet(Net):
    def __init__(self, tp, gather_group):
        super().__init__(lambda: TpMlp(tp), layers=2)
        self.groups = tp, gather_group

    def hidden(self, x):
        for layer in self.layers:
            x = Recompute.apply(x, layer, *self.groups)
        return x


def reference():
    return single(lambda: Net(layers=2), batch=make_batch(rows=8))


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=2, tp=2)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    default_group = dp
    model = load(RecomputingNet(tp, tp if fixed else default_group), ref.weights, tp, TP_SHARDS)
    return tp_training(ref, model, dp, tp)
