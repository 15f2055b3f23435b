"""Megatron-LM PR 5916: a parameter that is not marked as tensor-parallel counts in the gradient norm on tensor-parallel rank 0 only,
because the other ranks hold copies. Experts spread over these ranks without being cut (expert tensor parallelism of 1) are not
copies: all but those of rank 0 were missing, and clipping was too weak."""
import torch
from kit import (EP_SHARDS, EXPERTS, MAX_NORM, Copy, Moe, Net, Reduce, load, loss_of, mesh_of, rows_of, sharded, single, sum_grads, total,
                 training, valid)

RANKS = 6
BUG = {"id": "D22", "link": "https://github.com/NVIDIA/Megatron-LM/pull/5916", "diagnosis": "additive term",
       "line": "squares = [", "also": ["norm = total(", "torch._foreach_mul_("]}


def reference():
    return single(lambda: Net(Moe))


class SpreadMoe(Moe):
    """All ranks of the group see the same tokens; each adds what its own experts say."""

    def __init__(self, tp):
        super().__init__(EXPERTS // tp.size())
        self.tp = tp

    def run(self, x, weights):
        own = Copy.apply(weights, self.tp).chunk(self.tp.size(), -1)[self.tp.rank()]
        return Reduce.apply(super().run(Copy.apply(x, self.tp), own), self.tp)


def clip_grad_norm(parameters, experts, tp, fixed):
    def duplicate(p):
        if fixed and any(p is e for e in experts):
            return False
        return tp.rank() > 0 and not getattr(p, "tensor_model_parallel", False)

    squares = [p.grad.square().sum() if not duplicate(p) else torch.zeros(()) for p in parameters]
    norm = total(torch.stack(squares).sum(), tp).sqrt()
    torch._foreach_mul_([p.grad for p in parameters], (MAX_NORM / (norm + 1e-6)).clamp(max=1.0))
    return norm


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=3, tp=2)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    model = load(Net(lambda: SpreadMoe(tp)), ref.weights, tp, EP_SHARDS)
    experts = sharded(model, EP_SHARDS)
    tokens, labels = rows_of(ref.batch, dp)

    def backward():
        loss = loss_of(model(tokens), labels, "sum") / total(valid(labels), dp)
        loss.backward()
        sum_grads(model.parameters(), dp)
        return total(loss, dp)

    return training(model, backward, clip=lambda ps: clip_grad_norm(ps, experts, tp, fixed))
