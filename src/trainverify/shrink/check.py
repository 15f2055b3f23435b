"""What holds of a reduced program (trusted): every reference lies in its storage, and every call, executed, gives exactly the sizes that the trace says.

Calls that were made from one template (templates.py) differ in the numbers of their storages alone, so one of them is executed, on any numbers: sizes do not
depend on what floats are. Numbers that left tensors for Python get the values that they have at these sizes: what they are computed from is executed.
"""
from __future__ import annotations

import operator
from collections import defaultdict

import numpy as np
import torch

from trainverify.ir.trace import RESIZE, Collective, OpCall, Program, ScalarRef, Trace, references, resized
from trainverify.ops.access import reads
from trainverify.ops.table import OpTable
from trainverify.replay.collectives import deliver
from trainverify.replay.errors import ReplayError
from trainverify.replay.machine import Hooks, Machine
from trainverify.replay.native import NativeMemory, dtype_of, extent
from trainverify.replay.run import NATIVE, World, replay
from trainverify.shrink.classes import refusal
from trainverify.shrink.flow import meeting
from trainverify.shrink.repeat import Forms

SCALARS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "truediv": operator.truediv, "floordiv": operator.floordiv, "mod": operator.mod,
           "pow": operator.pow, "neg": operator.neg, "pos": operator.pos, "abs": abs, "min": min, "max": max, "float": float}
NOT_EXECUTED = "cannot be executed at the reduced sizes"


def check(program: Program, made: list[list[range]], table: OpTable) -> None:
    """made: of each rank, the calls that were not made from a template, those that became of one call together."""
    for trace, groups in zip(program.traces, made):
        well_formed(trace, [k for g in groups for k in g])
    forms, known = Forms(), set()
    for trace, blobs, groups in zip(program.traces, program.blobs, made):
        _execute_each(trace, blobs, groups, forms, known)
    _meet(program, forms)
    if any(isinstance(c.outs, ScalarRef) for t in program.traces for c in t.ops):
        execute(left(program), table)


def well_formed(trace: Trace, calls: list[int]) -> None:
    """These references lie inside their storages. Anything else is our own bug."""
    for k in calls:
        call = trace.ops[k]
        if call.index != k:
            raise AssertionError(f"call {k} has the number {call.index}")
        for ref in references(call):
            if ref.storage >= len(trace.storages) or (ref.numel and extent(ref) * dtype_of(ref.dtype).itemsize > trace.storages[ref.storage].nbytes):
                raise AssertionError(f"{call.name} ({trace.spans[call.span] if call.span >= 0 else ''}): {ref} is not inside its storage")
        if call.collective is not None and not fills(call.collective):
            raise AssertionError(f"{call.name}: what comes in and goes out does not have the same sizes: {call.collective}")


def fills(c: Collective) -> bool:
    """Whether what comes in fills what goes out."""
    n = len(c.group)
    if c.kind == "all_gather" and not c.listed:
        return all(o.numel == n * i.numel for i, o in zip(c.inputs, c.outputs))
    if c.kind == "reduce_scatter" and not c.listed:
        return all(i.numel == n * o.numel for i, o in zip(c.inputs, c.outputs))
    if c.kind in ("all_reduce", "broadcast"):
        return all(i.numel == o.numel for i, o in zip(c.inputs, c.outputs))
    if c.kind == "all_to_all" and not c.listed:
        return (not c.in_splits or sum(c.in_splits) == c.inputs[0].size[0]) and (not c.out_splits or sum(c.out_splits) == c.outputs[0].size[0])
    return True


# ---- each call for itself

class Blank(NativeMemory):
    """Memory in which everything is there: what is recorded, zero where nothing is."""

    def initial(self, sid: int) -> np.ndarray:
        got = self.blobs.get(f"init.{sid}")
        return np.zeros(self.trace.storages[sid].nbytes, dtype=np.uint8) if got is None else got


def _execute_each(trace: Trace, blobs: dict, groups: list[range], forms: Forms, known: set[tuple]) -> None:
    places = [0] * len(trace.spans)
    for group in groups:
        calls = [trace.ops[k] for k in group if trace.ops[k].collective is None and not trace.ops[k].name.startswith("tv.")]
        key = tuple([forms.of(call, places)[0] for call in calls])
        if not calls or key in known:
            continue
        known.add(key)
        memory = Blank(trace, blobs)
        memory.scalars = defaultdict(lambda: 1.0)
        for call in calls:
            try:
                with torch.no_grad():
                    memory.run(call)
            except (RuntimeError, IndexError, ValueError, ReplayError) as e:
                span = trace.spans[call.span] if call.span >= 0 else None
                raise refusal("SHAPE003", f"{call.name} {NOT_EXECUTED}: {e}", "verify without --reduce, and report this", span) from e


