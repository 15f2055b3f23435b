"""Which calls belong together in an edit: the same line on all ranks and in all steps, what stands above a call, and the groups that the
ranks divide into (not trusted)."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from trainverify.diagnose.dataflow import Dataflow, Node
from trainverify.diagnose.words import Names
from trainverify.ir.trace import OpCall, TensorRef

Occurrence = dict[int, Node]                  # rank -> its call: what all ranks do at one line, the same time round
Family = dict[int, tuple[int, ...]]           # rank -> its group, of groups that divide the ranks
MOST_ABOVE, MOST_LEVELS = 2000, 60


class Places:
    def __init__(self, flow: Dataflow, names: Names):
        self.flow, self.names = flow, names
        self._at: dict[tuple, dict[int, dict[tuple[int, int], int]]] = defaultdict(lambda: defaultdict(dict))   # line -> rank -> (step, time) -> call
        self._key: dict[Node, tuple[tuple, tuple[int, int]]] = {}
        self._waits: dict[tuple[int, int], int] = {}
        for rank, ops in flow.calls.items():
            for call in ops:
                self._note(rank, call)

    def _note(self, rank: int, call: OpCall) -> None:
        if call.name == "tv.wait":
            self._waits[(rank, call.args[0])] = call.index
        span = self.flow.span((rank, call.index))
        if span is None or not span.file or call.name.startswith("tv."):
            return
        line = (call.name, span.file, span.line, span.phase, tuple((file, at) for file, at, _ in span.stack))
        here = self._at[line][rank]
        time = sum(1 for step, _ in here if step == span.step) if span.step else len(here)
        here[(span.step, time)] = call.index
        self._key[(rank, call.index)] = (line, (span.step, time))

    def occurrences(self, nodes: Iterable[Node], exact: bool) -> list[Occurrence]:
        """Every time that all ranks are at these calls' lines, in every step; exact: only the same times round as these calls."""
        lines: dict[tuple, set[int]] = defaultdict(set)
        for line, (_, time) in (self._key[n] for n in nodes if n in self._key):
            lines[line].add(time)
        out: dict[tuple, Occurrence] = {}
        for line, times in lines.items():
            for rank, calls in self._at[line].items():
                for (step, time), index in calls.items():
                    if not exact or time in times:
                        out.setdefault((line, step, time), {})[rank] = (rank, index)
        return list(out.values())

    def line(self, node: Node) -> tuple | None:
        """What calls of one line share: op, file, line, phase, and from where that was called. None: the call has no line."""
        key = self._key.get(node)
        return key[0] if key is not None else None

    def at_line(self, line: tuple, rank: int) -> list[Node]:
        """A rank's calls of a line, in all steps."""
        return [(rank, i) for i in self._at[line][rank].values()] if rank in self._at.get(line, ()) else []

    def alike(self, node: Node) -> list[Node]:
        """The calls of the same operation at the same line, on all ranks and in all steps, wherever that was called."""
        line = self.line(node)
        found = [(rank, i) for other, ranks in self._at.items() if line is not None and other[:3] == line[:3] for rank, calls in ranks.items() for i in calls.values()]
        return sorted(found)

    def called(self, node: Node) -> str:
        """" called at FILE:LINE" for a line of a helper: one that other lines or another file calls."""
        line = self.line(node)
        if line is None or not line[4] or line[4][0][0] == line[1] and sum(other[:4] == line[:4] for other in self._at) < 2:
            return ""
        return f" called at {line[4][0][0]}:{line[4][0][1]}"

    def settled(self, node: Node) -> Node:
        """The call after which a call's result stands: for asynchronous communication its wait."""
        c = self.flow.call(node).collective
        if c is None or c.work is None:
            return node
        return (node[0], self._waits.get((node[0], c.work), node[1]))

    def above(self, nodes: Iterable[Node]) -> list[Node]:
        """These calls and what they were computed from, nearest first, over ranks."""
        level, seen = list(dict.fromkeys(nodes)), {}
        for _ in range(MOST_LEVELS):
            seen.update(dict.fromkeys(level))
            level = list(dict.fromkeys(p for n in level for p in self.flow.producers(n) if p not in seen))
            if not level or len(seen) > MOST_ABOVE:
                break
        return list(seen)

    def families(self) -> list[Family]:
        """Divisions of the ranks into groups, as the program has them: mesh axes, then groups of one size, then all ranks."""
        sets: dict[object, list[tuple[int, ...]]] = defaultdict(list)
        for group, axis in self.names.groups.items():
            key = axis or next((k for k in range(len(self.names.groups)) if not any(set(group) & set(g) for g in sets[(k, len(group))])), 0)
            sets[axis or (key, len(group))].append(group)
        found = [{r: g for g in groups for r in g} for groups in sets.values() if groups]
        return sorted(found, key=lambda f: max(len(g) for g in f.values()))

    def family(self, group: tuple[int, ...]) -> Family:
        """The division that a group belongs to."""
        return next((f for f in self.families() if group in f.values()), {r: group for r in group})

    def over(self, family: Family) -> str:
        """"tp", "ranks [0, 1]", "groups of 2 ranks such as [0, 1]" """
        groups = sorted(set(family.values()))
        axis = self.names.groups.get(groups[0], "")
        if axis:
            return axis
        if len(groups) == 1:
            return "all ranks" if len(groups[0]) == self.names.world else f"ranks {list(groups[0])}"
        return " and ".join(f"ranks {list(g)}" for g in groups) if len(groups) == 2 else f"each group of {len(groups[0])} ranks such as {list(groups[0])}"


def result(call: OpCall) -> TensorRef | None:
    """The tensor that a call makes, if it is one that can be changed in place."""
    targets = call.collective.outputs if call.collective is not None else call.targets()
    if len(targets) != 1 or 0 in targets[0].size or any(s == 0 and n > 1 for n, s in zip(targets[0].size, targets[0].stride)):
        return None
    return targets[0]
