"""When each storage is used for the last time, so that replay can let go of its contents (trusted: a storage that is used again must be kept)."""
from __future__ import annotations

from collections import defaultdict

from trainverify.ir.trace import RESIZE, Trace, references, resized


def last_uses(trace: Trace) -> dict[int, tuple[int, ...]]:
    """From a call's position to the storages that no later call names."""
    last: dict[int, int] = {}
    awaited: dict[int, tuple[int, ...]] = {}
    for i, call in enumerate(trace.ops):
        used = (resized(call),) if call.name == RESIZE else tuple([ref.storage for ref in references(call)])
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
