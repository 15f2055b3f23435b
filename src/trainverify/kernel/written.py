"""Terms over leaves: what identifiers are, open ones written out (trusted).

Each identifier has a shape: LEAF, a rational number, or for an open node of the parallel side (equal to nothing proved) the
term that it was made as, with its leaves. Rows are expanded to terms of one shape by group, and leaves unfolded to their definitions.
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from trainverify.kernel.rename import distinct
from trainverify.kernel.shapes import LEAF, Shapes
from trainverify.kernel.store import I64, Store, grow, is_total

INLINE = 300                                  # leaves up to which an open node is written out from the start
DEEPEST = 400                                 # operations above each other that unfolding may reach
NESTING = 120                                 # operations above each other in a written-out term
SIMPLE = 1 << 20                              # constants with larger numerators or denominators are leaves


@dataclass(frozen=True, slots=True)
class Group:
    """Rows (by index) that are terms of one shape, with their leaves [rows, leaves]."""

    shape: int
    index: np.ndarray
    leaves: np.ndarray


class TooLarge(Exception):
    """A term would have more leaves than the limit."""


class Written:
    """The terms of a store's identifiers."""

    def __init__(self, store: Store):
        self.store, self.shapes = store, Shapes()
        self._shape, self._at = np.zeros(0, np.int32), np.zeros(0, I64)
        self._pool, self._used = np.empty(1024, I64), 0
        self._constants = 0

    def is_leaf(self, ids: np.ndarray) -> np.ndarray:
        """Which identifiers are written as themselves."""
        self.sync()
        return self._shape[ids] == LEAF

    def sync(self) -> None:
        """The arrays of shapes cover all identifiers, and constants are shapes of their own."""
        store, n = self.store, self.store.n
        if n > len(self._shape):
            old, room = len(self._shape), max(n, 2 * len(self._shape))
            self._shape, self._at = grow(self._shape, room), grow(self._at, room)
            self._shape[old:] = LEAF
        if len(store.constants) > self._constants:
            for i, q in list(store.constants.items())[self._constants:]:
                if abs(q.numerator) < SIMPLE and q.denominator < SIMPLE:
                    self._shape[i] = self.shapes.constant(q)
            self._constants = len(store.constants)

    def write_out(self, code: int, rows: np.ndarray, ids: np.ndarray) -> None:
        """Remember the terms of open nodes. Those that are too large stay leaves; so do maxima (what is subtracted before exp is
        shared by many), and functions that may be undefined: an obligation takes every uninterpreted function for total."""
        kind, attr = self.store.ops[code][0]
        if kind == "max" or kind == "uf" and not is_total(attr):
            return
        try:
            groups = self.expand(code, rows, INLINE)
        except TooLarge:
            return
        self.sync()
        for g in groups:
            if self.shapes.depth[g.shape] > NESTING:
                continue
            width, to = g.leaves.shape[1], ids[g.index]
            need = self._used + g.leaves.size
            if need > len(self._pool):
                self._pool = grow(self._pool, max(need, 2 * len(self._pool)))
            self._pool[self._used:need] = g.leaves.reshape(-1)
            self._shape[to] = g.shape
            self._at[to] = self._used + np.arange(len(to)) * width
            self._used = need

    def expand(self, code: int, rows: np.ndarray, limit: int) -> list[Group]:
        """The terms of rows, open operands written out. Raises TooLarge."""
        self.sync()
        (kind, attr), _ = self.store.ops[code]
        operands = self.store.operands(code, rows)
        attr = None if kind == "dot" else attr
        shapes = self._shape[operands]
        if not shapes.any():
            shape = self.shapes.intern(kind, attr, (LEAF,) * operands.shape[1])
            self._check(shape, limit)
            return [Group(shape, np.arange(len(rows)), operands)]
        first, inverse = distinct(shapes.astype(I64))
        out = []
        for g, i in enumerate(first):
            index = np.flatnonzero(inverse == g)
            shape = self.shapes.intern(kind, attr, tuple(shapes[i].tolist()))
            self._check(shape, limit)
            out.append(Group(shape, index, self._leaves(operands[index], shapes[i])))
        return out

    def _check(self, shape: int, limit: int) -> None:
        if self.shapes.leaves[shape] > limit or self.shapes.depth[shape] > DEEPEST:
            raise TooLarge(f"{self.shapes.leaves[shape]} leaves, {self.shapes.depth[shape]} operations deep")

    def _leaves(self, operands: np.ndarray, shapes: np.ndarray) -> np.ndarray:
        """Leaves of rows whose operands have these shapes."""
        columns = []
        for j, shape in enumerate(shapes.tolist()):
            column, width = operands[:, j], self.shapes.leaves[shape]
            if shape == LEAF:
                columns.append(column[:, None])
            elif width:
                columns.append(self._pool[self._at[column][:, None] + np.arange(width)])
        return np.concatenate(columns, 1) if columns else np.zeros((len(operands), 0), I64)

    def definitions(self, ids: np.ndarray, limit: int) -> list[Group]:
        """The terms that define identifiers, one operation deep (open operands written out); what has no definition stays a leaf."""
        codes = self.store.code[ids]
        out = []
        for code in np.unique(codes).tolist():
            index = np.flatnonzero(codes == code)
            if not code:                      # rational numbers, and leaves for good: symbols, numbers without a rational shape
                shapes = self._shape[ids[index]]
                for s in np.unique(shapes).tolist():
                    at = index[shapes == s]
                    out.append(Group(s, at, ids[at, None] if s == LEAF else np.zeros((len(at), 0), I64)))
                continue
            rows = self.store.definition(ids[index], code)
            out += [Group(g.shape, index[g.index], g.leaves) for g in self.expand(code, rows, limit)]
        return out

    def unfolded(self, shape: int, leaves: np.ndarray, positions: np.ndarray, limit: int) -> list[Group]:
        """Rows of one shape with the leaves at these positions replaced by their definitions."""
        n = len(leaves)
        if not positions.size:
            return [Group(shape, np.arange(n), leaves)]
        found, codes = [], np.zeros((n, len(positions)), I64)
        for j, p in enumerate(positions.tolist()):
            groups = self.definitions(leaves[:, p], limit)
            place = np.zeros(n, I64)
            for k, g in enumerate(groups):
                codes[g.index, j], place[g.index] = k, np.arange(len(g.index))
            found.append((p, groups, place))
        first, kind = distinct(codes)
        out = []
        for k, i in enumerate(first):
            index = np.flatnonzero(kind == k)
            used = [(p, groups[codes[i, j]], place[index]) for j, (p, groups, place) in enumerate(found)]
            new = self.shapes.replace(shape, {p: g.shape for p, g, _ in used})
            self._check(new, limit)
            columns, last = [], 0
            for p, g, place in used:
                columns += [leaves[index, last:p], g.leaves[place]]
                last = p + 1
            out.append(Group(new, index, np.concatenate([*columns, leaves[index, last:]], 1)))
        return out


def pairs(ref: list[Group], par: list[Group], n: int) -> Iterable[tuple[Group, Group, np.ndarray]]:
    """Groups of both sides over the same n rows, cut to what they have in common: (ref, par, row numbers)."""
    for a in ref:
        for b in par:
            if len(a.index) == n and len(b.index) == n:
                yield a, b, a.index
                continue
            common, i, j = np.intersect1d(a.index, b.index, assume_unique=True, return_indices=True)
            if len(common):
                yield Group(a.shape, common, a.leaves[i]), Group(b.shape, common, b.leaves[j]), common


def whole_leaves(ref: Group, par: Group, reps: np.ndarray) -> Iterable[tuple[Group, Group, np.ndarray]]:
    """Where the other side mentions the identifier itself, it is a leaf instead of its definition."""
    itself = (par.leaves == reps[:, None]).any(1)
    if not itself.any():
        yield ref, par, np.arange(len(reps))
        return
    for at, whole in ((np.flatnonzero(itself), True), (np.flatnonzero(~itself), False)):
        if len(at):
            left = Group(LEAF, at, reps[at, None]) if whole else Group(ref.shape, at, ref.leaves[at])
            yield left, Group(par.shape, at, par.leaves[at]), at
