"""yalis pull request 36: queries and keys are normalised over all heads together, and tensor parallelism splits the heads. Each rank took the mean
square of its own heads, as if they were all there are."""
import torch
from kit import HEAD_DIM, HEADS, TP_SHARDS, Attention, Copy, Net, Reduce, TpMlp, load, mesh_of, single, tp_training
from torch import nn

RANKS = 6
BUG = {"id": "E14", "link": "https://github.com/axonn-ai/yalis/pull/36", "diagnosis": "other",
       "line": "square = x.pow(2).mean((1, 3), keepdim=True)", "also": ["return x * (square + 1e-5).rsqrt()"]}
SHARDS = {**TP_SHARDS, "q_norm.weight": 0, "k_norm.weight": 0}


class HeadsNorm(nn.Module):
    """Over heads and head size together; tp: of which this rank has a part."""

    def __init__(self, heads, tp):
        super().__init__()
        self.weight, self.tp = nn.Parameter(torch.ones(heads, 1, HEAD_DIM)), tp

    def forward(self, x):
        square = x.pow(2).mean((1, 3), keepdim=True)
        if self.tp is not None:
            square = Copy.apply(Reduce.apply(square / self.tp.size(), self.tp), self.tp)
        return x * (square + 1e-5).rsqrt() * self.weight


class NormedAttention(Attention):
    def __init__(self, tp=None, fixed=False):
        heads = HEADS // (tp.size() if tp else 1)
        super().__init__(heads)
        self.tp, self.q_norm, self.k_norm = tp, *(HeadsNorm(heads, tp if fixed else None) for _ in range(2))

    def attend(self, q, k, v):
        return super().attend(self.q_norm(q), self.k_norm(k), v)

    def forward(self, x):
        return Reduce.apply(super().forward(Copy.apply(x, self.tp)), self.tp) if self.tp else super().forward(x)


def reference():
    return single(lambda: Net(attention=NormedAttention))


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=3, tp=2)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    model = load(Net(attention=lambda: NormedAttention(tp, fixed), mlp=lambda: TpMlp(tp)), ref.weights, tp, SHARDS)
    return tp_training(ref, model, dp, tp, shards=SHARDS)
