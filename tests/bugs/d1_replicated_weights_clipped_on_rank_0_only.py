"""DeepSpeed PR 1801, BF16_Optimizer, the bug of the BLOOM-176B training: the list of gradients for the norm leaves out replicated
parameters except on tensor-parallel rank 0, so that they count once. The same list was then clipped, so the other ranks updated
their copies of the norm weights with unclipped gradients and the copies drifted apart."""
import torch
from kit import MAX_NORM, TP_SHARDS, Net, TpMlp, adamw, load, loss_of, mesh_of, rows_of, sharded, single, sum_grads, total, training, valid

RANKS = 6
BUG = {"id": "D1", "link": "https://github.com/deepspeedai/DeepSpeed/pull/1801", "diagnosis": "other tensor",
       "line": "clipped = self.grads_for_norm()",
       "also": ["lp.data.copy_(hp.data)", "self.optimizer.step()", "torch._foreach_mul_(clipped"]}
reference = single


class HighPrecisionOptimizer:
    """Keeps a master copy of every parameter and of its gradient, clips, updates, and writes the parameters back."""

    def __init__(self, parameters, is_sharded, tp, fixed):
        self.lp, self.tp, self.fixed = parameters, tp, fixed
        self.hp = [p.detach().clone().requires_grad_() for p in parameters]
        self.is_sharded = [any(p is s for s in is_sharded) for p in parameters]
        self.optimizer = adamw(self.hp)

    def grads_for_norm(self):
        first = self.tp.rank() == 0
        return [hp.grad for hp, is_sharded in zip(self.hp, self.is_sharded) if is_sharded or first]

    def clip(self, _):
        for lp, hp in zip(self.lp, self.hp):
            hp.grad = lp.grad.float()
        norm = total(torch.stack([g.square().sum() for g in self.grads_for_norm()]).sum(), self.tp).sqrt()
        if self.fixed:
            clipped = [hp.grad for hp in self.hp]
        else:
            clipped = self.grads_for_norm()
        torch._foreach_mul_(clipped, (MAX_NORM / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def step(self):
        self.optimizer.step()
        for lp, hp in zip(self.lp, self.hp):
            lp.data.copy_(hp.data)

    def zero_grad(self):
        for p in self.lp:
            p.grad = None


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=3, tp=2)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    model = load(Net(lambda: TpMlp(tp)), ref.weights, tp, TP_SHARDS)
    optimizer = HighPrecisionOptimizer(list(model.parameters()), sharded(model), tp, fixed)
    tokens, labels = rows_of(ref.batch, dp)

    def backward():
        loss = loss_of(model(tokens), labels, "sum") / total(valid(labels), dp)
        loss.backward()
        sum_grads(model.parameters(), dp)
        return total(loss, dp)

    return training(model, backward, optimizer, optimizer.clip)
