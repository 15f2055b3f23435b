"""What a value of the field is, how it moves, and its memory cells (not trusted: makes guesses).

A *symbolic* value has residues `res` [4, *shape]; a *constant* has float64 contents `num` and gets its residues when it meets a
symbolic one. Elements that are no real number are marked in `sp`. Values are never changed in place.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

POS_INF, NEG_INF, NAN, GARBAGE = 1, 2, 3, 4   # codes in `sp`; 0: a real number; their residues are 0
Q_BAD, P_BAD = 1, 2                           # the residues modulo Q (P) do not follow from the value alone
ROOTED = 4                                    # some elements have a square that the field remembers
MAXED = 8                                     # some elements may be maxima
SETTLED = 16                                  # unreliable residues have been replaced by the ones known for the value
TAINT = Q_BAD | P_BAD
MARKS = ROOTED | MAXED | TAINT
_FLOATS = torch.tensor([1.0, math.inf, -math.inf, math.nan, math.nan], dtype=torch.float64)


class FieldValue:
    """sgn: two sign bits per element (one per P) that logarithms of non-squares carry, or None."""

    __slots__ = ("shape", "res", "num", "sp", "sgn", "flags")

    def __init__(self, shape, res=None, num=None, sp=None, sgn=None, flags=0):
        self.shape: tuple[int, ...] = tuple(shape)
        self.res: torch.Tensor | None = res
        self.num: torch.Tensor | None = num
        self.sp: torch.Tensor | None = sp
        self.sgn: torch.Tensor | None = sgn
        self.flags: int = flags

    def __repr__(self) -> str:
        return f"FieldValue(num={self.num})" if self.num is not None else f"FieldValue(res={self.res}, sp={self.sp}, flags={self.flags})"

    def move(self, f: Callable[[torch.Tensor, int], torch.Tensor]) -> FieldValue:
        """Applies a movement f(tensor, number of leading dimensions to leave alone)."""
        if self.num is not None:
            num = f(self.num, 0)
            return FieldValue(num.shape, num=num)
        res = f(self.res, 1)
        return FieldValue(res.shape[1:], res, None, None if self.sp is None else f(self.sp, 0),
                          None if self.sgn is None else f(self.sgn, 0), self.flags)


def broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The common shape (torch.broadcast_shapes costs most of a second at its first call)."""
    out: list[int] = []
    for i in range(-max(map(len, shapes)), 0):
        sizes = {s[i] for s in shapes if len(s) >= -i} - {1}
        if len(sizes) > 1:
            raise ValueError(f"shapes {shapes} do not broadcast")
        out.append(sizes.pop() if sizes else 1)
    return tuple(out)


def joined(flags: Sequence[int]) -> int:
    """Flags of a value whose elements come from several."""
    out, settled = 0, SETTLED
    for f in flags:
        out |= f & MARKS
        if f & TAINT:
            settled &= f
    return out | settled


def spread_dims(t: torch.Tensor, dims: int) -> torch.Tensor:
    """A [4, ...] tensor with ones inserted after the components, up to `dims` element dimensions."""
    missing = dims - (t.dim() - 1)
    return t if missing <= 0 else t.reshape(t.shape[0], *([1] * missing), *t.shape[1:])


def floats(v: FieldValue) -> torch.Tensor:
    """Float64 stand-ins that carry infinities and nan through IEEE arithmetic; symbolic real numbers are 1."""
    if v.num is not None:
        return v.num
    return _FLOATS[0] if v.sp is None else _FLOATS[v.sp.long()]


def codes(stand_in: torch.Tensor, garbage: torch.Tensor | None) -> torch.Tensor | None:
    """`sp` from stand-ins and the places of garbage; None where all are real numbers."""
    bad = ~stand_in.isfinite()
    if garbage is not None:
        bad = bad | garbage
    if not bad.any():
        return None
    sp = torch.where(stand_in.isnan(), NAN, torch.where(stand_in > 0, POS_INF, NEG_INF))
    sp = torch.where(bad, sp, 0)
    if garbage is not None:
        sp = torch.where(garbage, GARBAGE, sp)
    return sp.to(torch.uint8)


