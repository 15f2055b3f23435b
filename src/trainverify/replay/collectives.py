"""What each collective means, once, for every algebra (trusted). Integer tensors use the same code through `Tensors`.

`deliver(m, kind, calls, ins)` takes every member's Collective and input values in group order and returns every member's
output values. Reductions go through the algebra in group order.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch

from trainverify.algebra.base import Algebra, Complex, V
from trainverify.ir.trace import Collective
from trainverify.ops.reduction import reduce_tensors
from trainverify.replay.errors import ReplayError


def message(rank: int, c: Collective) -> tuple:
    """What a send and its receive have in common: the how manieth message from whom to whom, in which group, under which tag."""
    source, target = (rank, c.peer) if c.kind == "send" else (c.peer, rank)
    return source, target, c.group, c.group_name, c.tag, c.seq


def reduce_values(m: Algebra, op: str | None, values: Sequence[V], factor: Any = None) -> V:
    """One value from the members' values of equal shape."""
    if isinstance(values[0], torch.Tensor):
        return reduce_tensors(values, op, factor)
    if isinstance(values[0], Complex):
        return Complex(reduce_values(m, op, [v.re for v in values], factor), reduce_values(m, op, [v.im for v in values], factor))
    if op == "premul_sum":
        values = [m.mul(v, m.const(factor)) for v in values]
    total = values[0]
    for v in values[1:]:
        if op in ("sum", "avg", "premul_sum"):
            total = m.add(total, v)
        elif op == "max":
            total = m.maximum(total, v)
        elif op == "min":
            total = m.minimum(total, v)
        elif op == "product":
            total = m.mul(total, v)
        else:
            raise ReplayError(f"reduce op {op} has no meaning over the reals")
    return m.scale(total, Fraction(1, len(values))) if op == "avg" else total


def deliver(m: Algebra, calls: Sequence[Collective], ins: Sequence[Sequence[V]]) -> list[list[V | None]]:
    """Outputs of every member (None: that output stays as it is). `calls` and `ins` are in group order."""
    first, n = calls[0], len(calls)
    kind = first.kind
    if kind in ("all_reduce", "reduce"):
        totals = [reduce_values(m, first.reduce_op, [x[i] for x in ins], first.factor) for i in range(len(ins[0]))]
        return [totals if kind == "all_reduce" or c.group[j] == c.root else [None] * len(c.outputs) for j, c in enumerate(calls)]
    if kind == "broadcast":
        root = first.group.index(first.root)
        return [list(ins[root]) for _ in calls]
    if kind == "all_gather":
        if first.listed:
            return [[ins[j][i] for i in range(len(ins[0])) for j in range(n)] for _ in calls]
        return [[_concat(m, [x[i] for x in ins], c.outputs[i].size) for i in range(len(ins[0]))] for c in calls]
    if kind == "reduce_scatter":
        return [_reduce_scatter(m, c, ins, me, n) for me, c in enumerate(calls)]
    if kind == "all_to_all":
        return [_all_to_all(m, calls, ins, me) for me in range(n)]
    root = first.group.index(first.root) if first.root is not None else 0
    if kind == "scatter":
        return [[ins[root][i * n + me] for i in range(len(c.outputs))] for me, c in enumerate(calls)]
    if kind == "gather":
        return [[ins[j][i] for i in range(len(ins[0])) for j in range(n)] if me == root else [None] * len(c.outputs) for me, c in enumerate(calls)]
    if kind == "barrier":
        return [[] for _ in calls]
    raise ReplayError(f"collective {kind} has no meaning in the table")


def _numel(shape: Sequence[int]) -> int:
    return math.prod(shape)


def _slice_flat(m: Algebra, v: V, start: int, shape: Sequence[int]) -> V:
    if isinstance(v, Complex):
        return Complex(_slice_flat(m, v.re, start, shape), _slice_flat(m, v.im, start, shape))
    return m.take([v], torch.arange(start + 1, start + 1 + _numel(shape)).reshape(tuple(shape)))


def _concat(m: Algebra, parts: Sequence[V], shape: Sequence[int]) -> V:
    if isinstance(parts[0], Complex):
        return Complex(_concat(m, [p.re for p in parts], shape), _concat(m, [p.im for p in parts], shape))
    n = sum(_numel(p.shape) for p in parts)
    return m.take(list(parts), torch.arange(1, n + 1).reshape(tuple(shape)))


def _reduce_scatter(m: Algebra, c: Collective, ins, me: int, n: int) -> list[V]:
    out = []
    for i, ref in enumerate(c.outputs):
        if c.listed:
            parts = [x[i * n + me] for x in ins]
        else:
            parts = [_slice_flat(m, x[i], me * ref.numel, ref.size) for x in ins]
        out.append(m.reshape(reduce_values(m, c.reduce_op, parts, c.factor), ref.size) if not isinstance(parts[0], Complex)
                   else reduce_values(m, c.reduce_op, parts, c.factor))
    return out


def _all_to_all(m: Algebra, calls: Sequence[Collective], ins, me: int) -> list[V]:
    c = calls[me]
    if c.listed:
        return [ins[j][me] for j in range(len(calls))]
    parts = []
    for j, other in enumerate(calls):
        row = math.prod(other.inputs[0].size[1:])
        start = sum(other.in_splits[:me])
        rows = other.in_splits[me]
        if rows != c.out_splits[j]:
            raise ReplayError(f"all_to_all: member {j} sends {rows} rows and member {me} expects {c.out_splits[j]}")
        parts.append(_slice_flat(m, ins[j][0], start * row, (rows * row,)))
    return [_concat(m, parts, c.outputs[0].size)]


class Tensors:
    """Torch tensors as values: integers and bytes, and the native run, bit for bit as captured (reductions: ops/reduction.py)."""

    def reshape(self, a: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        return a.reshape(tuple(shape))

    def take(self, sources: Sequence[torch.Tensor], index: torch.Tensor) -> torch.Tensor:
        flat = torch.cat([s.reshape(-1) for s in sources])
        return flat[index.reshape(-1) - 1].reshape(index.shape)
