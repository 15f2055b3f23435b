"""Counts that are written out: the same function where nothing is reduced away, and the recorded count where it is."""
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import trainverify as tv
from shrink.kit import captured, verified
from trainverify.ops.standard import standard_table
from trainverify.shrink.check import execute
from trainverify.shrink.reduce import reduce_programs

WIDTH = 24


class Normed(nn.Module):
    def __init__(self, fused: bool, kind: str):
        super().__init__()
        self.fused, self.kind = fused, kind
        self.weight, self.bias = nn.Parameter(torch.rand(WIDTH) + 0.5), nn.Parameter(torch.rand(WIDTH))

    def forward(self, x):
        if self.kind == "layer":
            if self.fused:
                return F.layer_norm(x, (WIDTH,), self.weight, self.bias, 1e-5)
            d = x - x.mean(-1, keepdim=True)
            return d * torch.rsqrt(d.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight + self.bias
        if self.fused:
            return F.rms_norm(x, (WIDTH,), self.weight, 1e-5) + self.bias
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight + self.bias


def training(model, batch):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        loss = (model(batch["x"] * batch["x"]) * batch["c"]).sum()
        loss.backward()
        optimizer.step()
        return {"loss": loss}
    return tv.Training(model, step, batch)


def spec(kind: str, fused: bool):
    def reference():
        torch.manual_seed(0)
        return training(Normed(False, kind), {"x": torch.randn(5, 7, WIDTH), "c": torch.randn(5, 7, WIDTH)})

    def parallel(ref):
        model = Normed(fused, kind)
        model.load_state_dict(ref.weights)
        return training(model, ref.batch)
    return reference, parallel


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_fused_norm_is_the_composed_one_at_the_reduced_sizes(kind):
    small = reduce_programs(*captured(*spec(kind, fused=True), 1), standard_table())
    found = [{(o.kind, o.name): torch.as_tensor(o.native) for o in execute(p, standard_table()).machines[0].outputs} for p in (small.reference, small.parallel)]
    assert found[0][("gradient", "weight")].shape[0] < WIDTH
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-4, atol=1e-5, msg=str(key))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_fused_norm_is_proved_by_reduction(kind):
    report = verified(*spec(kind, fused=True), 1)
    assert report.verdict == "PROVED", report.diagnostics
    assert all(c.reduced < WIDTH for c in report.reduction.classes if c.size == WIDTH)


# ---- numbers that left tensors

def weighed(weights, batch, world: int = 1, wrong: bool = False):
    """Three sums of vectors that Python numbers have filled: of one that counts labels, and of one that depends on the weights, given by name and in a list."""
    model = nn.Linear(24, 20, bias=False)
    if weights is not None:
        model.load_state_dict(weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        labels = (batch["y"] >= 0).float().sum().item()
        size = model.weight.detach().square().sum()
        if wrong:
            size = 2 * size
        size = size.item()
        named, listed = torch.zeros(24).add(torch.ones(24), alpha=size), torch._foreach_mul([torch.ones(24)], [size])[0]
        loss = (model(batch["x"]) * (torch.ones(24) / labels).sum()).square().sum() * named.sum() / listed.sum()
        loss.backward()
        if world > 1:
            dist.all_reduce(model.weight.grad)
        optimizer.step()
        return {"loss": tv.local(loss, reduce="sum") if world > 1 else loss, "named": named.sum(), "listed": listed.sum()}

    return tv.Training(model, step, batch=batch)


@pytest.mark.parametrize("wrong", [False, True])
def test_numbers_that_left_tensors_are_what_they_are_in_what_is_counted(wrong):
    def reference():
        return weighed(None, {"x": torch.randn(8, 24, generator=torch.Generator().manual_seed(0)), "y": torch.arange(8) - 1})

    def parallel(ref):
        mine = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
        return weighed(ref.weights, {"x": ref.batch["x"][mine], "y": ref.batch["y"]}, 2, wrong)

    report = verified(reference, parallel, 2)
    assert report.verdict == ("REFUTED" if wrong else "PROVED")
    assert not wrong or {o.name for o in report.outputs if o.verdict == "REFUTED"} == {"named", "listed"}


# ---- weights of classes

@pytest.mark.parametrize("by", ["weights", "targets"])
def test_a_weighted_mean_divides_by_weights_and_not_by_how_many_targets_there_are(by):
    def build(weights, batch, how):
        model, classes = nn.Linear(24, 30, bias=False), 1.0 + torch.arange(30) % 3
        if weights is not None:
            model.load_state_dict(weights)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step():
            y, total = model(batch["x"]), classes[batch["y"]].sum() if how == "weights" else (batch["y"] >= 0).sum()
            loss = F.cross_entropy(y, batch["y"], classes) if how == "mean" else F.cross_entropy(y, batch["y"], classes, reduction="sum") / total
            loss.backward()
            optimizer.step()
            return {"loss": loss}
        return tv.Training(model, step, batch=batch)

    def reference():
        return build(None, {"x": torch.randn(16, 24, generator=torch.Generator().manual_seed(0)), "y": torch.arange(16) * 7 % 30}, "mean")

    report = verified(reference, lambda ref: build(ref.weights, ref.batch, by), 1)
    assert report.verdict == ("PROVED" if by == "weights" else "REFUTED"), report.outputs


# ---- counts that no literal says

SUMS = {"ones": lambda y, n: (y.square() + 1).sum(), "literal": lambda y, n: y.square().sum() + n, "wrong literal": lambda y, n: y.square().sum() + n + 1}


@pytest.mark.parametrize("full_size", [False, True])
@pytest.mark.parametrize("how, verdict", [("literal", "UNKNOWN"), ("wrong literal", "REFUTED")])
def test_a_difference_at_the_reduced_sizes_alone_refutes_nothing(how, verdict, full_size):
    def build(weights, batch, total):
        model = nn.Linear(24, 30, bias=False)
        if weights is not None:
            model.load_state_dict(weights)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step():
            loss = total(model(batch), 16 * 30)
            loss.backward()
            optimizer.step()
            return {"loss": loss}
        return tv.Training(model, step, batch=batch)

    def reference():
        return build(None, torch.randn(16, 24, generator=torch.Generator().manual_seed(0)), SUMS["ones"])

    report = verified(reference, lambda ref: build(ref.weights, ref.batch, SUMS[how]), 1, full_size=full_size)
    assert {o.name: o.verdict for o in report.outputs if o.kind == "scalar"} == {"loss": verdict} and report.verdict == verdict
    assert bool(report.findings) == (verdict == "REFUTED") and ("SHAPE004" in [d.code for d in report.diagnostics]) == (verdict == "UNKNOWN")
