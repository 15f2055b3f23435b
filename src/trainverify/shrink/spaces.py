"""Index spaces: what a dimension of a tensor, or a whole storage, ranges over (trusted).

A space is a class of dimensions that have the same indices. It is an atom, or the product of spaces (row-major, as a view joins
and splits dimensions), or the concatenation of spaces (as cat, slices and shards make it). Facts are added one by one; where a space
has a structure already, both are refined until they agree, so that in the end every space has one structure over atoms. What cannot be
brought to agree is pinned: it keeps its full size, with a reason.

Rows that data have put in an order, or picked (tokens by expert), are named by where they come from: index i of such a space is a given index of another.

A reduction chooses for each atom which of its indices are kept; that determines the kept indices of every space. `Kept` evaluates it.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from trainverify.diagnostics import Span

ROWS = 64                                     # a dimension of at most so many indices may be told apart index by index (ranks, microbatches)
PRODUCT, CAT, PICK = "product", "cat", "pick"
ONE = 0


class Conflict(Exception):
    """Two spaces of different sizes were said to be the same."""


@dataclass(frozen=True, slots=True)
class Pin:
    """A space that keeps its full size; structural: ranks, stages and the like, which are never reduced."""

    space: int
    why: str
    span: Span | None = None
    structural: bool = False


@dataclass(frozen=True, slots=True)
class Form:
    kind: str
    parts: tuple[int, ...]
    at: bytes = b""                           # of a pick: for each index, which one of parts[0] it is

    @property
    def picked(self) -> np.ndarray:
        return np.frombuffer(self.at, dtype=np.int64)


class Spaces:
    def __init__(self) -> None:
        self._size, self._parent, self._form = [1], [0], [None]
        self.pins: list[Pin] = []
        self._loose: dict[tuple[int, int, int], int] = {}
        self.fixed: list[tuple[int, int]] = []       # indices that must be kept: (space, index)

    # ---- spaces
    def new(self, size: int) -> int:
        if size == 1:
            return ONE
        self._size.append(size)
        self._parent.append(len(self._parent))
        self._form.append(None)
        return len(self._parent) - 1

    def find(self, s: int) -> int:
        while self._parent[s] != s:
            self._parent[s] = self._parent[self._parent[s]]
            s = self._parent[s]
        return s

    def size(self, s: int) -> int:
        return self._size[s]

    def form(self, s: int) -> Form | None:
        return self._form[self.find(s)]

    def roots(self) -> list[int]:
        return [s for s in range(len(self._parent)) if self._parent[s] == s]

    def pin(self, s: int, why: str, span: Span | None = None, structural: bool = False) -> None:
        if self.size(s) > 1:
            self.pins.append(Pin(s, why, span, structural))

    # ---- facts
    def unify(self, a: int, b: int) -> None:
        """a and b have the same indices."""
        a, b = self.find(a), self.find(b)
        if a == b:
            return
        if self._size[a] != self._size[b]:
            raise Conflict(f"sizes {self._size[a]} and {self._size[b]}")
        form = self._form[b]
        self._parent[b], self._form[b] = a, None
        if self._form[a] is None:
            self._form[a] = form
        elif form is not None and form.kind == PRODUCT:
            self.product(a, form.parts)
        elif form is not None and form.kind == PICK:
            self.pick(a, form.parts[0], form.picked)
        elif form is not None:
            self._cat(a, form.parts)

    def product(self, s: int, parts: Iterable[int]) -> None:
        """The indices of s are those of the parts, the last one fastest."""
        s, parts = self.find(s), tuple(p for p in parts if self.size(p) != 1)
        if math.prod(map(self.size, parts)) != self.size(s):
            raise Conflict(f"{self.size(s)} is not the product of {[self.size(p) for p in parts]}")
        if self.size(s) <= 1:
            return
        if len(parts) == 1:
            return self.unify(s, parts[0])
        form = self._form[s]
        if form is None:
            self._form[s] = Form(PRODUCT, parts)
        elif form.kind == PRODUCT:
            self._align(s, form.parts, parts)
        elif form.kind == PICK:
            self._pin_all((s, *parts), "rows that data have put in an order are taken apart")
        else:
            self._product_of_cat(s, parts)

    def cat(self, s: int, parts: Sequence[int]) -> None:
        """The indices of s are those of the parts, one part after the other."""
        parts = tuple(p for p in parts if self.size(p))
        if sum(map(self.size, parts)) != self.size(s):
            raise Conflict(f"{self.size(s)} is not the sum of {[self.size(p) for p in parts]}")
        if len(parts) == 1:
            self.unify(s, parts[0])
        elif parts and self.form(s) is None:
            self._form[self.find(s)] = Form(CAT, parts)
        else:
            self._cat(s, parts)

    def _cat(self, s: int, parts: Sequence[int]) -> None:
        at = 0
        for p in parts:
            self.unify(self.segment(s, at, at + self.size(p)), p)
            at += self.size(p)

    def pick(self, s: int, base: int, at: np.ndarray) -> None:
        """Index i of s is index at[i] of base; no two are the same one."""
        s, base, n = self.find(s), self.find(base), len(at)
        if n != self.size(s):
            raise Conflict(f"{n} rows are picked for {self.size(s)}")
        if n <= 1:
            self.fixed += [(base, int(i)) for i in at]
            return
        if n == self.size(base) and np.array_equal(at, np.arange(n)):
            return self.unify(s, base)
        form, other = self._form[base], self._form[s]
        if form is not None and form.kind == PICK:
            return self.pick(s, form.parts[0], form.picked[at])
        if other is not None and other.kind == CAT:
            ends = np.cumsum([0, *map(self.size, other.parts)]).tolist()
            for p, lo, hi in zip(other.parts, ends, ends[1:]):
                self.pick(p, base, at[lo:hi])
        elif other is not None and other.kind == PICK:
            self._both(s, base, at, other)
        elif other is not None or s in self._under(base):
            raise Conflict("rows that data have put in an order have another structure already")
        else:
            self._form[s] = Form(PICK, (base,), np.ascontiguousarray(at, dtype=np.int64).tobytes())

    def _both(self, s: int, base: int, at: np.ndarray, known: Form) -> None:
        """s was picked from two spaces."""
        there, its = self.find(known.parts[0]), known.picked
        if np.array_equal(at, its) and self.size(there) == self.size(base):
            self.unify(there, base)
        elif there == base:
            raise Conflict("rows were put in two orders")
        elif len(at) == self.size(base):
            self.pick(base, there, its[np.argsort(at)])
        elif len(its) == self.size(there):
            self.pick(there, base, at[np.argsort(its)])
        else:
            raise Conflict("rows were picked from two places")

    def _under(self, s: int) -> set[int]:
        """s and all of which it is made."""
        found, stack = set(), [self.find(s)]
        while stack:
            x = stack.pop()
            if x not in found:
                found.add(x)
                form = self._form[x]
                stack += [self.find(p) for p in form.parts] if form else []
        return found

    def picks(self, s: int) -> bool:
        """Whether data decide how many of its indices are kept."""
        return any((form := self._form[x]) is not None and form.kind == PICK for x in self._under(s))

    def segment(self, s: int, lo: int, hi: int) -> int:
        """The space of the indices lo .. hi - 1 of s."""
        s = self.find(s)
        if (lo, hi) == (0, self.size(s)):
            return s
        if hi - lo <= 0:
            return self.new(0)
        form = self._form[s]
        if form is None:
            cuts = [c for c in (lo, hi) if 0 < c < self.size(s)]
            pieces = [self.new(b - a) for a, b in zip([0, *cuts], [*cuts, self.size(s)])]
            self._form[s] = Form(CAT, tuple(pieces))
            return pieces[1 if lo else 0]
        if form.kind == CAT:
            return self._segment_of_cat(form, lo, hi)
        if form.kind == PICK:
            made = self.new(hi - lo)
            self.pick(made, form.parts[0], form.picked[lo:hi])
            return self.find(made)
        return self._segment_of_product(s, form, lo, hi)

    def _segment_of_cat(self, form: Form, lo: int, hi: int) -> int:
        found, at = [], 0
        for p in form.parts:
            a, b = max(lo, at), min(hi, at + self.size(p))
            if a < b:
                found.append(self.segment(p, a - at, b - at))
            at += self.size(p)
        if len(found) == 1:
            return found[0]
        made = self.new(hi - lo)
        self._form[made] = Form(CAT, tuple(found))
        return made

    def _segment_of_product(self, s: int, form: Form, lo: int, hi: int) -> int:
        first, row = form.parts[0], self._rest(form.parts[1:])
        step = self.size(row)
        if lo % step == 0 and hi % step == 0:
            head = self.segment(first, lo // step, hi // step)
            made = self.new(hi - lo)
            self.product(made, (head, *form.parts[1:]))
            return made
        if lo // step == (hi - 1) // step:    # inside one row
            k = lo // step
            self.segment(first, k, k + 1)
            return self.segment(row, lo - k * step, hi - k * step)
        if self.size(first) <= ROWS:
            self._rows(s, first, row)
            return self.segment(s, lo, hi)
        return self._unaligned(s, lo, hi)

    def _unaligned(self, s: int, lo: int, hi: int) -> int:
        """A boundary inside a row of many: all of it stays as it is."""
        key = (s, lo, hi)
        if key not in self._loose:
            self._loose[key] = self.new(hi - lo)
            for pinned in (s, self._loose[key]):
                self.pin(pinned, "a part of it ends inside a row")
        return self._loose[key]

    def _rest(self, parts: tuple[int, ...]) -> int:
        if len(parts) == 1:
            return self.find(parts[0])
        made = self.new(math.prod(map(self.size, parts)))
        self.product(made, parts)
        return self.find(made)

    def _rows(self, s: int, first: int, row: int) -> None:
        """Take a product apart, row by row."""
        self.pin(first, "its indices are told apart one by one", structural=True)
        self._form[self.find(s)] = Form(CAT, (row,) * self.size(first))

    def _product_of_cat(self, s: int, parts: tuple[int, ...]) -> None:
        pieces = self._form[s].parts
        bounds = np.cumsum([0, *(self.size(p) for p in pieces)]).tolist()
        step = self.size(s) // self.size(parts[0])
        if all(b % step == 0 for b in bounds):
            for p, lo, hi in zip(pieces, bounds, bounds[1:]):
                self.product(p, (self.segment(parts[0], lo // step, hi // step), *parts[1:]))
        elif self.size(parts[0]) <= ROWS:
            self.pin(parts[0], "its indices are told apart one by one", structural=True)
            row = self._rest(parts[1:])
            for k in range(self.size(parts[0])):
                self.unify(self.segment(s, k * step, (k + 1) * step), row)
        else:
            self._pin_all((s, *parts), "it is seen with boundaries that do not fit its rows")

    def _align(self, s: int, a: tuple[int, ...], b: tuple[int, ...]) -> None:
        """Two factorisations of one space, most significant first."""
        a, b = list(a), list(b)
        while a and b:
            left, right = [a.pop(0)], [b.pop(0)]
            m, n = self.size(left[0]), self.size(right[0])
            while m != n:
                side, other = (left, a) if m < n else (right, b)
                side.append(other.pop(0))
                m, n = (m * self.size(side[-1]), n) if m < n else (m, n * self.size(side[-1]))
            if len(right) == 1:
                self.product(right[0], left)
            elif len(left) == 1:
                self.product(left[0], right)
            else:
                self._refine(left, right)

    def _refine(self, a: list[int], b: list[int]) -> None:
        """Several factors on both sides: the factors of a common refinement, where there is one."""
        def marks(parts: list[int]) -> list[int]:
            sizes = [self.size(p) for p in parts]
            return [math.prod(sizes[k:]) for k in range(len(sizes) + 1)]

        chain = sorted({*marks(a), *marks(b)}, reverse=True)
        if any(x % y for x, y in zip(chain, chain[1:])):
            return self._pin_all((*a, *b), "two factorisations of it have no common refinement")
        fine = [self.new(x // y) for x, y in zip(chain, chain[1:])]
        for parts in (a, b):
            ends = marks(parts)
            for p, hi, lo in zip(parts, ends, ends[1:]):
                self.product(p, fine[chain.index(hi):chain.index(lo)])

    def _pin_all(self, spaces: Iterable[int], why: str) -> None:
        for p in spaces:
            self.pin(p, why)

    # ---- closure
    def close(self) -> None:
        """Spaces with the same structure are the same."""
        changed = True
        while changed:
            changed, known = False, {}
            for s in self.roots():
                form = self._form[s]
                if form is None or self.find(s) != s:
                    continue
                key = (form.kind, self.flat(s), form.at)
                other = known.setdefault(key, s)
                if self.find(other) != self.find(s):
                    self.unify(other, s)
                    changed = True

    def flat(self, s: int) -> tuple[int, ...]:
        """The parts of s, and theirs where they are of the same kind."""
        form = self._form[self.find(s)]
        out: list[int] = []
        for p in form.parts if form else ():
            inner = self._form[self.find(p)]
            out += self.flat(p) if inner is not None and inner.kind == form.kind != PICK else [self.find(p)]
        return tuple(out)

    def atoms(self, s: int) -> tuple[int, ...]:
        """The atoms under s, each once."""
        seen: dict[int, None] = {}
        stack = [self.find(s)]
        while stack:
            s = stack.pop()
            form = self._form[s]
            if form is None:
                seen[s] = None
            else:
                stack += [self.find(p) for p in reversed(form.parts)]
        return tuple(seen)


class Kept:
    """Which indices of each space are kept, given those of the atoms."""

    def __init__(self, spaces: Spaces, atoms: dict[int, np.ndarray]):
        self.spaces, self._atoms = spaces, atoms
        self._count: dict[int, int] = {}
        self._indices: dict[int, np.ndarray] = {}

    def count(self, s: int) -> int:
        s = self.spaces.find(s)
        if s not in self._count:
            form = self.spaces.form(s)
            if form is None:
                self._count[s] = len(self._atoms[s]) if s in self._atoms else self.spaces.size(s)
            elif form.kind == PICK:
                self._count[s] = int(self._among(form).sum())
            else:
                counts = [self.count(p) for p in form.parts]
                self._count[s] = math.prod(counts) if form.kind == PRODUCT else sum(counts)
        return self._count[s]

    def before(self, s: int, at: int) -> int:
        """How many of the indices below `at` are kept."""
        s = self.spaces.find(s)
        size, count = self.spaces.size(s), self.count(s)
        if at in (0, size) or count == size:
            return count if at == size else at
        form = self.spaces.form(s)
        if form is None:
            return int(np.searchsorted(self._atoms[s], at))
        if form.kind == PICK:
            return int(np.searchsorted(self.indices(s), at))
        if form.kind == PRODUCT:
            total, size, count = 0, size, count
            for p in form.parts:
                size, count = size // self.spaces.size(p), count // self.count(p)
                k, at = divmod(at, size)
                total += self.before(p, k) * count
                if not at or self.before(p, k + 1) == self.before(p, k):     # nothing of row k is kept
                    break
            return total
        total = 0
        for p in form.parts:
            if at <= self.spaces.size(p):
                return total + self.before(p, at)
            total, at = total + self.count(p), at - self.spaces.size(p)
        return total

    def indices(self, s: int) -> np.ndarray:
        """The kept indices, ascending."""
        s = self.spaces.find(s)
        if s not in self._indices:
            self._indices[s] = self._evaluate(s)
        return self._indices[s]

    def _evaluate(self, s: int) -> np.ndarray:
        form = self.spaces.form(s)
        if self.count(s) == self.spaces.size(s):
            return np.arange(self.spaces.size(s))
        if form is None:
            return self._atoms[s]
        if form.kind == PICK:
            return np.flatnonzero(self._among(form))
        out = np.zeros(1 if form.kind == PRODUCT else 0, dtype=np.int64)
        at = 0
        for p in form.parts:
            mine = self.indices(p)
            if form.kind == PRODUCT:
                out = (out[:, None] * self.spaces.size(p) + mine).reshape(-1)
            else:
                out = np.concatenate([out, mine + at])
                at += self.spaces.size(p)
        return out

    def _among(self, form: Form) -> np.ndarray:
        """Of each index of a pick, whether it is kept."""
        base = np.zeros(self.spaces.size(form.parts[0]), dtype=bool)
        base[self.indices(form.parts[0])] = True
        return base[form.picked]
