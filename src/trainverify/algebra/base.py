"""The micro-operations in which every op row is written, and what an algebra must provide.

Values (`V`) are opaque handles with a `.shape`; all binary micro-ops broadcast as torch does. Integer and index tensors are
torch tensors and never values. Rows use nothing else.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

V = Any
Number = int | float | Fraction


@dataclass(frozen=True, slots=True)
class Complex:
    """A complex tensor: two values of equal shape."""

    re: V
    im: V

    @property
    def shape(self) -> tuple[int, ...]:
        return self.re.shape


class Algebra(Protocol):
    name: str

    # ---- constants
    def const(self, x: Number, shape: tuple[int, ...] = ()) -> V:
        """A scalar literal: int and Fraction exactly; a float as the simplest rational that rounds to it in float64; inf and nan allowed."""
    def data(self, t: torch.Tensor) -> V:
        """Concrete data (any dtype), element by element, exactly as stored."""
    def is_const(self, a: V) -> bool:
        """Whether the value is known not to depend on any symbol."""

    # ---- ring and field
    def add(self, a: V, b: V) -> V: ...
    def sub(self, a: V, b: V) -> V: ...
    def neg(self, a: V) -> V: ...
    def mul(self, a: V, b: V) -> V: ...
    def inv(self, a: V) -> V: ...
    def div(self, a: V, b: V) -> V: ...
    def scale(self, a: V, c: Number) -> V:
        """c * a for a literal c."""
    def sum(self, a: V, dims: Sequence[int] | None = None, keepdim: bool = False) -> V:
        """Sum over dims (None or empty: all)."""
    def cumsum(self, a: V, dim: int) -> V: ...
    def matmul(self, a: V, b: V) -> V:
        """[..., m, k] @ [..., k, n]; batch dimensions broadcast; at least 2 dimensions each."""

    # ---- functions
    def exp(self, a: V) -> V: ...
    def log(self, a: V) -> V: ...
    def sqrt(self, a: V) -> V: ...
    def pow(self, a: V, q: Number) -> V:
        """a ** q for a literal q; integers and halves decompose, other exponents are opaque."""
    def power(self, a: V, b: V) -> V:
        """a ** b for two values (a constant base with constant exponents is evaluated)."""
    def sin(self, a: V) -> V: ...
    def cos(self, a: V) -> V: ...
    def erf(self, a: V) -> V: ...
    def opaque(self, tag: str, *args: V) -> V:
        """An uninterpreted function applied elementwise; equal iff tag and arguments are equal. `real` knows the tags
        tan, atan, asin, acos, sinh, cosh, atan2, floor, ceil, round, trunc, log1p, expm1, erfc, erfinv, lgamma, digamma, fmod."""

    # ---- order (opaque in the field: no branch is taken on a symbol)
    def maximum(self, a: V, b: V) -> V: ...
    def minimum(self, a: V, b: V) -> V: ...
    def amax(self, a: V, dims: Sequence[int], keepdim: bool = False) -> V: ...
    def amin(self, a: V, dims: Sequence[int], keepdim: bool = False) -> V: ...
    def peak(self, a: V, dims: Sequence[int]) -> V | None:
        """What to subtract before exp where a result does not depend on it (softmax): the finite maximum over dims, kept, in an
        algebra whose exp overflows; None in an exact one."""
    def compare(self, op: str, a: V, b: V) -> V:
        """0/1-valued; op is gt, ge, lt, le, eq or ne."""
    def where(self, mask: V | torch.Tensor, a: V, b: V) -> V:
        """mask: a concrete boolean tensor (selection, exact) or a 0/1 value."""
    def sign(self, a: V) -> V: ...
    def abs(self, a: V) -> V: ...

    # ---- movement (costs nothing in meaning)
    def reshape(self, a: V, shape: Sequence[int]) -> V: ...
    def permute(self, a: V, dims: Sequence[int]) -> V: ...
    def expand(self, a: V, shape: Sequence[int]) -> V: ...
    def take(self, sources: Sequence[V], index: torch.Tensor) -> V:
        """Gather: `index` (int64, any shape) counts from 1 through the concatenation of the flattened sources; 0 is the constant 0."""
    def scatter_sum(self, base: V, index: torch.Tensor, src: V) -> V:
        """base with src[i] added at flat position index[i] (index.shape == src.shape; repeated positions accumulate)."""
    def cast(self, a: V, dtype: str) -> V:
        """A cast between float types: the identity over the reals (the algebra notes the assumption)."""

    # ---- memory cells: one flat float buffer of n elements
    def stack(self, values: Sequence[V]) -> V:
        """Values of equal shape along a new leading dimension."""
    def symbols(self, name: str, first: int, n: int) -> V:
        """Flat value of n symbols with global symbol numbers first..first+n-1 (the same numbers on both sides mean the same symbol)."""
    def garbage(self, key: str, n: int) -> V:
        """Flat value of n uninitialised elements: never equal to anything, absorbing in arithmetic, movable."""
    def cell(self, flat: V) -> Any:
        """A memory cell (one flat buffer) with these contents."""
    def load(self, cell: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> V:
        """Strided read; a copy or a view that later stores must not change."""
    def store(self, cell: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], v: V) -> Any:
        """Strided write of v (already of shape `size`); returns the cell to use from now on."""

    # ---- comparison of results (guesses in the field, never a proof)
    def equal(self, a: V, b: V) -> torch.Tensor:
        """Boolean tensor, elementwise; shapes are equal."""
    def to_float(self, a: V) -> torch.Tensor | None:
        """float64 values where the algebra has them (real, constants), else None."""