def _meet(program: Program, forms: Forms) -> None:
    """What the members of each meeting bring fills what they get."""
    met: dict[tuple, list[tuple[int, Trace, OpCall]]] = defaultdict(list)
    for trace in program.traces:
        places = [0] * len(trace.spans)
        for call in trace.ops:
            if call.collective is not None:
                met[meeting(trace.rank, call.collective)].append((forms.of(call, places)[0], trace, call))
    known: set[tuple] = set()
    for members in met.values():
        key = tuple([(form, trace.rank) for form, trace, _ in members])
        if key not in known:
            known.add(key)
            _deliver([trace for _, trace, _ in members], [call for _, _, call in members])


def _deliver(traces: list[Trace], calls: list[OpCall]) -> None:
    of = {trace.rank: call.collective for trace, call in zip(traces, calls)}
    first = calls[0].collective
    try:
        if first.kind in ("send", "recv"):
            sent, got = ([r for call in calls if call.collective.kind == kind for r in getattr(call.collective, of_kind)]
                         for kind, of_kind in (("send", "inputs"), ("recv", "outputs")))
            fits = len(calls) < 2 or [r.numel for r in sent] == [r.numel for r in got]
        else:
            descr = [of[r] for r in first.group]
            given = deliver(NATIVE, descr, [[torch.zeros(r.size, dtype=dtype_of(r.dtype)) for r in c.inputs] for c in descr])
            fits = all(v is None or v.numel() == r.numel for c, values in zip(descr, given) for r, v in zip(c.outputs, values))
    except (RuntimeError, IndexError, ValueError, KeyError, ReplayError) as e:
        raise refusal("SHAPE003", f"{calls[0].name} {NOT_EXECUTED}: {e}", "verify without --reduce, and report this") from e
    if not fits:
        raise refusal("SHAPE003", f"{calls[0].name} {NOT_EXECUTED}: what is sent does not fill what is received", "verify without --reduce, and report this")


# ---- numbers that left tensors

def left(program: Program) -> Program:
    """The calls from which tracked scalars are computed, and these."""
    met: set[tuple] = set()
    while True:                               # a collective that one member needs, all must execute
        before = len(met)
        needed = [_needed(trace, met) for trace in program.traces]
        if len(met) == before:
            break
    return Program([Trace(t.side, t.rank, t.world_size, [t.ops[k] for k in calls], t.storages, t.spans, meta=t.meta) for t, calls in zip(program.traces, needed)],
                   program.blobs)


def _needed(trace: Trace, met: set[tuple]) -> list[int]:
    found, storages, works = [], set(), set()
    for k in range(len(trace.ops) - 1, -1, -1):
        call = trace.ops[k]
        c = call.collective
        if c is not None:
            key = meeting(trace.rank, c)
            if key in met or not storages.isdisjoint([r.storage for r in c.outputs]):
                met.add(key)
                found.append(k)
                storages.update([r.storage for r in c.inputs])
                works.add(c.work)
            continue
        written = [r.storage for r in call.targets()] if not call.name.startswith("tv.") or call.name == "tv.symbol" else ()
        moved = call.name == RESIZE and resized(call) in storages      # others are not there
        if isinstance(call.outs, ScalarRef) or moved or (written and not storages.isdisjoint(written)):
            found.append(k)
            storages.update([r.storage for r in reads(call)])
            storages.update(written)
        elif call.name == "tv.wait":
            found.append(k)
    return [k for k in reversed(found) if trace.ops[k].name != "tv.wait" or trace.ops[k].args[0] in works]


def execute(program: Program, table: OpTable) -> World:
    """Execute a reduced program; each result must have exactly the sizes that its reference says. Tracked scalars get the values that they have there."""
    def after(machine: Machine, call: OpCall, results: list) -> None:
        if call.name.startswith("tv.scalar."):
            _scalar(machine, call)

    last: list[tuple[Machine, OpCall]] = []

    def before(machine: Machine, call: OpCall) -> None:
        last[:] = [(machine, call)]

    try:
        return replay(program, [], table, Hooks(before=(before,), after=(after,)))
    except (RuntimeError, IndexError, ValueError, ReplayError) as e:
        name, span = (last[0][1].name, last[0][0].span(last[0][1])) if last else ("a call", None)
        raise refusal("SHAPE003", f"{name} {NOT_EXECUTED}: {e}", "verify without --reduce, and report this", span) from e


def _scalar(machine: Machine, call: OpCall) -> None:
    value = scalar_value(machine, call)
    if value is not None:
        call.kwargs["value"] = machine.native.scalars[call.outs.id] = value


def scalar_value(machine: Machine, call: OpCall) -> float | None:
    """What a tracked scalar is where the machine is; None: not known."""
    op = call.name.split(".")[2]
    if op != "item" and op not in SCALARS:
        return None
    try:
        value = machine.native.tensor(call.args[0]).item() if op == "item" else SCALARS[op](*[machine.native.decode(a) for a in call.args])
    except (ZeroDivisionError, OverflowError, TypeError):
        return None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
