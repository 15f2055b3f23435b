"""Storages as index spaces: which space each dimension of each tensor reference ranges over (trusted).

Traces have no view operations: a view is a reference to the same storage with other sizes and strides. So products, slices,
transposes and selections all come from here: a reference is read as digits of the storage's index, one digit for each
stride, of which it takes a range. References that are no such thing (overlapping windows, a diagonal) pin what they touch.
"""
from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from trainverify.diagnostics import Span
from trainverify.ir.trace import OpCall, Program, TensorRef, references
from trainverify.ops.access import reads
from trainverify.shrink.repeat import Repeats, item
from trainverify.shrink.spaces import Kept, Spaces


def dense(ref: TensorRef) -> bool:
    """Whether the reference is contiguous in row-major order."""
    step = 1
    for size, stride in zip(reversed(ref.size), reversed(ref.stride)):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def packed(ref: TensorRef) -> bool:
    """Whether the reference covers an interval, each element once, in some order of its dimensions."""
    step = 1
    for stride, size in sorted((d, s) for s, d in zip(ref.size, ref.stride) if s != 1):
        if stride != step:
            return False
        step *= size
    return True


@dataclass(slots=True)
class Digit:
    """One digit of an index: its space, the stride of its unit, the range that the reference takes of it, and which dimension of the reference that is
    (-1: none, a single index). within, start: the space of which this digit and the next one are a part, from where on (x[..., 3:9:2] of a row of 10);
    -1: they are no part."""

    space: int
    stride: int
    lo: int
    hi: int
    axis: int
    within: int = -1
    start: int = 0


@dataclass(slots=True)
class View:
    """How a reference was read: in the interval lo .. hi - 1 of its storage, by digits (most significant first). None of it where the reference is
    pinned. parts: numbers of the storage in one element of the reference (2 where floats are read as complex numbers)."""

    dims: tuple[int, ...]
    lo: int = 0
    hi: int = 0
    digits: list[Digit] = field(default_factory=list)
    pinned: bool = False
    parts: int = 1


