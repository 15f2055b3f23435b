"""AReno pull request 496: in latent attention a replicated projection feeds a column-parallel one, whose entry sums the gradient over the ranks. The
replicated weight's gradient is summed over them again afterwards, except for the rows of the shared key, which bypass the second
projection: another direction, not only another length."""
import torch
import torch.nn.functional as F
from kit import HEAD_DIM, HEADS, HIDDEN, TP_SHARDS, Copy, Net, Reduce, TpMlp, load, mesh_of, single, sum_grads, tp_training
from torch import nn

RANKS = 6
BUG = {"id": "B34", "link": "https://github.com/inclusionAI/AReno/pull/496", "diagnosis": "multiple",
       "line": "sum_grads([layer.attention.kv_a.weight for layer in model.layers], tp)",
       "also": ["dist.all_reduce(p.grad, group=group)", "rest = [p.grad for p in parameters", "latent, shared = self.kv_a("],
       "missed": ["diagnosis"]}
SHARDS, LATENT, SHARED = {**TP_SHARDS, "kv_b.weight": 0}, 4, 3


class LatentAttention(nn.Module):
    """Keys and values from a latent vector, and a part of the key that all heads share. tp: this rank's heads."""

    def __init__(self, tp=None, fixed=False):
        super().__init__()
        self.tp, self.fixed, self.heads = tp, fixed, HEADS // (tp.size() if tp else 1)
        self.q = nn.Linear(HIDDEN, self.heads * (HEAD_DIM + SHARED), bias=False)
        self.kv_a, self.kv_b = nn.Linear(HIDDEN, LATENT + SHARED, bias=False), nn.Linear(LATENT, self.heads * 2 * HEAD_DIM, bias=False)
        self.out = nn.Linear(self.heads * HEAD_DIM, HIDDEN, bias=False)

    def enter(self, x, here):
        """The boundary of the tensor-parallel region, if it is here."""
        return Copy.apply(x, self.tp) if self.tp and here else x

    def forward(self, x):
        q = self.q(self.enter(x, True)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        latent, shared = self.kv_a(self.enter(x, self.fixed)).split((LATENT, SHARED), -1)
        k, v = self.kv_b(self.enter(latent, not self.fixed)).unflatten(-1, (self.heads, -1)).transpose(1, 2).chunk(2, -1)
        k = torch.cat((k, shared.unsqueeze(1).expand(-1, self.heads, -1, -1)), -1)
        y = self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return Reduce.apply(y, self.tp) if self.tp else y


def reference():
    return single(lambda: Net(attention=LatentAttention))


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=2, tp=3)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    model = load(Net(attention=lambda: LatentAttention(tp, fixed), mlp=lambda: TpMlp(tp)), ref.weights, tp, SHARDS)

    def finish():
        sum_grads([layer.attention.kv_a.weight for layer in model.layers], tp)
        sum_grads(model.parameters(), dp)

    return tp_training(ref, model, dp, tp, after=finish, shards=SHARDS)
