"""Plants bugs in a recorded program: edits of its calls such as people make mistakes (not trusted; what becomes of one is for others to say).

A mutation is made where one line of the program is, in every step (now and then in one step only), on all ranks or on one. Which are made
depends on the seed alone, and kinds and lines take turns, so that a few mutations already visit all of a program.
"""
from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import msgspec

from trainverify.diagnose.dataflow import Dataflow, Node
from trainverify.diagnose.edit import Edit, all_reduce, copied, moved, reading, reducing, regrouped, scaled
from trainverify.diagnose.places import Occurrence, Places, result
from trainverify.diagnose.words import names_of
from trainverify.diagnostics import Span
from trainverify.ir.check import elements
from trainverify.ir.trace import Arg, Collective, OpCall, Program, Sequence, TensorRef, inputs, tensors

SAME_SIZE = ("reduce_scatter", "all_gather", "all_to_all")    # over a group of another size these deliver another shape
OTHER_OPERATION = {"aten.add.Tensor": "aten.sub.Tensor", "aten.sub.Tensor": "aten.add.Tensor", "aten.add_.Tensor": "aten.sub_.Tensor",
                   "aten.mul.Tensor": "aten.div.Tensor", "aten.div.Tensor": "aten.mul.Tensor", "aten.cos.default": "aten.sin.default",
                   "aten.sin.default": "aten.cos.default", "aten.mean.dim": "aten.sum.dim_IntList"}
OTHER_REDUCTION = {"sum": "avg", "avg": "sum", "max": "min", "min": "max"}
COMMUTE = {"add", "add_", "mul", "mul_", "maximum", "minimum", "eq", "ne"}
NUMBERS = {"add", "add_", "sub", "sub_", "rsub", "mul", "mul_", "div", "div_", "pow", "pow_", "lerp", "lerp_"}     # their integers are factors, not sizes
NAMED = {"alpha", "beta", "lr", "beta1", "beta2", "weight_decay", "eps", "value", "scale"}
ONCE, ONE_RANK = 0.25, 0.4                    # shares of the mutations that are made in one step, or on one rank, where that makes sense


@dataclass(frozen=True, slots=True)
class Mutation:
    """One planted bug: its kind, what was changed in words, the changed calls, and where the first of them comes from."""

    kind: str
    text: str
    nodes: tuple[Node, ...]
    span: Span | None
    edit: Edit

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({rank for rank, _ in self.nodes}))


