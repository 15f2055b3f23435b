"""TransformerEngine (ROCm PR 715): its Linear marked every weight as tensor-parallel, also one that is replicated, such as the
down-projection of latent attention. Megatron's gradient norm counts a marked weight on every rank, so these were counted once
per tensor-parallel rank: the norm came out up to 1.5 times too large, and clipping went by it."""
import torch
from kit import HIDDEN, MAX_NORM, Copy, Net, Reduce, load, loss_of, mesh_of, rows_of, single, sum_grads, total, training, valid
from torch import nn

RANKS = 6
LATENT, WIDE = 4, 10
BUG = {"id": "D4", "link": "https://github.com/ROCm/TransformerEngine/pull/715", "diagnosis": "additive term",
       "line": "norm = total(torch.stack(squares).sum(), tp).sqrt()", "also": ["squares = [", "torch._foreach_mul_("]}


class Latent(nn.Module):
    """Down to a small latent, then up and out: `kv_down` is replicated, `kv_up` and `out` are split over the ranks."""

    def __init__(self, tp=None, fixed=True):
        super().__init__()
        self.tp, n = tp, 1 if tp is None else tp.size()
        self.kv_down = self.linear(HIDDEN, LATENT, "duplicated", fixed)
        self.kv_up = self.linear(LATENT, WIDE // n, "column", fixed)
        self.out = self.linear(WIDE // n, HIDDEN, "row", fixed)

    @staticmethod
    def linear(width, height, mode, fixed):
        made = nn.Linear(width, height, bias=False)
        made.weight.tensor_model_parallel = mode != "duplicated" if fixed else True
        return made

    def forward(self, x):
        latent = self.kv_down(x).tanh()
        if self.tp is None:
            return self.out(self.kv_up(latent))
        return Reduce.apply(self.out(self.kv_up(Copy.apply(latent, self.tp))), self.tp)


def reference():
    return single(lambda: Net(Latent))


def clip_grad_norm(parameters, tp):
    """Replicated parameters count on rank 0 only."""
    squares = [p.grad.square().sum() for p in parameters if getattr(p, "tensor_model_parallel", False) or tp.rank() == 0]
    norm = total(torch.stack(squares).sum(), tp).sqrt()
    torch._foreach_mul_([p.grad for p in parameters], (MAX_NORM / (norm + 1e-6)).clamp(max=1.0))
    return norm


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=3, tp=2)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    model = load(Net(lambda: Latent(tp, fixed)), ref.weights, tp, {"kv_up.weight": 0, "out.weight": 1})
    tokens, labels = rows_of(ref.batch, dp)

    def backward():
        loss = loss_of(model(tokens), labels, "sum") / total(valid(labels), dp)
        loss.backward()
        sum_grads(model.parameters(), dp)
        return total(loss, dp)

    return training(model, backward, clip=lambda ps: clip_grad_norm(ps, tp))
