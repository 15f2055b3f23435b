"""Where a difference arises: the first operation whose inputs agree with the reference and whose result does not.

A value agrees if every element's fingerprint is a value of the reference, or is constant. The search walks back from a wrong
output through producers that disagree in the same way; it stops where all inputs agree. Guesses only.
"""
from __future__ import annotations

from dataclasses import dataclass, field

from trainverify.diagnose.dataflow import Dataflow, Node
from trainverify.diagnose.terms import SUMS
from trainverify.diagnose.watch import CONSTANT, GOOD, OPEN, Watch
from trainverify.ir.trace import ScalarRef, TensorRef

ALLOCATES = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "empty_permuted"}
NEAR = 8                                      # calls between a communication and an operation that works on what it brought


@dataclass(slots=True)
class Origin:
    """A candidate: the call, how its result relates to the reference, and which outputs it reaches."""

    node: Node
    status: str
    outputs: set = field(default_factory=set)
    ranks: set = field(default_factory=set)
    nodes: set = field(default_factory=set)   # all calls at this place where a difference arises


class Search:
    def __init__(self, flow: Dataflow, watch: Watch):
        self.flow, self.watch = flow, watch
        self.region: set[Node] = set()        # all that was found to disagree
        self.mixed: dict[Node, Node] = {}     # a multiple -> the sum of it and a right value

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
        return self._superfluous(seen) or self._mixed(found)

    def _superfluous(self, region: set[Node]) -> set[Node]:
        """Collectives that made a multiple of the reference out of right values, and feed the wrong region."""
        scaled = [p for n in region if self.status(n) == OPEN for p in self.flow.producers(n) if self.status(p).startswith("x ")]
        sources = self._walk(scaled, lambda n: self.status(n).startswith("x "))
        return {s for s in sources if self.flow.call(s).collective is not None and self.flow.call(s).collective.kind != "send"
                and all(self.status(p) == GOOD for p in self.flow.producers(s))}

    def _mixed(self, found: set[Node]) -> set[Node]:
        """Where a sum of a right value and a multiple of a right one is what is wrong, the multiple is: the collectives that made it."""
        out: set[Node] = set()
        for n in found:
            producers = self.flow.producers(n)
            kinds = {self.status(p) for p in producers}
            multiples = [p for p in producers if self.status(p).startswith("x ")]
            made: set[Node] = set()
            if len(kinds) == 2 and GOOD in kinds and multiples and self.flow.call(n).name.split(".")[1] in SUMS:
                made = {s for s in self._walk(multiples, lambda n: self.status(n).startswith("x ")) if self.flow.call(s).collective is not None}
            self.mixed.update(dict.fromkeys(made, n))
            out |= made or {n}
        return out

    def constants(self, nodes) -> list[Node]:
        """Where constants that these calls read, and that the reference does not have, were made."""
        found = [p for n in nodes for p in self.flow.producers(n) if self.status(p) == CONSTANT]
        return sorted(self._walk(found, lambda n: self.status(n) == CONSTANT), key=lambda n: (n[1], n[0]))

    def above(self, nodes) -> set[Node]:
        """These calls, and all that they were computed from through values that do not agree."""
        seen: set[Node] = set()
        stack = list(nodes)
        while stack:
            node = stack.pop()
            if node not in seen:
                seen.add(node)
                stack += [p for p in self.flow.producers(node) if self.status(p) not in (GOOD, CONSTANT)]
        return seen

    def through(self, node: Node) -> Node | None:
        """The nearest communication above a call whose operands are right, within a few calls and within its phase."""
        span = self.flow.span(node)
        level, seen = [node], {node}
        for _ in range(NEAR):
            level = [p for n in level for p in self._feeders(n) if p not in seen]
            seen.update(level)
            for p in level:
                at = self.flow.span(p)
                if span is not None and at is not None and (at.phase == "setup" or at.step != span.step):
                    continue
                if self.flow.sender(p) is not None:
                    return p
        return None

    def _feeders(self, node: Node) -> list[Node]:
        """Producers on the same rank; a receive is its own."""
        return [] if self.flow.sender(node) is not None else [p for p in self.flow.producers(node) if p[0] == node[0]]

    def _is_marked(self, node: Node, marked: set[Node]) -> bool:
        """A receive and a tracked scalar are marked as what they were made from."""
        if self.flow.sender(node) is None and not isinstance(self.flow.call(node).outs, ScalarRef):
            return node in marked or marked is self.watch.garbage and self.flow.call(node).name.split(".")[1] in ALLOCATES
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
    earliest (a rank that makes more calls of its own before the ranks meet does not come later for it). Calls of one line, on any rank and in any
    phase, are one candidate."""
    by_place: dict[tuple, Origin] = {}
    for key, rank, ref, index in wrong:
        for node in search.origins(rank, ref, index, marked):
            span = search.flow.span(node)
            place = (span.file, span.line) if span is not None and span.file else (search.flow.call(node).name, 0)
            origin = by_place.get(place)
            if origin is None:
                origin = by_place[place] = Origin(node, search.status(node))
            if node[::-1] < origin.node[::-1]:
                origin.node, origin.status = node, search.status(node)
            origin.outputs.add(key)
            origin.ranks.add(node[0])
            origin.nodes.add(node)
    return sorted(by_place.values(), key=lambda o: (-len(o.outputs), *search.flow.moment(o.node), o.node[0]))