class Layout:
    """The storages of one rank of one side. Those that are one for the reduction (repeat.py) have one entry: `storages`, `items` and `views` are by
    the least of their numbers."""

    def __init__(self, spaces: Spaces, program: Program, rank: int, repeats: Repeats):
        self.spaces, self.trace, self.repeats = spaces, program.traces[rank], repeats
        self.canon = repeats.canon
        self.where = (self.trace.side, rank)
        self.storages: dict[int, int] = {}
        self.items: dict[int, int] = {}
        self.views: dict[TensorRef, View] = {}
        self._intervals: dict[int, list[tuple[int, int]]] = {}
        self._offsets: dict[tuple, set[int]] = defaultdict(set)        # of references to one storage with the same sizes and strides
        self._complex: set[int] = set()       # storages of floats that are also read as complex numbers
        self.read: set[int] = set()           # storages that some call reads
        self._collect()

    def _collect(self) -> None:
        widths: dict[int, set[int]] = defaultdict(set)
        intervals: dict[int, set[tuple[int, int]]] = defaultdict(set)      # in bytes
        kinds: dict[int, set[str]] = defaultdict(set)
        for call in self.repeats.distinct():
            self.read.update([self.canon[r.storage] for r in reads(call)])
            for ref in references(call):
                if ref.numel:
                    sid = self.canon[ref.storage]
                    width = item(ref.dtype)
                    widths[sid].add(width)
                    if packed(ref):
                        intervals[sid].add((ref.offset * width, (ref.offset + ref.numel) * width))
                    self._offsets[(sid, ref.size, ref.stride)].add(ref.offset)
                    kinds[sid].add(ref.dtype)
        self._complex = {sid for sid, found in kinds.items() if found <= {"float32", "complex64"} or found <= {"float64", "complex128"}}
        for sid, found in widths.items():
            width = self.items[sid] = min(found)
            n = self.trace.storages[sid].nbytes // width
            self.storages[sid] = self.spaces.new(n)
            if len(found) > 1 and not (len(found) == 2 and sid in self._complex):
                self.spaces.pin(self.storages[sid], "its bytes are read as numbers of several widths")
            self._intervals[sid] = sorted({*((lo // width, hi // width) for lo, hi in intervals[sid]), (0, n)}, key=lambda i: i[1] - i[0])

    def span(self, call: OpCall) -> Span | None:
        return self.trace.spans[call.span] if 0 <= call.span < len(self.trace.spans) else None

    def one(self, ref: TensorRef) -> TensorRef:
        """The same reference to the storage that stands for its storage."""
        sid = self.canon[ref.storage]
        return ref if sid == ref.storage else TensorRef(sid, ref.offset, ref.size, ref.stride, ref.dtype)

    def space(self, sid: int) -> int:
        """The space of a storage's elements."""
        return self.storages[self.canon[sid]]

    # ---- reading references
    def view(self, ref: TensorRef, span: Span | None = None) -> View:
        ref = self.one(ref)
        got = self.views.get(ref)
        if got is None:
            got = self.views[ref] = self._read(ref) or self._pinned(ref, span)
        return got

    def dims(self, ref: TensorRef, span: Span | None = None) -> tuple[int, ...]:
        return self.view(ref, span).dims

    def flat(self, ref: TensorRef) -> int:
        """The space of the reference's elements in row-major order."""
        if not ref.numel:
            return self.spaces.new(0)
        dims = self.dims(ref)
        if dense(ref) and item(ref.dtype) == self.items[self.canon[ref.storage]]:
            return self.spaces.segment(self.space(ref.storage), ref.offset, ref.offset + ref.numel)
        made = self.spaces.new(ref.numel)
        self.spaces.product(made, dims)
        return made

    def _pinned(self, ref: TensorRef, span: Span | None) -> View:
        dims = tuple(self.spaces.new(n) for n in ref.size)
        for s in (*dims, self.storages[ref.storage]):
            self.spaces.pin(s, f"it is read with sizes {list(ref.size)} and strides {list(ref.stride)}, which are no digits of its index", span)
        return View(dims, pinned=True)

    def _read(self, ref: TensorRef) -> View | None:
        if not ref.numel:
            return View(tuple(self.spaces.new(n) for n in ref.size), ref.offset, ref.offset)
        width = self.items[ref.storage]
        if item(ref.dtype) == 2 * width and ref.storage in self._complex:
            return self._read_complex(ref)
        if item(ref.dtype) != width:
            return None
        axes = sorted((k for k, (n, d) in enumerate(zip(ref.size, ref.stride)) if n != 1 and d != 0), key=lambda k: -ref.stride[k])
        end = ref.offset + 1 + sum((ref.size[k] - 1) * ref.stride[k] for k in axes)
        for lo, hi in self._intervals[ref.storage]:
            if lo <= ref.offset and end <= hi and (found := self._digits(ref, axes, lo, hi)) is not None:
                return self._named(ref, lo, hi, found)
        return None

    def _read_complex(self, ref: TensorRef) -> View | None:
        """Complex numbers in a storage of floats: pairs of these."""
        pairs = TensorRef(ref.storage, 2 * ref.offset, (*ref.size, 2), (*[2 * d for d in ref.stride], 1), "float32" if ref.dtype == "complex64" else "float64")
        found = self._read(pairs)
        if found is None:
            return None
        self.spaces.pin(found.dims[-1], "real and imaginary part", structural=True)
        return View(found.dims[:-1], found.lo, found.hi, found.digits, False, 2)

    def _digits(self, ref: TensorRef, axes: list[int], lo: int, hi: int) -> list[tuple] | None:
        """(axis, size of the digit, its stride, first index, end, start in the row of which it is a part and that row's size) for each axis, and a last
        one for what is below the smallest stride."""
        at, above, out = ref.offset - lo, hi - lo, []
        for place, k in enumerate(axes):
            stride, n = ref.stride[k], ref.size[k]
            below = math.prod(ref.size[j] for j in axes[place + 1:])
            if above % stride and stride % below == 0 and above % below == 0:
                part = self._part(ref, at, above, n, stride, below)
                if part is None:
                    return None
                start, first = part
                out += [(k, n, stride, 0, n, start, above // below), (-1, stride // below, below, first, first + 1, 0, 0)]
                at -= (start + first) * below
                above = below
                continue
            first, at = divmod(at, stride)
            if above % stride or first + n > above // stride:
                return None
            out.append((k, above // stride, stride, first, first + n, 0, 0))
            above = stride
        out.append((-1, above, 1, at, at + 1, 0, 0))
        return out

    def _part(self, ref: TensorRef, at: int, above: int, n: int, stride: int, unit: int) -> tuple[int, int] | None:
        """Every stride-th unit of a row that is no multiple of it: where the part that is taken apart starts, and which unit of each group it is. What
        is read beside it (the even and the odd ones) starts together."""
        if at % unit:
            return None
        here, step = at // unit, stride // unit
        beside = [(o - ref.offset) // unit for o in self._offsets[(ref.storage, ref.size, ref.stride)] if abs(o - ref.offset) < stride and (o - ref.offset) % unit == 0]
        for start in sorted({here + min((b for b in beside if b <= 0 and b > -step), default=0), here, *range(max(0, here - step + 1), here)}):
            if start >= 0 and here - start < step and start + n * step <= above // unit and (start == here or start - here in beside or here + n * step > above // unit):
                return start, here - start
        return None

    def _named(self, ref: TensorRef, lo: int, hi: int, found: list[tuple]) -> View:
        s = self.spaces
        digits, factors, k = [], [], 0
        dims = [s.new(n) for n in ref.size]
        for axis, n, stride, first, end, start, row in found:
            digits.append(Digit(s.new(n), stride, first, end, axis, s.new(row) if row else -1, start))
        while k < len(digits):
            d = digits[k]
            if d.within >= 0:
                n = s.size(d.space) * s.size(digits[k + 1].space)
                s.product(s.segment(d.within, d.start, d.start + n), (d.space, digits[k + 1].space))
                k += 1
            factors.append(d.space if d.within < 0 else d.within)
            k += 1
        s.product(s.segment(self.storages[ref.storage], lo, hi), factors)
        for d in digits:
            part = s.segment(d.space, d.lo, d.hi)
            if d.axis >= 0:
                dims[d.axis] = part
        return View(tuple(dims), lo, hi, digits)

    # ---- writing references
    def reduced(self, ref: TensorRef, kept: Kept) -> TensorRef:
        """The reference at the reduced sizes."""
        view = self.view(ref)
        size = tuple(kept.count(s) for s in view.dims)
        if view.pinned or not ref.numel:
            return ref if size == ref.size else TensorRef(ref.storage, 0, size, _row_major(size), ref.dtype)
        below, offset, steps, unit = 1, kept.before(self.space(ref.storage), view.lo), {}, 1
        for d in reversed(view.digits):
            steps[d.axis] = below
            offset += kept.before(d.space, d.lo) * below
            if d.within >= 0:                 # of `below` units, those of the digit after it
                offset += kept.before(d.within, d.start) * unit
                below = unit * kept.count(d.within)
            else:
                unit, below = below, below * kept.count(d.space)
        stride = [0] * len(size)
        natural = 1
        for k in reversed(range(len(size))):
            if k in steps:
                stride[k] = steps[k]
                natural = max(natural, steps[k] * size[k])
            elif ref.size[k] == 1:
                stride[k] = natural if ref.stride[k] else 0
        if view.parts == 1:
            return TensorRef(ref.storage, offset, size, tuple(stride), ref.dtype)
        if offset % view.parts or any(d % view.parts for d in stride):
            raise AssertionError(f"{self.where}: {ref} is not made of whole numbers at the reduced sizes")
        return TensorRef(ref.storage, offset // view.parts, size, tuple(d // view.parts for d in stride), ref.dtype)

    def restricts(self, ref: TensorRef, small: TensorRef, kept: Kept) -> bool:
        """Whether `small` addresses, among the kept elements of the storage, exactly the recorded reference's elements at the kept indices."""
        if not ref.numel:
            return not small.numel
        if small.size != tuple(kept.count(s) for s in self.dims(ref)):
            return False
        old = _addresses(ref.offset, [kept.indices(s) for s in self.dims(ref)], ref.stride)
        new = _addresses(small.offset, [np.arange(n) for n in small.size], small.stride)
        elements = kept.indices(self.space(ref.storage))
        times = self.view(ref).parts
        return all((int(new.max()) + 1) * times <= len(elements) and bool((elements[new * times + k] == old * times + k).all()) for k in range(times))

    def shifted(self, ref: TensorRef) -> bool:
        """Whether the same is also read a few indices further on."""
        return any(d and gap % d == 0 and 0 < gap // d < n for o in self._offsets[(self.canon[ref.storage], ref.size, ref.stride)]
                   if (gap := abs(o - ref.offset)) for n, d in zip(ref.size, ref.stride))

    def is_checked(self, ref: TensorRef) -> bool:
        """Whether the elements of its storage are numbers of its type; the others are pinned."""
        return item(ref.dtype) == self.items.get(self.canon[ref.storage]) or self.view(ref).parts > 1

    def nbytes(self, sid: int, kept: Kept) -> int:
        one = self.canon[sid]
        return kept.count(self.storages[one]) * self.items[one] if one in self.storages else self.trace.storages[sid].nbytes


def _addresses(offset: int, indices: list[np.ndarray], strides: tuple[int, ...]) -> np.ndarray:
    at = np.full(1, offset, dtype=np.int64)
    for mine, stride in zip(indices, strides):
        at = (at[:, None] + np.asarray(mine, dtype=np.int64) * stride).reshape(-1)
    return at


def _row_major(size: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(size[k + 1:]) for k in range(len(size)))
