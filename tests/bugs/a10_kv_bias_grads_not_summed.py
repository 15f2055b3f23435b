"""bigcode Megatron-LM issues 11 and 35: with one key-value head for all queries its projection is the same on all tensor-parallel ranks, while
each rank's gradient covers its own query heads. The sum over the ranks was done for the weights and left out the biases."""
import torch.distributed as dist
import torch.nn.functional as F
from kit import HEAD_DIM, HEADS, HIDDEN, Copy, Net, Reduce, load, mesh_of, single, sum_grads, tp_training
from torch import nn

RANKS = 6
BUG = {"id": "A10", "link": "https://github.com/bigcode-project/Megatron-LM/issues/35", "diagnosis": "partial sum",
       "line": "k, v = self.kv(x).chunk(2, -1)", "also": ["sum_grads(model.parameters(), dp)", "rest = [p.grad"]}
SHARDS = {"q.weight": 0, "q.bias": 0, "out.weight": 1}


class MultiQuery(nn.Module):
    """One key-value head; this rank's query heads."""

    def __init__(self, tp=None):
        super().__init__()
        self.tp, heads = tp, HEADS // (dist.get_world_size(tp) if tp else 1)
        self.q, self.kv = nn.Linear(HIDDEN, heads * HEAD_DIM), nn.Linear(HIDDEN, 2 * HEAD_DIM)
        self.out = nn.Linear(heads * HEAD_DIM, HIDDEN, bias=False)

    def forward(self, x):
        x = Copy.apply(x, self.tp) if self.tp else x
        q = self.q(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        k, v = self.kv(x).chunk(2, -1)
        y = F.scaled_dot_product_attention(q, k.unsqueeze(1).expand_as(q), v.unsqueeze(1).expand_as(q), is_causal=True)
        y = self.out(y.transpose(1, 2).flatten(2))
        return Reduce.apply(y, self.tp) if self.tp else y


def reference():
    return single(lambda: Net(attention=MultiQuery))


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=2, tp=3)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    model = load(Net(attention=lambda: MultiQuery(tp)), ref.weights, tp, SHARDS)

    def finalize():
        kinds = (".kv.weight", ".kv.bias") if fixed else (".kv.weight",)
        sum_grads([p for name, p in model.named_parameters() if name.endswith(kinds)], tp)
        sum_grads(model.parameters(), dp)

    return tp_training(ref, model, dp, tp, after=finalize, shards=SHARDS)
