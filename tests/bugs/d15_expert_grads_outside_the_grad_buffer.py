"""Megatron-LM issue 565: the distributed optimizer builds its shards from the model's gradient buffers. The main gradients of SwitchMLP's
experts were allocated one by one, outside of these buffers, so no shard holds them and the experts are never updated."""
import torch
import torch.distributed as dist
from kit import (EP_SHARDS, EpMoe, Moe, Net, adamw, clip_sharded, load, loss_of, make_batch, mesh_of, rows_of, sharded, single, total, training,
                 valid)

RANKS = 6
BUG = {"id": "D15", "link": "https://github.com/NVIDIA/Megatron-LM/issues/565", "diagnosis": "never updated",
       "line": "p.main_grad = torch.zeros_like(p)", "also": ["self.optimizer.step()", "p.main_grad.add_(p.grad)"]}


def reference():
    return single(lambda: Net(Moe), batch=make_batch(rows=12, length=10))


class GradBuffer:
    """One flat buffer for the gradients of its parameters, and the parameters that this rank updates."""

    def __init__(self, parameters, group):
        self.group, self.flat = group, torch.zeros(sum(p.numel() for p in parameters))
        for p, view in zip(parameters, self.flat.split([p.numel() for p in parameters])):
            p.main_grad = view.view_as(p)
        self.owners = {p: i % group.size() for i, p in enumerate(parameters)}


class DistributedOptimizer:
    def __init__(self, model, experts, expert_dp, fixed):
        dense = [p for p in model.parameters() if not any(p is e for e in experts)]
        self.model, self.experts, self.expert_dp = model, experts, expert_dp
        self.buffers = [GradBuffer(dense, dist.group.WORLD)]
        if fixed:
            self.buffers.append(GradBuffer(experts, expert_dp))
        else:
            for p in experts:
                p.main_grad = torch.zeros_like(p)
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(self.accumulate)
        self.optimizer = adamw([p for b in self.buffers for p, owner in b.owners.items() if owner == b.group.rank()])

    def accumulate(self, p):
        p.main_grad.add_(p.grad)
        p.grad = None

    def reduce(self):
        for b in self.buffers:
            dist.all_reduce(b.flat, group=b.group)
        if len(self.buffers) == 1:
            for p in self.experts:
                dist.all_reduce(p.main_grad, group=self.expert_dp)
        for p in self.model.parameters():
            p.grad = p.main_grad.clone()

    def step(self):
        self.optimizer.step()
        for b in self.buffers:
            for p, owner in b.owners.items():
                dist.broadcast(p.data, group=b.group, group_src=owner)

    def zero_grad(self):
        for p in self.model.parameters():
            p.grad = None
            p.main_grad.zero_()


def parallel(ref, fixed=False):
    mesh = mesh_of(expert_dp=3, ep=2)
    expert_dp, ep = mesh.get_group("expert_dp"), mesh.get_group("ep")
    model = load(Net(lambda: EpMoe(ep)), ref.weights, ep, EP_SHARDS)
    experts = sharded(model, EP_SHARDS)
    optimizer = DistributedOptimizer(model, experts, expert_dp, fixed)
    tokens, labels = rows_of(ref.batch, None)

    def backward():
        loss = loss_of(model(tokens), labels, "sum") / total(valid(labels))
        loss.backward()
        optimizer.reduce()
        return total(loss)

    return training(model, backward, optimizer, lambda ps: clip_sharded(ps, experts, ep))
