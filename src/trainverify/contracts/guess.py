"""Guesses of what an open block may be: blocks of the reference that can be computed from its leaves and hold its numbers (not trusted).

Numbers are the blocks' elements at the recorded inputs, in float64. Only blocks near the leaves are looked at, so that a guess costs the same at
any depth of the program.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from heapq import heapify, heappop, heappush

import numpy as np
import torch

from trainverify.algebra.real import Real, RealValue
from trainverify.contracts.evaluate import apply
from trainverify.contracts.graph import Graph
from trainverify.contracts.patterns import I64, Blocks

DEPTH, NEAR = 40, 6                           # operations between leaves and what a block may be: if they say all of it, or only a part
AROUND = 2_000                                # blocks that are looked at
SAME, SMALL = 1e-10, 1e-6                     # relative: numbers that may be equal; elements that are too small to tell anything
SAMPLES = (32, 4096)                          # elements that are looked for before all are, at first and in the end


class Numbers:
    """The elements of blocks at the recorded inputs, computed when asked for."""

    def __init__(self, graph: Graph, real: Real, symbols: Sequence[RealValue]):
        """symbols: the recorded values of the first blocks, flat."""
        self._graph, self._real = graph, real
        self._values: dict[int, RealValue] = dict(enumerate(symbols))
        self._ordered: dict[int, np.ndarray] = {}
        self._indexed: set[int] = set()
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []      # numbers in order, and their blocks

    def of(self, block: int) -> np.ndarray:
        todo, g = [block], self._graph
        while todo:
            b = todo[-1]
            missing = [x for x in g.operands[b] if x not in self._values]
            if missing:
                todo += missing
                continue
            todo.pop()
            if b not in self._values:
                self._values[b] = self._computed(b)
        return self._values[block].t.numpy()

    def ordered(self, block: int) -> np.ndarray:
        """The finite ones but 0, each once, ascending."""
        found = self._ordered.get(block)
        if found is None:
            numbers = self.of(block)
            found = self._ordered[block] = np.unique(numbers[np.isfinite(numbers) & (numbers != 0)])
        return found

    def held(self, block: int, wanted: np.ndarray) -> np.ndarray:
        """Which of these numbers the block has."""
        low, high = _between(self.ordered(block), wanted)
        return high > low

    def holders(self, blocks: Sequence[int], wanted: np.ndarray) -> np.ndarray:
        """Those of the blocks that have some of the numbers, the ones with the most first."""
        self._index(blocks)
        owners = np.concatenate([_spread(owners, *_between(numbers, wanted)) for numbers, owners in self._runs] or [np.zeros(0, I64)])
        counts = np.bincount(owners, minlength=len(self._graph.size))[blocks]
        order = np.lexsort((blocks, -counts))
        return np.asarray(blocks)[order[:int((counts > 0).sum())]]

    def _index(self, blocks: Sequence[int]) -> None:
        """All numbers of all blocks that were asked for are kept in sorted runs, each at least twice as long as the next."""
        new = [b for b in blocks if b not in self._indexed]
        if not new:
            return
        self._indexed.update(new)
        run = _sorted(np.concatenate([self.ordered(b) for b in new]), np.repeat(np.array(new, I64), [len(self.ordered(b)) for b in new]))
        while self._runs and len(self._runs[-1][0]) < 2 * len(run[0]):
            old = self._runs.pop()
            run = _sorted(np.concatenate([old[0], run[0]]), np.concatenate([old[1], run[1]]))
        self._runs.append(run)

    def _computed(self, block: int) -> RealValue:
        s = self._graph.signatures[self._graph.signature[block]]
        if s.name == "opaque" and not self._real.knows(s.attr):
            return RealValue(torch.full((self._graph.size[block],), math.nan, dtype=torch.float64))     # nothing is guessed of it
        value = apply(self._real, s, [self._values[x] for x in self._graph.operands[block]])
        return self._real.reshape(value, (self._graph.size[block],))


def _sorted(numbers: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(numbers, kind="stable")
    return numbers[order], owners[order]


def _between(numbers: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where in the ordered numbers the wanted ones are: from, to."""
    room = SAME * np.abs(wanted)
    return np.searchsorted(numbers, wanted - room), np.searchsorted(numbers, wanted + room, side="right")


