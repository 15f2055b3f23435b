"""Long sums: two identifiers are equal if both are the same rational combination of the same summands (trusted).

Gradient norms sum tens of thousands of squares, grouped differently on both sides. Sums, differences, negations and multiples by
constants are written out down to what is none of these; then coefficients are compared, exactly.
"""
from __future__ import annotations

from fractions import Fraction
from math import lcm

import numpy as np

from trainverify.kernel.store import I64, Store

LIMIT = 1 << 21                               # summands
_WHOLE = 1 << 31                              # coefficients, over their common denominator


def combination(store: Store, parts: list[tuple[Fraction, np.ndarray]]) -> dict[Fraction, list[np.ndarray]] | None:
    """Identifiers by coefficient, none of which is a sum or a multiple; None if there are too many or one may be undefined."""
    out: dict[Fraction, list[np.ndarray]] = {}
    total = Fraction(0)
    left, count = list(parts), 0
    while left:
        c, ids = left.pop()
        constant = store.is_constant[ids]
        for i in ids[constant].tolist():
            total += c * store.constants[i]
        ids = ids[~constant]
        count += len(ids)
        if count > LIMIT or not store.clean[ids].all():
            return None
        codes = store.code[ids]
        for code in np.unique(codes).tolist():
            mine = ids[codes == code]
            further = _written_out(store, code, mine, c)
            if further is None:
                out.setdefault(c, []).append(mine)
            else:
                left += further[0]
                if len(further[1]):
                    out.setdefault(c, []).append(further[1])
    if total:
        out.setdefault(total, []).append(np.array([-1]))       # stands for 1
    return out


def _written_out(store: Store, code: int, ids: np.ndarray, c: Fraction):
    """(summands with coefficients, identifiers that stay) of c times identifiers with this operation; None: all stay."""
    kind = store.ops[code][0][0]
    if kind not in ("add", "sub", "neg", "mul"):
        return None
    rows = store.definition(ids, code)
    if kind == "add":
        return [(c, rows.reshape(-1))], rows[:0, 0]
    if kind == "sub":
        return [(c, rows[:, 0]), (-c, rows[:, 1])], rows[:0, 0]
    if kind == "neg":
        return [(-c, rows[:, 0])], rows[:0, 0]
    parts, rest = [], np.ones(len(ids), bool)
    for column in (0, 1):
        factors = np.where(rest & store.is_constant[rows[:, column]], rows[:, column], -1)
        for factor in np.unique(factors[factors >= 0]).tolist():
            parts.append((c * store.constants[factor], rows[factors == factor, 1 - column]))
        rest &= factors < 0
    return (parts, ids[rest]) if parts else None


def _coefficients(groups: dict[Fraction, list[np.ndarray]], denominator: int) -> tuple[np.ndarray, np.ndarray] | None:
    """(summands, coefficients over the denominator), without those that vanish."""
    ids = [np.concatenate(arrays) for arrays in groups.values()]
    weights = [c * denominator for c in groups]
    if any(abs(w) * max(map(len, ids)) >= _WHOLE for w in weights):
        return None
    every = np.concatenate([np.zeros(0, I64), *ids])
    names, at = np.unique(every, return_inverse=True)
    sums = np.zeros(len(names), I64)
    np.add.at(sums, at.reshape(-1), np.concatenate([np.zeros(0, I64), *(np.full(len(i), int(w)) for i, w in zip(ids, weights))]))
    return names[sums != 0], sums[sums != 0]


def equal_sums(store: Store, left: list[tuple[Fraction, np.ndarray]], right: list[tuple[Fraction, np.ndarray]]) -> bool:
    """Whether two rational combinations of identifiers are one. False: not shown."""
    a, b = combination(store, left), combination(store, right)
    if a is None or b is None:
        return False
    denominator = lcm(1, *(c.denominator for c in (*a, *b)))
    x, y = _coefficients(a, denominator), _coefficients(b, denominator)
    return x is not None and y is not None and np.array_equal(x[0], y[0]) and np.array_equal(x[1], y[1])
