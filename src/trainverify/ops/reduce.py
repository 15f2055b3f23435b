"""Rows of reductions: sums, means, variances, extrema, norms, products, scans (trusted).

A mean over n elements is the sum times the literal 1/n. Extrema are opaque sets; the positions that max and min give are
a decision of the float data, so their rows log one; the values do not depend on it.
"""
from __future__ import annotations

import math
from fractions import Fraction

import torch

from trainverify.algebra.base import Complex
from trainverify.ir.trace import TensorRef
from trainverify.ops import lift as L
from trainverify.ops.lift import dims_of, lift, number
from trainverify.ops.table import Rows

rows = Rows("reduce")


@rows("aten.sum", source="torch.sum")
def sum(m, self, dim=None, keepdim=False, *, dtype=None):
    """The sum over dim"""
    x = L.cast(m, self, dtype)
    return L.total(m, x, dims_of(dim, len(x.shape)), keepdim)


@rows("aten.nansum", source="torch.nansum")
def nansum(m, self, dim=None, keepdim=False, *, dtype=None):
    """The sum over dim, nan counting as 0"""
    x = L.cast(m, self, dtype)
    return L.total(m, m.where(m.compare("ne", x, x), m.const(0), x), dims_of(dim, len(x.shape)), keepdim)


@rows("aten.mean", source="torch.mean")
def mean(m, self, dim=None, keepdim=False, *, dtype=None):
    """The sum over dim times 1/n"""
    x = L.cast(m, self, dtype)
    return L.mean(m, x, dims_of(dim, len(x.shape)), keepdim)


@rows("aten.cumsum", source="torch.cumsum")
def cumsum(m, self, dim, *, dtype=None):
    """Running sums along dim"""
    x = L.cast(m, self, dtype)
    return m.cumsum(x, dim) if x.shape else x


@rows("aten.logsumexp", source="torch.logsumexp")
def logsumexp(m, self, dim, keepdim=False):
    """log of the sum of exp"""
    x = lift(m, self)
    dims = dims_of(dim, len(x.shape)) or list(range(len(x.shape)))
    peak = m.peak(x, dims)
    if peak is None:
        return m.log(L.total(m, m.exp(x), dims, keepdim))
    out = m.add(m.log(L.total(m, m.exp(m.sub(x, peak)), dims, True)), peak)
    return out if keepdim else m.reshape(out, [n for d, n in enumerate(x.shape) if d not in dims])


# ---- variance
def _moments(m, self, dim, unbiased, correction, keepdim):
    """Variance and mean; correction is what is subtracted from the count (default 1; `unbiased` is the older spelling)."""
    x = lift(m, self)
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    dims = dims_of(dim, len(x.shape))
    less = (1 if unbiased else 0) if unbiased is not None else 1 if correction is None else correction
    center = L.mean(m, x, dims, True)
    d = m.sub(x, center)
    squares = L.total(m, m.mul(d, d), dims, keepdim)
    free = max(L.count(x.shape, dims) - less, 0)
    var = m.scale(squares, 1 / Fraction(free)) if free else m.div(squares, m.const(0))
    return var, center if keepdim else L.mean(m, x, dims, False)


@rows("aten.var", source="torch.var")
def var(m, self, dim=None, unbiased=None, keepdim=False, *, correction=None):
    """Sum of squared deviations from the mean over (n - correction)"""
    return _moments(m, self, dim, unbiased, correction, keepdim)[0]


@rows("aten.var_mean", source="torch.var_mean")
def var_mean(m, self, dim=None, unbiased=None, keepdim=False, *, correction=None):
    """The variance and the mean"""
    return list(_moments(m, self, dim, unbiased, correction, keepdim))


@rows("aten.std", source="torch.std")
def std(m, self, dim=None, unbiased=None, keepdim=False, *, correction=None):
    """The square root of the variance"""
    return m.sqrt(_moments(m, self, dim, unbiased, correction, keepdim)[0])


