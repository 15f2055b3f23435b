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
LOW, HIGH = 0.5, 1.5                          # values of leaves: logarithms and roots of them are defined


class Predictor:
    def __init__(self, real: Real):
        self._real = real
        self._drawn: dict[tuple[int, int], RealValue] = {}

    def claim(self, task: Task) -> Claim | None:
        """Per element of the block, divided by the factor, a part and place with its number, or zero, or an infinity; None: some are no such thing."""
        values = self._values(task)
        if values is None:
            return None
        parts = [v.t.reshape(-1).numpy() for v in values[:len(task.sizes) + len(task.steps)]]
        mine = values[-1].t.reshape(-1).numpy() / float(task.factor)
        plain = np.isfinite(mine) & (mine != 0)
        if np.isnan(mine).any():
            return None
        at = _equal(np.concatenate([*parts, np.zeros(0)]), mine[plain])
        if at is None:
            return None
        starts = np.cumsum([0, *map(len, parts)])
        slot, place = np.full(len(mine), CONSTANT, I32), bits(torch.from_numpy(mine))
        slot[plain] = np.searchsorted(starts, at, side="right") - 1
        place[plain] = at - starts[slot[plain]]
        return slot, place

    def _values(self, task: Task) -> list[RealValue] | None:
        """All values of a task; None: it has a function that float64 knows nothing of."""
        if any(o.signature.name == "opaque" and not self._real.knows(o.signature.attr) for o in chain(task.steps, task.mine)):
            return None
        values = [self._leaf(i, n) for i, n in enumerate(task.sizes)]
        for o in task.steps:
            values.append(self._real.reshape(apply(self._real, o.signature, [values[x] for x in o.operands]), (o.size,)))
        for leaf, step in task.same:
            values[leaf] = values[step]
        for o in task.mine:
            values.append(self._real.reshape(apply(self._real, o.signature, [values[x] for x in o.operands]), (o.size,)))
        return values

    def _leaf(self, i: int, size: int) -> RealValue:
        found = self._drawn.get((i, size))
        if found is None:
            found = self._drawn[i, size] = self._real.data(torch.from_numpy(np.random.default_rng((i, size)).uniform(LOW, HIGH, size)))
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
