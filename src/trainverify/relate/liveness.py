"""Which recorded calls something that leaves the program depends on, over all ranks (for warnings only; not trusted).

A call matters if its result, or what is computed from it, is an output, becomes a number or a decision, or leaves for Python. Dependence is
by storages: whoever wrote into one before a call that matters reads it matters too, so that a call is never taken for idle by mistake.
"""
from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable

from trainverify.ir.trace import OpCall, ScalarRef, Trace, inputs, tensors
from trainverify.replay.collectives import message

_NO_SINKS = frozenset({"tv.data", "tv.symbol", "tv.resize", "tv.wait", "tv.stepped"})


def idle_calls(traces: Iterable[Trace]) -> set[tuple[int, int]]:
    """(rank, index) of the calls on which nothing depends."""
    return _Walk(list(traces)).idle()


class _Walk:
    """From what leaves back to everything that it depends on."""

    def __init__(self, traces: list[Trace]):
        self.ops = {t.rank: t.ops for t in traces}
        self.writers: dict[tuple[int, int], list[int]] = defaultdict(list)       # rank and storage -> calls that write it, in order
        self.partners: dict[tuple, list[tuple[int, int]]] = defaultdict(list)    # collective or message -> its calls
        self.live: set[tuple[int, int]] = set()
        self.pending: list[tuple[int, int]] = []
        for rank, ops in self.ops.items():
            for i, call in enumerate(ops):
                for storage in _written(call):
                    self.writers[rank, storage].append(i)
                if call.collective is not None:
                    self.partners[_meeting(rank, call)].append((rank, i))
                elif _leaves(call):
                    self._mark(rank, i)

    def idle(self) -> set[tuple[int, int]]:
        seen: dict[tuple[int, int], int] = {}          # how many of a storage's writers are marked already
        while self.pending:
            rank, i = self.pending.pop()
            call = self.ops[rank][i]
            if call.collective is not None:
                for other in self.partners[_meeting(rank, call)]:
                    self._mark(*other)
            for storage in _read(call):
                writers = self.writers.get((rank, storage), ())
                n = bisect_left(writers, i)
                for w in writers[seen.get((rank, storage), 0):n]:
                    self._mark(rank, w)
                seen[rank, storage] = max(n, seen.get((rank, storage), 0))
        return {(rank, i) for rank, ops in self.ops.items() for i in range(len(ops))} - self.live

    def _mark(self, rank: int, i: int) -> None:
        if (rank, i) not in self.live:
            self.live.add((rank, i))
            self.pending.append((rank, i))


def _leaves(call: OpCall) -> bool:
    if call.name.startswith("tv."):
        return call.name not in _NO_SINKS
    return isinstance(call.outs, ScalarRef) or call.outs is not None and not any(True for _ in tensors(call.outs))


def _written(call: OpCall) -> set[int]:
    found = {t.storage for t in call.targets()}
    return found | {t.storage for t in call.collective.outputs} if call.collective is not None else found


def _read(call: OpCall) -> set[int]:
    found = {t.storage for t in inputs(call)}
    return found | {t.storage for t in call.collective.inputs} if call.collective is not None else found


def _meeting(rank: int, call: OpCall) -> tuple:
    c = call.collective
    return message(rank, c) if c.kind in ("send", "recv") else (c.group, c.group_name, c.seq)
