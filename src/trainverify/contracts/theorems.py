"""Theorems: what an open block equals, for all values of its leaves; each is proved once per form (trusted).

Candidates are the reference's blocks that can be computed from the leaves alone. They and the open block's expression are evaluated in the
kernel's terms over fresh symbols; the kernel merges what it proves. A theorem lists the reference's operations that it speaks of. It holds for
another block of the same form if the reference did the same operations on that block's leaves, which is looked up.
"""
from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from trainverify.algebra.terms import Terms, TermValue
from trainverify.contracts.evaluate import Evaluator, prints_of
from trainverify.contracts.graph import Graph
from trainverify.contracts.guess import Guesses
from trainverify.contracts.patterns import CONSTANT, I32, I64, Blocks, Pattern
from trainverify.kernel.store import ZERO_ID, Store

EFFORT = 8_000                                # operations evaluated for all theorems: a program that needs more does not repeat itself
VARIANTS = 3                                  # theorems of one form: the reference may do different things with such leaves


class TooMuch(Exception):
    """Theorems cost more than they spare."""


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
    def __init__(self, graph: Graph, evaluator: Evaluator, guesses: Guesses):
        self._graph, self._evaluator, self._guesses = graph, evaluator, guesses
        self._of_form: dict[int, list[Theorem | None]] = {}
        self.counts = {"forms": 0, "theorems": 0, "applied": 0, "evaluated": 0}

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
            needed = sorted(likely)           # the theorem speaks of nothing else of the reference
            others = tuple(sorted({x for b in needed for x in self._graph.operands[b]} - likely - set(leaves)))
            slot, place, hit = self._attempt(block, (*leaves, *others), needed, factor)
            count = int((slot != CONSTANT).sum())
            if hit.all() or count > most:
                number = {b: i for i, b in enumerate((*leaves, *others, *needed))}
                steps = tuple((self._graph.signature[b], tuple([number[x] for x in self._graph.operands[b]])) for b in needed)
                pattern, used = self._evaluator.patterns.make((len(slot),), slot, place)
                same = tuple((leaves.index(b), number[b]) for b in needed if b in leaves)
                best, most = Theorem(len(others), steps, same, pattern, used, factor, None if hit.all() else np.flatnonzero(~hit)), count
            if hit.all():
                break
        return best

    def _attempt(self, block: int, leaves: Blocks, candidates: list[int], factor: Fraction) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Per element of the block: the leaf or candidate (counted through) and place that it is proved to be, times the factor, and whether any is."""
        g, ev = self._graph, self._evaluator
        m = ev.proving()
        values = self._reference(m, leaves, candidates)
        store = m.nodes
        store.parallel = True
        m.begin_side("parallel")
        mine = m.ids(self._expression(m, block, values)).reshape(-1).numpy()
        ids = np.concatenate([m.ids(values[b]).numpy() for b in (*leaves, *candidates)] or [np.zeros(0, I64)])
        owner = np.repeat(np.arange(len(leaves) + len(candidates)), [g.size[b] for b in (*leaves, *candidates)])
        places = np.concatenate([np.arange(g.size[b]) for b in (*leaves, *candidates)] or [np.zeros(0, I64)])
        known, first = np.unique(ids, return_index=True)
        whole = np.ones(len(mine), bool)
        if factor != 1:
            mine, whole = _divided(store, mine, factor)
        slot, place = np.full(len(mine), CONSTANT, I32), np.zeros(len(mine), I64)     # the bits of 0 are 0
        at = np.minimum(np.searchsorted(known, mine), max(len(known) - 1, 0))
        hit = (known[at] == mine) & store.clean[mine] & whole if len(known) else np.zeros(len(mine), bool)
        slot[hit], place[hit] = owner[first[at[hit]]], places[first[at[hit]]]
        fixed, held = ev.places(store, mine)
        fixed &= whole
        slot[fixed], place[fixed] = CONSTANT, held[fixed]
        return slot, place, hit | fixed

    def _reference(self, m: Terms, leaves: Blocks, candidates: list[int]) -> dict[int, TermValue]:
        """Flat values of the leaves (fresh symbols) and of what the reference computes from them."""
        g, ev = self._graph, self._evaluator
        m.nodes.parallel = False
        free = [b for b in leaves if b not in set(candidates)]
        symbols = ev.fresh(m, [g.size[b] for b in free])[1]
        for v in symbols:
            m.claims.guesses.learn(prints_of(m, v), v.ids.numpy())
        values = dict(zip(free, symbols))
        for b in candidates:
            values[b] = self._evaluated(m, b, values)
        return values

    def _expression(self, m: Terms, block: int, values: dict[int, TermValue]) -> TermValue:
        """The value of an open block from its leaves."""
        todo = [block]
        while todo:
            b = todo[-1]
            missing = [x for x in self._graph.operands[b] if x not in values]
            if missing:
                todo += missing
                continue
            todo.pop()
            if b not in values:
                values[b] = self._evaluated(m, b, values)
        return values[block]

    def _evaluated(self, m: Terms, b: int, values: dict[int, TermValue]) -> TermValue:
        g = self._graph
        s = g.signatures[g.signature[b]]
        self.counts["evaluated"] += 1
        if self.counts["evaluated"] > EFFORT:
            raise TooMuch
        return m.reshape(self._evaluator.apply(m, s, [values[x] for x in g.operands[b]]), (g.size[b],))


def _divided(store: Store, ids: np.ndarray, factor: Fraction) -> tuple[np.ndarray, np.ndarray]:
    """What the identifiers are the factor times of, and where that is seen."""
    out, seen = np.full(len(ids), ZERO_ID, I64), ids == ZERO_ID
    for code in np.unique(store.code[ids]).tolist():
        at = np.flatnonzero(store.code[ids] == code)
        if store.ops[code][0] == ("neg", None) and factor == -1:
            out[at], seen[at] = store.definition(ids[at], code)[:, 0], True
        elif store.ops[code][0] == ("mul", None):
            rows = store.definition(ids[at], code)
            is_factor = rows == store.constant(factor)
            some = is_factor.any(1)
            out[at[some]], seen[at[some]] = np.where(is_factor[some, 0], rows[some, 1], rows[some, 0]), True
    return out, seen
