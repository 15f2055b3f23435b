"""Megatron-Bridge pull request 6009: an adapter's matrix that all experts share is replicated over the expert-parallel ranks, and a hook sums its
gradient over them. With fused accumulation the gradient is in main_grad, and what the hook finds in grad is a dummy."""
import torch
import torch.distributed as dist
from kit import EP_SHARDS, EXPERTS, HIDDEN, Gather, Moe, Net, ReduceScatter, ep_training, load, mesh_of, single
from torch import nn

RANKS = 3
BUG = {"id": "A15", "link": "https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/6009", "diagnosis": "partial sum",
       "line": "weight.main_grad.add_(", "also": ["p.grad = p.main_grad", "p.grad /= dist.get_world_size(group)"]}
SHARDS, LOW = {**EP_SHARDS, "up": 0}, 2


class FusedLinear(torch.autograd.Function):
    """The gradient of the weight is added to its main_grad at once; autograd gets a dummy of the right shape."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x)
        ctx.weight = weight
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        weight, (x,) = ctx.weight, ctx.saved_tensors
        weight.main_grad.add_(x.flatten(0, -2).T @ grad.flatten(0, -2))
        return grad @ weight.T, torch.zeros_like(weight)


class AdaptedMoe(Moe):
    """Experts with a low-rank adapter: all share `down`, each has its own `up`. ep: this rank's experts, on the tokens of all ranks."""

    def __init__(self, ep=None):
        super().__init__(EXPERTS // (dist.get_world_size(ep) if ep else 1))
        self.ep, self.low = ep, FusedLinear.apply if ep else torch.matmul
        self.down, self.up = nn.Parameter(torch.randn(HIDDEN, LOW) / 2), nn.Parameter(torch.randn(len(self.w1), LOW, HIDDEN) / 2)

    def run(self, x, weights):
        if self.ep:
            x, weights = Gather.apply(x, self.ep, 0, True), Gather.apply(weights, self.ep, 0, True)
            weights = weights.chunk(self.ep.size(), -1)[self.ep.rank()]
        y = super().run(x, weights) + torch.einsum("...r,erh,...e->...h", self.low(x, self.down), self.up, weights)
        return ReduceScatter.apply(y, self.ep, 0) if self.ep else y


def reference():
    return single(lambda: Net(mlp=AdaptedMoe))


def parallel(ref, fixed=False):
    ep = mesh_of(ep=3).get_group("ep")
    model = load(Net(mlp=lambda: AdaptedMoe(ep)), ref.weights, ep, SHARDS)
    shared = model.layers[0].mlp.down
    shared.register_hook(lambda grad: dist.all_reduce(shared.main_grad if fixed else grad, group=ep))

    def finish(experts):
        shared.grad = shared.main_grad / ep.size()
        shared.main_grad = torch.zeros_like(shared)
        for p in experts:
            p.grad /= ep.size()

    shared.main_grad = torch.zeros_like(shared)
    return ep_training(ref, model, ep, finish, SHARDS)