@rows("aten.std_mean", source="torch.std_mean")
def std_mean(m, self, dim=None, unbiased=None, keepdim=False, *, correction=None):
    """The square root of the variance, and the mean"""
    v, center = _moments(m, self, dim, unbiased, correction, keepdim)
    return [m.sqrt(v), center]


# ---- extrema
@rows("aten.amax", source="torch.amax")
def amax(m, self, dim=(), keepdim=False):
    """The largest element over dim"""
    x = lift(m, self)
    return m.amax(x, dims_of(dim, len(x.shape)), keepdim) if x.shape else x


@rows("aten.amin", source="torch.amin")
def amin(m, self, dim=(), keepdim=False):
    """The smallest element over dim"""
    x = lift(m, self)
    return m.amin(x, dims_of(dim, len(x.shape)), keepdim) if x.shape else x


@rows("aten.aminmax", source="torch.aminmax")
def aminmax(m, self, *, dim=None, keepdim=False):
    """The smallest and the largest element"""
    return [amin(m, self, dim, keepdim), amax(m, self, dim, keepdim)]


def _extremum(m, kind: str, of_two, over_dims, self, other, keepdim, ctx):
    """max or min: of all, of two tensors, or over one dimension with the position as a decision."""
    x = lift(m, self)
    if other is None:
        return over_dims(m, x, (), False)
    if not number(other):
        return of_two(x, lift(m, other))
    if not m.is_const(x):
        at = ctx.native[1]
        ctx.decide(kind, [_last(m, x, other)], at.movedim(other, -1) if keepdim and x.shape else at)
    return [over_dims(m, x, [other], keepdim), None]


def _last(m, x, dim: int):
    """x with dimension dim moved last: one choice per row of that."""
    n = max(len(x.shape), 1)
    return m.permute(x, [*(d for d in range(n) if d != dim % n), dim % n]) if x.shape else m.reshape(x, (1,))


@rows("aten.max", source="torch.max", ctx=True)
def max_(m, self, dim_or_other=None, keepdim=False, *, dim=None, other=None, ctx):
    """The largest element; over one dim also its position, a decision"""
    second = next((a for a in (dim_or_other, dim, other) if a is not None), None)
    return _extremum(m, "argmax", m.maximum, amax, self, second, keepdim, ctx)


@rows("aten.min", source="torch.min", ctx=True)
def min_(m, self, dim_or_other=None, keepdim=False, *, dim=None, other=None, ctx):
    """The smallest element; over one dim also its position, a decision"""
    second = next((a for a in (dim_or_other, dim, other) if a is not None), None)
    return _extremum(m, "argmin", m.minimum, amin, self, second, keepdim, ctx)


# ---- masks
def _truths(m, x, ctx):
    """x as 0/1: masks are that already."""
    ref = ctx.call.args[0]
    mask = isinstance(ref, TensorRef) and ref.dtype == "bool"
    return lift(m, x) if mask else m.compare("ne", lift(m, x), m.const(0))


def _truth_over(m, extreme, x, dim, keepdim, of_nothing: int):
    dims = {d % len(x.shape) for d in dims_of(dim, len(x.shape))} if x.shape else ()
    if 0 not in (x.shape[d] for d in dims):
        return extreme(m, x, dim, keepdim)
    return m.const(of_nothing, tuple(1 if d in dims else n for d, n in enumerate(x.shape) if keepdim or d not in dims))


@rows("aten.any", source="torch.any", ctx=True)
def any(m, self, dim=None, keepdim=False, *, ctx):
    """The largest truth value; of nothing: false"""
    return _truth_over(m, amax, _truths(m, self, ctx), dim, keepdim, 0)


@rows("aten.all", source="torch.all", ctx=True)
def all(m, self, dim=None, keepdim=False, *, ctx):
    """The smallest truth value; of nothing: true"""
    return _truth_over(m, amin, _truths(m, self, ctx), dim, keepdim, 1)


