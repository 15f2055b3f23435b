"""Optimizers of torch.optim, each on a small model of its own, in other implementations than the reference's (foreach, fused, sharded)."""
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import trainverify as tv

RANKS = 2
IMPLEMENTATION = {"for-loop": dict(foreach=False), "foreach": dict(foreach=True), "fused": dict(fused=True), "default": {}}


def groups(model):
    """Weight decay for matrices only."""
    return [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0, "lr": 0.02}]


MAKE = {
    "adamw": lambda m, kw: torch.optim.AdamW(groups(m), lr=0.01, betas=(0.9, 0.95), **kw),
    "amsgrad": lambda m, kw: torch.optim.Adam(m.parameters(), lr=0.01, weight_decay=0.01, amsgrad=True, **kw),
    "nesterov": lambda m, kw: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01, **kw),
    "dampened": lambda m, kw: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, dampening=0.1, maximize=True, **kw),
    "adagrad": lambda m, kw: torch.optim.Adagrad(m.parameters(), lr=0.1, lr_decay=0.01, **kw),
    "maximize": lambda m, kw: torch.optim.AdamW(m.parameters(), lr=0.01, maximize=True, **kw),
    "rmsprop": lambda m, kw: torch.optim.RMSprop(m.parameters(), lr=0.01, momentum=0.5, centered=True, **_unfused(kw)),
    "adamax": lambda m, kw: torch.optim.Adamax(m.parameters(), lr=0.01, **_unfused(kw)),
    "nadam": lambda m, kw: torch.optim.NAdam(m.parameters(), lr=0.01, decoupled_weight_decay=True, weight_decay=0.1, **_unfused(kw)),
    "radam": lambda m, kw: torch.optim.RAdam(m.parameters(), lr=0.01, foreach=False),      # foreach divides by 0 on its way: docs/limits.md
    "adadelta": lambda m, kw: torch.optim.Adadelta(m.parameters(), lr=0.1, **_unfused(kw)),
}


def _unfused(kw):
    return {} if "fused" in kw else kw


def nets():
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)) for name in MAKE})


def loss_of(net, x, y):
    return (net(x) - y).square().mean()


def train(models, optimizers, schedulers, x, y, after=lambda name: None):
    """models and optimizers by name; every model is trained on the same data."""
    def step():
        reported = {}
        for name, model in models.items():
            loss = loss_of(model, x, y)
            loss.backward()
            after(name)
            optimizers[name].step()
            optimizers[name].zero_grad()
            reported[name] = loss
        for scheduler in schedulers:
            scheduler.step()
        return reported

    return step


def schedule(optimizer):
    """Warm-up, then a cosine."""
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: (n + 1) / 2),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)], milestones=[1])


def reference():
    models = nets()
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    optimizers = {name: make(models[name], IMPLEMENTATION["for-loop"]) for name, make in MAKE.items()}
    step = train(models, optimizers, [schedule(optimizers[n]) for n in ("adamw", "nesterov")], x, y)
    return tv.Training(models, step, batch={"x": x, "y": y})


def run(ref, wrap, kw, wrong):
    models = nets()
    models.load_state_dict(ref.weights)
    wrapped = {name: wrap(model) for name, model in models.items()}
    optimizers = {name: make(wrapped[name], kw) for name, make in MAKE.items()}
    world, rank = dist.get_world_size(), dist.get_rank()
    schedulers = [schedule(optimizers[n]) for n in ("adamw",) + (() if wrong else ("nesterov",))]
    step = train(wrapped, optimizers, schedulers, *(ref.batch[k].chunk(world)[rank] for k in ("x", "y")))
    return tv.Training(models, lambda: {k: tv.local(v) for k, v in step().items()})


def foreach(ref, wrong):
    return run(ref, DistributedDataParallel, IMPLEMENTATION["foreach"], wrong)


def fused(ref, wrong):
    return run(ref, DistributedDataParallel, IMPLEMENTATION["fused"], wrong)


def sharded(ref, wrong):
    return run(ref, fully_shard, IMPLEMENTATION["default"], wrong)


def parallel(ref, how, wrong=False):
    dist.init_process_group("nccl")
    return globals()[how](ref, wrong)