def is_garbage(v: FieldValue) -> torch.Tensor | None:
    return None if v.sp is None or v.num is not None else v.sp == GARBAGE


def any_of(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return a if b is None else b if a is None else a | b


def both_signs(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return a if b is None else b if a is None else a ^ b


def sum_signs(sgn: torch.Tensor, add: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Sign bits of a sum: each bit's parity; `add` sums int64 tensors."""
    s = sgn.to(torch.int64)
    total = add((s & 1) | ((s >> 1) << 32))
    return ((total & 1) | ((total >> 32 & 1) << 1)).to(torch.uint8)


class Cell:
    """One flat buffer; its tensors are shared with values until the next partial store.

    known: where a symbolic buffer holds constants that were stored into a part of it (nan elsewhere; None: nowhere). What is loaded from there
    is constant: a random initialisation of an uneven shard decides nothing, though its padding was never written.
    """

    __slots__ = ("n", "value", "owned", "known")

    def __init__(self, value: FieldValue):
        self.n = value.shape[0]
        self.become(value)

    def become(self, value: FieldValue) -> None:
        self.value = value.move(lambda t, lead: t.contiguous())
        self.owned, self.known = False, None

    def keep(self, offset: int, size: Sequence[int], stride: Sequence[int], num: torch.Tensor) -> None:
        """A part of a symbolic buffer was overwritten by constants."""
        if self.known is None:
            self.known = torch.full((self.n,), float("nan"), dtype=torch.float64)
        _view(self.known, 0, offset, tuple(size), tuple(stride)).copy_(num)

    def load(self, offset: int, size: Sequence[int], stride: Sequence[int]) -> FieldValue:
        size, stride, v = tuple(size), tuple(stride), self.value
        if self.known is not None:
            part = _view(self.known, 0, offset, size, stride)
            if part.numel() and not part.isnan().any():
                return FieldValue(size, num=part.clone(memory_format=torch.contiguous_format))
        if offset == 0 and is_dense(size, stride, self.n):
            self.owned = False
            return v.move(lambda t, lead: t.reshape((*t.shape[:lead], *size)))
        out = v.move(lambda t, lead: _view(t, lead, offset, size, stride).clone(memory_format=torch.contiguous_format))
        if out.sp is not None and not out.sp.any():
            out.sp = None
        return out

    def store(self, offset: int, size: Sequence[int], stride: Sequence[int], v: FieldValue) -> None:
        """v: of the cell's kind (constant or symbolic)."""
        size, stride = tuple(size), tuple(stride)
        if offset == 0 and is_dense(size, stride, self.n):
            self.value, self.owned = v.move(lambda t, lead: t.reshape((*t.shape[:lead], self.n)).contiguous()), False
            self.known = None
            return
        if self.known is not None:
            _view(self.known, 0, offset, size, stride).fill_(float("nan"))
        mine = self.value
        if not self.owned:
            mine = self.value = mine.move(lambda t, lead: t.clone(memory_format=torch.contiguous_format))
            self.owned = True
        if mine.num is not None:
            _view(mine.num, 0, offset, size, stride).copy_(v.num)
            mine.res = None
            return
        _view(mine.res, 1, offset, size, stride).copy_(v.res)
        for name in ("sp", "sgn"):
            new, old = getattr(v, name), getattr(mine, name)
            if new is None and old is None:
                continue
            if old is None:
                old = torch.zeros(self.n, dtype=torch.uint8)
                setattr(mine, name, old)
            view = _view(old, 0, offset, size, stride)
            view.zero_() if new is None else view.copy_(new)
        mine.flags = joined((mine.flags, v.flags))


def is_dense(size: tuple[int, ...], stride: tuple[int, ...], n: int) -> bool:
    """Whether a strided view is all n elements in order."""
    expected = 1
    for s, step in zip(reversed(size), reversed(stride)):
        if s != 1 and step != expected:
            return False
        expected *= s
    return expected == n


def _view(t: torch.Tensor, lead: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    if lead:
        return t.as_strided((t.shape[0], *size), (t.stride(0), *stride), t.storage_offset() + offset)
    return t.as_strided(size, stride, t.storage_offset() + offset)
