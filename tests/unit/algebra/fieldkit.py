"""Small programs in micro-ops, run on both sides of a field."""
from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch

from trainverify.algebra.field import Field


def symbols(m, first: int, *shape: int):
    n = torch.Size(shape).numel()
    return m.reshape(m.symbols("x", first, n), shape)


def through_memory(m, v):
    """What a later op reads after this one was stored."""
    n = torch.Size(v.shape).numel()
    cell = m.store(m.cell(m.const(0.0, (n,))), 0, (n,), (1,), m.reshape(v, (n,)))
    return m.load(cell, 0, v.shape, torch.empty(v.shape).stride())


def agree(reference: Callable, parallel: Callable, *shapes: tuple[int, ...], seed: int = 3) -> bool:
    """Whether both programs give equal values (each is f(algebra, *values) and may return a list)."""
    m = Field(seed)
    results = []
    for side, f in (("reference", reference), ("parallel", parallel)):
        m.begin_side(side)
        out = f(m, *(symbols(m, 1000 * (i + 1), *s) for i, s in enumerate(shapes)))
        results.append([through_memory(m, v) for v in (out if isinstance(out, list) else [out])])
    return all(bool(m.equal(a, b).all()) for a, b in zip(*results, strict=True))


def one(m):
    return m.const(1)


def mean(m, x, dims=(-1,), keepdim=True):
    n = torch.Size([x.shape[d] for d in dims]).numel()
    return m.scale(m.sum(x, dims, keepdim), Fraction(1, n))


def softmax(m, x, dim=-1):
    e = m.exp(x)
    return m.div(e, m.sum(e, [dim], True))


def logsumexp(m, x, keepdim=True):
    return m.log(m.sum(m.exp(x), [-1], keepdim))


def sigmoid(m, x):
    return m.inv(m.add(one(m), m.exp(m.neg(x))))


def tanh(m, x):
    return m.sub(one(m), m.scale(m.inv(m.add(m.exp(m.scale(x, 2)), one(m))), 2))


def columns(m, x, start: int, stop: int):
    index = torch.arange(x.shape[0] * x.shape[1]).reshape(x.shape)[:, start:stop] + 1
    return m.take([x], index)


def rows(m, x, start: int, stop: int):
    index = torch.arange(x.shape[0] * x.shape[1]).reshape(x.shape)[start:stop] + 1
    return m.take([x], index)


def square(m, x):
    return m.mul(x, x)


def norm(m, x):
    return m.sqrt(m.sum(square(m, x)))
