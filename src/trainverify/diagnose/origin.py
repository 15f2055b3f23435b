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
from trainverify.algebra.fieldvalue import is_garbage
from trainverify.diagnose.dataflow import Dataflow, Node
from trainverify.ir.trace import ScalarRef, TensorRef
from trainverify.replay.memory import is_float

FACTORS = tuple(Fraction(n) for n in (2, 3, 4, 6, 8, -1)) + tuple(Fraction(1, n) for n in (2, 3, 4, 6, 8))
GOOD, OPEN, CONSTANT = "good", "open", "constant"
MICRO = ("exp", "mul", "sum", "inv", "matmul", "log", "add", "sub", "sqrt", "div")
KEPT = 1 << 24                                # elements of open values that are kept for a closer look


@dataclass(slots=True)
class Watch:
    """Hook target: fingerprints of the reference's values, then each parallel result's status: good; constant (no symbol in it, but
    no constant of the reference either); "x c" (c times values of the reference); open (none of these, kept in `values`)."""

    factors: tuple[Fraction, ...] = FACTORS
    prints: list[np.ndarray] = field(default_factory=list)
    table: np.ndarray | None = None
    status: dict[Node, str] = field(default_factory=dict)
    values: dict[Node, object] = field(default_factory=dict)
    kept: int = 0
    inverses: object = None                   # of the factors, as a value of the field
    nan: set[Node] = field(default_factory=set)
    garbage: set[Node] = field(default_factory=set)

    def value(self, side: str, machine, m, call, k: int, ref) -> None:
        if not is_float(ref.dtype):
            return
        if side == "parallel":
            self._mark(machine, m, call, ref)
        if m.name != "field":
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

    def found(self, m, v) -> bool:
        return bool(self._among(m.fingerprint(v).reshape(-1).numpy()).all())

    def _among(self, f: np.ndarray) -> np.ndarray:
        """Which fingerprints are values of the reference."""
        table = self._finish()
        if not len(table):
            return np.zeros(f.shape, dtype=bool)
        at = np.minimum(np.searchsorted(table, f), len(table) - 1)
        return table[at] == f

    def begin(self, m, everything) -> None:
        """Before the reference is replayed. Its symbols are values of it, and so are the results of the micro-operations inside its
        rows: fused and composed forms meet there."""
        self.inverses = None
        self.prints.append(np.unique(m.fingerprint(everything).reshape(-1).numpy()))
        for name in MICRO:
            setattr(m, name, self._noted(m, getattr(m, name)))

    def _noted(self, m, micro):
        def noted(*args, **kwargs):
            v = micro(*args, **kwargs)
            self.prints.append(np.unique(m.fingerprint(v).reshape(-1).numpy()))
            return v
        return noted

    def end(self, m) -> None:
        """After the reference is replayed."""
        for name in MICRO:
            delattr(m, name)

    def _mark(self, machine, m, call, ref) -> None:
        """Which results hold a NaN in float64, or uninitialised elements."""
        v = machine.memory[m.name].load(ref)
        for part in (v.re, v.im) if isinstance(v, Complex) else (v,):
            if m.name == "real" and bool(part.t.isnan().any()):
                self.nan.add((machine.rank, call.index))
            uninitialised = is_garbage(part) if m.name == "field" else None
            if uninitialised is not None and bool(uninitialised.any()):
                self.garbage.add((machine.rank, call.index))

    def _judge(self, rank: int, index: int, m, v) -> None:
        old = self.status.get((rank, index), GOOD)
        if old not in (GOOD, CONSTANT):
            return
        status = GOOD
        if not self.found(m, v):
            status = CONSTANT if m.is_const(v) else self._scale(m, v)
        n = int(np.prod(v.shape, dtype=np.int64))
        if status == OPEN and self.kept + n <= KEPT:
            self.values[(rank, index)] = v
            self.kept += n
        self.status[(rank, index)] = old if status == GOOD else status

    def _scale(self, m, v) -> str:
        """"x c" if every element is c times a value of the reference; a few elements are tried with all factors at once first."""
        n = int(np.prod(v.shape, dtype=np.int64))
        sample = m.take([v], torch.arange(1, n + 1, max(1, n // 8))[:, None])
        if self.inverses is None:
            self.inverses = m.reshape(m.stack([m.const(1 / c) for c in self.factors]), (1, len(self.factors)))
        likely = self._among(m.fingerprint(m.mul(sample, self.inverses)).numpy()).all(0)
        for k in np.flatnonzero(likely):
            if self.found(m, m.scale(v, 1 / self.factors[k])):
                return f"x {self.factors[k]}"
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
        self.region: set[Node] = set()        # all that was found to disagree

    def status(self, node: Node) -> str:
        """Of what a node delivers; a receive and a tracked scalar have the status of what they were made from."""
        if node in self.watch.status:
            return self.watch.status[node]
        if self.flow.sender(node) is not None or isinstance(self.flow.call(node).outs, ScalarRef):
            found = [self.status(p) for p in self.flow.producers(node)]
            return next((s for s in found if s not in (GOOD, CONSTANT)), GOOD)
        return GOOD

    def origins(self, rank: int, ref, before: int, marked: set[Node] | None = None) -> set[Node]:
        """Sources of the wrong region above one output: values that disagree in the same way, then a superfluous reduction."""
        starts = self.flow.writer(rank, ref, before) if isinstance(ref, TensorRef) else self.flow.scalar(rank, ref)
        if marked is not None:
            return self._walk(starts, lambda n: self._is_marked(n, marked))
        kinds = [s for s in map(self.status, starts) if s not in (GOOD, CONSTANT)]
        want = kinds[0] if kinds else OPEN
        seen: set[Node] = set()
        found = self._walk(starts, lambda n: self.status(n) == want, seen)
        found = found or self._walk(starts, lambda n: self.status(n) not in (GOOD, CONSTANT), seen)
        self.region |= seen
        return self._superfluous(seen) or found

    def _superfluous(self, region: set[Node]) -> set[Node]:
        """Collectives that made a multiple of the reference out of right values, and feed the wrong region."""
        scaled = [p for n in region if self.status(n) == OPEN for p in self.flow.producers(n) if self.status(p).startswith("x ")]
        sources = self._walk(scaled, lambda n: self.status(n).startswith("x "))
        return {s for s in sources if self.flow.call(s).collective is not None and self.flow.call(s).collective.kind != "send"
                and all(self.status(p) == GOOD for p in self.flow.producers(s))}

    def constants(self) -> list[Node]:
        """Where constants that feed the wrong region, and that the reference does not have, were made; in program order."""
        found = [p for n in self.region for p in self.flow.producers(n) if self.status(p) == CONSTANT]
        return sorted(self._walk(found, lambda n: self.status(n) == CONSTANT), key=lambda n: (n[1], n[0]))

    def _is_marked(self, node: Node, marked: set[Node]) -> bool:
        """A receive and a tracked scalar are marked as what they were made from."""
        if self.flow.sender(node) is None and not isinstance(self.flow.call(node).outs, ScalarRef):
            return node in marked
        return any(self._is_marked(p, marked) for p in self.flow.producers(node))

    def _walk(self, starts: list[Node], bad, seen: set[Node] | None = None) -> set[Node]:
        """The bad nodes above `starts`, through bad ones only, none of whose producers is bad; `seen` collects all bad ones."""
        out: set[Node] = set()
        seen = set() if seen is None else seen
        stack = [s for s in starts if bad(s)]
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            worse = [p for p in self.flow.producers(node) if bad(p)]
            if not worse:
                out.add(node)
            stack += worse
        return out

    def share(self, m, node: Node, groups: list[tuple[int, ...]]) -> tuple[int, ...] | None:
        """The smallest group over which the same call's results sum to values of the reference: a reduction is missing."""
        for group in sorted((g for g in groups if node[0] in g), key=len):
            parts = [self.watch.values.get(self.flow.twin(node, r)) for r in group]
            if any(v is None or tuple(v.shape) != tuple(parts[0].shape) for v in parts):
                continue
            total = parts[0]
            for v in parts[1:]:
                total = m.add(total, v)
            if self.watch.found(m, total):
                return group
        return None


def rank_origins(search: Search, wrong: list[tuple[object, int, object, int]], marked: set[Node] | None = None) -> list[Origin]:
    """Candidates over wrong outputs (key, rank, ref, index of the tv.output call), best first: those that explain most, then the
    earliest in program order. The same call on other ranks is one candidate."""
    by_place: dict[tuple, Origin] = {}
    for key, rank, ref, index in wrong:
        for node in search.origins(rank, ref, index, marked):
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

