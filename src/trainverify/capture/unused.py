"""Memory that is asked for and never used: its end is left out of the trace, as if the program had asked for less (trusted).

What no recorded call reads or writes has no meaning. A buffer of half a billion elements (DeepSpeed's buckets) takes no memory
while a program runs, since the system provides what is touched; here every element would be a number of the replay. What is read without having been
written stays, and is garbage as before.
"""
from __future__ import annotations

import msgspec

from trainverify.ir.check import itemsize
from trainverify.ir.trace import RESIZE, OpCall, Sequence, Storage, TensorRef, references, resized

EMPTY = "aten.empty.memory_format"
SMALL = 1 << 20                                # bytes of a storage that stays as it is


def without_unused(ops: list[OpCall], storages: list[Storage]) -> tuple[list[OpCall], list[Storage]]:
    """The calls and storages of a trace, large uninitialised tensors only as long as they are used."""
    made = {call.outs.storage: call.index for call in ops if _is_large(call, storages)}
    moved = {resized(call) for call in ops if call.name == RESIZE} if made else set()
    made = {sid: index for sid, index in made.items() if sid not in moved}
    if not made:
        return ops, storages
    used = dict.fromkeys(made, 0)              # bytes from the storage's start to the last that is touched
    for call in ops:
        for ref in references(call):
            if ref.storage in used and made[ref.storage] != call.index:
                used[ref.storage] = max(used[ref.storage], _end(ref))
    ops, storages = list(ops), list(storages)
    for sid, index in made.items():
        ops[index] = shorter = _shorter(ops[index], used[sid])
        storages[sid] = Storage(_end(shorter.outs), False)
    return ops, storages


def _is_large(call: OpCall, storages: list[Storage]) -> bool:
    """Whether the call makes a large storage that its result, in row-major order, fills."""
    if call.name != EMPTY or not isinstance(call.outs, TensorRef) or 0 in call.outs.size:
        return False
    ref, strides = call.outs, [1]
    for n in reversed(ref.size[1:]):
        strides.insert(0, strides[0] * n)
    nbytes = storages[ref.storage].nbytes
    return nbytes > SMALL and ref.size != () and ref.stride == tuple(strides) and _end(ref) == nbytes and call.args == (Sequence(ref.size),)


def _end(ref: TensorRef) -> int:
    """Bytes from the storage's start to behind the last element."""
    if 0 in ref.size:
        return 0
    return (ref.offset + 1 + sum((n - 1) * s for n, s in zip(ref.size, ref.stride))) * itemsize(ref.dtype)


def _shorter(call: OpCall, used: int) -> OpCall:
    """The call with as many rows as are used, and at least one."""
    ref = call.outs
    rows = max(-(-used // (ref.stride[0] * itemsize(ref.dtype))), 1)
    size = (rows, *ref.size[1:])
    return msgspec.structs.replace(call, args=(Sequence(size),), outs=TensorRef(ref.storage, ref.offset, size, ref.stride, ref.dtype))
