"""Repairs to try: from what a diagnosis found to edits of the recorded calls, the most likely first (not trusted: each is tried).

Only what one small change mends: a reduction that is missing, superfluous or over the wrong group, a factor, positions that do not
begin where this rank's part does, messages that go the wrong way round; and those of parts.py and amounts.py.
"""
from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction


from trainverify.diagnose.amounts import Amounts
from trainverify.diagnose.candidate import Candidate
from trainverify.diagnose.dataflow import Node
from trainverify.diagnose.edit import Edit, all_reduce, copied, moved, reducing, regrouped, scaled, sent_to
from trainverify.diagnose.explain import Cause, Diagnosis
from trainverify.diagnose.parts import Parts
from trainverify.diagnose.places import Family, Occurrence, Places, result
from trainverify.diagnose.relation import Relation
from trainverify.diagnose.watch import GOOD
from trainverify.ir.trace import OpCall, TensorRef, inputs
from trainverify.relate.compare import Compared
from trainverify.replay.memory import is_float

REDUCES = ("all_reduce", "reduce_scatter", "reduce")
SAME_SIZE = ("reduce_scatter", "all_gather", "all_to_all")    # over a group of another size these deliver another shape
MOVED = ("other", "permutation", "stale", "other tensor", "additive term")     # what comes of values in other places
MOST = 12                                     # candidates for one cause
MOST_NAMES = 2


@dataclass(frozen=True, slots=True)
class Held:
    """Where an output stands on one rank before it is clipped, and the call after which it stands there."""

    ref: TensorRef
    node: Node


