"""Arguments of rows as algebra values, complex arithmetic on pairs, and the few shape helpers that rows share (trusted).

A row receives numbers, integer and boolean torch tensors, values and `Complex` pairs; `lift` makes values of the first two.
The arithmetic here takes any of them and is complex exactly if one operand is.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch

from trainverify.algebra.base import Algebra, Complex, V
from trainverify.diagnostics import Diagnostic, Fault


def refuse(op: str, what: str, fix: str) -> Fault:
    """A use of an op that its row does not give a meaning to."""
    return Fault(Diagnostic("OPS002", f"{op}: {what}", fix=fix))


def lift(m: Algebra, x):
    """x as a value (or Complex): numbers exactly, concrete tensors as data, values unchanged."""
    if isinstance(x, (bool, int, float, Fraction)):
        return m.const(int(x) if isinstance(x, bool) else x)
    if isinstance(x, complex):
        return Complex(m.const(x.real), m.const(x.imag))
    if isinstance(x, torch.Tensor):
        return Complex(m.data(x.real), m.data(x.imag)) if x.is_complex() else m.data(x)
    return x


def number(x) -> bool:
    """Whether x is a literal (not a tensor, not a tracked scalar)."""
    return isinstance(x, (bool, int, float, Fraction))


# ---- complex arithmetic
def pair(m: Algebra, x) -> Complex:
    x = lift(m, x)
    return x if isinstance(x, Complex) else Complex(x, m.const(0, x.shape))


def each(m: Algebra, f, x):
    """f applied to both parts of a Complex, or to the value: for operations that are linear over the reals."""
    x = lift(m, x)
    return Complex(f(x.re), f(x.im)) if isinstance(x, Complex) else f(x)


def _both(m: Algebra, f, a, b):
    a, b = lift(m, a), lift(m, b)
    if isinstance(a, Complex) or isinstance(b, Complex):
        a, b = pair(m, a), pair(m, b)
        return Complex(f(a.re, b.re), f(a.im, b.im))
    return f(a, b)


def add(m: Algebra, a, b):
    return _both(m, m.add, a, b)


def sub(m: Algebra, a, b):
    return _both(m, m.sub, a, b)


def neg(m: Algebra, a):
    return each(m, m.neg, a)


def mul(m: Algebra, a, b):
    a, b = lift(m, a), lift(m, b)
    if isinstance(a, Complex) and isinstance(b, Complex):
        return Complex(m.sub(m.mul(a.re, b.re), m.mul(a.im, b.im)), m.add(m.mul(a.re, b.im), m.mul(a.im, b.re)))
    if isinstance(a, Complex):
        return Complex(m.mul(a.re, b), m.mul(a.im, b))
    if isinstance(b, Complex):
        return Complex(m.mul(a, b.re), m.mul(a, b.im))
    return m.mul(a, b)


def inv(m: Algebra, a):
    a = lift(m, a)
    if not isinstance(a, Complex):
        return m.inv(a)
    n = m.inv(m.add(m.mul(a.re, a.re), m.mul(a.im, a.im)))
    return Complex(m.mul(a.re, n), m.neg(m.mul(a.im, n)))


def div(m: Algebra, a, b):
    a, b = lift(m, a), lift(m, b)
    if isinstance(b, Complex):
        return mul(m, a, inv(m, b))
    if isinstance(a, Complex):
        return Complex(m.div(a.re, b), m.div(a.im, b))
    return m.div(a, b)


def conj(m: Algebra, a):
    a = lift(m, a)
    return Complex(a.re, m.neg(a.im)) if isinstance(a, Complex) else a


def scaled(m: Algebra, a, c):
    """c * a, where c is a literal or a tracked scalar; c = 1 costs nothing."""
    if number(c):
        return lift(m, a) if c == 1 else each(m, lambda v: m.scale(v, c), a)
    return mul(m, a, c)


# ---- shapes
def dims_of(dim, rank: int) -> list[int]:
    """A `dim` argument (None, int or list; empty: all) as sorted nonnegative dimensions."""
    if dim is None or (not isinstance(dim, int) and len(dim) == 0):
        return list(range(rank))
    dims = [dim] if isinstance(dim, int) else list(dim)
    return sorted(d % max(rank, 1) for d in dims) if rank else []


def count(shape: Sequence[int], dims: Sequence[int]) -> int:
    return math.prod(shape[d] for d in dims)


def total(m: Algebra, a, dims: Sequence[int], keepdim: bool = False):
    """Sum over exactly these dimensions (an empty list sums nothing, unlike the micro-op's)."""
    return each(m, lambda v: m.sum(v, dims, keepdim), a) if dims else lift(m, a)


def mean(m: Algebra, a, dims: Sequence[int], keepdim: bool = False):
    """Mean over these dimensions; of no element it is 0/0."""
    n = count(a.shape, dims)
    s = total(m, a, dims, keepdim)
    return scaled(m, s, Fraction(1, n)) if n else each(m, lambda v: m.div(v, m.const(0)), s)


def transpose(m: Algebra, a: V) -> V:
    """The last two dimensions exchanged."""
    n = len(a.shape)
    return m.permute(a, (*range(n - 2), n - 1, n - 2))


def flat_index(shape: Sequence[int]) -> torch.Tensor:
    """Positions of a tensor of this shape for `take`: 1, 2, ... in contiguous order."""
    return torch.arange(1, math.prod(shape) + 1).reshape(tuple(shape))


def full_like(m: Algebra, a: V, c) -> V:
    return m.const(c, tuple(a.shape))


# ---- dtypes
def float_name(dtype) -> str | None:
    """The name of a float dtype, None for None and for others."""
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) and dtype.is_floating_point else None


def cast(m: Algebra, a, dtype):
    """The `dtype=` argument of a row: a cast between float types; others are replay's business."""
    name = float_name(dtype)
    a = lift(m, a)
    return each(m, lambda v: m.cast(v, name), a) if name else a
