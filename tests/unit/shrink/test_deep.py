"""Programs of very many calls: float64 refutes what differs by far, and the line is looked up by numbers."""
import pytest
import torch
import torch.distributed as dist
from torch import nn

import trainverify as tv
from shrink.kit import verified
from trainverify.engine import analysis

LAYERS, WIDTH = 4, 8


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = (nn.ParameterList(nn.Parameter(torch.randn(n) / 4) for _ in range(LAYERS)) for n in ((6, WIDTH), (6, WIDTH), (WIDTH, 6)))

    def forward(self, x):
        for i in range(LAYERS):
            x = x + (torch.tanh(x @ self.up[i]) * (x @ self.gate[i])) @ self.down[i]
        return x


class Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad


class Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class Split(nn.Module):
    """Half of the width on each rank; one layer of one rank is made by `odd`."""

    def __init__(self, weights, odd):
        super().__init__()
        self.odd, mine = odd, lambda name, dim: nn.ParameterList(nn.Parameter(weights[f"{name}.{i}"].chunk(2, dim)[dist.get_rank()].clone()) for i in range(LAYERS))
        self.up, self.gate, self.down = mine("up", 1), mine("gate", 1), mine("down", 0)

    def forward(self, x):
        for i in range(LAYERS):
            h = Copied.apply(x)
            up, gate = h @ self.up[i], h @ self.gate[i]
            made = self.odd(up, gate) if (i, dist.get_rank()) == (2, 1) else torch.tanh(up) * gate
            x = x + Summed.apply(made @ self.down[i])
        return x


def swapped(up, gate):
    return torch.tanh(gate) * up


def a_little_more(up, gate):
    return torch.tanh(up) * gate * (1 + 2.0 ** -14)


def training(model, x):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        return {"loss": loss}
    return tv.Training(model, step, batch={"x": x})


def report(odd):
    def reference():
        torch.manual_seed(0)
        return training(Whole(), torch.randn(3, 6))
    return verified(reference, lambda ref: training(Split(ref.weights, odd), ref.batch["x"]), 2, reduce=False)


@pytest.fixture(autouse=True)
def very_deep(monkeypatch):
    monkeypatch.setattr(analysis, "DEEP", 0)
    monkeypatch.setattr(analysis, "DEEPER", 0)


def test_one_layer_of_one_rank_is_refuted_by_numbers_with_its_line():
    found = report(swapped)
    assert found.verdict == "REFUTED" and found.evidence == "in float64" and not found.count("PROVED")
    (finding,) = found.findings
    with open(__file__) as f:
        line = f.read().splitlines()[finding.diagnostic.span.line - 1]
    assert "torch.tanh(gate) * up" in line and finding.diagnostic.ranks == (1,) and finding.diagnostic.code == "REL001"
    assert finding.witnesses and finding.explains == found.count("REFUTED")


@pytest.mark.parametrize("odd, verdict", [(lambda up, gate: torch.tanh(up) * gate, "PROVED"), pytest.param(a_little_more, "REFUTED", marks=pytest.mark.slow)])
def test_what_does_not_differ_by_far_is_looked_at_in_a_field(odd, verdict):
    found = report(odd)
    assert found.verdict == verdict and (found.evidence == "proved without a field") == (verdict == "PROVED")
    assert verdict == "PROVED" or found.evidence.startswith("equal at")
