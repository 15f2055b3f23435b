"""Megatron-LM issue 1503: the gradient of the queries differs between a fused attention kernel and the local implementation, which computes
scores, softmax and the weighted sum one by one, in another order of operations. Equal over the real numbers: a negative control."""
import torch
from kit import HEAD_DIM, TP_SHARDS, Attention, Net, TpAttention, load, make_batch, mesh_of, single, tp_training

RANKS = 6
BUG = {"id": "X7", "link": "https://github.com/NVIDIA/Megatron-LM/issues/1503", "control": True}
BLOCK = 3


def reference():
    return single(lambda: Net(attention=Attention), batch=make_batch(6, 8))


class LocalAttention(TpAttention):
    """fixed: all keys at once; otherwise block by block of keys, with a running maximum and sum as fused kernels do it."""

    fixed = False

    def attend(self, q, k, v):
        causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        scores = (q @ k.mT * HEAD_DIM ** -0.5).masked_fill(~causal, float("-inf"))
        if self.fixed:
            return scores.softmax(-1) @ v
        top = scores[..., :1]
        weight, out = torch.zeros_like(top), torch.zeros_like(q)
        for block, values in zip(scores.split(BLOCK, -1), v.split(BLOCK, -2)):
            new_top = torch.maximum(top, block.amax(-1, keepdim=True)).detach()
            shrink, p = (top - new_top).exp(), (block - new_top).exp()
            weight, out, top = weight * shrink + p.sum(-1, keepdim=True), out * shrink + p @ values, new_top
        return out / weight


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=3, tp=2)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    LocalAttention.fixed = fixed
    shards = {k: v for k, v in TP_SHARDS.items() if k[0] in "qkvo"}
    model = load(Net(attention=lambda: LocalAttention(tp)), ref.weights, tp, shards)
    return tp_training(ref, model, dp, tp, shards=shards)
