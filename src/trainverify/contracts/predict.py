"""What a block's elements may be: claims that a replay goes on under while they are proved (not trusted).

A theorem is about all values of its leaves, so both sides are evaluated in float64 at values drawn at random: what is equal there by chance alone is
rare, other than at the recorded inputs, where tokens repeat and much is zero.
"""
from __future__ import annotations

import math
from itertools import chain

import numpy as np
import torch

from trainverify.algebra.real import Real, RealValue
from trainverify.contracts.evaluate import apply
from trainverify.contracts.patterns import CONSTANT, I32, I64, bits
from trainverify.contracts.task import Claim, Task

NEAR = 1e-12                                  # relative: two float64 evaluations of one number
DRAWS = ((0.5, 1.5), (-1.5, 1.5))             # values of leaves: logarithms and roots are defined; then others, so that no maximum is taken for its largest


class Predictor:
    def __init__(self, real: Real):
        self._real = real
        self._drawn: dict[tuple[int, int, int], RealValue] = {}

    def claim(self, task: Task) -> Claim | None:
        """Per element of the block, divided by the factor, a part and place with its number, or zero, or an infinity; None: some are no such thing."""
        if any(o.signature.name == "opaque" and not self._real.knows(o.signature.attr) for o in chain(task.steps, task.mine)):
            return None                       # float64 knows nothing of it
        numbers, mine = self._numbers(task, 0)
        plain = np.isfinite(mine) & (mine != 0)
        if np.isnan(mine).any():
            return None
        at = _equal(numbers, mine[plain])
        if at is None or not self._holds_elsewhere(task, at, plain):
            return None
        starts = np.cumsum([0, *task.sizes, *(o.size for o in task.steps)])
        slot, place = np.full(len(mine), CONSTANT, I32), bits(torch.from_numpy(mine))
        slot[plain] = np.searchsorted(starts, at, side="right") - 1
        place[plain] = at - starts[slot[plain]]
        return slot, place

    def _holds_elsewhere(self, task: Task, at: np.ndarray, plain: np.ndarray) -> bool:
        """Whether what is equal at the first draw is so at the second, as far as that is defined."""
        numbers, mine = self._numbers(task, 1)
        said, fixed = numbers[at], mine[~plain]
        apart = np.abs(said - mine[plain]) > NEAR * np.abs(numbers[np.isfinite(numbers)]).max(initial=0.0)
        return not (apart | np.isnan(said) & np.isfinite(mine[plain])).any() and not (np.isfinite(fixed) & (fixed != 0)).any()

    def _numbers(self, task: Task, draw: int) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of all parts, and those of the block divided by the factor."""
        values = self._values(task, draw)
        parts = [v.t.reshape(-1).numpy() for v in values[:len(task.sizes) + len(task.steps)]]
        return np.concatenate([*parts, np.zeros(0)]), values[-1].t.reshape(-1).numpy() / float(task.factor)

    def _values(self, task: Task, draw: int) -> list[RealValue]:
        values = [self._leaf(i, n, draw) for i, n in enumerate(task.sizes)]
        for o in task.steps:
            values.append(self._real.reshape(apply(self._real, o.signature, [values[x] for x in o.operands]), (o.size,)))
        for leaf, step in task.same:
            values[leaf] = values[step]
        for o in task.mine:
            values.append(self._real.reshape(apply(self._real, o.signature, [values[x] for x in o.operands]), (o.size,)))
        return values

    def _leaf(self, i: int, size: int, draw: int) -> RealValue:
        found = self._drawn.get((i, size, draw))
        if found is None:
            found = self._drawn[i, size, draw] = self._real.data(torch.from_numpy(np.random.default_rng((i, size, draw)).uniform(*DRAWS[draw], size)))
        return found


def _equal(numbers: np.ndarray, wanted: np.ndarray) -> np.ndarray | None:
    """Where each wanted number (none is zero) occurs first; None: one does not."""
    order = np.argsort(numbers, kind="stable")
    ordered = np.append(numbers[order], math.nan)
    low = np.searchsorted(ordered, wanted - NEAR * np.abs(wanted))
    high = np.searchsorted(ordered, wanted + NEAR * np.abs(wanted), side="right")
    if (low >= high).any():
        return None
    first = order[low] if len(wanted) else np.zeros(0, I64)
    for step in range(1, int((high - low).max(initial=0))):
        more = low + step < high
        first[more] = np.minimum(first[more], order[low[more] + step])
    return first