# ---- norms
def _norm(m, self, ord, dim, keepdim, dtype):
    x = L.cast(m, self, dtype)
    if isinstance(x, Complex):
        x = m.sqrt(m.add(m.mul(x.re, x.re), m.mul(x.im, x.im)))
    dims = dims_of(dim, len(x.shape))
    if ord == 2:
        return m.sqrt(L.total(m, m.mul(x, x), dims, keepdim))
    if ord == 0:
        return L.total(m, m.compare("ne", x, m.const(0)), dims, keepdim)
    if ord in (math.inf, -math.inf):
        return (amax if ord > 0 else amin)(m, m.abs(x), dims, keepdim) if dims else m.abs(x)
    size = m.abs(x)
    if ord == 1:
        return L.total(m, size, dims, keepdim)
    return m.pow(L.total(m, m.pow(size, ord), dims, keepdim), 1 / ord)


@rows("aten.linalg_vector_norm", source="torch.linalg.vector_norm")
def linalg_vector_norm(m, self, ord=2, dim=None, keepdim=False, *, dtype=None):
    """(sum |x|^p)^(1/p); the largest or smallest |x| for p = inf or -inf"""
    return _norm(m, self, ord, dim, keepdim, dtype)


@rows("aten.norm", source="torch.norm")
def norm(m, self, p=2, dim=None, keepdim=False, *, dtype=None):
    """The vector norm"""
    return _norm(m, self, 2 if p is None else p, dim, keepdim, dtype)


# ---- products
def _along(m, x, dim: int):
    """The slices of x along dim, in order."""
    index = L.flat_index(x.shape)
    return [m.take([x], index.select(dim, i)) for i in range(x.shape[dim])]


@rows("aten.prod", source="torch.prod")
def prod(m, self, dim=None, keepdim=False, *, dtype=None):
    """The product over dim"""
    x = L.cast(m, self, dtype)
    if dim is None or not x.shape:
        x, dim = m.reshape(x, (math.prod(x.shape),)), 0
        out_shape = ()
    else:
        shape = list(x.shape)
        shape[dim] = 1
        if not keepdim:
            del shape[dim % len(x.shape)]
        out_shape = tuple(shape)
    parts = _along(m, x, dim)
    if not parts:
        return m.const(1, out_shape)
    while len(parts) > 1:
        pairs = [m.mul(a, b) for a, b in zip(parts[::2], parts[1::2])]
        parts = pairs + ([parts[-1]] if len(parts) % 2 else [])
    return m.reshape(parts[0], out_shape)


@rows("aten.cumprod", source="torch.cumprod")
def cumprod(m, self, dim, *, dtype=None):
    """Running products along dim"""
    x = L.cast(m, self, dtype)
    if not x.shape or 0 in x.shape:
        return x
    parts = _along(m, x, dim)
    for i in range(1, len(parts)):
        parts[i] = m.mul(parts[i - 1], parts[i])
    rest = L.flat_index(parts[0].shape)
    index = torch.stack([rest + i * rest.numel() for i in range(len(parts))], dim)
    return m.take(parts, index)


@rows("aten.dist", source="torch.dist")
def dist(m, self, other, p=2):
    """The norm of the difference"""
    return _norm(m, m.sub(lift(m, self), lift(m, other)), p, None, False, None)


@rows("aten.trace", source="torch.trace")
def trace(m, self):
    """The sum of the diagonal"""
    x = lift(m, self)
    return m.sum(m.take([x], L.flat_index(x.shape).diagonal()))


@rows("aten.count_nonzero", source="torch.count_nonzero")
def count_nonzero(m, self, dim=None):
    """How many elements are not 0 (an integer that depends on the data)"""
    x = m.compare("ne", lift(m, self), m.const(0))
    return L.total(m, x, dims_of(dim, len(x.shape)), False)


@rows("aten.histc", source="torch.histc", ctx=True)
def histc(m, self, bins=100, min=0, max=0, *, ctx):
    """How many elements fall into each bin, as recorded: a decision of the float data"""
    x = lift(m, self)
    if not m.is_const(x):
        ctx.decide(f"histc:{bins}:{min}:{max}", [m.reshape(x, (-1,))], ctx.native[0])
    return m.data(ctx.native[0])
