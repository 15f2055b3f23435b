"""Operations on arrays of identifiers: what can be folded exactly is, the rest becomes rows (trusted).

Folding drops an operand only if it is defined wherever the reference is: x * 0 and x - x are 0 for clean x alone. An infinity
(from a mask) is carried by the rules of limits as far as they are certain; anything doubtful is GARBAGE, as is 0/0. All arrays
are int64; `prints` holds the fingerprints of the results, by position.
"""
from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np

from trainverify.kernel.claims import Claims, Prints
from trainverify.kernel.store import GARBAGE, I64, INF_ID, NINF_ID, ONE_ID, ZERO_ID, condition
from trainverify.kernel.terms import NEGATIVE, POSITIVE

_DIGITS = 1 << 64                             # larger rationals are not folded


class Elements:
    def __init__(self, claims: Claims):
        self.claims, self.store = claims, claims.store

    # ---- helpers
    def _special(self, *arrays: np.ndarray) -> bool:
        """Whether an infinity or garbage occurs."""
        return any(bool(((a - INF_ID).view(np.uint64) < 3).any()) for a in arrays)

    def _finish(self, kind: str, attr, rows: np.ndarray, out: np.ndarray, prints: Prints) -> np.ndarray:
        """Rows whose result is still -1 in `out` become identifiers."""
        left = np.flatnonzero(out < 0)
        if not left.size:
            return out
        if left.size == len(out):
            return self.claims.resolve(kind, attr, rows, prints)
        out[left] = self.claims.resolve(kind, attr, rows[left], Some(prints, left))
        return out

    def _fold(self, out: np.ndarray, x: np.ndarray, y: np.ndarray, f: Callable[[Fraction, Fraction], Fraction]) -> None:
        """Results for two known rationals."""
        both = np.flatnonzero(self.store.is_constant[x] & self.store.is_constant[y] & (out < 0))
        if not both.size:
            return
        pairs, inverse = np.unique(np.stack([x[both], y[both]], 1), axis=0, return_inverse=True)
        made = []
        for a, b in pairs.tolist():
            q = f(self.store.constants[a], self.store.constants[b])
            small = abs(q.numerator) < _DIGITS and q.denominator < _DIGITS
            made.append(self.store.constant(q) if small else -1)
        out[both] = np.array(made)[inverse.reshape(-1)]

    def _clean(self, *arrays: np.ndarray) -> np.ndarray:
        ok = self.store.clean[arrays[0]]
        for a in arrays[1:]:
            ok = ok & self.store.clean[a]
        return ok

    # ---- ring
    def add(self, x: np.ndarray, y: np.ndarray, prints: Prints) -> np.ndarray:
        out = np.where(x == ZERO_ID, y, np.where(y == ZERO_ID, x, -1))
        self._fold(out, x, y, Fraction.__add__)
        if self._special(x, y):
            out = self._limits_of_sum(np.stack([x, y], 1), out)
        return self._finish("add", None, np.stack([np.minimum(x, y), np.maximum(x, y)], 1), out, prints)

    def _limits_of_sum(self, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        up, down = (rows == INF_ID).any(1), (rows == NINF_ID).any(1)
        others = (self.store.clean[rows] | (rows == INF_ID) | (rows == NINF_ID)).all(1)
        wrong = (rows == GARBAGE).any(1) | (up & down) | ((up | down) & ~others)
        return np.where(wrong, GARBAGE, np.where(up, INF_ID, np.where(down, NINF_ID, out)))

    def sub(self, x: np.ndarray, y: np.ndarray, prints: Prints) -> np.ndarray:
        out = np.where(y == ZERO_ID, x, np.where((x == y) & self._clean(x), ZERO_ID, -1))
        self._fold(out, x, y, Fraction.__sub__)
        if self._special(x, y):
            out = self._limits_of_sum(np.stack([x, _opposite(y)], 1), out)
        nothing = np.flatnonzero((x == ZERO_ID) & (out < 0))
        if nothing.size:
            out[nothing] = self.neg(y[nothing], Some(prints, nothing))
        return self._finish("sub", None, np.stack([x, y], 1), out, prints)

    def neg(self, x: np.ndarray, prints: Prints) -> np.ndarray:
        out = np.where(x == GARBAGE, GARBAGE, np.where(x == INF_ID, NINF_ID, np.where(x == NINF_ID, INF_ID, -1)))
        self._fold(out, x, x, lambda a, _: -a)
        return self._finish("neg", None, x[:, None], out, prints)

    def mul(self, x: np.ndarray, y: np.ndarray, prints: Prints) -> np.ndarray:
        out = np.where((x == ZERO_ID) & self._clean(y) | (y == ZERO_ID) & self._clean(x), ZERO_ID, np.where(x == ONE_ID, y, np.where(y == ONE_ID, x, -1)))
        self._fold(out, x, y, Fraction.__mul__)
        if self._special(x, y):
            out = np.where((x == GARBAGE) | (y == GARBAGE), GARBAGE, self._limit_of_product(x, y, self._limit_of_product(y, x, out)))
        self._square_roots(x, y, out)
        negative = np.flatnonzero(((x == self.store.minus_one) | (y == self.store.minus_one)) & (out < 0))
        if negative.size:
            other = np.where(x == self.store.minus_one, y, x)[negative]
            out[negative] = self.neg(other, Some(prints, negative))
        return self._finish("mul", None, np.stack([np.minimum(x, y), np.maximum(x, y)], 1), out, prints)

    def _square_roots(self, x: np.ndarray, y: np.ndarray, out: np.ndarray) -> None:
        """The square of a root that is defined is what it is the root of (norms are squared again to add them up)."""
        root = self.store.operation("sqrt", None, 1)
        at = np.flatnonzero((x == y) & (self.store.code[x] == root) & self.store.clean[x] & (out < 0))
        if at.size:
            out[at] = self.store.definition(x[at], root)[:, 0]

    def _limit_of_product(self, x: np.ndarray, y: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Where x is infinite: times a factor of known sign it is an infinity."""
        infinite, sign = (x == INF_ID) | (x == NINF_ID), self.store.sign[y]
        known = self._clean(y)
        limit = np.where(known & (sign == POSITIVE), x, np.where(known & (sign == NEGATIVE), _opposite(x), GARBAGE))
        return np.where(infinite, limit, out)

    def total(self, rows: np.ndarray, prints: Prints) -> np.ndarray:
        """Sums of rows [n, width]."""
        if rows.shape[1] < 2:
            return rows[:, 0].copy() if rows.shape[1] else np.full(len(rows), ZERO_ID)
        if rows.shape[1] == 2:
            return self.add(rows[:, 0], rows[:, 1], prints)
        rows = np.sort(rows, 1)
        alone = rows[:, -2] == ZERO_ID
        out = np.where(alone, rows[:, -1], -1)
        if self._special(rows):
            out = self._limits_of_sum(rows, out)
        pairs = np.flatnonzero((rows[:, -3] == ZERO_ID) & (out < 0))      # as the sum of two
        if pairs.size:
            out[pairs] = self.add(rows[pairs, -2], rows[pairs, -1], Some(prints, pairs))
        return self._finish("add", None, rows, out, prints)

    def dot(self, a: np.ndarray, b: np.ndarray, prints: Prints) -> np.ndarray:
        """Products of matrices of identifiers: a [batch, m, k], b [batch, k, n] to [batch, m, n]."""
        batch, m, k = a.shape
        n = b.shape[2]
        columns = b.transpose(0, 2, 1)
        if k == 0:
            return np.full((batch, m, n), ZERO_ID)
        if k == 1:
            x, y = np.broadcast_arrays(a, b)
            return self.mul(x.reshape(-1), y.reshape(-1), prints).reshape(batch, m, n)
        left, right = a.reshape(-1, k), columns.reshape(-1, k)
        x = np.broadcast_to(self.store.vectors(left).reshape(batch, m, 1), (batch, m, n)).reshape(-1)
        y = np.broadcast_to(self.store.vectors(right).reshape(batch, 1, n), (batch, m, n)).reshape(-1)
        out = np.full(len(x), -1, I64)
        if self._special(left, right):
            bad = [((r - INF_ID).view(np.uint64) < 3).any(1) for r in (left, right)]
            out[(bad[0].reshape(batch, m, 1) | bad[1].reshape(batch, 1, n)).reshape(-1)] = GARBAGE
        if (left == ZERO_ID).any() or (right == ZERO_ID).any():
            self._empty_products(a, columns, out.reshape(batch, m, n))
        return self._finish("dot", k, np.stack([np.minimum(x, y), np.maximum(x, y)], 1), out, prints).reshape(batch, m, n)

    def _empty_products(self, a: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
        """Dot products of clean vectors in which every product has a factor 0."""
        some, clean = (a != ZERO_ID).astype(np.float32), self.store.clean[a].all(2)
        others, tidy = (columns != ZERO_ID).astype(np.float32), self.store.clean[columns].all(2)
        none = some @ others.transpose(0, 2, 1) == 0
        out[none & clean[:, :, None] & tidy[:, None, :] & (out < 0)] = ZERO_ID

    # ---- functions
    def inv(self, x: np.ndarray, prints: Prints) -> np.ndarray:
        out = np.where((x == INF_ID) | (x == NINF_ID), ZERO_ID, np.where(x == ONE_ID, ONE_ID, -1))
        self._fold(out, np.where(x == ZERO_ID, GARBAGE, x), x, lambda a, _: 1 / a)
        return self._apply("inv", None, x, out, prints)

    def exp(self, x: np.ndarray, prints: Prints) -> np.ndarray:
        return self._apply("exp", None, x, np.where(x == ZERO_ID, ONE_ID, np.where(x == NINF_ID, ZERO_ID, np.where(x == INF_ID, INF_ID, -1))), prints)

    def log(self, x: np.ndarray, prints: Prints) -> np.ndarray:
        return self._apply("log", None, x, np.where(x == ONE_ID, ZERO_ID, np.where(x == INF_ID, INF_ID, -1)), prints)

    def sqrt(self, x: np.ndarray, prints: Prints) -> np.ndarray:
        return self._apply("sqrt", None, x, np.where(x <= ONE_ID, x, np.where(x == INF_ID, INF_ID, -1)), prints)

    def function(self, kind: str, x: np.ndarray, prints: Prints) -> np.ndarray:
        """sin and cos."""
        return self._apply(kind, None, x, np.full(len(x), -1, I64), prints)

    def _apply(self, kind: str, attr, x: np.ndarray, out: np.ndarray, prints: Prints) -> np.ndarray:
        """A function of one operand; where it is certainly undefined, or of no real number, it is garbage."""
        out = np.where((out < 0) & ((x >= INF_ID) & (x <= GARBAGE)), GARBAGE, out)
        needs = condition(kind, attr)
        if needs is not None:
            out = np.where((out < 0) & (self.store.sign[x] & needs == 0), GARBAGE, out)
        return self._finish(kind, attr, x[:, None], out, prints)

    def uninterpreted(self, tag: str, operands: list[np.ndarray], prints: Prints) -> np.ndarray:
        rows = np.stack(operands, 1)
        out = np.where(((rows >= INF_ID) & (rows <= GARBAGE)).any(1), GARBAGE, -1)
        return self._finish("uf", tag, rows, out, prints)

    # ---- order
    def greatest(self, rows: np.ndarray, prints: Prints) -> np.ndarray:
        """Maxima of rows [n, width]; -inf does not count."""
        rows = np.sort(rows, 1)
        out = np.full(len(rows), -1, I64)
        if self._special(rows):
            lost, up = (rows == GARBAGE).any(1), (rows == INF_ID).any(1)
            up &= (self.store.clean[rows] | (rows == INF_ID) | (rows == NINF_ID)).all(1)
            none = (rows == NINF_ID).all(1)
            some = np.where(rows == NINF_ID, ZERO_ID - 1, rows).max(1)        # any operand that counts
            rows = np.sort(np.where(rows == NINF_ID, some[:, None], rows), 1)
            out = np.where(lost | ((rows == INF_ID).any(1) & ~up), GARBAGE, np.where(up, INF_ID, np.where(none, NINF_ID, -1)))
        out = np.where((out < 0) & (rows[:, 0] == rows[:, -1]), rows[:, 0], out)
        if rows.shape[1] == 2:
            self._fold(out, rows[:, 0].copy(), rows[:, 1].copy(), max)
        return self._finish("max", None, rows, out, prints)

    def compare(self, op: str, x: np.ndarray, y: np.ndarray, prints: Prints) -> np.ndarray:
        """0/1-valued; op is gt or eq."""
        out = np.where((x == y) & self._clean(x), ONE_ID if op == "eq" else ZERO_ID, -1)
        self._fold(out, x, y, (lambda a, b: Fraction(a == b)) if op == "eq" else (lambda a, b: Fraction(a > b)))
        if self._special(x, y):
            out = self._compared_limits(op, x, y, out)
        rows = np.stack([np.minimum(x, y), np.maximum(x, y)] if op == "eq" else [x, y], 1)
        return self._finish("compare", op, rows, out, prints)

    def _compared_limits(self, op: str, x: np.ndarray, y: np.ndarray, out: np.ndarray) -> np.ndarray:
        def size(v):
            return np.where(v == INF_ID, 1, np.where(v == NINF_ID, -1, 0))
        a, b = size(x), size(y)
        infinite = (a != 0) | (b != 0)
        sure = (self._clean(x) | (a != 0)) & (self._clean(y) | (b != 0))
        limit = np.where((a == b) if op == "eq" else (a > b), ONE_ID, ZERO_ID)
        return np.where((x == GARBAGE) | (y == GARBAGE) | infinite & ~sure, GARBAGE, np.where(infinite, limit, out))


class Some:
    """The prints of some of the rows."""

    def __init__(self, prints: Prints, index: np.ndarray):
        self.prints, self.index = prints, index

    def of(self, index: np.ndarray) -> np.ndarray | None:
        return self.prints.of(self.index[index])

    def divided(self, index: np.ndarray, factors: tuple[Fraction, ...]) -> np.ndarray:
        return self.prints.divided(self.index[index], factors)


def _opposite(x: np.ndarray) -> np.ndarray:
    """Infinities exchanged."""
    return np.where(x == INF_ID, NINF_ID, np.where(x == NINF_ID, INF_ID, x))
