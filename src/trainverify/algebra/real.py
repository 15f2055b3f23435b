"""The algebra `real`: every value is a float64 tensor and every micro-op is torch's own (not trusted; used for conformance and witnesses)."""
from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import torch

from trainverify.algebra.base import Number

F64 = torch.float64
FUNCTIONS: Mapping[str, Callable[..., torch.Tensor]] = {
    tag: getattr(torch, tag)
    for tag in ("tan", "atan", "asin", "acos", "sinh", "cosh", "atan2", "floor", "ceil", "round", "trunc", "log1p", "expm1", "erfc",
                "erfinv", "lgamma", "digamma", "fmod", "remainder", "asinh", "acosh", "atanh", "frac")
}
COMPARISONS: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    op: getattr(operator, op) for op in ("gt", "ge", "lt", "le", "eq", "ne")
}


class RealValue:
    """A float64 tensor; a class of its own, so that op rows can tell values from integer tensors."""

    __slots__ = ("t",)

    def __init__(self, t: torch.Tensor):
        self.t = t

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.t.shape)

    def __repr__(self) -> str:
        return f"RealValue({self.t})"


def _number(x: Number) -> float:
    return x.numerator / x.denominator if isinstance(x, Fraction) else float(x)


class Real:
    """symbols: a table, or a function from symbol numbers (int64) to float64 values; functions: further opaque tags."""

    name = "real"

    def __init__(self, symbols: torch.Tensor | Callable[[torch.Tensor], torch.Tensor] | None = None,
                 functions: Mapping[str, Callable[..., torch.Tensor]] | None = None):
        self._symbols = symbols
        self._functions = {**FUNCTIONS, **(functions or {})}

    # ---- constants
    def const(self, x: Number, shape: Sequence[int] = ()) -> RealValue:
        return RealValue(torch.full(tuple(shape), _number(x), dtype=F64))

    def data(self, t: torch.Tensor) -> RealValue:
        return RealValue(t.detach().to(F64, copy=True))

    def is_const(self, a: RealValue) -> bool:
        """Always False: nothing is known about dependence, so rows take the path that holds for symbols."""
        return False

    # ---- ring and field
    def add(self, a, b):
        return RealValue(a.t + b.t)

    def sub(self, a, b):
        return RealValue(a.t - b.t)

    def neg(self, a):
        return RealValue(-a.t)

    def mul(self, a, b):
        return RealValue(a.t * b.t)

    def inv(self, a):
        return RealValue(a.t.reciprocal())

    def div(self, a, b):
        return RealValue(a.t / b.t)

    def scale(self, a, c: Number):
        return RealValue(a.t * _number(c))

    def sum(self, a, dims: Sequence[int] | None = None, keepdim: bool = False):
        dims = tuple(dims) if dims else tuple(range(a.t.dim()))
        return RealValue(a.t.sum(dims, keepdim) if dims else a.t)

    def cumsum(self, a, dim: int):
        return RealValue(a.t.cumsum(dim))

    def matmul(self, a, b):
        return RealValue(a.t @ b.t)

    # ---- functions
    def exp(self, a):
        return RealValue(a.t.exp())

    def log(self, a):
        return RealValue(a.t.log())

    def sqrt(self, a):
        return RealValue(a.t.sqrt())

    def pow(self, a, q: Number):
        return RealValue(a.t.pow(_number(q)))

    def power(self, a, b):
        return RealValue(a.t.pow(b.t))

    def sin(self, a):
        return RealValue(a.t.sin())

    def cos(self, a):
        return RealValue(a.t.cos())

    def erf(self, a):
        return RealValue(a.t.erf())

    def knows(self, tag: str) -> bool:
        """Whether `opaque` can evaluate this function."""
        return tag in self._functions

    def opaque(self, tag: str, *args):
        if tag not in self._functions:
            raise LookupError(f"no float64 function for the uninterpreted tag {tag!r}")
        return RealValue(self._functions[tag](*(a.t for a in args)))

    # ---- order
    def maximum(self, a, b):
        return RealValue(torch.maximum(a.t, b.t))

    def minimum(self, a, b):
        return RealValue(torch.minimum(a.t, b.t))

    def amax(self, a, dims: Sequence[int] = (), keepdim: bool = False):
        return RealValue(a.t.amax(tuple(dims), keepdim))

    def amin(self, a, dims: Sequence[int] = (), keepdim: bool = False):
        return RealValue(a.t.amin(tuple(dims), keepdim))

    def peak(self, a, dims: Sequence[int]):
        if 0 in a.t.shape or not dims:
            return None
        top = a.t.amax(tuple(dims), True)
        return RealValue(torch.where(top.isfinite(), top, 0.0))

    def compare(self, op: str, a, b):
        return RealValue(COMPARISONS[op](a.t, b.t).to(F64))

    def where(self, mask, a, b):
        chosen = mask if isinstance(mask, torch.Tensor) else mask.t
        return RealValue(torch.where(chosen != 0, a.t, b.t))

    def sign(self, a):
        return RealValue(a.t.sign())

    def abs(self, a):
        return RealValue(a.t.abs())

    # ---- movement
    def reshape(self, a, shape: Sequence[int]):
        return RealValue(a.t.reshape(tuple(shape)))

    def permute(self, a, dims: Sequence[int]):
        return RealValue(a.t.permute(tuple(dims)))

    def expand(self, a, shape: Sequence[int]):
        return RealValue(a.t.expand(tuple(shape)))

    def take(self, sources: Sequence[RealValue], index: torch.Tensor):
        if len(sources) == 1 and index.numel() and bool((index > 0).all()):
            return RealValue(sources[0].t.reshape(-1)[index - 1])
        flat = torch.cat([torch.zeros(1, dtype=F64), *(s.t.reshape(-1) for s in sources)])
        return RealValue(flat[index])

    def scatter_sum(self, base, index: torch.Tensor, src):
        flat = base.t.reshape(-1).index_add(0, index.reshape(-1), src.t.expand(index.shape).reshape(-1))
        return RealValue(flat.reshape(base.t.shape))

    def cast(self, a, dtype: str):
        return a

    # ---- memory cells
    def stack(self, values: Sequence[RealValue]):
        return RealValue(torch.stack([v.t for v in values]))

    def symbols(self, name: str, first: int, n: int):
        if self._symbols is None:
            raise LookupError(f"no concrete values were given for the symbols of {name!r}")
        if callable(self._symbols):
            values = self._symbols(torch.arange(first, first + n))
        else:
            values = self._symbols[first:first + n]
        if values.shape != (n,):
            raise ValueError(f"expected {n} values for the symbols of {name!r}, got shape {tuple(values.shape)}")
        return RealValue(values.to(F64))

    def garbage(self, key: str, n: int):
        return RealValue(torch.full((n,), float("nan"), dtype=F64))

    def cell(self, flat: RealValue) -> torch.Tensor:
        return flat.t.clone(memory_format=torch.contiguous_format)

    def load(self, cell: torch.Tensor, offset: int, size: Sequence[int], stride: Sequence[int]):
        return RealValue(cell.as_strided(tuple(size), tuple(stride), offset).clone(memory_format=torch.contiguous_format))

    def store(self, cell: torch.Tensor, offset: int, size: Sequence[int], stride: Sequence[int], v) -> torch.Tensor:
        cell.as_strided(tuple(size), tuple(stride), offset).copy_(v.t)
        return cell

    # ---- comparison of results
    def equal(self, a, b) -> torch.Tensor:
        """Exactly equal, or both nan."""
        return (a.t == b.t) | (a.t.isnan() & b.t.isnan())

    def to_float(self, a) -> torch.Tensor:
        return a.t
