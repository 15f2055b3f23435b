"""The store: one identifier per element, one row per operation on identifiers (trusted).

An identifier names a real number that depends on the symbols. A row (operation, operands) is interned: equal rows are one
identifier. A row's value may be another identifier than its own, once `claims` has proved the two equal. All of the reference
comes first, so that its nodes are definitions; what the parallel side adds is compared with them.

An identifier is *clean* if it is defined wherever the reference is. Reference nodes are, by hypothesis: the reference is defined
where every operation that it executes is, also one whose result a mask discards. GARBAGE stands for memory that nobody wrote and
for what is no real number; whatever reads it is garbage. Signs (bits as in `terms`) hold wherever the reference is defined.
"""
from __future__ import annotations

from fractions import Fraction

import numpy as np

from trainverify.kernel.hashtable import HashTable
from trainverify.kernel.signs import flip, plus, times
from trainverify.kernel.terms import ANY, NEGATIVE, NONNEGATIVE, NONZERO, POSITIVE, ZERO, Attr

# The first identifiers. Infinities come from constants alone (masks, also log 0, as PyTorch has it); they never enter a row.
ZERO_ID, ONE_ID, INF_ID, NINF_ID, GARBAGE = range(5)
I64 = np.int64
_MIX = np.uint64(0x9E3779B97F4A7C15)

Op = tuple[str, Attr]

TOTAL = frozenset({"asinh", "atan", "atan2", "ceil", "cosh", "erf", "erfc", "expm1", "floor", "frac", "pair", "round", "sinh", "trunc"})

_PLUS = np.array([[plus(a, b) if a and b else 0 for b in range(8)] for a in range(8)], np.uint8)
_TIMES = np.array([[times(a, b) for b in range(8)] for a in range(8)], np.uint8)
_FLIP = np.array([flip(a) for a in range(8)], np.uint8)


def sign_of(q: Fraction) -> int:
    return POSITIVE if q > 0 else NEGATIVE if q < 0 else ZERO


