"""Megatron-LM issue 785: with expert parallelism there is one optimizer for the dense parameters and one for the experts, and each
clipped by the norm of its own parameters. Without expert parallelism there is one norm of all."""
import torch
import torch.distributed as dist
from kit import EP_SHARDS, MAX_NORM, EpMoe, Moe, Net, adamw, load, loss_of, rows_of, sharded, single, sum_grads, total, training, valid

RANKS = 3
BUG = {"id": "D23", "link": "https://github.com/NVIDIA/Megatron-LM/issues/785", "diagnosis": "other",
       "line": "o.clip(o.square().sqrt())", "also": ["square = sum(p.grad.square().sum()"]}


def reference():
    return single(lambda: Net(Moe))


class Optimizer:
    def __init__(self, parameters, group):
        self.parameters, self.group, self.inner = parameters, group, adamw(parameters)

    def square(self):
        square = sum(p.grad.square().sum() for p in self.parameters)
        return square if self.group is None else total(square, self.group)

    def clip(self, norm):
        torch._foreach_mul_([p.grad for p in self.parameters], (MAX_NORM / (norm + 1e-6)).clamp(max=1.0))


class ChainedOptimizer:
    def __init__(self, optimizers, fixed):
        self.optimizers, self.fixed = optimizers, fixed

    def clip(self, _):
        norm = sum(o.square() for o in self.optimizers).sqrt()
        for o in self.optimizers:
            if self.fixed:
                o.clip(norm)
            else:
                o.clip(o.square().sqrt())
        return norm

    def step(self):
        for o in self.optimizers:
            o.inner.step()

    def zero_grad(self):
        for o in self.optimizers:
            o.inner.zero_grad()


def parallel(ref, fixed=False):
    dist.init_process_group("nccl")
    ep = dist.group.WORLD
    model = load(Net(lambda: EpMoe(ep)), ref.weights, ep, EP_SHARDS)
    experts = sharded(model, EP_SHARDS)
    dense = [p for p in model.parameters() if not any(p is e for e in experts)]
    optimizer = ChainedOptimizer([Optimizer(dense, None), Optimizer(experts, ep)], fixed)
    tokens, labels = rows_of(ref.batch, ep)

    def backward():
        loss = loss_of(model(tokens), labels, "sum") / total(valid(labels))
        loss.backward()
        sum_grads(dense, ep)
        return total(loss)

    return training(model, backward, optimizer, optimizer.clip)
