"""Megatron-Bridge pull request 5231: an adapter of experts is split over the expert-tensor-parallel ranks, and tensor parallelism elsewhere
has another degree. Its gradients were averaged over the ordinary data-parallel group, which mixes different parts of it."""
import torch
from kit import FFN, HIDDEN, Gather, Net, ReduceScatter, ep_training, load, make_batch, mean_grads, mesh_of, single
from torch import nn

RANKS = 6
BUG = {"id": "A16", "link": "https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/5231", "diagnosis": "additive term",
       "line": "dist.all_reduce(p.grad, group=group)",
       "also": ["mean_grads(adapters, None)", "square = nn.utils.get_total_norm([p.grad for p in sharded])"]}
SHARDS, LOW = {"up": 1, "down": 0, "up_b": 1}, 3


class AdaptedExpert(nn.Module):
    """A frozen expert with a low-rank adapter of its first matrix. etp: this rank's part, on the tokens of all etp ranks."""

    def __init__(self, etp=None):
        super().__init__()
        self.etp, ffn = etp, FFN // (etp.size() if etp else 1)
        self.up, self.down = (nn.Parameter(torch.randn(size) / 3, requires_grad=False) for size in ((HIDDEN, ffn), (ffn, HIDDEN)))
        self.up_a, self.up_b = nn.Parameter(torch.randn(HIDDEN, LOW)), nn.Parameter(torch.randn(LOW, ffn))

    def forward(self, x):
        x = Gather.apply(x, self.etp, 0, True) if self.etp else x
        y = (x @ self.up + x @ self.up_a @ self.up_b).relu() @ self.down
        return ReduceScatter.apply(y, self.etp, 0) if self.etp else y


def reference():
    return single(lambda: Net(mlp=AdaptedExpert), batch=make_batch(12, 10))


def parallel(ref, fixed=False):
    mesh = mesh_of(edp=3, etp=2)
    edp, etp = mesh.get_group("edp"), mesh.get_group("etp")
    model = load(Net(mlp=lambda: AdaptedExpert(etp)), ref.weights, etp, SHARDS)

    def average(adapters):
        if fixed:
            mean_grads(adapters, edp)
            for p in adapters:
                p.grad /= etp.size()          # the tokens of all etp ranks are in it
        else:
            mean_grads(adapters, None)

    return ep_training(ref, model, etp, average, SHARDS)
