"""The part of a program that some of its outputs are computed from (trusted: what is proved of the part is said of the whole).

By storages, and never by regions or killed writes: a call that is kept keeps every earlier call that wrote to any storage which it names, so
each storage that matters holds at each moment what it held in the whole program. With a call come all members of its collective, the sender
of its message, and what Python had asked of values by then: the calls that are there are those that Python made after these answers.
"""
from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterable

import msgspec

from trainverify.ir.trace import RESIZE, OpCall, Program, references, resized, scalar_ids
from trainverify.relate.decisions import is_sized_by_data
from trainverify.replay.collectives import message
from trainverify.replay.machine import DECIDED

Place = tuple[int, int]                       # rank, position in its trace
ALWAYS = {"tv.symbol", "tv.data", "tv.step"}
ASKED = {"tv.decision", "tv.escape"}          # and DECIDED, and what data give sizes to
NAMED = {"tv.param", "tv.stepped"}            # the first of each name says what the parameter holds


def part(program: Program, outputs: Iterable[Place]) -> Program:
    """Only the calls that these calls need, in their order."""
    kept = _Part(program).of(outputs)
    traces = []
    for t in program.traces:
        works = {c.collective.work for p, c in enumerate(t.ops) if (t.rank, p) in kept and c.collective is not None} - {None}
        ops = [c for p, c in enumerate(t.ops) if (t.rank, p) in kept or c.name == "tv.wait" and c.args[0] in works]
        traces.append(msgspec.structs.replace(t, ops=ops))
    return Program(traces, program.blobs)


class _Part:
    def __init__(self, program: Program):
        self._ops = {t.rank: t.ops for t in program.traces}
        self._writers: dict[Place, list[int]] = defaultdict(list)          # rank, storage -> positions
        self._scalars: dict[Place, int] = {}
        self._members: dict[tuple, list[Place]] = defaultdict(list)
        self._sent: dict[tuple, Place] = {}
        self._asked: dict[int, list[int]] = {}
        self._kept: set[Place] = set()
        self._stack: list[Place] = []
        self._whole: dict[Place, int] = {}    # rank, storage -> before which position all that wrote to it is kept
        self._answered: dict[int, int] = defaultdict(int)                  # rank -> how many of what was asked is kept
        for t in program.traces:
            self._index(t.rank, t.ops)

    def _index(self, rank: int, ops: list[OpCall]) -> None:
        asked = self._asked[rank] = []
        named: set[tuple] = set()
        for p, call in enumerate(ops):
            c = call.collective
            for storage in {resized(call)} if call.name == RESIZE else {r.storage for r in (c.outputs if c is not None else call.targets())}:
                self._writers[rank, storage].append(p)
            for scalar in scalar_ids((call.outs,)):
                self._scalars[rank, scalar] = p
            if c is not None and c.kind == "send":
                self._sent[message(rank, c)] = (rank, p)
            elif c is not None and c.kind != "recv":
                self._members[c.group, c.group_name, c.seq].append((rank, p))
            if call.name in NAMED and (call.name, call.args[0]) not in named:
                named.add((call.name, call.args[0]))
                asked.append(p)
            elif call.name in ASKED or call.name.rpartition(".")[0] in DECIDED or is_sized_by_data(call):
                asked.append(p)

    def of(self, outputs: Iterable[Place]) -> set[Place]:
        self._stack = [*outputs, *((r, p) for r, ops in self._ops.items() for p, c in enumerate(ops) if c.name in ALWAYS)]
        while self._stack:
            place = self._stack.pop()
            if place not in self._kept:
                self._kept.add(place)
                self._need(*place)
        return self._kept

    def _need(self, rank: int, p: int) -> None:
        """Put on the stack what a call needs."""
        call = self._ops[rank][p]
        c = call.collective
        for storage in {resized(call)} if call.name == RESIZE else {r.storage for r in references(call)}:
            done, writers = self._whole.get((rank, storage), 0), self._writers[rank, storage]
            if p > done:
                self._stack += [(rank, w) for w in writers[bisect.bisect_left(writers, done):bisect.bisect_left(writers, p)]]
                self._whole[rank, storage] = p
        self._stack += [(rank, self._scalars[rank, s]) for s in scalar_ids((*call.args, *call.kwargs.values())) if (rank, s) in self._scalars]
        if c is not None and c.kind == "recv":
            self._stack += [self._sent[m]] if (m := message(rank, c)) in self._sent else []
        elif c is not None and c.kind != "send":
            self._stack += self._members[c.group, c.group_name, c.seq]
        if call.name not in ALWAYS:
            asked, done = self._asked[rank], self._answered[rank]
            now = bisect.bisect_left(asked, p)
            self._stack += [(rank, q) for q in asked[done:now]]
            self._answered[rank] = max(now, done)
