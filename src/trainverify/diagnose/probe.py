"""Finds by how much a term of the loss counts wrongly: what one line makes is doubled, with its gradient, and the outputs' answer says which
factor mends them (not trusted: the factor is tried like any repair).

Gradients and reported losses are linear in every term of the loss. With P the parallel value, D the one under which the term is doubled and R the
reference's, the factor f has R - P = (f - 1) (D - P): guessed from float64, checked in the field.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch

from trainverify.diagnose.candidate import Candidate
from trainverify.diagnose.dataflow import Node
from trainverify.diagnose.edit import Edit, scaled
from trainverify.diagnose.explain import Cause, Diagnosis
from trainverify.diagnose.places import Places, result
from trainverify.diagnose.relation import Relation, ratio
from trainverify.ir.trace import OpCall, TensorRef
from trainverify.relate.compare import Compared, Piece
from trainverify.replay.memory import is_float
from trainverify.replay.run import World

PROBE = "probe"                               # the kind of the outputs that a probe adds
MOST_LINES, MOST_TARGETS = 6, 4
SUMS = ("add", "add_", "sub", "sum", "stack", "cat")     # a line's value is told by the last of its other calls


@dataclass(frozen=True, slots=True)
class Target:
    """A wrong piece of an output, before it was clipped, and where it stands in memory."""

    number: int
    compared: Compared
    piece: Piece
    ref: TensorRef
    node: Node


class Probes:
    """doubled: replays an edited program in the field and in float64; None: it cannot run."""

    def __init__(self, diagnosis: Diagnosis, places: Places, doubled: Callable[[Edit], World | None]):
        self.d, self.flow, self.places, self.doubled = diagnosis, diagnosis.flow, places, doubled

    def candidates(self, cause: Cause) -> Iterator[Candidate]:
        targets = self._targets(cause)
        for node in self._lines()[:MOST_LINES] if targets else ():
            edit = self._scaled(node, Fraction(2))
            for t in targets:
                step = t.compared.key[2]
                edit.after[t.node].append(OpCall(0, "tv.output", (PROBE, str(t.number), step, t.ref), {}, None))
            world = self.doubled(edit)
            factor = self._factor(targets, world) if world is not None else None
            if factor is not None and factor != 1:
                yield self._candidate(node, factor, True)
                yield self._candidate(node, factor, False)

    def _candidate(self, node: Node, factor: Fraction, value: bool) -> Candidate:
        """value: the value is wrong too, and not the gradient alone."""
        line = f"{self.flow.span(node)}{self.places.called(node)}"
        amount = abs(1 - factor)
        times = "" if amount == 1 else f"{amount} x "
        if factor < 1:
            text, detail = f"parallel = reference + {times}the part of it that comes from {line}", f"a term too many: {times}what comes from {line}"
        else:
            text, detail = f"reference = parallel + {times}the part of it that comes from {line}", f"a term is missing: {times}what comes from {line}"
        words = f"what {line} makes, and its gradient" if value else f"the gradient of what {line} makes"
        return Candidate(f"scale by {factor} {words}", self._scaled(node, factor, value), Relation("additive term", "REL014", text, detail=detail), node)

    # ---- what is looked at
    def _targets(self, cause: Cause) -> list[Target]:
        """The first wrong pieces of a cause's gradients and scalars; those of other causes have other factors."""
        out: list[Target] = []
        for key in cause.keys:
            if key[0] not in ("gradient", "scalar") or key[2] != self.d.step or len(out) == MOST_TARGETS:
                continue
            compared = self.d.raw.get(key) or self.d.by_key[key].compared
            for p, recorded in zip(compared.pieces, self.d.by_key[key].compared.pieces):
                if not p.wrong("field") or not isinstance(recorded.recorded.ref, TensorRef) or recorded.recorded.declare:
                    continue
                ref, before = self.d.before_clipping(recorded) if key in self.d.raw else (recorded.recorded.ref, recorded.recorded.call.index)
                node = self.flow.writer(p.rank, ref, before)[:1]
                if node:
                    out.append(Target(len(out), compared, p, ref, self.places.settled(node[0])))
                    break
        return out

    def _factor(self, targets: list[Target], world: World) -> Fraction | None:
        """The factor that mends all targets that the line reaches."""
        held = {int(o.name): o.values for m in world.machines for o in m.outputs if o.kind == PROBE}
        field, found = self.d.watched.field, set()
        for t in targets:
            values = held.get(t.number)
            if values is None or "real" not in values:
                return None
            at = torch.from_numpy(t.piece.at)
            here, due = t.piece.parallel, t.piece.reference
            shape = tuple(here["field"].shape)
            doubled = field.reshape(field.take([values["field"]], at + 1), shape)
            grown = field.sub(doubled, here["field"])
            gap = field.sub(field.reshape(due["field"], shape), here["field"])
            floats = values["real"].t.reshape(-1)[at] - here["real"].t.reshape(-1)
            if not bool((floats != 0).any()):
                continue
            got = ratio(field, floats, due["real"].t.reshape(-1) - here["real"].t.reshape(-1), grown, gap)
            if got is None:
                return None
            found.add(1 + got)
        return found.pop() if len(found) == 1 else None

    # ---- lines
    def _lines(self) -> list[Node]:
        """For each line that makes one number in the forward, and has a backward: its last call that is no sum, latest lines first."""
        back, ahead = set(), {}
        for rank, ops in self.flow.calls.items():
            for call in ops:
                node = (rank, call.index)
                line, span = self.places.line(node), self.flow.span(node)
                if line is None or call.collective is not None or span.step != self.d.step:
                    continue
                place = (line[1], line[2], line[4])
                if line[3] == "backward":
                    back.add(place)
                elif line[3] == "forward" and self._is_number(call) and call.name.split(".")[1] not in SUMS:
                    ahead.setdefault(place, {})[rank] = node
        lines = [min(nodes.values()) for place, nodes in ahead.items() if place in back]
        return sorted(lines, key=lambda n: -n[1])

    def _is_number(self, call: OpCall) -> bool:
        targets = call.targets()
        return bool(targets) and call.name.startswith("aten.") and targets[0].numel == 1 and is_float(targets[0].dtype)

    def _scaled(self, node: Node, factor: Fraction, value: bool = True) -> Edit:
        """What a line makes, in every step and every time, and the gradient that its backward delivers, times a factor; or the gradient alone."""
        edit = Edit()
        for n in (n for o in self.places.occurrences([node], False) for n in o.values()) if value else ():
            edit.after[self.places.settled(n)] += scaled(self.flow.call(n).targets()[0], factor, self.flow.call(n).span)
        _, file, number, _, stack = self.places.line(node)
        for rank, ops in self.flow.calls.items():
            first = None
            for call in ops:
                line = self.places.line((rank, call.index))
                if line is None or (line[1], line[2], line[3], line[4]) != (file, number, "backward", stack) or result(call) is None or call.collective is not None:
                    continue
                first = first or (call.name, result(call).numel)
                if (call.name, result(call).numel) == first:
                    edit.after[(rank, call.index)] += scaled(result(call), factor, call.span)
        return edit
