"""Who wrote what a call reads: producers within a rank by overlapping writes, across ranks through collectives and messages."""
from __future__ import annotations

import bisect
from collections import defaultdict, deque

from trainverify.diagnostics import Span
from trainverify.ir.trace import OpCall, Program, ScalarRef, TensorRef, inputs
from trainverify.replay.machine import overlap

Node = tuple[int, int]                        # rank, call index


class Dataflow:
    def __init__(self, program: Program):
        self.calls: dict[int, list[OpCall]] = {t.rank: t.ops for t in program.traces}
        self._spans = {t.rank: t.spans for t in program.traces}
        self._writes: dict[int, dict[int, list[tuple[int, TensorRef]]]] = {}
        self._members: dict[tuple, list[Node]] = defaultdict(list)
        self._sender: dict[Node, Node] = {}
        self._scalars: dict[tuple[int, int], int] = {}
        self._works: dict[Node, Node] = {}        # wait -> the receive that it completed
        self._places: dict[tuple[int, tuple], list[int]] = {}
        self._nth: dict[tuple, int] = {}
        self._place: dict[Node, tuple] = {}
        self._producers: dict[Node, list[Node]] = {}
        self._marks: dict[int, list[int]] = {}    # of each rank: collectives, and the beginnings of steps
        for trace in program.traces:
            self._index(trace.rank, trace.ops)
        self._match_messages(program)

    def _index(self, rank: int, ops: list[OpCall]) -> None:
        table: dict[int, list[tuple[int, TensorRef]]] = defaultdict(list)
        works: dict[int, OpCall] = {}
        marks = self._marks[rank] = []
        for call in ops:
            c = call.collective
            if call.name == "tv.step" or c is not None and c.kind not in ("send", "recv"):
                marks.append(call.index)
            if c is not None:
                if c.kind not in ("send", "recv"):
                    self._members[(c.group, c.group_name, c.seq)].append((rank, call.index))
                if c.work is not None:
                    works[c.work] = call
                for ref in c.outputs:
                    table[ref.storage].append((call.index, ref))
            elif call.name == "tv.wait" and call.args[0] in works:
                op = works[call.args[0]]
                if op.collective.kind == "recv":
                    for ref in op.collective.outputs:
                        table[ref.storage].append((call.index, ref))
                    self._sender[(rank, call.index)] = self._works[(rank, call.index)] = (rank, op.index)
            else:
                for ref in call.targets():
                    table[ref.storage].append((call.index, ref))
            if isinstance(call.outs, ScalarRef):
                self._scalars[(rank, call.outs.id)] = call.index
        self._writes[rank] = table

    def moment(self, node: Node) -> tuple[int, int]:
        """When a call is made, comparable between ranks: how many collectives and steps began before, and how many calls ago the last of them did."""
        marks = self._marks[node[0]]
        k = bisect.bisect_left(marks, node[1])
        return k, node[1] - (marks[k - 1] if k else 0)

    def _match_messages(self, program: Program) -> None:
        sent: dict[tuple, deque] = defaultdict(deque)
        for trace in program.traces:
            for call in trace.ops:
                c = call.collective
                if c is not None and c.kind == "send":
                    sent[(trace.rank, c.peer, c.group, c.tag)].append((trace.rank, call.index))
        for trace in program.traces:
            for call in trace.ops:
                c = call.collective
                if c is not None and c.kind == "recv":
                    box = sent[(c.peer, trace.rank, c.group, c.tag)]
                    if box:
                        self._sender[(trace.rank, call.index)] = box.popleft()

    def call(self, node: Node) -> OpCall:
        return self.calls[node[0]][node[1]]

    def span(self, node: Node) -> Span | None:
        i = self.call(node).span
        return self._spans[node[0]][i] if 0 <= i < len(self._spans[node[0]]) else None

    def writer(self, rank: int, ref: TensorRef, before: int) -> list[Node]:
        """The calls whose writes the reference may read, latest first, down to one that covers it whole."""
        out = []
        history = self._writes[rank].get(ref.storage, [])
        at = bisect.bisect_left(history, before, key=lambda w: w[0])
        for index, wrote in reversed(history[:at]):
            if overlap(ref, wrote):
                out.append((rank, index))
                if wrote == ref or wrote.numel >= ref.numel and _contiguous(wrote) and _inside(ref, wrote):
                    break
        return out

    def sender(self, node: Node) -> Node | None:
        """The send that a receive (or the wait that completed it) got its value from."""
        return self._sender.get(node)

    def place(self, node: Node) -> tuple | None:
        """What calls of the same line in the same step share."""
        span = self.span(node)
        return None if span is None or not span.file else (self.call(node).name, span.file, span.line, span.module, span.phase, span.step)

    def at_place(self, rank: int, place: tuple) -> list[int]:
        if not self._places:
            for r, ops in self.calls.items():
                for call in ops:
                    if (p := self.place((r, call.index))) is not None:
                        self._places.setdefault((r, p), []).append(call.index)
        return self._places.get((rank, place), [])

    def delivered(self, node: Node) -> Node:
        """The communication that a wait completed; any other call itself."""
        return self._works.get(node, node)

    def members(self, node: Node) -> list[Node]:
        """All members' calls of a collective, in order of ranks."""
        c = self.call(node).collective
        return self._members[(c.group, c.group_name, c.seq)]

    def twin(self, node: Node, rank: int) -> Node | None:
        """The same call on another rank: same op at the same line, the same time round."""
        if not self._nth:
            for r, ops in self.calls.items():
                count: dict[tuple, int] = defaultdict(int)
                for call in ops:
                    span = self.span((r, call.index))
                    place = (call.name, span and (span.file, span.line, span.phase))
                    self._nth[(r, place, count[place])] = call.index
                    self._place[(r, call.index)] = (place, count[place])
                    count[place] += 1
        place, n = self._place[node]
        index = self._nth.get((rank, place, n))
        return None if index is None else (rank, index)

    def scalar(self, rank: int, ref: ScalarRef) -> list[Node]:
        at = self._scalars.get((rank, ref.id))
        return [] if at is None else [(rank, at)]

    def producers(self, node: Node) -> list[Node]:
        """The calls that produced a call's inputs, over ranks."""
        if node not in self._producers:
            self._producers[node] = self._find_producers(node)
        return self._producers[node]

    def _find_producers(self, node: Node) -> list[Node]:
        rank, index = node
        call = self.call(node)
        out: list[Node] = []
        if node in self._sender:
            peer = self._sender[node]
            return self.producers(peer) if self.call(peer).collective.kind == "send" else [peer]
        c = call.collective
        if c is not None and c.kind != "send":
            for r, i in self._members[(c.group, c.group_name, c.seq)]:
                for ref in self.calls[r][i].collective.inputs:
                    out += self.writer(r, ref, i)
            return _unique(out)
        refs = c.inputs if c is not None else tuple(inputs(call))
        for ref in refs:
            out += self.writer(rank, ref, index)
        out += [n for a in call.args if isinstance(a, ScalarRef) for n in self.scalar(rank, a)]
        return _unique(out)

    def readers(self, node: Node, most: int = 8) -> list[Node]:
        """The next later calls on the same rank that read what this call wrote, until it is overwritten."""
        rank, index = node
        call = self.call(node)
        wrote = call.collective.outputs if call.collective is not None else call.targets()
        out: list[Node] = []
        for later in self.calls[rank][index + 1:]:
            refs = later.collective.inputs if later.collective is not None else inputs(later)
            if any(overlap(r, w) for r in refs for w in wrote):
                out.append((rank, later.index))
            if len(out) >= most or any(t in wrote for t in later.writes):
                break
        return out

    def first_reader(self, node: Node) -> Node | None:
        """The first later call on the same rank that reads what this call wrote."""
        rank, index = node
        call = self.call(node)
        wrote = call.collective.outputs if call.collective is not None else call.targets()
        for later in self.calls[rank][index + 1:]:
            if any(overlap(r, w) for r in inputs(later) for w in wrote):
                return (rank, later.index)
        return None


def _unique(nodes: list[Node]) -> list[Node]:
    return list(dict.fromkeys(nodes))


def _contiguous(ref: TensorRef) -> bool:
    expected = 1
    for size, stride in zip(reversed(ref.size), reversed(ref.stride)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _inside(a: TensorRef, b: TensorRef) -> bool:
    end = a.offset + sum((s - 1) * d for s, d in zip(a.size, a.stride))
    return a.dtype == b.dtype and b.offset <= a.offset and end < b.offset + b.numel
