"""Edited programs: recorded calls replaced, dropped or joined by others (not trusted, and never a basis of a verdict on the program itself).

An edit names calls by rank and index. The result is a program of its own: calls are numbered anew and checksums, which are those of
what really ran, are gone, but where plain values left for Python: those must not change. The traces that it was made from stay as they are.
"""
from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from fractions import Fraction

import msgspec

from trainverify.diagnose.dataflow import Node
from trainverify.ir.trace import Arg, Collective, OpCall, Program, ScalarRef, Sequence, TensorRef, Trace

NAME = "repair"                               # of the group that inserted collectives meet in: no recorded group has this name and number


@dataclass(slots=True)
class Edit:
    """calls: what stands in place of a recorded call (None: nothing); after: what follows it."""

    calls: dict[Node, OpCall | None] = field(default_factory=dict)
    after: dict[Node, list[OpCall]] = field(default_factory=lambda: defaultdict(list))

    @property
    def empty(self) -> bool:
        return not self.calls and not any(self.after.values())

    def joined(self, other: Edit) -> Edit | None:
        """Both edits, or None if they are about the same calls."""
        if self.calls.keys() & other.calls.keys():
            return None
        out = Edit({**self.calls, **other.calls})
        for edit in (self, other):
            for node, calls in edit.after.items():
                out.after[node] += calls
        return out


def all_reduce(ref: TensorRef, group: tuple[int, ...], op: str, meeting: int, span: int) -> OpCall:
    """An all-reduce in place; `meeting` is the same number on every rank of the group, and no other all-reduce of the group has it."""
    c = Collective("all_reduce", group, NAME, meeting, (ref,), (ref,), op)
    return OpCall(0, "c10d.allreduce_.default", (ref,), {}, None, (ref,), span, c)


def scaled(ref: TensorRef, factor: Fraction, span: int) -> list[OpCall]:
    """Multiplications in place by a rational number, whose float would be rounded."""
    calls = [("aten.mul_.Scalar", factor.numerator)] if factor.numerator != 1 else []
    calls += [("aten.div_.Scalar", factor.denominator)] if factor.denominator != 1 else []
    return [OpCall(0, name, (ref, n), {}, ref, (ref,), span) for name, n in calls]


def moved(ref: TensorRef, by: int, span: int) -> OpCall:
    """An addition of a whole number in place."""
    return OpCall(0, "aten.add_.Scalar", (ref, by), {}, ref, (ref,), span)


def copied(call: OpCall) -> OpCall | None:
    """In place of a collective that changes nothing any more: its inputs as its outputs. None: they were the same memory."""
    c = call.collective
    if all(i == o for i, o in zip(c.inputs, c.outputs)):
        return None
    (source,), (target,) = c.inputs, c.outputs
    return OpCall(0, "aten.copy_.default", (target, source), {}, target, (target,), call.span)


def regrouped(call: OpCall, group: tuple[int, ...], meeting: int) -> OpCall:
    return _with(call, msgspec.structs.replace(call.collective, group=group, group_name=NAME, seq=meeting))


def reducing(call: OpCall, op: str) -> OpCall:
    return _with(call, msgspec.structs.replace(call.collective, reduce_op=op))


def sent_to(call: OpCall, peer: int) -> OpCall:
    return _with(call, msgspec.structs.replace(call.collective, peer=peer))


def reading(call: OpCall, instead: dict[TensorRef, TensorRef]) -> OpCall:
    """The call with other regions read, and with views of those made."""
    def other(a: Arg) -> Arg:
        if isinstance(a, Sequence):
            return Sequence(tuple(other(x) for x in a.items))
        return instead.get(a, a) if isinstance(a, TensorRef) else a
    new = msgspec.structs.replace(call, args=tuple(map(other, call.args)), kwargs={k: other(a) for k, a in call.kwargs.items()}, outs=other(call.outs))
    c = call.collective
    return new if c is None else _with(new, msgspec.structs.replace(c, inputs=tuple(instead.get(i, i) for i in c.inputs)))


def _with(call: OpCall, collective: Collective) -> OpCall:
    return msgspec.structs.replace(call, collective=collective)


# ---- application

def applied(program: Program, edit: Edit) -> Program:
    """The edited program. Calls and blobs that are unchanged are shared with the old one."""
    peers = any(c is not None and c.collective is not None and c.collective.peer is not None for c in edit.calls.values())
    traces, blobs = [], []
    for trace, blob in zip(program.traces, program.blobs):
        ops, number = _edited(trace, edit)
        if peers:
            _count_messages(ops)
        traces.append(msgspec.structs.replace(trace, ops=ops))
        blobs.append({_renamed(name, number): data for name, data in blob.items()})
    return Program(traces, blobs)


def _edited(trace: Trace, edit: Edit) -> tuple[list[OpCall], dict[int, int]]:
    """The calls of one rank, and the new number of each old one."""
    ops: list[OpCall] = []
    number: dict[int, int] = {}

    def add(call: OpCall) -> None:
        ops.append(msgspec.structs.replace(call, index=len(ops), digest_in=call.digest_in if _leaves(call) else 0, digest_out=0))
    for call in trace.ops:
        node = (trace.rank, call.index)
        number[call.index] = len(ops)
        new = edit.calls.get(node, call)
        if new is not None:
            add(new)
        for more in edit.after.get(node, ()):
            add(more)
    return ops, number


def _leaves(call: OpCall) -> bool:
    """Whether Python took plain values from here: they are in later calls as they were, so the replay must find them unchanged."""
    return call.name == "tv.escape" or call.name.startswith(("aten._local_scalar_dense.", "aten.is_nonzero.", "aten.equal.")) and not isinstance(call.outs, ScalarRef)


def _renamed(name: str, number: dict[int, int]) -> str:
    """Blobs of random numbers are named by their call."""
    kind, _, rest = name.partition(".")
    if kind != "rng":
        return name
    index, _, k = rest.partition(".")
    return f"rng.{number[int(index)]}.{k}"


def _count_messages(ops: list[OpCall]) -> None:
    """Number sends and receives again: each counts those of its own between the same two ranks."""
    seen: Counter[tuple] = Counter()
    for i, call in enumerate(ops):
        c = call.collective
        if c is not None and c.kind in ("send", "recv"):
            key = (c.kind, c.peer, c.group, c.group_name, c.tag)
            ops[i] = _with(call, msgspec.structs.replace(c, seq=seen[key]))
            seen[key] += 1
