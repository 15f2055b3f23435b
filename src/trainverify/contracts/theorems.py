"""Theorems: what an open block equals, for all values of its leaves; each is proved once per form (trusted).

Candidates are the reference's blocks that can be computed from the leaves alone. They and the open block's expression are evaluated in the
kernel's terms over fresh symbols; the kernel merges what it proves (`task.py`). Where numbers say what all of the block's elements are
(`predict.py`), that is a claim, and somebody else may prove it meanwhile (`docket.py`). A theorem lists the reference's operations that it speaks of.
It holds for another block of the same form if the reference did the same operations on that block's leaves, which is looked up.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch

from trainverify.contracts.docket import Docket, Lost
from trainverify.contracts.evaluate import Evaluator
from trainverify.contracts.graph import Graph
from trainverify.contracts.guess import Guesses
from trainverify.contracts.patterns import CONSTANT, Blocks, Pattern, bits
from trainverify.contracts.predict import Predictor
from trainverify.contracts.task import Result, Task, constants_of, operations

VARIANTS = 3                                  # theorems of one form: the reference may do different things with such leaves


@dataclass(frozen=True, slots=True)
class Theorem:
    """others: how many blocks of the reference besides the leaves it speaks of; it holds for all values of those, too. steps: operations of the
    reference on leaves, others and earlier steps (counted through). same: leaves that are such a step's result. The block's elements are factor *
    pattern over leaves, others and steps; but for those at `open`, of which it says nothing."""

    others: int
    steps: tuple[tuple[int, Blocks], ...]
    same: tuple[tuple[int, int], ...]
    pattern: Pattern
    used: Blocks
    factor: Fraction
    open: np.ndarray | None


class Theorems:
    def __init__(self, graph: Graph, evaluator: Evaluator, guesses: Guesses, predictor: Predictor, docket: Docket):
        self._graph, self._evaluator, self._guesses, self._predictor, self._docket = graph, evaluator, guesses, predictor, docket
        self._of_form: dict[int, list[Theorem | None]] = {}
        self.counts = {"forms": 0, "theorems": 0, "applied": 0}

    def about(self, block: int) -> tuple[Theorem, Blocks] | None:
        """A theorem on an open block, and the blocks that its pattern is over."""
        form, leaves = self._graph.form(block)
        known = self._of_form.setdefault(form, [])
        for theorem in known:
            if theorem is None:
                return None
            found = self._applied(theorem, block, leaves)
            if found is not None:
                return found
        if len(known) >= VARIANTS:
            return None
        self.counts["forms"] += not known
        with np.errstate(all="ignore"):       # guesses by numbers that may be too large, or none
            theorem = self._prove(block, leaves)
        known.append(theorem)
        self.counts["theorems"] += theorem is not None
        return None if theorem is None else self._applied(theorem, block, leaves)

    def _applied(self, theorem: Theorem, block: int, leaves: Blocks) -> tuple[Theorem, Blocks] | None:
        blocks: list[int | None] = [*leaves, *[None] * theorem.others]
        for signature, refs in theorem.steps:
            b = self._done(signature, [blocks[r] for r in refs])
            if b is None:
                return None
            for r, x in zip(refs, self._graph.operands[b]):
                blocks[r] = x
            blocks.append(b)
        if any(blocks[leaf] != blocks[step] for leaf, step in theorem.same):
            return None
        self.counts["applied"] += 1
        return theorem, tuple([blocks[u] for u in theorem.used])

    def _done(self, signature: int, operands: list[int | None]) -> int | None:
        """The reference's block of an operation on these operands; None stands for any."""
        g = self._graph
        if None not in operands:
            b = g.find(signature, tuple(operands))
            return b if b is not None and g.of_reference[b] else None
        known = [x for x in operands if x is not None]
        for b in g.users[known[0]] if known else ():
            if g.signature[b] == signature and all(x is None or x == y for x, y in zip(operands, g.operands[b])):
                return b
        return None

    # ---- proving
    def _prove(self, block: int, leaves: Blocks) -> Theorem | None:
        best, most = None, 0
        for factor, likely in self._guesses.likely(block, leaves):
            theorem, count, whole = self._attempt(block, leaves, sorted(likely), factor)
            if whole or count > most:
                best, most = theorem, count
            if whole:
                break
        return best

    def _attempt(self, block: int, leaves: Blocks, needed: list[int], factor: Fraction) -> tuple[Theorem | None, int, bool]:
        """A theorem about the block that speaks of nothing else of the reference than its leaves and what is needed, how many of the elements it says
        anything of that is no constant, and whether it says something of all."""
        g, ev = self._graph, self._evaluator
        others = tuple(sorted({x for b in needed for x in g.operands[b]} - set(needed) - set(leaves)))
        parts = (*leaves, *others, *needed)
        number = {b: i for i, b in enumerate(parts)}
        steps = tuple((g.signature[b], tuple([number[x] for x in g.operands[b]])) for b in needed)
        same = tuple((leaves.index(b), number[b]) for b in needed if b in leaves)
        mine = self._opened(block, number)
        number.update((b, len(parts) + i) for i, b in enumerate(mine))
        done, asked = operations(g, needed, number), operations(g, mine, number)
        task = Task(ev.seed, ev.factors, tuple([g.size[b] for b in (*leaves, *others)]), done, same, asked, factor, None,
                    constants_of((*done, *asked), ev.field.constants))
        claim = self._predictor.claim(task)
        result = self._docket.ask(replace(task, claim=claim), claim is not None)
        if isinstance(result, Lost):
            return None, 0, False
        slot, place, hit = (*claim, np.ones(len(claim[0]), bool)) if result is None or result.holds else self._told(result)
        pattern, used = ev.patterns.make((len(slot),), slot, place)
        open_ = None if hit.all() else np.flatnonzero(~hit)
        return Theorem(len(others), steps, same, pattern, used, factor, open_), int((slot != CONSTANT).sum()), open_ is None

    def _told(self, result: Result) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the result says of elements, with constants as a pattern has them."""
        contents_ = [self._evaluator.content(x) for x in result.numbers]
        stand = np.array([x is not None for x in contents_], bool)
        held = bits(torch.tensor([0.0 if x is None else x for x in contents_], dtype=torch.float64))
        fixed = np.flatnonzero(result.hit & (result.slot == CONSTANT))
        place, hit = result.place.copy(), result.hit.copy()
        place[fixed], hit[fixed] = held[result.place[fixed]], stand[result.place[fixed]]
        place[~hit] = 0                       # the bits of 0 are 0
        return result.slot, place, hit

    def _opened(self, block: int, known: dict[int, int]) -> list[int]:
        """An open block and those below it that are not known, operands first."""
        todo, out = [block], {}
        while todo:
            b = todo[-1]
            missing = [x for x in self._graph.operands[b] if x not in known and x not in out]
            if missing:
                todo += missing
                continue
            todo.pop()
            out[b] = None
        return list(out)
