"""Whether a program is well formed: what every captured program is, and what an edited one must be to mean anything (no torch, not trusted).

Tensors lie inside their storages, scalars are used after they were made, waits name work that was issued, every member of a group comes to each of
its collectives exactly once and with the same kind, and as many messages are received as are sent.
"""
from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator

from trainverify.ir.trace import Program, ScalarRef, TensorRef, Trace, references, scalar_ids

MOST = 20                                     # problems that are told


def problems(program: Program) -> list[str]:
    """What is wrong with a program, in words; [] if it is well formed."""
    out: list[str] = []
    for trace in program.traces:
        for said in _of_rank(trace):
            out.append(f"rank {trace.rank}: {said}")
            if len(out) == MOST:
                return out
    return (out + _meetings(program) + _messages(program))[:MOST]


def _of_rank(trace: Trace) -> Iterator[str]:
    scalars: set[int] = set()
    works: set[int] = set()
    for at, call in enumerate(trace.ops):
        where = f"call {at} ({call.name})"
        if call.index != at:
            yield f"{where} has the number {call.index}"
        for ref in references(call):
            if (said := _misplaced(ref, trace)):
                yield f"{where}: {said}"
        yield from (f"{where}: scalar {s} is used before it is made" for s in scalar_ids((*call.args, *call.kwargs.values())) if s not in scalars)
        if isinstance(call.outs, ScalarRef):
            scalars.add(call.outs.id)
        if call.collective is not None and call.collective.work is not None:
            works.add(call.collective.work)
        if call.name == "tv.wait" and call.args[0] not in works:
            yield f"{where}: nothing issued the work {call.args[0]}"


def _misplaced(ref: TensorRef, trace: Trace) -> str:
    if len(ref.size) != len(ref.stride) or min((*ref.size, ref.offset)) < 0:
        return f"{ref} is no tensor"
    if not 0 <= ref.storage < len(trace.storages):
        return f"there is no storage {ref.storage}"
    end = ref.offset + 1 + sum((n - 1) * s for n, s in zip(ref.size, ref.stride)) if 0 not in ref.size else 0
    nbytes = trace.storages[ref.storage].nbytes
    return f"{ref} ends behind the {nbytes} bytes of its storage" if end * itemsize(ref.dtype) > nbytes else ""


def itemsize(dtype: str) -> int:
    """Bytes of one element: "bfloat16" 2, "complex64" 8, "bool" 1, "float8_e4m3fn" 1."""
    found = re.match(r"[a-z]+(\d+)", dtype)
    return max(int(found[1]) // 8, 1) if found else 1


def _meetings(program: Program) -> list[str]:
    met: dict[tuple, list[tuple[int, str]]] = defaultdict(list)
    for trace in program.traces:
        for c in (call.collective for call in trace.ops if call.collective is not None):
            if c.kind not in ("send", "recv"):
                met[(c.group, c.group_name, c.seq)].append((trace.rank, c.kind))
    out = []
    for (group, name, seq), came in met.items():
        if sorted(r for r, _ in came) != sorted(group):
            out.append(f"collective {seq} of group {name!r}: of ranks {list(group)}, {[r for r, _ in came]} come")
        elif len({kind for _, kind in came}) > 1:
            out.append(f"collective {seq} of group {name!r}: ranks come for {sorted({kind for _, kind in came})}")
    return out


def _messages(program: Program) -> list[str]:
    count: Counter[tuple] = Counter()
    for trace in program.traces:
        for c in (call.collective for call in trace.ops if call.collective is not None):
            if c.kind == "send":
                count[trace.rank, c.peer, c.tag] += 1
            elif c.kind == "recv":
                count[c.peer, trace.rank, c.tag] -= 1
    return [f"rank {src} sends {abs(n)} messages {'more' if n > 0 else 'fewer'} than rank {dst} receives" for (src, dst, _), n in count.items() if n]


def elements(ref: TensorRef, trace: Trace) -> int:
    """How many elements of a tensor's type its storage has room for."""
    return trace.storages[ref.storage].nbytes // itemsize(ref.dtype)
