"""Megatron-LM commit 9beed7a0d5: the largest activation, from which the scale of an FP8 cast follows, was taken over the data-parallel ranks and
not over the tensor-parallel ones as well. The scale cancels over the real numbers: a negative control."""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from kit import TP_SHARDS, Copy, Net, Reduce, TpMlp, load, mesh_of, single, tp_training

RANKS = 6
BUG = {"id": "X3", "link": "https://github.com/NVIDIA/Megatron-LM/commit/9beed7a0d5", "control": True}
reference = single


class Cast(torch.autograd.Function):
    """To FP8 by a scale, and back; the gradient passes as it is."""

    @staticmethod
    def forward(ctx, x, groups):
        largest = x.abs().amax()
        for group in groups:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        scale = 448.0 / largest.clamp(min=1e-12)          # as casts to FP8 do: where all is 0, a scale of 448 / 0 would make it NaN
        return (x * scale).to(torch.float8_e4m3fn).to(x.dtype) / scale

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Fp8Mlp(TpMlp):
    groups = ()

    def forward(self, x):
        y = Cast.apply(F.gelu(self.up(Copy.apply(x, self.tp))), self.groups)
        return Reduce.apply(F.linear(y, self.down.weight), self.tp) + self.down.bias


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=3, tp=2)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    Fp8Mlp.groups = (dp, tp) if fixed else (dp,)
    model = load(Net(mlp=lambda: Fp8Mlp(tp)), ref.weights, tp, TP_SHARDS)
    return tp_training(ref, model, dp, tp)
