"""Integers that say which rows a call takes, or where its rows are cut (trusted): evaluated at full size before the programs' spaces are read.

Where tokens go to experts, integers put rows in an order and say how many each expert gets. Which rows these are must be known for the spaces
(`Spaces.pick`), so these integers, and the calls on integers of which they are made, are executed first. What floats decide is not known here.
"""
from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from trainverify.ir.trace import OpCall, Program, Sequence, TensorRef, references
from trainverify.ops.table import OpTable
from trainverify.replay.machine import Hooks, Machine
from trainverify.replay.run import replay
from trainverify.shrink.classes import Classes, Where
from trainverify.shrink.facts import base
from trainverify.shrink.flow import flows
from trainverify.shrink.integers import LOOK, Full, Integers, Wanted
from trainverify.shrink.repeat import is_float
from trainverify.shrink.rules import CHOICES

TAKEN = {"index": 1, "_unsafe_index": 1, "index_put": 1, "_index_put_impl": 1, "_unsafe_index_put": 1, "index_select": 2, "index_add": 2}
CUT = {"_grouped_mm": 2}
Argument = tuple[Where, int, int]             # of a call (the first like it), at a position among its references


@dataclass(slots=True)
class Rows:
    """What is known of the arguments of calls that are told apart."""

    values: dict[Argument, np.ndarray] = field(default_factory=dict)
    chosen: set[Argument] = field(default_factory=set)           # integers that floats decide
    differing: set[Argument] = field(default_factory=set)        # not the same in all calls like this one

    def of(self, where: Where, like: int, position: int) -> np.ndarray | None:
        key = (where, like, position)
        return None if key in self.chosen or key in self.differing else self.values.get(key)


def integers_of(call: OpCall) -> list[tuple[int, TensorRef]]:
    """Arguments of a call that say which rows it takes, where it cuts rows, or what it sorts, with their positions."""
    op = base(call.name)
    at = TAKEN.get(op, CUT.get(op, 0 if op in CHOICES else -1))
    if at < 0 or at >= len(call.args) or (op not in CHOICES and not any(is_float(r) for r in references(call))):
        return []
    given = call.args[at].items if isinstance(call.args[at], Sequence) else (call.args[at],)
    found = [a for a in given if isinstance(a, TensorRef)]
    if len(found) != 1 or len(found[0].size) != 1 or found[0].dtype not in ("int64", "int32") or found[0].numel < 2:
        return []
    return [(list(references(call)).index(found[0]), found[0])]


class Known(Integers):
    """The evaluation; `rows` is what it finds."""

    def __init__(self, classes: Classes, table: OpTable):
        self.classes, self.table, self.rows = classes, table, Rows()
        asked = {where: {call.index: tuple(p for p, _ in integers_of(call)) for call in layout.repeats.distinct() if integers_of(call)}
                 for where, layout in classes.layouts.items()}
        if not any(asked.values()):
            return
        self.ranks = {side: flows(classes, side, {r: asked[s, r] for s, r in classes.layouts if s == side}) for side in classes.programs}
        self.wanted = {}
        for ranks in self.ranks.values():
            for rank in ranks:
                self.wanted[rank.layout.where] = self._asked(rank, asked[rank.layout.where])
        for side, program in classes.programs.items():
            traces = self._slices(side, Full())
            replay(Program(traces, program.blobs), [], self.table, Hooks(before=(self._before,)))

    def _asked(self, rank, asked: dict[int, tuple[int, ...]]) -> Wanted:
        found, repeats, where = Wanted(), rank.layout.repeats, rank.layout.where
        for k, like in enumerate(repeats.like):
            for p in asked.get(like, ()):
                sid = repeats.named[k][p]
                if (k, sid) in rank.chosen:
                    self.rows.chosen.add((where, like, p))
                else:
                    ref = repeats.forms[repeats.form[k]].refs[p]
                    found.looked[k].append((p, TensorRef(sid, ref.offset, ref.size, ref.stride, ref.dtype), None))
        return found

    def _before(self, machine: Machine, call: OpCall) -> None:
        if call.name != LOOK:
            return
        where = (machine.trace.side, machine.rank)
        like = self.classes.layouts[where].repeats.like[call.index]
        for p, ref, _ in self.wanted[where].looked[call.index]:
            now = machine.native.tensor(ref).numpy().astype(np.int64)
            if not np.array_equal(self.rows.values.setdefault((where, like, p), now), now):
                self.rows.differing.add((where, like, p))


def rows_known(classes: Classes, table: OpTable) -> Rows:
    """Which rows the calls of both programs take."""
    return Known(classes, table).rows


__all__ = ["Rows", "rows_known"]