class Maker:
    """Makes the candidates for the causes of one run."""

    def __init__(self, diagnosis: Diagnosis):
        self.d, self.flow, self.watch = diagnosis, diagnosis.flow, diagnosis.watch
        self.places = Places(self.flow, self.watch.names)
        self.parts, self.amounts = Parts(self.flow, self.places), Amounts(self.flow, self.places)
        self._meetings = 0
        self._relations: dict[int, Relation] = {}

    def candidates(self, cause: Cause, probed: Iterable[Candidate] = ()) -> Iterator[Candidate]:
        """No two with the same edit: what the diagnosis speaks for, then what probes find, then what is near."""
        seen: set[tuple] = set()
        for its in (itertools.islice(self._fresh(self._likely(cause), seen), MOST), probed, itertools.islice(self._fresh(self._near(cause), seen), MOST)):
            yield from its

    def _fresh(self, its: Iterable[Candidate], seen: set[tuple]) -> Iterator[Candidate]:
        for c in its:
            signature = _signature(c.edit)
            if not c.edit.empty and signature not in seen:
                seen.add(signature)
                yield c

    def _likely(self, cause: Cause) -> Iterator[Candidate]:
        relation, status = cause.relation, self.watch.status.get(cause.nodes[0], "") if cause.nodes else ""
        factor = relation.factor if relation.kind == "multiple" else Fraction(status[2:]) if relation.kind == "other" and status.startswith("x ") else None
        if factor:
            yield from self._multiple(cause, factor)
        elif relation.kind == "partial sum":
            yield from self._partial(cause)
        if cause.brought:
            yield from self._regrouped(cause.brought)
            yield from self._reduced_numbers(cause.brought)
        if relation.ratio:
            yield from self.amounts.losses(relation.ratio)
        if relation.kind in MOVED:
            yield from self._positions(cause)
            yield from self._messages(cause)
        yield from self._origin_partial(cause)
        yield from self._norms(cause)
        if relation.kind in ("other", "additive term"):
            yield from self.amounts.addends(cause.nodes)
        if relation.kind in ("other", "additive term", "partial sum"):
            yield from self.amounts.reductions(list(cause.nodes))

    def _near(self, cause: Cause) -> Iterator[Candidate]:
        relation = cause.relation
        starts = [n for n in (relation.at, *cause.nodes) if n is not None]
        starts += [h.node for held in self._held([k[:2] for k in cause.keys[:2]], self.d.step) for h in held.values()] if not starts else []
        if relation.kind in MOVED:
            yield from interleaved(self.parts.candidates(cause.nodes), self._regrouped(starts))
        else:
            yield from self._regrouped(starts, alike(relation.ranks, self.watch.names.world) if relation.kind == "wrong group" else None)

    # ---- sums
    def _partial(self, cause: Cause) -> Iterator[Candidate]:
        for (group, factor), names in self._outputs(cause, lambda r: r.kind == "partial sum" and (r.ranks, r.factor)):
            if group:
                yield self._reduce_outputs(names, self.places.family(group), factor)

    def _origin_partial(self, cause: Cause) -> Iterator[Candidate]:
        """The origin's own result is a share: reduce it there."""
        for node in cause.nodes[:1]:
            group = self.d.search.share(self.watched_field, node, list(self.watch.names.groups))
            for exact in (False, True) if group is not None else ():
                yield self._reduce_results(self.places.occurrences(cause.nodes, exact), self.places.family(group))

    @property
    def watched_field(self):
        return self.d.watched.field

    def _reduce_outputs(self, names: list[tuple[str, str]], family: Family, factor: Fraction) -> Candidate:
        edit, first = Edit(), None
        sizes = {len(g) for g in family.values()}
        average = factor > 1 and sizes == {factor}
        for held in self._held(names):
            for group in sorted({family[r] for r in held if r in family}):
                if not set(group) <= held.keys():
                    continue
                self._meetings += 1
                for h in (held[r] for r in group):
                    span, at = self.flow.call(h.node).span, self._before_use(h.node)
                    edit.after[at].append(all_reduce(h.ref, group, "avg" if average else "sum", self._meetings, span))
                    edit.after[at] += [] if average else scaled(h.ref, 1 / factor, span)
                    first = first or h
        more = "" if average or factor == 1 else f" and scale it by {1 / factor}"
        return Candidate(f"insert all_reduce({'AVG' if average else 'SUM'}) over {self.places.over(family)}{self._before(first)}, {self._of(names)}{more}", edit)

    def _before_use(self, node: Node) -> Node:
        """The call before the next one that reads what stands after this call, or where ranks meet: they may not wait for each other earlier,
        while messages are under way, nor in another order."""
        reader, (rank, index) = self.flow.first_reader(node), node
        last = reader[1] if reader is not None else index + 1
        met = next((c.index for c in self.flow.calls[rank][index + 1:last] if c.collective is not None and c.collective.kind not in ("send", "recv")), last)
        return rank, max(index, met - 1)

    def _reduce_results(self, occurrences: list[Occurrence], family: Family) -> Candidate:
        edit = Edit()
        for occurrence in occurrences:
            for group in sorted({family[r] for r in occurrence if r in family}):
                refs = {r: result(self.flow.call(occurrence[r])) for r in group if r in occurrence}
                if len(refs) < len(group) or any(ref is None for ref in refs.values()):
                    continue
                self._meetings += 1
                for r, ref in refs.items():
                    edit.after[self.places.settled(occurrence[r])].append(all_reduce(ref, group, "sum", self._meetings, self.flow.call(occurrence[r]).span))
        return Candidate(f"insert all_reduce(SUM) over {self.places.over(family)} after {self._line(occurrences)}", edit)

    def _norms(self, cause: Cause) -> Iterator[Candidate]:
        """The norm of what a rank holds, as the norm of what a group does."""
        nodes = [n for n in cause.nodes if "norm" in self.flow.call(n).name.split(".")[1] and (ref := result(self.flow.call(n))) is not None and ref.numel == 1]
        occurrences = self.places.occurrences(nodes, False)
        for family in self.places.families() if nodes else ():
            edit = self._reduce_results(occurrences, family).edit
            for node, calls in edit.after.items():
                ref, span = calls[0].args[0], calls[0].span
                calls.insert(0, OpCall(0, "aten.pow_.Scalar", (ref, 2), {}, ref, (ref,), span))
                calls.append(OpCall(0, "aten.sqrt_.default", (ref,), {}, ref, (ref,), span))
            over = self.places.over(family)
            means = Relation("partial sum", "REL002", f"reference^2 = sum over {over} of the squares of the parallel values",
                             detail="each rank counts only what it holds", same=("norm",))
            yield Candidate(f"sum the square of the norm over {over}, and take the root of that, after {self._line(occurrences)}", edit, means, nodes[0])

    def _reduced_numbers(self, nodes: Iterable[Node]) -> Iterator[Candidate]:
        """A count that each rank makes of its own share, and that meets right values: its sum over some group; or its mean, as a sum with
        what is divided by it times the number of ranks (gradients are averaged later)."""
        for node in self._lines_above(nodes, self._is_count):
            occurrences, families = self.places.occurrences([node], False), self.places.families()
            for family in families:
                yield self._reduce_results(occurrences, family)
            for family in reversed(families):
                yield self._averaged(occurrences, family)

    def _averaged(self, counts: list[Occurrence], family: Family) -> Candidate:
        (n, *others) = {len(g) for g in family.values()}
        divided = [{r: reader for r, node in o.items() if (reader := self.flow.first_reader(node)) is not None} for o in counts]
        whole, scaling = self._reduce_results(counts, family), self._scale_results(divided, Fraction(n))
        both = None if others or scaling.edit.empty else whole.edit.joined(scaling.edit)
        return Candidate(f"{whole.text} and {scaling.text}", both or Edit())

    def _is_count(self, call: OpCall) -> bool:
        base = call.name.split(".")[1]
        return call.name.startswith("aten.") and base in ("sum", "count_nonzero") and (ref := result(call)) is not None and not is_float(ref.dtype) and ref.dtype != "bool"

    # ---- multiples
    def _multiple(self, cause: Cause, factor: Fraction) -> Iterator[Candidate]:
        found = self._outputs(cause, lambda r: r.kind == "multiple" and bool(r.factor) and (r.factor,))
        if cause.late:
            yield from (self._scale_outputs(names, 1 / f) for (f,), names in found)
        nodes = [n for n in cause.nodes if _reducing(self.flow.call(n))]
        again = all(self.watch.status.get(p, GOOD) == GOOD for n in nodes for p in self.flow.producers(n))
        for exact in (False, True) if nodes else ():
            if again:
                yield self._removed(nodes, exact, factor)
            yield from self._other_op(nodes, exact, factor)
        yield from self._everywhere(factor)
        for node in list(self._lines_above(cause.nodes, lambda call: _reducing(call) and len(call.collective.group) == factor))[:1] if not nodes else ():
            yield self._removed([node], False, factor)
        for exact in (False, True):
            yield self._scale_results(self.places.occurrences(cause.nodes, exact), 1 / factor)
        if not cause.late:
            yield from (self._scale_outputs(names, 1 / f) for (f,), names in found)

    def _everywhere(self, factor: Fraction) -> Iterator[Candidate]:
        """All reductions that make this multiple out of right values, at whatever lines."""
        nodes = [n for n, status in self.watch.status.items() if status == f"x {factor}" and _reducing(self.flow.call(n))
                 and all(self.watch.status.get(p, GOOD) == GOOD for p in self.flow.producers(n))]
        if nodes:
            yield from self._other_op(nodes, False, factor)
            yield self._scale_results(self.places.occurrences(nodes, False), 1 / factor)

    def _other_op(self, nodes: list[Node], exact: bool, factor: Fraction) -> Iterator[Candidate]:
        for was, now in (("sum", "avg"), ("avg", "sum")):
            edit = Edit()
            for node in (n for o in self.places.occurrences(nodes, exact) for n in o.values()):
                c = self.flow.call(node).collective
                if c is not None and c.reduce_op == was and factor == (len(c.group) if was == "sum" else Fraction(1, len(c.group))):
                    edit.calls[node] = reducing(self.flow.call(node), now)
            yield Candidate(f"{_NAMES[now]} instead of {_NAMES[was]} in the {self._kind(nodes)} at {self._line([{0: n} for n in nodes])}", edit)

    def _removed(self, nodes: list[Node], exact: bool, factor: Fraction) -> Candidate:
        """Without reductions of what was whole before."""
        edit = Edit()
        for node in (n for o in self.places.occurrences(nodes, exact) for n in o.values()):
            c = self.flow.call(node).collective
            if c is not None and c.kind == "all_reduce" and c.reduce_op == "sum" and len(c.inputs) == 1 and factor == len(c.group):
                edit.calls[node] = copied(self.flow.call(node))
        return Candidate(f"remove the {self._kind(nodes)} at {self._line([{0: n} for n in nodes])}", edit)

    def _scale_results(self, occurrences: list[Occurrence], factor: Fraction) -> Candidate:
        edit = Edit()
        for node in (n for o in occurrences for n in o.values()):
            ref = result(self.flow.call(node))
            if ref is not None and is_float(ref.dtype):
                edit.after[self.places.settled(node)] += scaled(ref, factor, self.flow.call(node).span)
        return Candidate(f"scale by {factor} at {self._line(occurrences)}", edit)

    def _scale_outputs(self, names: list[tuple[str, str]], factor: Fraction) -> Candidate:
        edit, first = Edit(), None
        for h in (h for held in self._held(names) for h in held.values()):
            edit.after[h.node] += scaled(h.ref, factor, self.flow.call(h.node).span)
            first = first or h
        return Candidate(f"scale by {factor}{self._before(first)}: {self._of(names).removeprefix('of ')}", edit)

    # ---- groups
    def _regrouped(self, starts: Iterable[Node], first: Family | None = None) -> Iterator[Candidate]:
        """The nearest collectives above some calls, over another division of the ranks (`first`: one that the program need not have)."""
        nodes = list(self._lines_above(starts, lambda call: call.collective is not None and call.collective.kind in ("all_reduce", *SAME_SIZE)))
        for node in nodes:
            for exact in (True, False):
                for family in [*([first] if first else []), *self.places.families()]:
                    yield self._over(self.places.occurrences([node], exact), family, node)

    def _over(self, occurrences: list[Occurrence], family: Family, node: Node) -> Candidate:
        edit = Edit()
        for occurrence in occurrences:
            self._meetings += 1
            if not set(family) <= occurrence.keys():
                return Candidate("", Edit())
            for r, n in occurrence.items():
                call = self.flow.call(n)
                c, group = call.collective, family.get(r)
                if group is None or c.kind in SAME_SIZE and len(c.group) != len(group):
                    return Candidate("", Edit())
                edit.calls[n] = regrouped(call, group, self._meetings)
        others = [c.group for n in edit.calls if (c := self.flow.call(n).collective).group != family[n[0]]]
        if not others:
            return Candidate("", Edit())
        was = self.places.over(self.places.family(others[0]))
        return Candidate(f"{self._kind([node])} over {self.places.over(family)} instead of {was} at {self._line(occurrences)}", edit)

    # ---- positions and messages
    def _positions(self, cause: Cause) -> Iterator[Candidate]:
        """Positions that begin at 0 on every rank, where each has its own part of a sequence."""
        for node in self._lines_above(cause.nodes, lambda call: call.name == "aten.arange.default" and result(call) is not None):
            for family in self.places.families():
                edit = Edit()
                occurrences = self.places.occurrences([node], False)
                for n in (n for o in occurrences for n in o.values() if n[0] in family):
                    ref = result(self.flow.call(n))
                    by = family[n[0]].index(n[0]) * ref.numel
                    if by:
                        edit.after[n].append(moved(ref, by, self.flow.call(n).span))
                length = result(self.flow.call(node)).numel
                yield Candidate(f"add {length} x this rank's place in {self.places.over(family)} to the positions made at {self._line(occurrences)}", edit)

    def _messages(self, cause: Cause) -> Iterator[Candidate]:
        """The nearest receives above the cause, with their sends: the other way round, or between neighbours in a group."""
        for node in self._lines_above(cause.nodes, lambda call: call.collective is not None and call.collective.kind == "recv"):
            pairs = [(sender, n) for n in self.places.alike(node) if (sender := self.flow.sender(n)) is not None]
            where = " and ".join(dict.fromkeys(f"{self.flow.span(n)}" for n in (*pairs[0], node)[:2] if self.flow.span(n) is not None)) if pairs else ""
            means = Relation("permutation", "REL012", f"parallel = what is due to other ranks: the messages at {where} go to the wrong ones",
                             detail=f"that are due to other ranks: the messages at {where} go to the wrong ones")
            ways = {"send": {s: r[0] for s, r in pairs}, "recv": {r: s[0] for s, r in pairs}}
            back, to = ({n[0]: peer for n, peer in ways[kind].items()} for kind in ("recv", "send"))
            if back.keys() == to.keys() and all(len({p for n, p in w.items() if n[0] == rank}) == 1 for w in ways.values() for rank in to):
                yield Candidate(f"send to the rank that is received from, and receive from the one that is sent to, at {where}",
                                self._between(ways, to=back, back=to), means, node)
            for family in self.places.families():
                for by in (1, -1):
                    near = {r: {d: g[(g.index(r) + d) % len(g)] for d in (by, -by)} for r, g in family.items()}
                    edit = self._between(ways, {r: n[by] for r, n in near.items()}, {r: n[-by] for r, n in near.items()})
                    yield Candidate(f"send to the {'next' if by > 0 else 'previous'} rank of {self.places.over(family)}, and receive from the "
                                    f"{'previous' if by > 0 else 'next'} one, at {where}", edit, means, node)

    def _between(self, ways: dict[str, dict[Node, int]], to: dict[int, int], back: dict[int, int]) -> Edit:
        """These sends and receives with other peers; empty if nothing changes."""
        edit = Edit()
        for node, peer in ((n, p) for its in ways.values() for n, p in its.items()):
            new = (to if self.flow.call(node).collective.kind == "send" else back).get(node[0], peer)
            if new != peer:
                edit.calls[node] = sent_to(self.flow.call(node), new)
        return edit

    # ---- what edits are made of
    def _outputs(self, cause: Cause, kind: Callable[[Relation], tuple | bool]) -> list[tuple[tuple, list[tuple[str, str]]]]:
        """The wrong gradients and scalars of the first step, by what `kind` says of their relation, if it says the same of some of the
        cause's. Others have the same cause even where the search found another operation above them."""
        out: dict[tuple, list[tuple[str, str]]] = defaultdict(list)
        own: set[tuple] = set()
        for key in (k for k in self.d.by_key if k[2] == self.d.step and k[0] in ("gradient", "scalar")):
            c = self.d.raw.get(key) or self.d.by_key[key].compared
            got = any(p.wrong("field") for p in c.pieces) and kind(self._relation(c))
            if got:
                out[got].append(key[:2])
                own |= {got} if key in cause.keys else set()
        return sorted(((got, names) for got, names in out.items() if got in own), key=lambda item: -len(item[1]))

    def _relation(self, c: Compared) -> Relation:
        if id(c) not in self._relations:
            self._relations[id(c)] = self.d.relations.simple(c)
        return self._relations[id(c)]

    def _held(self, names: Iterable[tuple[str, str]], step: int = 0) -> Iterator[dict[int, Held]]:
        """Where these outputs stand, by rank, in every step (or one)."""
        wanted, seen = set(names), set()
        for (kind, name, at), c in self.d.watched.comparison.compared.items():
            held: dict[int, Held] = {}
            for p in c.pieces if (kind, name) in wanted and step in (0, at) else ():
                rec = p.recorded
                if not isinstance(rec.ref, TensorRef):
                    continue
                ref, before = self.d.before_clipping(p) if kind == "gradient" else (rec.ref, rec.call.index)
                found = self.flow.writer(rec.rank, ref, before)[:1]
                node = self.places.settled(found[0]) if found else None
                if node is not None and node[1] < before and (node, ref) not in seen:
                    seen.add((node, ref))
                    held[rec.rank] = Held(ref, node)
            if held:
                yield held

    def _lines_above(self, starts: Iterable[Node], wanted: Callable[[OpCall], bool]) -> Iterator[Node]:
        """The first call of each line above some calls that is wanted, nearest first."""
        seen: set = set()
        for node in self.places.above(starts):
            line = self.places.line(node)
            if line is not None and line not in seen and line[3] != "setup" and wanted(self.flow.call(node)):
                seen.add(line)
                yield node

    # ---- words
    def _of(self, names: list[tuple[str, str]]) -> str:
        told = [name for kind, name in names if kind == "gradient"]
        scalars = [name for kind, name in names if kind != "gradient"]
        gradients = " and ".join(told) if len(told) <= MOST_NAMES else f"{told[0]} and {len(told) - 1} more"
        return "of " + ", ".join([*([f"the gradient{'s' if len(told) > 1 else ''} of {gradients}"] if told else []), *scalars])

    def _before(self, held: Held | None) -> str:
        """" before FILE:LINE", the first reader"""
        reader = self.flow.first_reader(held.node) if held is not None else None
        span = self.flow.span(reader) if reader is not None else None
        span = span if span is not None and span.file else held and self.flow.span(held.node)
        if span is None or not span.file:
            return ""
        return f" before {span}" if reader is not None else f" after {span}"

    def _line(self, occurrences: list[Occurrence]) -> str:
        lines = {}
        for node in (n for o in occurrences for n in o.values()):
            span = self.flow.span(node)
            if span is not None:
                lines.setdefault(f"{span}" + self.places.called(node) + (" (backward)" if span.phase == "backward" else ""))
        told = list(lines)[:2]
        return " and ".join(told) + (f" and {len(lines) - 2} other lines" if len(lines) > 2 else "")

    def _kind(self, nodes: list[Node]) -> str:
        return self.flow.call(nodes[0]).collective.kind if nodes else ""


