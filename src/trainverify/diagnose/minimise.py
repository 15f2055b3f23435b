"""Delta debugging over the inputs of a counterexample: as few nonzero elements as a bounded number of trials finds, then small integers (not trusted).

Deterministic: the order of the attempts depends on the inputs' blocks alone.
"""
from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import torch

ZEROING = 0.65                               # the part of all attempts that may go into zeroing


class Minimiser:
    """shows(values): whether the difference is still there; at most `most` calls are made of it."""

    def __init__(self, values: torch.Tensor, blocks: Sequence[tuple[int, int]], shows: Callable[[torch.Tensor], bool], most: int):
        self.values, self.shows, self.most, self.tried = values.clone(), shows, most, 0
        self.blocks = [torch.arange(first, first + n) for first, n in blocks if n]

    def run(self) -> torch.Tensor:
        self._attack(self.blocks, int(self.most * ZEROING), torch.zeros_like)
        left = [kept for b in self.blocks if len(kept := b[self.values[b] != 0])]
        for smaller, until in ROUNDING:
            self._attack([b for b in left if not bool(_is_short(self.values[b]).all())], int(self.most * until), smaller)
        return self.values

    def _try(self, at: torch.Tensor, new: torch.Tensor) -> bool:
        """Take these new values if the difference stays."""
        if torch.equal(self.values[at], new):
            return True
        if self.tried >= self.most:
            return False
        candidate = self.values.clone()
        candidate[at] = new
        self.tried += 1
        if self.shows(candidate):
            self.values = candidate
            return True
        return False

    def _attack(self, sets: list[torch.Tensor], until: int, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Change sets of elements, the largest first; a set that cannot be changed as a whole is halved, blocks before their elements."""
        order = 0
        heap: list[tuple[int, int, list[torch.Tensor]]] = []

        def put(its: list[torch.Tensor]) -> None:
            nonlocal order
            if its:
                heapq.heappush(heap, (-sum(map(len, its)), order, its))
                order += 1
        put(sets)
        while heap and self.tried < until:
            its = heapq.heappop(heap)[2]
            at = torch.cat(its)
            if self._try(at, change(self.values[at])):
                continue
            if len(its) > 1:
                put(its[:len(its) // 2])
                put(its[len(its) // 2:])
            elif len(at) > 1:
                put([at[:len(at) // 2]])
                put([at[len(at) // 2:]])


def _integers(old: torch.Tensor) -> torch.Tensor:
    """Whole numbers of the same sign, 1, 2, 3 in turn, so that neighbours differ."""
    turn = torch.arange(len(old), dtype=old.dtype) % 3 + 1
    return torch.where(_is_short(old), old, torch.where(old < 0, -turn, turn))


def _units(old: torch.Tensor) -> torch.Tensor:
    return torch.where(_is_short(old), old, torch.where(old < 0, -1.0, 1.0).to(old.dtype))


def _tenths(old: torch.Tensor) -> torch.Tensor:
    """One decimal, and no zero that was none."""
    size = (old.abs() * 10).round().clamp(min=1) / 10
    return torch.where(old == 0, old, torch.where(old < 0, -size, size))


def _is_short(v: torch.Tensor) -> torch.Tensor:
    return (v == v.round()) & (v.abs() <= 9)


ROUNDING = ((_integers, 0.8), (_units, 0.9), (_tenths, 1.0))   # each with the part of all attempts after which the next begins
