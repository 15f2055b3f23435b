"""Guesses which element of the reference a new element equals: by fingerprint, and by fingerprint divided by likely factors (untrusted)."""
from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

import numpy as np

from trainverify.ir.trace import Program
from trainverify.kernel.claims import Prints
from trainverify.kernel.hashtable import HashTable
from trainverify.kernel.store import ZERO_ID, Store
from trainverify.relate.structure import Structure, divided, packed

SAMPLE = 4                                    # elements that are tried before a factor is tried on all
MOST_COUNTS = 4                               # numbers that the reference divides by, and that become factors
LARGEST_COUNT = 1 << 32
DECIMAL = {Fraction(10) ** k for k in range(3, 10)}           # epsilons, rates and decays are no counts


class Dictionary:
    """Fingerprints of the reference's elements, the earliest of each; factors in the order in which they are tried.

    Of elements that could not be proved to be the earliest with their fingerprint (the gradients of the biases of all keys are zero,
    which takes a long proof), marks by structure besides. What the reference divides by early (a number of tokens) is a factor too: others
    may divide later.
    """

    def __init__(self, store: Store, factors: Iterable[Fraction] = ()):
        self.factors = tuple(dict.fromkeys(factors))
        self._sizes = [c for c in self.factors if c.denominator == 1 and c > 1]
        self._store, self._counts = store, 0
        self._structure = Structure(store)
        self._ids, self._ambiguous, self._others = HashTable(), HashTable(), HashTable()
        self._zero: int | None = None
        self._is_ambiguous = False            # whether anything is; asked for every row

    def find(self, prints: np.ndarray) -> np.ndarray:
        return _look_up(self._ids, prints)

    def learn(self, prints: np.ndarray, ids: np.ndarray) -> None:
        self._ids.put(prints, ids[:, None])
        if len(ids) == 1 and (q := self._store.constants.get(int(ids[0]))) is not None:
            self._count(q)
        if self._zero is None and (ids == ZERO_ID).any():
            self._zero = int(prints[ids == ZERO_ID][0])

    def _count(self, q: Fraction) -> None:
        """A number that the reference multiplies with: if it is one over a count, the count is a factor, also with sizes of groups."""
        n = Fraction(q.denominator)
        if abs(q.numerator) == 1 and 1 < n < LARGEST_COUNT and n not in self.factors and n not in DECIMAL and self._counts < MOST_COUNTS:
            self._counts += 1
            near = [n, *(n * s for s in self._sizes), *(n / s for s in self._sizes)]
            self.factors = tuple(dict.fromkeys([*self.factors, *(f for c in near for f in (c, 1 / c))]))

    def ambiguous(self, prints: np.ndarray) -> np.ndarray:
        return self._ambiguous.get(prints)[0] if self._is_ambiguous else np.zeros(len(prints), bool)

    def find_other(self, code: int, rows: np.ndarray) -> np.ndarray:
        return _look_up(self._others, packed(self._structure.of_rows(code, rows)))

    def learn_other(self, prints: np.ndarray, code: int, rows: np.ndarray, ids: np.ndarray) -> None:
        self._ambiguous.put(prints, ids[:, None])
        self._is_ambiguous = self._is_ambiguous or bool(len(ids))
        self._others.put(packed(self._structure.of_rows(code, rows)), ids[:, None])

    def scales(self, index: np.ndarray, prints: Prints, code: int, rows: np.ndarray) -> Iterable[tuple[Fraction, np.ndarray]]:
        """(c, reps): rows[i], whose print is that of index[i], may be c * reps[i], or nothing where reps is -1."""
        some = index[np.unique(np.linspace(0, len(index) - 1, SAMPLE).astype(np.int64))]
        zero, structure = np.zeros(0, bool), None
        if self._zero is not None and self.ambiguous(np.array([self._zero])).any() and (zero := prints.of(index) == self._zero).any():
            structure = self._structure.of_rows(code, rows[zero])
        shown = prints.divided(some, self.factors)
        likely = (self.find(shown.reshape(-1)) > ZERO_ID).reshape(shown.shape).any(1)
        number = self._is_number(self.find(prints.of(index)))    # proposed as that number already, which is a multiple of every other
        for c, is_likely in zip(self.factors, likely.tolist()):
            if structure is not None:                            # zero over c is zero
                others = np.full(len(index), -1, np.int64)
                others[zero] = _look_up(self._others, packed(divided(structure, c)))
                yield c, others
            if is_likely:
                reps = self.find(prints.divided(index, (c,))[0])
                numbers = self._is_number(reps)
                reps[(reps == ZERO_ID) | numbers & number] = -1
                number |= numbers
                yield c, reps

    def _is_number(self, reps: np.ndarray) -> np.ndarray:
        return (reps >= 0) & self._store.is_constant[reps]


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
