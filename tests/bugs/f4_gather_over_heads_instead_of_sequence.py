"""torchtitan PR 3206: with context parallelism keys and values were gathered along the dimension that had been the sequence before the
transpose in front of attention. After it this is the heads: each rank attends over its own part of the sequence, with the
other ranks' keys as further heads."""
import torch
import torch.nn.functional as F
from kit import HEAD_DIM, HEADS, HIDDEN, Attention, Gather, Net, load, loss_of, mesh_of, part, rows_of, single, sum_grads, total, training, valid
from torch import nn

RANKS = 6
KV_HEADS = 2
BUG = {"id": "F4", "link": "https://github.com/pytorch/torchtitan/pull/3206", "diagnosis": "other",
       "line": "k, v = (Gather.apply(t, self.cp, self.gather_dim, True) for t in (k, v))",
       "also": ["return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)", "k, v = (t.repeat_interleave("]}


class GroupedAttention(Attention):
    """Fewer heads of keys and values than of queries."""

    def __init__(self):
        super().__init__()
        self.k, self.v = (nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM) for _ in range(2))

    def attend(self, q, k, v):
        return self.attention(q, k, v, 0)

    def attention(self, q, k, v, first):
        """Causal; the queries start at position `first`."""
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        mask = first + torch.arange(q.shape[2]).unsqueeze(-1) >= torch.arange(k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class ContextAttention(GroupedAttention):
    def __init__(self, cp, gather_dim):
        super().__init__()
        self.cp, self.gather_dim = cp, gather_dim

    def attend(self, q, k, v):
        k, v = (Gather.apply(t, self.cp, self.gather_dim, True) for t in (k, v))
        return self.attention(q, k, v, self.cp.rank() * q.shape[2])


def reference():
    return single(lambda: Net(attention=GroupedAttention))


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=2, cp=3)
    dp, cp = mesh.get_group("dp"), mesh.get_group("cp")
    assert HEADS == KV_HEADS * cp.size()
    model = load(Net(attention=lambda: ContextAttention(cp, gather_dim=2 if fixed else 1)), ref.weights)
    tokens, labels = (part(t, cp, 1) for t in rows_of(ref.batch, dp))

    def backward():
        loss = loss_of(model(tokens), labels, "sum") / total(valid(labels))
        loss.backward()
        sum_grads(model.parameters(), None)
        return total(loss)

    return training(model, backward)
