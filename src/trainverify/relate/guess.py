"""Guesses which element of the reference a new element equals: by fingerprint, and by fingerprint divided by likely factors (untrusted)."""
from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

import numpy as np

from trainverify.ir.trace import Program
from trainverify.kernel.claims import Prints
from trainverify.kernel.hashtable import HashTable
from trainverify.kernel.store import ZERO_ID

SAMPLE = 4                                    # elements that are tried before a factor is tried on all


class Dictionary:
    """Fingerprints of the reference's elements, the earliest of each, and the earliest that could not be proved to be that one;
    factors in the order in which they are tried."""

    def __init__(self, factors: Iterable[Fraction] = ()):
        self.factors = tuple(dict.fromkeys(factors))
        self._ids, self._others = HashTable(), HashTable()

    def find(self, prints: np.ndarray) -> np.ndarray:
        return _look_up(self._ids, prints)

    def find_other(self, prints: np.ndarray) -> np.ndarray:
        return _look_up(self._others, prints)

    def learn(self, prints: np.ndarray, ids: np.ndarray) -> None:
        self._ids.put(prints, ids[:, None])

    def learn_other(self, prints: np.ndarray, ids: np.ndarray) -> None:
        self._others.put(prints, ids[:, None])

    def scales(self, index: np.ndarray, prints: Prints) -> Iterable[tuple[Fraction, np.ndarray]]:
        """(c, reps): index[i] may be c * reps[i], or nothing where reps is -1."""
        some = index[np.unique(np.linspace(0, len(index) - 1, SAMPLE).astype(np.int64))]
        for c in self.factors:
            if (self.find(prints.divided(some, c)) > ZERO_ID).any():
                marks = prints.divided(index, c)
                reps = self.find(marks)
                reps[reps == ZERO_ID] = -1
                yield c, reps
                yield c, np.where(reps >= 0, self.find_other(marks), -1)


def _look_up(table: HashTable, prints: np.ndarray) -> np.ndarray:
    found, ids = table.get(prints)
    return np.where(found, ids[:, 0], -1)


def likely_factors(parallel: Program) -> list[Fraction]:
    """Sizes of groups and the world, numbers of shares and microbatches (as far as calls are repeated), their products and inverses, and -1."""
    world = len(parallel.traces)
    sizes = {len(call.collective.group) for t in parallel.traces for call in t.ops if call.collective is not None and call.collective.group}
    base = sorted({n for n in (*sizes, world) if n > 1})
    products = sorted({a * b for a in base for b in base} | set(base) | {2, 3, 4, 8})
    return [q for n in [*base, *(p for p in products if p not in base)] for q in (Fraction(n), Fraction(1, n))] + [Fraction(-1)]
