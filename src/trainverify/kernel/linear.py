"""Sums of shares, proved by what is linear in them (trusted).

Where every rank holds a share of a gradient and sends it on through products with what all ranks know (the backward of a norm, then of a
matrix), the shares' sum is the reference's gradient, sent on likewise: x u + x v = x w if u + v = w. An equation between sums is
taken apart into products, products of both sides that are equal cancel, and what is left is collected by its known factors. Each of
these must have the sum zero: equations of older identifiers. No term is written out, so length and depth do not matter.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from math import lcm

import numpy as np

from trainverify.kernel.store import I64, ONE_ID, Store
from trainverify.kernel.sums import combination

# A combination of identifiers that is zero: (identifier, coefficient), ascending; the first coefficient is 1.
Equation = tuple[tuple[int, Fraction], ...]

PILOT = 4                                     # sums that are tried before all of a call are
EQUATIONS = 200_000                           # of one call
PRODUCTS = 20_000                             # of one equation


class Shares:
    """Proves sums of open identifiers. prove(rows, reps, c): which sums of rows of identifiers are proved to be c times reps by other means."""

    def __init__(self, store: Store, prove: Callable[[np.ndarray, np.ndarray, Fraction], np.ndarray]):
        self.store, self._prove = store, prove
        self._known: dict[Equation, bool] = {(): True}
        self.effort = 0                                          # products that were looked at

    def sums(self, rows: np.ndarray, reps: np.ndarray, c: Fraction) -> np.ndarray:
        """Which sums of rows [n, width] are shown to be c times the identifiers reps [n]. Only if some of the first are, the others are tried."""
        ok = np.zeros(len(rows), bool)
        clean = np.flatnonzero(self.store.clean[rows].all(1) & self.store.clean[reps])
        for at in (clean[:PILOT], clean[PILOT:]):
            ok[at] = self._sums(rows[at].tolist(), reps[at].tolist(), c)
            if not ok[at].any():
                break
        return ok

    def _sums(self, rows: list[list[int]], reps: list[int], c: Fraction) -> list[bool]:
        wanted = [_normal(_gathered([*((i, Fraction(1)) for i in row), (rep, -c)])) for row, rep in zip(rows, reps)]
        parts = self._taken_apart(wanted)
        order = sorted(parts, key=lambda e: e[-1][0])            # what is taken apart is newer than its parts, but for those that cannot be
        self._settle([e for e in order if parts[e] is None])
        for e in order:
            if parts[e] is not None:
                self._known[e] = all(self._known[p] for p in parts[e])
        return [self._known[e] for e in wanted]

    def _taken_apart(self, wanted: list[Equation]) -> dict[Equation, list[Equation] | None]:
        """Every equation that is met, with those that imply it; None: it cannot be taken apart."""
        out: dict[Equation, list[Equation] | None] = {}
        left = [e for e in wanted if e not in self._known]
        while left and len(out) < EQUATIONS:
            e = left.pop()
            if e not in out:
                parts = out[e] = self._parts(e)
                left += [p for p in parts or () if p not in out and p not in self._known]
        for e in left:
            out.setdefault(e, None)
        return out

    def _parts(self, equation: Equation) -> list[Equation] | None:
        """Equations that imply this one; None: nothing of it is a share times something known."""
        found = products(self.store, equation)
        self.effort += 1 + len(found or ())
        if found is None:
            return None
        shares = self._shares(found)
        if shares is None:
            return None
        rest = _normal({ONE_ID if p[0] < 0 else p[0]: c for p, c in found.items() if len(p) == 1})
        parts = [e for e in (rest, *(_normal(_gathered(group)) for group in shares.values())) if e]
        return None if parts == [equation] else parts

    def _shares(self, found: dict[tuple[int, ...], Fraction]) -> dict[int, list[tuple[int, Fraction]]] | None:
        """What each known factor is multiplied by: of a share's product the factor that is not open; of others one that a share has, or that most
        others have. None: a product's factors are all alone."""
        is_open, shares = self.store.is_open, {}
        pairs = [p for p in found if len(p) == 2]
        for x, y in pairs:
            if is_open[x] != is_open[y]:
                shares.setdefault(y if is_open[x] else x, []).append((x if is_open[x] else y, found[x, y]))
        left = []
        for x, y in pairs:
            if is_open[x] == is_open[y]:
                known = x if x in shares else y if y in shares else None
                if known is None:
                    left.append((x, y))
                else:
                    shares[known].append((y if known == x else x, found[x, y]))
        often = Counter(i for pair in left for i in set(pair))
        for x, y in left:
            known, other = (x, y) if often[x] >= often[y] else (y, x)
            if often[known] < 2:
                return None
            shares.setdefault(known, []).append((other, found[x, y]))
        return shares

    def _settle(self, equations: list[Equation]) -> None:
        """Prove what cannot be taken apart as a sum that is a multiple of a known identifier."""
        batches: dict[tuple[int, Fraction], list[tuple[Equation, list[int], int]]] = {}
        for e in equations:
            self._known[e] = False
            for rep, c in reversed(e):
                others = {d for i, d in e if i != rep}
                if len(e) > 2 and len(others) == 1 and not self.store.is_open[rep]:
                    batches.setdefault((len(e) - 1, -c / others.pop()), []).append((e, [i for i, _ in e if i != rep], rep))
                    break
        for (_, c), batch in batches.items():
            ok = self._prove(np.array([row for _, row, _ in batch], I64), np.array([rep for *_, rep in batch], I64), c)
            self._known.update((e, bool(proved)) for (e, _, _), proved in zip(batch, ok))


