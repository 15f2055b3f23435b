"""Floats that collectives move as bytes: such a call is restated in the type that the memory has everywhere else (trusted).

`p.view(torch.uint8)` is broadcast because a backend does not know p's type. Moving bytes and moving the floats that they make
up is one thing, so that where all members' memory is used as one float type and as nothing else, the recorded call's references
are of that type. All else stays as it was recorded: bytes have no meaning over the reals.
"""
from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

from msgspec.structs import replace

from trainverify.ir.trace import Collective, OpCall, Program, TensorRef, Trace, inputs

MOVES = ("broadcast", "all_gather", "gather", "scatter", "all_to_all", "send", "recv")
_INTEGER = re.compile(r"u?int(8|16|32|64)")
_FLOAT = re.compile(r"b?float(8|16|32|64)(_\w+)?")


def restate_carried_floats(program: Program) -> Program:
    """The program, with the references of byte-wise moves of floats restated as floats. Calls are replaced, never changed."""
    meetings: dict[tuple, list[tuple[int, int]]] = defaultdict(list)
    for t, trace in enumerate(program.traces):
        for i, call in enumerate(trace.ops):
            c = call.collective
            if c is not None and c.kind in MOVES and all(_INTEGER.fullmatch(r.dtype) for r in (*c.inputs, *c.outputs)):
                meetings[_meeting(trace.rank, c)].append((t, i))
    if not meetings:
        return program
    types = [_types(trace) for trace in program.traces]
    for members in meetings.values():
        calls = [program.traces[t].ops[i].collective for t, i in members]
        whole = 2 if calls[0].kind in ("send", "recv") else len(calls[0].group)
        found = {types[t].get(r.storage, "") for (t, _), c in zip(members, calls) for r in (*c.inputs, *c.outputs)} - {""}
        if len(members) != whole or len(found) != 1 or not _FLOAT.fullmatch(dtype := found.pop()):
            continue
        restated = [_restated(c, dtype) for c in calls]
        if None not in restated:
            for (t, i), c in zip(members, restated):
                program.traces[t].ops[i] = replace(program.traces[t].ops[i], collective=c)
    return program


def _meeting(rank: int, c: Collective) -> tuple:
    """What the calls that belong together have in common."""
    if c.kind in ("send", "recv"):
        return "message", *((rank, c.peer) if c.kind == "send" else (c.peer, rank)), c.group, c.group_name, c.tag, c.seq
    return c.kind, c.group, c.group_name, c.seq


def _types(trace: Trace) -> dict[int, str]:
    """What type each storage is used as, by anything but collectives that move it as integers; several: no type. Absent: not used."""
    seen: dict[int, set[str]] = defaultdict(set)
    for call in trace.ops:
        for ref in _uses(call):
            seen[ref.storage].add(ref.dtype)
    return {sid: next(iter(dtypes)) if len(dtypes) == 1 else "several" for sid, dtypes in seen.items()}


def _uses(call: OpCall) -> Iterator[TensorRef]:
    """All references of a call but those that say nothing of a type: memory that is only allocated, integers that are only moved."""
    if call.name.startswith(("aten.empty", "aten.new_empty", "tv.wait")):
        return
    if call.collective is None:
        yield from inputs(call)
        yield from call.targets()
        return
    for ref in (*call.collective.inputs, *call.collective.outputs):
        if call.collective.kind not in MOVES or not _INTEGER.fullmatch(ref.dtype):
            yield ref


def _restated(c: Collective, dtype: str) -> Collective | None:
    """The collective in floats; None where some reference cannot be restated."""
    refs = (*c.inputs, *c.outputs)
    if c.kind == "all_to_all" and not c.listed and any(len(r.size) < 2 for r in refs):
        return None                            # its splits count the elements
    made = [_as_float(r, dtype) for r in refs]
    if None in made:
        return None
    n = len(c.inputs)
    return replace(c, inputs=tuple(made[:n]), outputs=tuple(made[n:]))


def _as_float(ref: TensorRef, dtype: str) -> TensorRef | None:
    """The same bytes as elements of `dtype`: the last dimension holds whole ones, without gaps."""
    have, want = _bits(_INTEGER, ref.dtype), _bits(_FLOAT, dtype)
    size, stride = (ref.size or (1,)), (ref.stride or (1,))
    counts = (ref.offset, size[-1], *stride[:-1])
    if stride[-1] != 1 and size[-1] != 1 or any(k * have % want for k in counts):
        return None
    offset, last, *strides = (k * have // want for k in counts)
    return TensorRef(ref.storage, offset, (*size[:-1], last), (*strides, 1), dtype)


def _bits(pattern: re.Pattern, dtype: str) -> int:
    return int(pattern.fullmatch(dtype).group(1))