def _spread(owners: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """All owners in these ranges."""
    sizes = high - low
    starts = np.repeat(low - np.cumsum(sizes) + sizes, sizes)
    return owners[starts + np.arange(int(sizes.sum()))]


class Guesses:
    def __init__(self, graph: Graph, numbers: Numbers, factors: Sequence[Fraction]):
        self._graph, self._numbers, self._factors = graph, numbers, (Fraction(1), *factors)

    def likely(self, block: int, leaves: Blocks) -> Iterable[tuple[Fraction, set[int]]]:
        """Factors, and blocks of the reference that the block may consist of with all that they are computed from."""
        mine = self._numbers.of(block)
        mine = mine[np.isfinite(mine)]
        size = float(np.abs(mine).max(initial=0.0))
        if not size:
            return
        some = np.unique(mine[np.abs(mine) > SMALL * size])
        around = Around(self._graph, leaves)
        for factor in self._factors:
            wanted = some / float(factor)
            held, chosen = self._cover(wanted, around.strictly)
            if not held.all():                # elements that do not depend on all operands
                more, others = self._cover(wanted[~held], around.loosely(chosen))
                held[~held] = more
                chosen += others
            if held.any():
                yield factor, around.explained(chosen)

    def _cover(self, wanted: np.ndarray, blocks: Sequence[int]) -> tuple[np.ndarray, list[int]]:
        """Which of the numbers some of the blocks hold, and blocks that do: those that hold the most first."""
        held, chosen, sizes = np.zeros(len(wanted), bool), [], list(SAMPLES)
        while sizes and not held.all():
            rest = np.flatnonzero(~held)
            sample = wanted[rest[np.unique(np.linspace(0, len(rest) - 1, sizes[0]).astype(I64))]]
            more = self._cover_by(self._numbers.holders(blocks, sample).tolist(), wanted, held)
            chosen += more
            if not more:                      # what is held in few places only
                sizes.pop(0)
        return held, chosen

    def _cover_by(self, blocks: Sequence[int], wanted: np.ndarray, held: np.ndarray) -> list[int]:
        """The blocks that hold some of what is not held yet; `held` is brought up to date."""
        chosen = []
        for b in blocks:
            rest = np.flatnonzero(~held)
            has = self._numbers.held(b, wanted[rest])
            if has.any():
                held[rest[has]] = True
                chosen.append(b)
        return chosen


class Around:
    """Blocks of the reference near the leaves of an open block.

    strictly: leaves, and what is computed from leaves alone; loosely: what is computed from those that were chosen, or leaves, and others. Ascending.
    """

    def __init__(self, graph: Graph, leaves: Blocks):
        self._graph, self._leaves = graph, frozenset(leaves)
        self.strictly = self._reached(self._leaves, DEPTH, all)
        self._loosely: dict[frozenset[int], list[int]] = {}

    def loosely(self, chosen: Iterable[int]) -> list[int]:
        start = self._leaves | self.explained(chosen)
        if start not in self._loosely:
            self._loosely[start] = self._reached(start, NEAR, any)
        return self._loosely[start]

    def _reached(self, start: Iterable[int], depth: int, enough: Callable[[Iterable[bool]], bool]) -> list[int]:
        """What is computed from these by so many operations; `enough` says of which operands: all or any."""
        level = dict.fromkeys(start, 0)
        waiting, seen = sorted({u for b in level for u in self._graph.users[b]}), set()
        heapify(waiting)
        while waiting and len(level) < AROUND:
            b = heappop(waiting)
            operands = self._graph.operands[b]
            if b in seen or b in level or not enough(x in level for x in operands):
                seen.add(b)
                continue
            above = [level[x] for x in operands if x in level]
            at = 1 + (max(above) if enough is all else min(above))
            if at > depth:
                continue
            level[b] = at
            for u in self._graph.users[b]:
                heappush(waiting, u)
        return sorted(level)

    def explained(self, chosen: Iterable[int]) -> set[int]:
        """The blocks with all that they are computed from; of leaves, what other leaves say of them."""
        below: dict[int, frozenset[int]] = dict.fromkeys(self._leaves, frozenset())
        out: set[int] = set()
        for b in chosen:
            if b in self._leaves:
                out.add(b)
            else:
                out |= self._parts(b, below, DEPTH, False, {}) or self._parts(b, below, NEAR, True, {}) or set()
        for b in sorted(out & self._leaves):
            above = {x: parts for x, parts in below.items() if x != b and b not in parts}
            parts = self._parts(b, dict(above), DEPTH, False, {}) or self._parts(b, dict(above), NEAR, True, {})
            out = out | parts if parts else out - {b}
        return out

    def _parts(self, block: int, below: dict[int, frozenset[int]], depth: int, loosely: bool, failed: dict[int, int]) -> frozenset[int] | None:
        """The block with all that it is computed from, down to the leaves; None: not from the leaves alone (loosely: not at all), or by a long way.
        failed: how deep was looked below blocks for nothing."""
        if block in below:
            return below[block]
        operands = self._graph.operands[block]
        if not operands or depth <= failed.get(block, 0):
            return None
        found = []
        for x in operands:
            more = self._parts(x, below, depth - 1, loosely, failed)
            if more is not None:
                found.append(more)
            elif not loosely:
                found = []
                break
        if not found:
            failed[block] = depth
            return None
        below[block] = parts = frozenset((block,)).union(*found)
        return parts