class Mutator:
    """Makes mutations of one program."""

    def __init__(self, program: Program):
        self.program, self.flow = program, Dataflow(program)
        self.traces = {t.rank: t for t in program.traces}
        self.places = Places(self.flow, names_of(program))
        self._starts = {t.rank: next((c.index for c in t.ops if c.name == "tv.step"), len(t.ops)) for t in program.traces}
        self._inputs = {(t.rank, ref.storage) for t in program.traces for c in t.ops if c.name == "tv.data" for ref in tensors(c.args[1])}
        self._meetings = 0
        self._kinds: dict[str, tuple[Callable[[OpCall], bool], Callable[[Node, random.Random], Mutation | None]]] = {
            "collective dropped": (_droppable, self._dropped_collective),
            "own share": (_counts, self._own_share),
            "collective twice": (_reduces, self._twice),
            "other group": (_regroupable, self._other_group),
            "other reduction": (_reduces, self._other_reduction),
            "wait dropped": (lambda c: c.name == "tv.wait", self._dropped_wait),
            "messages swapped": (lambda c: c.collective is not None and c.collective.kind in ("send", "recv"), self._swapped_messages),
            "microbatches swapped": (_plain, self._swapped_microbatches),
            "other factor": (lambda c: _plain(c) and bool(_numbers(c)), self._other_factor),
            "operands swapped": (lambda c: _plain(c) and _swappable(c) is not None, self._swapped),
            "other operation": (lambda c: c.name in OTHER_OPERATION and _makes_floats(c), self._other_operation),
            "slice shifted": (_plain, self._shifted),
            "positions shifted": (lambda c: c.name.startswith("aten.arange.") and result(c) is not None, self._moved),
            "update dropped": (_in_place, self._dropped_update),
        }

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self._kinds)

    def mutations(self, seed: int, most: int, kinds: Iterable[str] = ()) -> Iterator[Mutation]:
        """At most `most` mutations, no two alike; kinds take turns, and the lines of each kind."""
        rng = random.Random(seed)
        queues = {k: self._sites(self._kinds[k][0], rng) for k in self._kinds if not kinds or k in kinds}
        seen: set[tuple] = set()
        made = 0
        while queues and made < most:
            for kind in list(queues):
                found = self._next(kind, queues[kind], rng, seen)
                if found is None:
                    del queues[kind]
                elif made < most:
                    made += 1
                    yield found

    def at(self, node: Node, rng: random.Random) -> Iterator[Mutation]:
        """Every kind of mutation that this call allows."""
        for fits, make in self._kinds.values():
            if self._within(node) and fits(self.flow.call(node)):
                made = make(node, rng)
                if made is not None and not made.edit.empty:
                    yield made

    def _next(self, kind: str, queue: list[Node], rng: random.Random, seen: set[tuple]) -> Mutation | None:
        while queue:
            made = self._kinds[kind][1](queue.pop(), rng)
            if made is None or made.edit.empty:
                continue
            key = (kind, made.text, made.nodes)
            if key not in seen:
                seen.add(key)
                return made
        return None

    def _within(self, node: Node) -> bool:
        """Whether the call is made in a step."""
        return node[1] > self._starts[node[0]]

    def _sites(self, fits: Callable[[OpCall], bool], rng: random.Random) -> list[Node]:
        """The calls that fit, to be popped from the end: first one call of each line, in random order, then the others."""
        lines: dict[object, list[Node]] = defaultdict(list)
        for rank, ops in self.flow.calls.items():
            for call in ops[self._starts[rank] + 1:]:
                if fits(call):
                    lines[self.places.line((rank, call.index)) or (rank, call.index)].append((rank, call.index))
        groups = list(lines.values())
        rng.shuffle(groups)
        for nodes in groups:
            rng.shuffle(nodes)
        rounds = max(map(len, groups), default=0)
        return [nodes[k] for k in reversed(range(rounds)) for nodes in reversed(groups) if k < len(nodes)]

    # ---- which calls are changed together
    def _times(self, node: Node, rng: random.Random) -> list[Occurrence]:
        """The same time round of the call's line on all ranks: in every step, or in this one only."""
        found = self.places.occurrences([node], exact=True) or [{node[0]: node}]
        return [o for o in found if o.get(node[0]) == node] if rng.random() < ONCE else found

    def _some(self, node: Node, rng: random.Random) -> list[Node]:
        """Those calls, on all ranks or on this one only."""
        alone = rng.random() < ONE_RANK
        return [n for o in self._times(node, rng) for n in o.values() if self._within(n) and (not alone or n[0] == node[0])]

    def _met(self, node: Node, rng: random.Random) -> list[Node]:
        """Those collectives, with every member of each."""
        return list(dict.fromkeys(m for o in self._times(node, rng) for n in o.values() if self._within(n) for m in self.flow.members(n)))

    def _made(self, kind: str, text: str, edit: Edit, node: Node) -> Mutation:
        nodes = tuple(sorted({*edit.calls, *(n for n, calls in edit.after.items() if calls)}))
        return Mutation(kind, text, nodes, self.flow.span(node), edit)

    def _each(self, kind: str, text: str, nodes: Iterable[Node], change: Callable[[OpCall], OpCall | None], node: Node) -> Mutation:
        """These calls, each changed alike; one that cannot be changed stays as it is."""
        edit = Edit()
        for n in nodes:
            new = change(self.flow.call(n))
            if new is not None:
                edit.calls[n] = new
        return self._made(kind, text, edit, node)

    # ---- collectives
    def _dropped_collective(self, node: Node, rng: random.Random) -> Mutation:
        """Every member takes what it has for what it should get."""
        edit = Edit()
        for n in self._met(node, rng):
            call = self.flow.call(n)
            local = _local(call, n[0])
            edit.calls[n], edit.after[n] = (local[0], local[1:]) if local else (None, [])
            if (settled := self.places.settled(n)) != n:
                edit.calls[settled] = None
        return self._made("collective dropped", f"{self.flow.call(node).collective.kind} dropped", edit, node)

    def _own_share(self, node: Node, rng: random.Random) -> Mutation:
        """A count over all ranks is taken for as many times this rank's own, as where means are averaged: right if all ranks count the same."""
        edit = Edit()
        for n in self._met(node, rng):
            call = self.flow.call(n)
            edit.calls[n], *_ = *(_local(call, n[0]) or ()), None
            edit.after[n] += scaled(result(call), Fraction(len(call.collective.group)), call.span)
            if (settled := self.places.settled(n)) != n:
                edit.calls[settled] = None
        return self._made("own share", "each rank's own number times the number of ranks in place of their sum", edit, node)

    def _twice(self, node: Node, rng: random.Random) -> Mutation:
        """What was reduced is reduced again over the same group."""
        edit = Edit()
        meetings: dict[tuple, int] = {}
        for n in self._met(node, rng):
            call = self.flow.call(n)
            c, ref = call.collective, result(call)
            if ref is None:
                return self._made("collective twice", "", Edit(), node)
            if (c.group, c.group_name, c.seq) not in meetings:
                self._meetings += 1
            meeting = meetings.setdefault((c.group, c.group_name, c.seq), self._meetings)
            edit.after[self.places.settled(n)].append(all_reduce(ref, c.group, c.reduce_op, meeting, call.span))
        return self._made("collective twice", f"{self.flow.call(node).collective.kind} made twice", edit, node)

    def _other_group(self, node: Node, rng: random.Random) -> Mutation | None:
        """Over another division of the ranks that the program has."""
        c = self.flow.call(node).collective
        families = [f for f in self.places.families() if (mine := f.get(node[0], c.group)) != c.group and (c.kind not in SAME_SIZE or len(mine) == len(c.group))]
        if not families:
            return None
        family = rng.choice(families)
        edit = Edit()
        for occurrence in self._times(node, rng):
            if not all(set(family.get(r, (-1,))) <= occurrence.keys() for r in occurrence):
                return None
            if any(not set(self.flow.call(n).collective.group) <= occurrence.keys() for n in occurrence.values()):
                return None                   # whoever meets them from another line would wait forever
            self._meetings += 1
            for r, n in occurrence.items():
                edit.calls[n] = regrouped(self.flow.call(n), family[r], self._meetings)
        return self._made("other group", f"{c.kind} over {self.places.over(family)}", edit, node)

    def _other_reduction(self, node: Node, rng: random.Random) -> Mutation | None:
        new = OTHER_REDUCTION.get(self.flow.call(node).collective.reduce_op)
        if new is None:
            return None
        old = self.flow.call(node).collective
        return self._each("other reduction", f"{old.kind}({new.upper()}) instead of {old.reduce_op.upper()}", self._met(node, rng),
                          lambda call: reducing(call, new), node)

    def _dropped_wait(self, node: Node, rng: random.Random) -> Mutation:
        return self._made("wait dropped", "wait dropped", Edit({node: None}), node)

    # ---- what is read
    def _swapped_messages(self, node: Node, rng: random.Random) -> Mutation | None:
        """Two messages of one rank to (or from) the same other one change places."""
        c = self.flow.call(node).collective
        mine = c.inputs if c.kind == "send" else c.outputs
        for other in self._later(node, lambda call: call.collective is not None and call.collective.kind == c.kind and call.collective.peer == c.peer):
            d = self.flow.call(other).collective
            theirs = d.inputs if c.kind == "send" else d.outputs
            if len(mine) == len(theirs) == 1 and mine != theirs and (mine[0].size, mine[0].dtype) == (theirs[0].size, theirs[0].dtype):
                edit = Edit({n: _carrying(self.flow.call(n), refs) for n, refs in ((node, theirs), (other, mine))})
                return self._made("messages swapped", f"{c.kind} of one message in place of another", edit, node)
        return None

    def _swapped_microbatches(self, node: Node, rng: random.Random) -> Mutation | None:
        """Two reads of different parts of one input change places."""
        call = self.flow.call(node)
        mine = next((r for r in inputs(call) if (node[0], r.storage) in self._inputs), None)
        if mine is None:
            return None
        for other in self._later(node, lambda c: c.name == call.name):
            for ref in inputs(self.flow.call(other)):
                if ref != mine and (ref.storage, ref.size, ref.stride, ref.dtype) == (mine.storage, mine.size, mine.stride, mine.dtype):
                    edit = Edit({node: reading(call, {mine: ref}), other: reading(self.flow.call(other), {ref: mine})})
                    return self._made("microbatches swapped", "two parts of an input swapped", edit, node)
        return None

    def _later(self, node: Node, wanted: Callable[[OpCall], bool]) -> Iterator[Node]:
        """Later calls of the same rank and step."""
        for call in self.flow.calls[node[0]][node[1] + 1:]:
            if call.name == "tv.step":
                return
            if wanted(call):
                yield node[0], call.index

    def _shifted(self, node: Node, rng: random.Random) -> Mutation | None:
        """A part of a storage is read that lies beside the right one."""
        call, trace = self.flow.call(node), self.traces[node[0]]
        ways = [(ref, by) for ref in dict.fromkeys(inputs(call)) if ref not in call.writes for by in _steps(ref, elements(ref, trace))]
        if not ways:
            return None
        ref, by = rng.choice(ways)
        place = list(inputs(call)).index(ref)

        def change(c: OpCall) -> OpCall | None:
            held = list(inputs(c))
            old = held[place] if place < len(held) else None
            if old is None or old in c.writes or (old.size, old.stride) != (ref.size, ref.stride):
                return None
            return reading(c, {old: msgspec.structs.replace(old, offset=old.offset + by)}) if old.offset + by >= 0 else None
        return self._each("slice shifted", f"input {place} of {call.name} read {by:+d} elements further", self._some(node, rng), change, node)

    def _moved(self, node: Node, rng: random.Random) -> Mutation:
        edit = Edit()
        for n in self._some(node, rng):
            edit.after[n].append(moved(result(self.flow.call(n)), 1, self.flow.call(n).span))
        return self._made("positions shifted", "positions begin at 1", edit, node)

    # ---- what is computed
    def _other_factor(self, node: Node, rng: random.Random) -> Mutation:
        where = rng.choice(_numbers(self.flow.call(node)))
        old = _argument(self.flow.call(node), where)
        new = _other(old)
        return self._each("other factor", f"{new:.4g} instead of {old:.4g} in {self.flow.call(node).name}", self._some(node, rng),
                          lambda call: _given(call, where, new) if _argument(call, where) == old else None, node)

    def _swapped(self, node: Node, rng: random.Random) -> Mutation:
        return self._each("operands swapped", f"operands of {self.flow.call(node).name} swapped", self._some(node, rng),
                          lambda call: _swappable(call) and _exchanged(call, *_swappable(call)), node)

    def _other_operation(self, node: Node, rng: random.Random) -> Mutation:
        name = self.flow.call(node).name
        return self._each("other operation", f"{OTHER_OPERATION[name]} instead of {name}", self._some(node, rng),
                          lambda call: msgspec.structs.replace(call, name=OTHER_OPERATION[name]), node)

    def _dropped_update(self, node: Node, rng: random.Random) -> Mutation:
        return self._made("update dropped", f"{self.flow.call(node).name} dropped", Edit(dict.fromkeys(self._some(node, rng))), node)


