"""References that a framework builds for a world of one rank: DTensors over one device, state dict hooks, containers of optimizers."""
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

import trainverify as tv
from judge import assert_equal, summary
from pairs import LR, WIDTH, Weight, batch_of

RANKS = 2


class Container(torch.optim.Optimizer):
    """An optimizer only by its type: those that it holds do the work."""

    def __init__(self, parameters):
        self.optimizers = [torch.optim.SGD([p], lr=LR, momentum=0.9) for p in parameters]
        super().__init__([p for o in self.optimizers for g in o.param_groups for p in g["params"]], {})

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()


def split_on_save(module, state, prefix, metadata):
    """A hook that computes on the state dict, as those that split fused matrices do."""
    whole = state.pop(prefix + "w")
    state[prefix + "left"], state[prefix + "right"] = whole[:, :2].clone(), whole[:, 2:].clone()


def trained(model, batch, optimizer, share=slice(None)):
    def step():
        loss = F.cross_entropy(model(batch["x"][share]), batch["targets"][share])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {}
    return tv.Training(model, step, batch=batch)


def sharded_reference():
    torch.manual_seed(0)
    model = fully_shard(Weight())
    model.register_state_dict_post_hook(split_on_save)
    return trained(model, batch_of(6), Container(model.parameters()))


def parallel(ref):
    assert os.path.isabs(ref.checkpoint())
    dist.init_process_group("gloo")
    model = Weight()
    with torch.no_grad():
        model.w.copy_(torch.cat([ref.weights["left"], ref.weights["right"]], dim=1))
    fully_shard(model)
    mine = slice(dist.get_rank() * 3, dist.get_rank() * 3 + 3)
    return trained(model, ref.batch, Container(model.parameters()), mine)


def test_reference_that_is_sharded_over_one_rank():
    report = tv.verify(sharded_reference, parallel, ranks=RANKS, steps=2, timeout=60.0, repair=False)
    assert_equal(report)
    assert {(o.kind, o.name) for o in report.outputs} == {("gradient", "w"), ("parameter", "w"), ("state", "w::momentum_buffer")}, summary(report)


def drawn_in_place(shards):
    """A layer whose weights are drawn in place, some again and again until none is far from 0, then overwritten by the reference's."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = nn.Linear(WIDTH, 5)
    if shards:
        dist.init_process_group("gloo")
        fully_shard(model)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.trunc_normal_(parameter, std=0.02)
    return model


def uneven_shards(ref):
    model = drawn_in_place(shards=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(distribute_tensor(ref.weights[name], parameter.device_mesh, parameter.placements))
    batch = {"x": ref.batch["x"], "targets": ref.batch["targets"] % 5}
    return trained(model, batch, torch.optim.SGD(model.parameters(), lr=LR))


def plain_reference():
    model, batch = drawn_in_place(shards=False), batch_of(6)
    batch["targets"] %= 5
    return trained(model, batch, torch.optim.SGD(model.parameters(), lr=LR))


def test_what_an_uneven_shard_draws_is_data():
    assert_equal(tv.verify(plain_reference, uneven_shards, ranks=RANKS, steps=1, timeout=60.0, repair=False))
