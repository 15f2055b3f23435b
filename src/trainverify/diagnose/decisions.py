"""Decisions that the reference does not make, seen with the findings: a cause of them, or a mere consequence (not trusted)."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from trainverify.diagnose.dataflow import Dataflow, Node
from trainverify.diagnostics import Diagnostic
from trainverify.replay.run import World

MOST_CALLS = 200_000


@dataclass(frozen=True, slots=True)
class Place:
    """An unmatched decision of REL008 and the calls that may be meant: those at its line on its ranks."""

    diagnostic: Diagnostic
    nodes: tuple[Node, ...]

    @property
    def first(self) -> list[Node]:
        """On each rank, the first."""
        return [(rank, min(i for r, i in self.nodes if r == rank)) for rank in dict.fromkeys(r for r, _ in self.nodes)]


def places(world: World, diagnostics: Sequence[Diagnostic]) -> list[Place]:
    found = []
    for d in diagnostics:
        if d.code == "REL008" and d.span is not None:
            nodes = [(m.rank, x.call.index) for m in world.machines if m.rank in d.ranks for x in m.decisions
                     if (span := m.span(x.call)) is not None and (span.file, span.line) == (d.span.file, d.span.line) and span.step == d.span.step]
            found.append(Place(d, tuple(nodes)))
    return found


def above(flow: Dataflow, starts: Sequence[Node], among: set[Node]) -> set[Node]:
    """One of `among` that lies above the starts (in what these were computed from), if any does."""
    seen: set[Node] = set()
    found: set[Node] = set()
    stack = list(starts)
    while stack and len(seen) < MOST_CALLS and not found:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in among:
            found.add(node)
        stack += flow.producers(node)
    return found


def follows(place: Place, flow: Dataflow, wrong: set[Node]) -> bool:
    """Whether the decision, when it is first taken on each rank, is one of values that were computed from wrong ones."""
    return bool(place.nodes) and all(above(flow, [node], wrong) for node in place.first)


def told(diagnostics: Sequence[Diagnostic], consequences: Sequence[Diagnostic]) -> list[Diagnostic]:
    """The same diagnostics, those that merely follow from the findings as notes."""
    return [msgspec.structs.replace(d, severity="note", message=f"{d.message}; this follows from the difference above", fix="")
            if any(d is c for c in consequences) else d for d in diagnostics]
