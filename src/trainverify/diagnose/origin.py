"""Where a difference arises: the first operation whose inputs agree with the reference and whose result does not.

A value agrees if every element's fingerprint is a value of the reference, or is constant. The search walks back from a wrong
output through producers that disagree in the same way; it stops where all inputs agree. Guesses only.
"""
from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import torch

from trainverify.algebra.base import Complex
from trainverify.diagnose.dataflow import Dataflow, Node
from trainverify.ir.trace import ScalarRef, TensorRef
from trainverify.replay.memory import is_float

FACTORS = tuple(Fraction(n) for n in (2, 3, 4, 6, 8, -1)) + tuple(Fraction(1, n) for n in (2, 3, 4, 6, 8))
GOOD, OPEN = "good", "open"


@dataclass(slots=True)
class Watch:
    """Hook target: fingerprints of the reference's values, then each parallel result's status (good, open, or x c)."""

    factors: tuple[Fraction, ...] = FACTORS
    prints: list[np.ndarray] = field(default_factory=list)
    table: np.ndarray | None = None
    status: dict[Node, str] = field(default_factory=dict)

    def value(self, side: str, machine, m, call, k: int, ref) -> None:
        if m.name != "field" or not is_float(ref.dtype):
            return
        v = machine.memory["field"].load(ref)
        for part in (v.re, v.im) if isinstance(v, Complex) else (v,):
            if side == "reference":
                self.prints.append(np.unique(m.fingerprint(part).reshape(-1).numpy()))
            else:
                self._judge(machine.rank, call.index, m, part)

    def _finish(self) -> np.ndarray:
        if self.table is None:
            self.table = np.unique(np.concatenate(self.prints)) if self.prints else np.zeros(0, dtype=np.int64)
            self.prints.clear()
        return self.table

    def _found(self, m, v) -> bool:
        return self._among(m.fingerprint(v).reshape(-1).numpy())

    def _among(self, f: np.ndarray) -> bool:
        table = self._finish()
        if not len(table) or not len(f):
            return not len(f)
        at = np.minimum(np.searchsorted(table, f), len(table) - 1)
        return bool((table[at] == f).all())

    def symbols(self, m, everything) -> None:
        """The symbols themselves are values of the reference."""
        self.prints.append(np.unique(m.fingerprint(everything).reshape(-1).numpy()))

    def _judge(self, rank: int, index: int, m, v) -> None:
        old = self.status.get((rank, index), GOOD)
        if old == GOOD:
            self.status[(rank, index)] = GOOD if m.is_const(v) or self._found(m, v) else self._scale(m, v)

    def _scale(self, m, v) -> str:
        """"x c" if every element is c times a value of the reference; a few elements are tried with all factors at once first."""
        n = int(np.prod(v.shape, dtype=np.int64))
        sample = m.take([v], torch.arange(1, n + 1, max(1, n // 8))[:, None])
        inverse = m.stack([m.const(1 / c) for c in self.factors])
        prints = m.fingerprint(m.mul(sample, m.reshape(inverse, (1, len(self.factors))))).numpy()
        for k, c in enumerate(self.factors):
            if self._among(prints[:, k]) and self._found(m, m.scale(v, 1 / c)):
                return f"x {c}"
        return OPEN


@dataclass(slots=True)
class Origin:
    """A candidate: the call, how its result relates to the reference, and which outputs it reaches."""

    node: Node
    status: str
    outputs: set = field(default_factory=set)
    ranks: set = field(default_factory=set)


class Search:
    def __init__(self, flow: Dataflow, watch: Watch):
        self.flow, self.watch = flow, watch

    def status(self, node: Node) -> str:
        """Of what a node delivers; a receive and a tracked scalar have the status of what they were made from."""
        if node in self.watch.status:
            return self.watch.status[node]
        sender = self.flow._sender.get(node)
        if sender is not None or isinstance(self.flow.call(node).outs, ScalarRef):
            found = [self.status(p) for p in self.flow.producers(node)]
            return next((s for s in found if s != GOOD), GOOD)
        return GOOD

    def origins(self, rank: int, ref, before: int) -> set[Node]:
        """Sources of the wrong region above one output: prefer those that disagree in the same way as the output."""
        starts = self.flow.writer(rank, ref, before) if isinstance(ref, TensorRef) else self.flow.scalar(rank, ref)
        kinds = [self.status(s) for s in starts if self.status(s) != GOOD]
        want = kinds[0] if kinds else OPEN
        found = self._walk(starts, lambda s: s == want)
        return found or self._walk(starts, lambda s: s != GOOD)

    def _walk(self, starts: list[Node], bad) -> set[Node]:
        out: set[Node] = set()
        seen: set[Node] = set()
        stack = [s for s in starts if bad(self.status(s))]
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            worse = [p for p in self.flow.producers(node) if bad(self.status(p))]
            if not worse:
                out.add(node)
            stack += worse
        return out


def rank_origins(search: Search, wrong: list[tuple[object, int, object, int]]) -> list[Origin]:
    """Candidates over wrong outputs (key, rank, ref, index of the tv.output call), best first: those that explain most, then the
    earliest in program order. The same call on other ranks is one candidate."""
    by_place: dict[tuple, Origin] = {}
    for key, rank, ref, index in wrong:
        for node in search.origins(rank, ref, index):
            call = search.flow.call(node)
            span = search.flow.span(node)
            place = (call.name, span and (span.file, span.line))
            origin = by_place.get(place)
            if origin is None:
                origin = by_place[place] = Origin(node, search.status(node))
            if node[1] < origin.node[1]:
                origin.node = node
            origin.outputs.add(key)
            origin.ranks.add(node[0])
    return sorted(by_place.values(), key=lambda o: (-len(o.outputs), o.node[1], o.node[0]))

