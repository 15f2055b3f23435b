"""When each storage is used for the last time, so that replay can let go of its contents (trusted: a storage that is used again must be kept)."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from trainverify.ir.trace import Name, OpCall, Trace, inputs


def last_uses(trace: Trace) -> dict[int, tuple[int, ...]]:
    """From a call's position to the storages that no later call names."""
    last: dict[int, int] = {}
    awaited: dict[int, tuple[int, ...]] = {}
    for i, call in enumerate(trace.ops):
        used = tuple(_storages(call))
        if call.collective is not None and call.collective.work is not None:
            awaited[call.collective.work] = used
        elif call.name == "tv.wait":
            used += awaited.get(call.args[0], ())
        for sid in used:
            last[sid] = i
    ends: dict[int, list[int]] = defaultdict(list)
    for sid, i in last.items():
        ends[i].append(sid)
    return {i: tuple(sids) for i, sids in ends.items()}


def _storages(call: OpCall) -> Iterator[int]:
    for ref in inputs(call):
        yield ref.storage
    for ref in call.targets():
        yield ref.storage
    if call.collective is not None:
        for ref in (*call.collective.inputs, *call.collective.outputs):
            yield ref.storage
    if call.name == "tv.resize":
        storage = call.args[0]
        yield int(storage.value) if isinstance(storage, Name) else int(storage)