def products(store: Store, equation: Equation) -> dict[tuple[int, ...], Fraction] | None:
    """The combination as one of products of two identifiers, and of single ones that are none (-1 stands for the number 1); None if there are
    too many or one may be undefined."""
    found: list[tuple[Fraction, list[tuple[int, ...]]]] = []
    met: set[tuple[int, ...]] = set()
    todo = [(c, np.array([i])) for i, c in equation]
    while todo:
        flat = combination(store, todo)
        if flat is None or sum(len(ids) for arrays in flat.values() for ids in arrays) > PRODUCTS:
            return None
        todo = []
        for c, arrays in flat.items():
            keys = [(x,) if y is None else (x, y) if x < y else (y, x) for x, y in _factors(store, np.concatenate(arrays), todo, c)]
            found.append((c, keys))
            met.update(keys)
        if len(met) > PRODUCTS:
            return None
    return _collected(found)


def _collected(found: list[tuple[Fraction, list[tuple[int, ...]]]]) -> dict[tuple[int, ...], Fraction]:
    """The coefficient of each product, without those that cancel: added up over a common denominator, since most are met often and few are left."""
    denominator = lcm(1, *(c.denominator for c, _ in found))
    out: dict[tuple[int, ...], int] = {}
    for c, keys in found:
        weight = c.numerator * (denominator // c.denominator)
        for key in keys:
            out[key] = out.get(key, 0) + weight
    return {key: Fraction(n, denominator) for key, n in out.items() if n}


def _factors(store: Store, ids: np.ndarray, todo: list[tuple[Fraction, np.ndarray]], c: Fraction):
    """(x, y) for all products that identifiers are, (x, None) for what is no product. Those with a number as factor go to `todo`, times c."""
    codes = np.where(ids < 0, 0, store.code[ids])
    for code in np.unique(codes).tolist():
        mine, kind = ids[codes == code], store.ops[code][0][0]
        if kind not in ("mul", "dot"):
            yield from ((i, None) for i in mine.tolist())
            continue
        pairs = store.operands(code, store.definition(mine, code)).reshape(-1, 2)
        for column in (0, 1):
            number = store.is_constant[pairs[:, column]]
            todo += [(c * store.constants[x], np.array([y])) for x, y in zip(pairs[number, column].tolist(), pairs[number, 1 - column].tolist())]
            pairs = pairs[~number]
        yield from zip(pairs[:, 0].tolist(), pairs[:, 1].tolist())


def _gathered(summands: list[tuple[int, Fraction]]) -> dict[int, Fraction]:
    out: dict[int, Fraction] = {}
    for i, c in summands:
        out[i] = out.get(i, Fraction(0)) + c
    return out


def _normal(summands: dict[int, Fraction]) -> Equation:
    left = sorted((i, c) for i, c in summands.items() if c)
    return tuple((i, c / left[0][1]) for i, c in left)
