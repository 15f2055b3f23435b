"""Which claims are instances of one that was settled before (trusted).

An obligation is proved for all values of its leaves. A row whose leaves are equal wherever the proved row's are is that obligation with
other leaves, so it holds too, if its leaves have the signs that the proof was given. To see that costs one comparison per leaf; to name
the row canonically costs several sorts.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

KEEP = 16                                     # patterns of one kind of claim


@dataclass(slots=True)
class Pattern:
    """again, first: positions whose identifier has occurred before in the row, and where for the first time; signs: of the row's
    identifiers, where a proof depends on them. None of the rest: proved; else unfold: positions, after arranging the row in this
    order, to be replaced by their definitions."""

    again: np.ndarray
    first: np.ndarray
    signs: np.ndarray | None
    order: np.ndarray | None = None
    unfold: np.ndarray | None = None

    def fits(self, rows: np.ndarray, signs: np.ndarray) -> np.ndarray:
        """Which of some rows of identifiers are instances; signs: of all identifiers."""
        ok = (rows[:, self.again] == rows[:, self.first]).all(1)
        if self.signs is not None and ok.any():
            ok[ok] = (signs[rows[ok]] == self.signs).all(1)
        return ok


class Patterns:
    """Patterns by kind of claim."""

    def __init__(self) -> None:
        self._by_kind: dict[tuple, list[Pattern]] = {}

    def of(self, kind: tuple) -> list[Pattern]:
        return self._by_kind.setdefault(kind, [])

    def learn(self, kind: tuple, row: np.ndarray, signs: np.ndarray | None, order: np.ndarray | None = None, unfold: np.ndarray | None = None) -> None:
        """Remember a row (identifiers) that is proved, or with which unfolding it is."""
        known = self.of(kind)
        if len(known) < KEEP:
            _, first, inverse = np.unique(row, return_index=True, return_inverse=True)
            same = first[inverse.reshape(-1)]
            again = np.flatnonzero(same != np.arange(len(row)))
            known.append(Pattern(again, same[again], None if signs is None else signs[row], order, unfold))