_NAMES = {"sum": "SUM", "avg": "AVG"}


def alike(group: tuple[int, ...], world: int) -> Family | None:
    """The division of all ranks into groups with the steps of this one, as a mesh has them: of 4 ranks, (1, 3) belongs to (0, 2), (1, 3)."""
    step = group[1] - group[0] if len(group) > 1 else 0
    block = step * len(group)
    if not step or world % block or group != tuple(range(group[0], group[0] + block, step)):
        return None
    family = {r: tuple(range(r // block * block + r % step, (r // block + 1) * block, step)) for r in range(world)}
    return family if group in family.values() else None


def interleaved(*iterators: Iterator[Candidate]) -> Iterator[Candidate]:
    """In turn from each, while it has more."""
    waiting = list(iterators)
    while waiting:
        for one in list(waiting):
            try:
                yield next(one)
            except StopIteration:
                waiting.remove(one)


def _reducing(call: OpCall) -> bool:
    c = call.collective
    return c is not None and c.kind in REDUCES and c.reduce_op in ("sum", "avg")


def _signature(edit: Edit) -> tuple:
    """The same for edits that change the same calls in the same way, whatever numbers their meetings have."""
    changed = tuple(sorted((n, None if c is None else _plain(c)) for n, c in edit.calls.items()))
    return changed, tuple(sorted((n, tuple(_plain(c) for c in calls)) for n, calls in edit.after.items() if calls))


def _plain(call: OpCall) -> str:
    c = call.collective
    return f"{call.name} {call.args} {call.kwargs}" + (f" {c.group} {c.reduce_op} {c.peer}" if c is not None else "")
