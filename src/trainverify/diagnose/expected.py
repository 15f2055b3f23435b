"""What the reference has in place of a wrong result: which of its operations, and which of its elements (not trusted; shown, never judged by).

Known by fingerprints where the wrong result is a multiple or a share of a value of the reference. Else the reference's operation of the
same name that reads the same operand, or the one nearest to that operand, is taken.
"""
from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from trainverify.diagnose.dataflow import Dataflow, Node
from trainverify.diagnose.evidence import prints_of
from trainverify.diagnose.origin import Search
from trainverify.diagnose.trial import Outcome, Place, result_of
from trainverify.diagnose.watch import OPEN, Home
from trainverify.ir.trace import OpCall, Program, TensorRef, inputs
from trainverify.replay.memory import is_float

MOST_CANDIDATES = 4
NOISE = 1e-3                                  # of the largest element: what is smaller is compared as if it were this large


@dataclass(frozen=True, slots=True)
class Expected:
    """The reference's elements in place of a result: flat positions `at` (-1: zero) in what `home` names; call -1 are the symbols."""

    home: Home
    at: np.ndarray
    how: str = ""                             # why this operation, where it is a guess

    @property
    def place(self) -> Place | None:
        return ("reference", 0, self.home.call) if self.home.call >= 0 else None


class Expectations:
    """Candidates for each wrong result. `reference`: the program up to the step that is replayed."""

    def __init__(self, search: Search, field, reference: Program, groups: list[tuple[int, ...]]):
        self.search, self.watch, self.flow, self.field, self.groups = search, search.watch, search.flow, field, groups
        self.reference = Dataflow(reference)
        self.rank = reference.traces[0].rank
        self.ops = reference.traces[0].ops

    def candidates(self, node: Node) -> list[Expected]:
        """The likeliest first."""
        shared = self._shared(node)
        return [e for e in ([shared] if shared is not None else self._by_operands(node)) if e.home.call < len(self.ops)]

    def operand(self, node: Node, ref: TensorRef) -> Expected | None:
        """Where the reference has what a call reads."""
        makers = self.flow.writer(node[0], ref, node[1])
        prints = prints_of(self.search, makers[0], ref) if len(makers) == 1 else None
        found = self.watch.home(prints) if prints is not None else None
        return Expected(*found) if found is not None else None

    def result(self, node: Node) -> Expected | None:
        """Where the reference has what a call wrote."""
        held = self.watch.printed.get(node) or [(None, None)]
        found = self.watch.home(held[0][1]) if held[0][1] is not None else None
        return Expected(*found) if found is not None and found[0].call < len(self.ops) else None

    def call(self, home: Home) -> OpCall:
        return self.ops[home.call]

    def _shared(self, node: Node) -> Expected | None:
        """Of a result whose sum over a group is a value of the reference."""
        if self.search.status(node) != OPEN or (group := self.search.share(self.field, node, self.groups)) is None:
            return None
        total = None
        for rank in group:
            v = self.watch.values[self.flow.twin(node, rank)]
            total = v if total is None else self.field.add(total, v)
        found = self.watch.home(self.field.fingerprint(total).reshape(-1).numpy())
        return Expected(*found) if found is not None else None

    def _by_operands(self, node: Node) -> list[Expected]:
        call = self.flow.call(node)
        targets = _targets(call)
        if not targets or not is_float(targets[0].dtype):
            return []
        refs = call.collective.inputs if call.collective is not None else tuple(inputs(call))
        out: list[Expected] = []
        for ref in (r for r in refs if is_float(r.dtype)):
            held = self.operand(node, ref)
            if held is None or held.home.call >= len(self.ops):
                continue
            if ref.numel == targets[0].numel and (call.collective is not None or self.search.status(node).startswith("x ")):
                out.append(held)              # of a communication or a multiplication: what came in may be what is due
            readers = [self.ops[i] for r, i in self.reference.readers((self.rank, held.home.call))] if held.home.call >= 0 else []
            same = [c for c in readers if c.name == call.name]
            near = sorted((c for c in self.ops if c.name == call.name and c not in same), key=lambda c: abs(c.index - held.home.call)) if call.collective is None else []
            for c in [*same, *near[:2]]:
                at = _same_places(_targets(c), targets[0], ref, held.at)
                if at is not None:
                    out.append(Expected(Home(c.index, 0), at, "" if c in same else "the reference's nearest operation of this kind"))
        return sorted(out, key=lambda e: (bool(e.how), e.home.call < 0))[:MOST_CANDIDATES]


def chosen(search: Search, node: Node, candidates: list[Expected], outcome: Outcome, symbols: torch.Tensor) -> Expected | None:
    """The first candidate from which the result differs; of a multiple the one that it is a multiple of."""
    ours = result_of(outcome, "parallel", node)
    status = search.status(node)
    if ours is None:
        return None
    for e in candidates:
        theirs = value(e, outcome, symbols)
        if theirs is None or theirs.numel() != ours.numel():
            continue
        theirs = theirs.reshape(ours.shape)
        if status.startswith("x ") and not torch.allclose(ours, theirs * float(Fraction(status[2:])), rtol=1e-9, atol=1e-12):
            continue
        if differ(theirs, ours, 1e-9):
            return e
    return None


def value(e: Expected, outcome: Outcome, symbols: torch.Tensor) -> torch.Tensor | None:
    """The reference's elements in a trial, flat."""
    source = symbols if e.place is None else result_of(outcome, "reference", e.place[1:], e.home.target)
    at = torch.from_numpy(e.at)
    if source is None or not len(e.at) or int(e.at.max()) >= source.numel():
        return None
    return torch.where(at >= 0, source.reshape(-1)[at.clamp(min=0)], 0.0)


def differ(theirs: torch.Tensor, ours: torch.Tensor, least: float) -> bool:
    """Whether the sides differ by more than a part `least` of their size, or ours is no number where theirs is."""
    return bool(where(theirs, ours, least).any())


def where(theirs: torch.Tensor, ours: torch.Tensor, least: float) -> torch.Tensor:
    size = torch.maximum(theirs.abs(), ours.abs())
    largest = torch.where(size.isfinite(), size, 0.0).max() if size.numel() else 0.0
    size = size.clamp(min=NOISE * float(largest))
    return ours.isnan() & theirs.isfinite() | theirs.isfinite() & ours.isfinite() & ((theirs - ours).abs() > least * size)


def _targets(call: OpCall) -> tuple[TensorRef, ...]:
    return call.collective.outputs if call.collective is not None else call.targets()


def _same_places(theirs: tuple[TensorRef, ...], ours: TensorRef, operand: TensorRef, at: np.ndarray) -> np.ndarray | None:
    """Which elements of a reference result stand in place of ours: those of the operand, or all in order."""
    if not theirs or not is_float(theirs[0].dtype):
        return None
    if theirs[0].numel == ours.numel:
        return np.arange(ours.numel)
    if operand.size == ours.size and len(at) == ours.numel and (at >= 0).all() and int(at.max()) < theirs[0].numel:
        return at
    return None