# ---- calls that can be changed in some way

def _plain(call: OpCall) -> bool:
    """A local operation of PyTorch."""
    return call.collective is None and not call.name.startswith("tv.") and not call.rng


def _droppable(call: OpCall) -> bool:
    return call.collective is not None and call.collective.kind not in ("send", "recv", "barrier") and _local(call, call.collective.group[0]) is not None


def _reduces(call: OpCall) -> bool:
    c = call.collective
    return c is not None and c.kind in ("all_reduce", "reduce_scatter") and c.reduce_op in OTHER_REDUCTION


def _counts(call: OpCall) -> bool:
    """A sum of one number of each rank."""
    c = call.collective
    return c is not None and c.kind == "all_reduce" and c.reduce_op == "sum" and (ref := result(call)) is not None and ref.numel == 1


def _regroupable(call: OpCall) -> bool:
    return call.collective is not None and call.collective.kind in ("all_reduce", *SAME_SIZE)


def _makes_floats(call: OpCall) -> bool:
    return _plain(call) and all(_is_float(ref) for ref in call.targets())


def _in_place(call: OpCall) -> bool:
    """Whether the program stays well formed without the call: all it does is to write memory that is there."""
    plain = call.outs is None or isinstance(call.outs, (TensorRef, Sequence))
    return _plain(call) and plain and bool(call.writes) and set(tensors(call.outs)) <= set(call.writes)


