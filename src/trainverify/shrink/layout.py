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
from trainverify.ir.trace import OpCall, Program, TensorRef
from trainverify.ops.access import reads
from trainverify.shrink.repeat import Repeats, item, references
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
    """One digit of an index: its space, the stride of its unit, and the range that the reference takes of it."""

    space: int
    stride: int
    lo: int
    hi: int


@dataclass(slots=True)
class View:
    """How a reference was read: in the interval lo .. hi - 1 of its storage, by digits (most significant first); axis of each digit, -1: a single
    index. None of it where the reference is pinned."""

    dims: tuple[int, ...]
    lo: int = 0
    hi: int = 0
    digits: list[Digit] = field(default_factory=list)
    axes: tuple[int, ...] = ()
    pinned: bool = False


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
        self.read: set[int] = set()           # storages that some call reads
        self._collect()

    def _collect(self) -> None:
        widths: dict[int, set[int]] = defaultdict(set)
        intervals: dict[int, set[tuple[int, int]]] = defaultdict(set)
        for call in self.repeats.distinct():
            self.read.update([self.canon[r.storage] for r in reads(call)])
            for ref in references(call):
                if ref.numel:
                    sid = self.canon[ref.storage]
                    widths[sid].add(item(ref.dtype))
                    if packed(ref):
                        intervals[sid].add((ref.offset, ref.offset + ref.numel))
        for sid, found in widths.items():
            width = self.items[sid] = min(found)
            n = self.trace.storages[sid].nbytes // width
            self.storages[sid] = self.spaces.new(n)
            if len(found) > 1:
                self.spaces.pin(self.storages[sid], "its bytes are read as numbers of several widths")
            self._intervals[sid] = sorted({*intervals[sid], (0, n)}, key=lambda i: i[1] - i[0])

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
        if item(ref.dtype) != self.items[ref.storage]:
            return None
        axes = sorted((k for k, (n, d) in enumerate(zip(ref.size, ref.stride)) if n != 1 and d != 0), key=lambda k: -ref.stride[k])
        end = ref.offset + 1 + sum((ref.size[k] - 1) * ref.stride[k] for k in axes)
        for lo, hi in self._intervals[ref.storage]:
            if lo <= ref.offset and end <= hi and (found := self._digits(ref, axes, lo, hi)) is not None:
                return self._named(ref, axes, lo, hi, found)
        return None

    @staticmethod
    def _digits(ref: TensorRef, axes: list[int], lo: int, hi: int) -> list[tuple[int, int, int, int]] | None:
        """(size of the digit, its stride, first index, end) for each axis, and a last one for what is below the smallest stride."""
        at, above, out = ref.offset - lo, hi - lo, []
        for k in axes:
            stride = ref.stride[k]
            first, at = divmod(at, stride)
            if above % stride or first + ref.size[k] > above // stride:
                return None
            out.append((above // stride, stride, first, first + ref.size[k]))
            above = stride
        out.append((above, 1, at, at + 1))
        return out

    def _named(self, ref: TensorRef, axes: list[int], lo: int, hi: int, found: list[tuple[int, int, int, int]]) -> View:
        s = self.spaces
        digits = [Digit(s.new(n), stride, first, end) for n, stride, first, end in found]
        s.product(s.segment(self.storages[ref.storage], lo, hi), [d.space for d in digits])
        dims = [s.new(n) for n in ref.size]
        for k, d in zip([*axes, -1], digits):
            part = s.segment(d.space, d.lo, d.hi)
            if k >= 0:
                dims[k] = part
        return View(tuple(dims), lo, hi, digits, (*axes, -1))

    # ---- writing references
    def reduced(self, ref: TensorRef, kept: Kept) -> TensorRef:
        """The reference at the reduced sizes."""
        view = self.view(ref)
        size = tuple(kept.count(s) for s in view.dims)
        if view.pinned or not ref.numel:
            return ref if size == ref.size else TensorRef(ref.storage, 0, size, _row_major(size), ref.dtype)
        below, offset, steps = 1, kept.before(self.space(ref.storage), view.lo), {}
        for k, d in zip(reversed(view.axes), reversed(view.digits)):
            steps[k] = below
            offset += kept.before(d.space, d.lo) * below
            below *= kept.count(d.space)
        stride = [0] * len(size)
        natural = 1
        for k in reversed(range(len(size))):
            if k in steps:
                stride[k] = steps[k]
                natural = max(natural, steps[k] * size[k])
            elif ref.size[k] == 1:
                stride[k] = natural if ref.stride[k] else 0
        return TensorRef(ref.storage, offset, size, tuple(stride), ref.dtype)

    def restricts(self, ref: TensorRef, small: TensorRef, kept: Kept) -> bool:
        """Whether `small` addresses, among the kept elements of the storage, exactly the recorded reference's elements at the kept indices."""
        if not ref.numel:
            return not small.numel
        if small.size != tuple(kept.count(s) for s in self.dims(ref)):
            return False
        old = _addresses(ref.offset, [kept.indices(s) for s in self.dims(ref)], ref.stride)
        new = _addresses(small.offset, [np.arange(n) for n in small.size], small.stride)
        elements = kept.indices(self.space(ref.storage))
        return int(new.max()) < len(elements) and bool((elements[new] == old).all())

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