class Arena:
    """Rows of one width with their operations, and the identifier that each row's value has."""

    def __init__(self, width: int):
        self.width, self.n = width, 0
        self.rows, self.code, self.value = np.empty((64, width), I64), np.empty(64, np.int32), np.empty(64, I64)
        self._table = HashTable()
        spread = np.arange(1, width + 1, dtype=np.uint64) * _MIX
        self._weights = (spread ^ (spread >> np.uint64(29))) | np.uint64(1)

    def keys(self, code: int, rows: np.ndarray) -> np.ndarray:
        """62-bit hashes; equal for equal rows of one operation."""
        x = rows.astype(np.uint64) * np.uint64(0xBF58476D1CE4E5B9)
        x ^= x >> np.uint64(31)
        x *= self._weights
        x ^= x >> np.uint64(29)
        h = x.sum(1, dtype=np.uint64) + np.uint64((code + 1) * 0x94D049BB133111EB % 2**64)
        h = (h ^ (h >> np.uint64(32))) * _MIX
        return (h >> np.uint64(2)).astype(I64)

    def find(self, code: int, rows: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(found, index): which rows are here already, compared in full, and where."""
        found, at = self._table.get(keys)
        at = at[:, 0]
        hit = np.flatnonzero(found)
        if hit.size:
            same = self.code[at[hit]] == code
            same &= (self.rows[at[hit]] == rows[hit]).all(1)
            found[hit] = same
        return found, at

    def append(self, code: int, rows: np.ndarray, keys: np.ndarray, values: np.ndarray) -> int:
        """Add rows that are not here, and are pairwise distinct; the index of the first."""
        first, n = self.n, self.n + len(rows)
        if n > len(self.code):
            grown = max(n, 2 * len(self.code))
            self.rows, self.code, self.value = (grow(a, grown) for a in (self.rows, self.code, self.value))
        self.rows[first:n], self.code[first:n], self.value[first:n] = rows, code, values
        self.n = n
        self._table.put(keys, np.arange(first, n)[:, None])
        return first


def grow(a: np.ndarray, n: int) -> np.ndarray:
    """A copy with room for n rows; the new ones are not set."""
    out = np.empty((n, *a.shape[1:]), a.dtype)
    out[:len(a)] = a
    return out


class Store:
    """Nodes with their definitions, cleanness and signs.

    Per identifier: `code` (the operation, see `ops`; 0: no definition), `row` (index in the arena of its width), `clean`, `sign`,
    `is_constant` (a known rational, see `constants`), `is_open` (of the parallel side, and nothing of the
    reference's by proof), `origin` (the replayed call that made it; a number that only grows).
    """

    PER_NODE = (("code", np.int32), ("row", I64), ("clean", bool), ("sign", np.uint8), ("is_constant", bool), ("is_open", bool), ("origin", np.int32))

    def __init__(self) -> None:
        self.n = 0
        self._room = 0
        self.parallel = False
        self.now = 0                          # the current call, for `origin`
        self.ops: list[tuple[Op, int]] = [(("none", None), 0)]
        self._codes: dict[tuple[Op, int], int] = {}
        self.arenas: dict[int, Arena] = {}
        self.constants: dict[int, Fraction] = {}
        self._constant_ids: dict[Fraction, int] = {}
        self._unknown: dict[object, int] = {}
        self._grow(1024)
        for q in (Fraction(0), Fraction(1)):
            self.constant(q)
        for _ in (INF_ID, NINF_ID, GARBAGE):
            self.code[self._allocate(1, ANY, False)] = 0
        self.minus_one = self.constant(Fraction(-1))

    # ---- nodes without rows
    def _grow(self, n: int) -> None:
        if n <= self._room:
            return
        room = max(n, 2 * self._room)
        for name, dtype in self.PER_NODE:
            setattr(self, name, grow(getattr(self, name, np.empty(0, dtype)), room))
        self._room = room

    def _allocate(self, n: int, sign: int | np.ndarray, clean: bool | np.ndarray) -> int:
        first = self.n
        self._grow(first + n)
        at = slice(first, first + n)
        self.code[at], self.row[at], self.sign[at], self.clean[at], self.is_constant[at], self.origin[at] = 0, -1, sign, clean, False, self.now
        self.is_open[at] = False
        self.n += n
        return first

    def constant(self, q: Fraction) -> int:
        """The identifier of a rational number."""
        if q not in self._constant_ids:
            i = self._allocate(1, sign_of(q), True)
            self._constant_ids[q], self.constants[i], self.is_constant[i] = i, q, True
        return self._constant_ids[q]

    def unknown(self, key: object, sign: int = ANY) -> int:
        """The identifier of a fixed number of which nothing but its sign is used (an irrational constant)."""
        if key not in self._unknown:
            self._unknown[key] = self._allocate(1, sign, True)
        return self._unknown[key]

    def symbols(self, n: int) -> int:
        """The first of n fresh symbols, which stand for arbitrary reals."""
        return self._allocate(n, ANY, True)

    # ---- rows
    def operation(self, kind: str, attr: Attr, width: int) -> int:
        key = ((kind, attr), width)
        if key not in self._codes:
            self._codes[key] = len(self.ops)
            self.ops.append(key)
            if width not in self.arenas:
                self.arenas[width] = Arena(width)
        return self._codes[key]

    def known(self, code: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(identifiers, index of each row that is new, keys): -1 stands for rows that are not interned."""
        arena = self.arenas[self.ops[code][1]]
        keys = arena.keys(code, rows)
        found, at = arena.find(code, rows, keys)
        ids = np.full(len(rows), -1, I64)
        ids[found] = arena.value[at[found]]
        return ids, np.flatnonzero(~found), keys

    def define(self, code: int, rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """New identifiers for rows (pairwise distinct, not interned)."""
        kind, attr = self.ops[code][0]
        clean, sign = self._judged(kind, attr, rows)
        first = self._allocate(len(rows), sign, clean)
        ids = np.arange(first, self.n)
        self.code[ids], self.is_open[ids] = code, self.parallel
        self.row[ids] = np.arange(len(rows)) + self.arenas[self.ops[code][1]].append(code, rows, keys, ids)
        return ids

    def identify(self, code: int, rows: np.ndarray, keys: np.ndarray, ids: np.ndarray) -> None:
        """Rows (not interned) whose value has been proved to be an identifier's. Only `claims` may say so."""
        self.arenas[self.ops[code][1]].append(code, rows, keys, ids)

    def definition(self, ids: np.ndarray, code: int) -> np.ndarray:
        """Operand rows [n, width] of identifiers that are all defined by this operation."""
        return self.arenas[self.ops[code][1]].rows[self.row[ids]]

    # ---- vectors, of which dot products are made
    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """One number per row of identifiers: equal rows have equal numbers."""
        code = self.operation("vector", None, rows.shape[1])
        arena = self.arenas[rows.shape[1]]
        keys = arena.keys(code, rows)
        found, at = arena.find(code, rows, keys)
        if not found.all():
            new = np.flatnonzero(~found)
            first, inverse = distinct_rows(rows[new], keys[new])
            pick = new[first]
            at[new] = (np.arange(len(pick)) + arena.append(code, rows[pick], keys[pick], np.zeros(len(pick), I64)))[inverse]
        return at

    def operands(self, code: int, rows: np.ndarray) -> np.ndarray:
        """The operands of rows: for a dot product of two vectors (a, b), the pairs a0 b0 a1 b1 .."""
        (kind, length), _ = self.ops[code]
        if kind != "dot":
            return rows
        vectors = self.arenas[length].rows
        out = np.empty((len(rows), 2 * length), I64)
        out[:, 0::2], out[:, 1::2] = vectors[rows[:, 0]], vectors[rows[:, 1]]
        return out

    # ---- definedness and signs
    def _judged(self, kind: str, attr: Attr, rows: np.ndarray) -> tuple[np.ndarray | bool, np.ndarray | int]:
        """(clean, sign) of new nodes; a condition of the reference becomes a fact about its operand."""
        if kind == "dot":
            return self._judged_dot(attr, rows)
        s = self.sign[rows]
        needs = condition(kind, attr)
        if needs is not None and not self.parallel:
            self.sign[rows[:, 0]] &= needs
            s = self.sign[rows]
        clean = self.clean[rows].all(1)
        if needs is not None and self.parallel:
            clean &= (s[:, 0] & ~np.uint8(needs)) == 0
        if kind == "uf" and self.parallel and not is_total(attr):
            clean[:] = False
        return clean, _sign(kind, attr, rows, s)

    def _judged_dot(self, length: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | int]:
        used, inverse = np.unique(rows, return_inverse=True)
        clean = self.clean[self.arenas[length].rows[used]].all(1)[inverse.reshape(rows.shape)].all(1)
        square = rows[:, 0] == rows[:, 1]
        return clean, np.where(square, NONNEGATIVE, ANY).astype(np.uint8)


def condition(kind: str, attr: Attr) -> int | None:
    """The signs of the operand for which an operation is defined; None: all."""
    if kind == "inv":
        return NONZERO
    if kind == "log":
        return POSITIVE
    if kind == "sqrt":
        return NONNEGATIVE
    if kind == "pow":
        negative, whole = attr < 0, attr.denominator == 1
        return (NONZERO if negative else None) if whole else POSITIVE if negative else NONNEGATIVE
    return None


def is_total(tag: str) -> bool:
    """Whether an uninterpreted function is known to have a value everywhere. The others have one where the reference applies them."""
    return tag in TOTAL


def _sign(kind: str, attr: Attr, rows: np.ndarray, s: np.ndarray) -> np.ndarray | int:
    """Signs of results from the signs [n, width] of operands."""
    if kind in ("add", "sub"):
        if kind == "sub":
            s = np.stack([s[:, 0], _FLIP[s[:, 1]]], 1)
        out = s[:, 0]
        for j in range(1, s.shape[1]):
            out = _PLUS[out, s[:, j]]
        return out
    if kind == "mul":
        out = _TIMES[s[:, 0], s[:, 1]]
        square = (s[:, 0] & ZERO) | np.where(s[:, 0] & NONZERO, POSITIVE, 0).astype(np.uint8)
        return np.where(rows[:, 0] == rows[:, 1], square, out).astype(np.uint8)
    if kind == "neg":
        return _FLIP[s[:, 0]]
    if kind == "inv":
        return s[:, 0] & NONZERO
    if kind == "exp":
        return POSITIVE
    if kind == "sqrt":
        return np.where(s[:, 0] == POSITIVE, POSITIVE, NONNEGATIVE).astype(np.uint8)
    if kind == "compare":
        return NONNEGATIVE
    if kind == "max":
        above = (s & (NEGATIVE | ZERO) == 0).any(1)
        floor = (s & NEGATIVE == 0).any(1)
        return np.where(above, POSITIVE, np.where(floor, NONNEGATIVE, ANY)).astype(np.uint8)
    if kind == "pow" and attr.denominator == 1 and attr.numerator % 2 == 0:
        return NONNEGATIVE
    return ANY


def distinct_rows(rows: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(first index of each distinct row, ascending; number of each row); keys are equal where rows are.

    Ascending, so that identifiers follow the order of elements: then sums over neighbours are named alike.
    """
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    if len(first) < len(rows) and not (rows == rows[first[inverse.reshape(-1)]]).all():      # a collision of hashes
        _, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    return first[order], number[inverse.reshape(-1)]