def _is_float(ref: TensorRef) -> bool:
    return ref.dtype.startswith(("float", "bfloat", "complex"))


# ---- pieces of edits

def _local(call: OpCall, rank: int) -> list[OpCall] | None:
    """Copies that stand in place of a collective; [] if it is in place, None where no copy fits."""
    c = call.collective
    if c.kind in ("all_reduce", "reduce", "broadcast") and len(c.inputs) == len(c.outputs):
        return [] if c.inputs == c.outputs else [copied(call)] if len(c.inputs) == 1 else None
    if c.kind in ("all_reduce", "broadcast") and not c.inputs:
        return []
    pairs = _own_parts(c, c.group.index(rank))
    return None if pairs is None else [OpCall(0, "aten.copy_.default", (target, source), {}, target, (target,), call.span) for target, source in pairs]


def _own_parts(c: Collective, me: int) -> list[tuple[TensorRef, TensorRef]] | None:
    """(target, source) of what a member alone can do: its own part everywhere, or its own part only."""
    n = len(c.group)
    if c.kind == "reduce_scatter":
        if c.listed:
            return [(out, c.inputs[i * n + me]) for i, out in enumerate(c.outputs)] if len(c.inputs) == n * len(c.outputs) else None
        return [(out, part) for out, whole in zip(c.outputs, c.inputs) if (part := _part(whole, out, me))] if len(c.inputs) == len(c.outputs) else None
    if c.kind == "all_gather":
        if c.listed:
            return [(out, c.inputs[k // n]) for k, out in enumerate(c.outputs)] if len(c.outputs) == n * len(c.inputs) else None
        return [(part, own) for own, whole in zip(c.inputs, c.outputs) for k in range(n) if (part := _part(whole, own, k))]
    if c.kind == "all_to_all" and len(c.inputs) == len(c.outputs) and all(i.size == o.size for i, o in zip(c.inputs, c.outputs)):
        return list(zip(c.outputs, c.inputs))
    return None


def _part(whole: TensorRef, like: TensorRef, k: int) -> TensorRef:
    """The k-th part of a dense tensor, as large and of the shape of another one."""
    strides, step = [], 1
    for size in reversed(like.size):
        strides.insert(0, step)
        step *= size
    return TensorRef(whole.storage, whole.offset + k * like.numel, like.size, tuple(strides), whole.dtype)


def _carrying(call: OpCall, refs: tuple[TensorRef, ...]) -> OpCall:
    """A send of, or a receive into, other memory."""
    c = call.collective
    return msgspec.structs.replace(call, collective=msgspec.structs.replace(c, **{"inputs" if c.kind == "send" else "outputs": refs}))


def _steps(ref: TensorRef, room: int) -> list[int]:
    """By how much a part of a storage can be shifted: by itself, or by one of its rows."""
    if 0 in ref.size:
        return []
    end = ref.offset + 1 + sum((n - 1) * s for n, s in zip(ref.size, ref.stride))
    rows = [s for n, s in zip(ref.size, ref.stride) if n > 1 and s > 0]
    steps = dict.fromkeys([end - ref.offset, *rows[:1], *rows[-1:]])
    return [by for step in steps for by in (step, -step) if ref.offset + by >= 0 and end + by <= room]


def _numbers(call: OpCall) -> list[int | str]:
    """Where a call has numbers that it computes with, but 0, of which every multiple is 0: positions of arguments and names."""
    base = call.name.split(".")[1]
    at: list[int | str] = [k for k, a in enumerate(call.args) if isinstance(a, float) and 0 < abs(a) < 1e30 and "arange" not in base]
    at += [k for k, a in enumerate(call.args) if base in NUMBERS and isinstance(a, int) and not isinstance(a, bool) and a]
    return at + [k for k, a in call.kwargs.items() if k in NAMED and isinstance(a, (int, float)) and not isinstance(a, bool) and a]


def _argument(call: OpCall, where: int | str) -> Arg:
    if isinstance(where, str):
        return call.kwargs.get(where)
    return call.args[where] if where < len(call.args) else None


def _given(call: OpCall, where: int | str, value: int | float) -> OpCall:
    if isinstance(where, str):
        return msgspec.structs.replace(call, kwargs={**call.kwargs, where: value})
    return msgspec.structs.replace(call, args=(*call.args[:where], value, *call.args[where + 1:]))


def _other(number: int | float) -> int | float:
    return number + 1 if isinstance(number, int) else number / 2


def _swappable(call: OpCall) -> tuple[int, int] | None:
    """Two arguments of one shape that may not change places without a change of the result."""
    if call.name.split(".")[1] in COMMUTE and "alpha" not in call.kwargs:
        return None
    at = [k for k, a in enumerate(call.args) if isinstance(a, TensorRef) and _is_float(a) and a not in call.writes]
    for i, k in enumerate(at):
        for j in reversed(at[i + 1:]):
            if (call.args[k].size, call.args[k].dtype) == (call.args[j].size, call.args[j].dtype) and call.args[k] != call.args[j]:
                return k, j
    return None


def _exchanged(call: OpCall, i: int, j: int) -> OpCall:
    args = list(call.args)
    args[i], args[j] = args[j], args[i]
    return msgspec.structs.replace(call, args=tuple(args))
