"""Rows of ops that make constant tensors (trusted). Uninitialised tensors (empty) have no row: replay makes them garbage."""
from __future__ import annotations

from fractions import Fraction

import torch

from trainverify.ops import lift as L
from trainverify.ops.lift import lift, number
from trainverify.ops.table import Rows

rows = Rows("pointwise")


def _made(m, v, ctx):
    """v everywhere in the shape of the recorded result."""
    out = ctx.native[0]
    v = L.pair(m, v) if out.is_complex() else lift(m, v)
    return L.each(m, lambda x: m.expand(x, tuple(out.shape)) if out.dim() else x, v)


@rows("aten.zeros", "aten.zeros_like", "aten.new_zeros", "aten._efficientzerotensor", source="torch.zeros", ctx=True)
def zeros(m, *_, ctx, **__):
    """0 everywhere"""
    return _made(m, 0, ctx)


@rows("aten.ones", "aten.ones_like", "aten.new_ones", source="torch.ones", ctx=True)
def ones(m, *_, ctx, **__):
    """1 everywhere"""
    return _made(m, 1, ctx)


@rows("aten.full", "aten.full_like", "aten.new_full", source="torch.full", ctx=True)
def full(m, size_or_self, *args, ctx, **kwargs):
    """fill_value everywhere"""
    return _made(m, kwargs["fill_value"] if "fill_value" in kwargs else args[-1], ctx)


@rows("aten.scalar_tensor", source="torch.tensor", ctx=True)
def scalar_tensor(m, s, *, ctx, **_):
    """The number s"""
    return _made(m, s, ctx)


@rows("aten.eye", source="torch.eye", ctx=True)
def eye(m, *_, ctx, **__):
    """The identity matrix"""
    return m.data(torch.eye(*ctx.native[0].shape, dtype=torch.int64))


@rows("aten.arange", source="torch.arange", ctx=True)
def arange(m, *bounds, ctx, **_):
    """start + i * step"""
    start, step = (bounds[0], bounds[2] if len(bounds) > 2 else 1) if len(bounds) > 1 else (0, 1)
    steps = L.scaled(m, m.data(torch.arange(ctx.native[0].numel())), step)
    return steps if number(start) and start == 0 else m.add(lift(m, start), steps)


def _line(m, start, end, steps):
    """start + i * (end - start) / (steps - 1)"""
    i = m.data(torch.arange(steps))
    rise = m.sub(lift(m, end), lift(m, start))
    return m.add(lift(m, start), m.mul(m.scale(i, Fraction(1, max(steps - 1, 1))), rise))


@rows("aten.linspace", source="torch.linspace")
def linspace(m, start, end, steps, **_):
    """start + i * (end - start) / (steps - 1)"""
    return _line(m, start, end, steps)


@rows("aten.logspace", source="torch.logspace")
def logspace(m, start, end, steps, base=10.0, **_):
    """base ** linspace"""
    return m.power(m.const(base), _line(m, start, end, steps))
