"""Tiny pairs of programs for the verdict tests: one weight, one batch, a step that each test varies in one function."""
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import trainverify as tv
from trainverify.report.model import Report

ROWS, WIDTH = 5, 6
LR = 0.1


class Weight(nn.Module):
    """x @ w"""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x):
        return x @ self.w


def batch_of(rows: int = ROWS) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(rows, WIDTH), "targets": torch.arange(rows) % WIDTH}


def forward(f: Callable) -> Callable:
    """A step whose logits (or loss, if it gives one number) are f(x @ w), with SGD."""
    def build(model, batch):
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)

        def step():
            out = f(model(batch["x"]))
            loss = out if out.dim() == 0 else F.cross_entropy(out, batch["targets"])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return {"loss": loss}
        return step
    return build


def update(make_optimizer: Callable, before: Callable = lambda parameters: None) -> Callable:
    """A step whose gradient is that of sum((x @ w)^3); `before(parameters)` runs between backward and optimizer."""
    def build(model, batch):
        optimizer = make_optimizer(model.parameters())

        def step():
            optimizer.zero_grad()
            loss = model(batch["x"]).pow(3).sum()
            loss.backward()
            before(list(model.parameters()))
            optimizer.step()
            return {"loss": loss}
        return step
    return build


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=LR)


def compare(right: Callable, other: Callable, *, model: Callable = Weight, batch: Callable = batch_of, ranks: int = 1, steps: int = 1,
            accept: tuple[str, ...] = ()) -> Report:
    """Verify other(model, batch) -> step, on every rank with the reference's weights, against right(model, batch) -> step."""
    def reference():
        torch.manual_seed(0)
        m, b = model(), batch()
        return tv.Training(m, right(m, b), batch=b)

    def parallel(ref):
        if ranks > 1:
            dist.init_process_group("gloo")
        m = model()
        m.load_state_dict(ref.weights)
        return tv.Training(m, other(m, ref.batch))

    return tv.verify(reference, parallel, ranks=ranks, steps=steps, accept=accept, timeout=60.0, repair=False)


def compare_forward(right: Callable, other: Callable, **options) -> Report:
    return compare(forward(right), forward(other), **options)


def scalars(*functions: Callable) -> Callable:
    """A step that reports one number per function of h = x @ w, under the function's first name, and trains nothing."""
    def build(model, batch):
        optimizer = sgd(model.parameters())

        def step():
            h = model(batch["x"])
            h.square().sum().backward()
            optimizer.step()
            with torch.no_grad():
                return {f.__name__: mixed(f(h)) for f in functions}
        return step
    return build


def mixed(v: torch.Tensor) -> torch.Tensor:
    """One number in which every element counts differently."""
    return (v.reshape(-1) * torch.arange(1, v.numel() + 1)).sum()
