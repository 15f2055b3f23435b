"""Native memory: the recorded program's real bytes, recomputed by torch's own kernels (trusted: integers, masks and decisions come from here)."""
from __future__ import annotations

import importlib
import math
from collections.abc import Iterable

import numpy as np
import torch

from trainverify.ir.trace import Arg, Name, OpCall, Program, ScalarRef, Sequence, TensorRef, Trace, tensors
from trainverify.ops.access import makes_garbage
from trainverify.ops.access import unread
from trainverify.replay.errors import ReplayError

_NAMED = {"dtype": lambda v: getattr(torch, v), "layout": lambda v: getattr(torch, v),
          "memory_format": lambda v: getattr(torch, v), "device": lambda v: torch.device("cpu"),
          "complex": complex, "generator": lambda v: None}
_DTYPES: dict[str, torch.dtype] = {}


def dtype_of(name: str) -> torch.dtype:
    got = _DTYPES.get(name)
    if got is None:
        got = _DTYPES[name] = getattr(torch, name)
    return got


def extent(ref: TensorRef) -> int:
    """Elements from the storage's start to the last one that the reference touches, plus one."""
    if 0 in ref.size:
        return ref.offset
    return ref.offset + 1 + sum((s - 1) * d for s, d in zip(ref.size, ref.stride))


class NativeMemory:
    """Storages of one rank as bytes. `scalars` holds tracked floats as recorded."""

    def __init__(self, trace: Trace, blobs: dict[str, object]):
        self.trace, self.blobs = trace, blobs
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.scalars: dict[int, float] = {}
        self._ops: dict[str, object] = {}

    # ---- tensors
    def storage(self, sid: int) -> torch.UntypedStorage:
        got = self.storages.get(sid)
        if got is None:
            data = self.initial(sid)
            if data is None:
                raise ReplayError(f"storage {sid} is read before anything wrote it")
            got = self.storages[sid] = torch.from_numpy(np.array(data, dtype=np.uint8)).clone().untyped_storage()   # torch's own memory, which it can resize
        return got

    def initial(self, sid: int) -> np.ndarray | None:
        """The storage's bytes when it was first seen as an input (None: some op made it)."""
        return self.blobs.get(f"init.{sid}")

    def tensor(self, ref: TensorRef) -> torch.Tensor:
        return torch.empty(0, dtype=dtype_of(ref.dtype)).set_(self.storage(ref.storage), ref.offset, ref.size, ref.stride)

    def decode(self, a: Arg):
        """An argument as torch takes it."""
        if isinstance(a, TensorRef):
            return self.tensor(a)
        if isinstance(a, Sequence):
            return [self.decode(x) for x in a.items]
        if isinstance(a, ScalarRef):
            return self.scalars[a.id]
        if isinstance(a, Name):
            if a.kind not in _NAMED:
                raise ReplayError(f"an argument could not be recorded: {a.kind} {a.value}")
            return _NAMED[a.kind](a.value)
        return a

    def provide(self, call: OpCall) -> None:
        """Memory for arguments of which the call takes only the shape, or which it overwrites, and that nobody has written."""
        skip = unread(call.name)
        for k, a in enumerate(call.args):
            for ref in tensors(a) if skip is None or k in skip else ():
                if ref.storage not in self.storages and self.initial(ref.storage) is None:
                    need = extent(ref) * dtype_of(ref.dtype).itemsize
                    self.storages[ref.storage] = torch.UntypedStorage(max(need, self.trace.storages[ref.storage].nbytes))

    # ---- execution
    def run(self, call: OpCall) -> list[torch.Tensor | None]:
        """Execute `call`; the tensors of its targets afterwards."""
        if call.rng:
            self._random(call)
        elif call.name.startswith("tv.scalar."):
            self.scalars[call.outs.id] = call.kwargs["value"]
        else:
            result = self._op(call.name)(*[self.decode(a) for a in call.args], **{k: self.decode(v) for k, v in call.kwargs.items()})
            if makes_garbage(call.name):
                _zero(result.untyped_storage(), 0)
            self.bind(tuple(tensors(call.outs)), _flat(result))
            if isinstance(call.outs, ScalarRef):
                self.scalars[call.outs.id] = result
        return [self.tensor(t) for t in call.targets()]

    def bind(self, refs: Iterable[TensorRef], values: Iterable[torch.Tensor]) -> None:
        """Make results the contents of their storages: a new storage adopts the result's, an old one is written."""
        for ref, v in zip(refs, values, strict=True):
            if tuple(v.shape) != ref.size:
                raise ReplayError(f"a result has sizes {tuple(v.shape)}, its reference {ref.size}")
            old = self.storages.get(ref.storage)
            if old is None and v.storage_offset() == ref.offset and v.stride() == ref.stride and v.dtype == dtype_of(ref.dtype):
                self.storages[ref.storage] = v.untyped_storage()
            elif old is None or old._cdata != v.untyped_storage()._cdata:
                self.write(ref, v)

    def write(self, ref: TensorRef, v: torch.Tensor) -> None:
        need = extent(ref) * dtype_of(ref.dtype).itemsize
        if ref.storage not in self.storages and self.initial(ref.storage) is None:
            self.storages[ref.storage] = torch.UntypedStorage(max(need, self.trace.storages[ref.storage].nbytes))
        self.tensor(ref).copy_(v)

    def _random(self, call: OpCall) -> None:
        for k, ref in enumerate(call.targets()):
            raw = np.array(self.blobs[f"rng.{call.index}.{k}"], copy=True).view(np.uint8)
            drawn = torch.from_numpy(raw).view(dtype_of(ref.dtype)) if raw.size else torch.empty(0, dtype=dtype_of(ref.dtype))
            self.write(ref, drawn.reshape(ref.size))

    def _op(self, name: str):
        got = self._ops.get(name)
        if got is None:
            ns, op, overload = name.split(".")
            if ns == "fsdp":
                importlib.import_module("torch.distributed.fsdp")      # registers its ops
            got = self._ops[name] = getattr(getattr(getattr(torch.ops, ns), op), overload)
        return got

    def resize(self, sid: int, nbytes: int) -> None:
        before = self.storage(sid).nbytes()
        self.storage(sid).resize_(nbytes)
        _zero(self.storage(sid), before)


def unregistered(*programs: Program) -> list[str]:
    """Operations in the traces that torch does not know here: whoever defines them has not been imported."""
    names = {c.name for p in programs for t in p.traces for c in t.ops if c.collective is None and not c.name.startswith(("tv.", "aten.", "fsdp."))}
    missing = []
    for name in sorted(names):
        ns, op, overload = name.split(".")
        if not hasattr(getattr(torch.ops, ns), op) or not hasattr(getattr(getattr(torch.ops, ns), op), overload):
            missing.append(name)
    return missing


def _zero(storage: torch.UntypedStorage, start: int) -> None:
    """Uninitialised bytes are zero, as they were in the capture."""
    if storage.nbytes() > start:
        torch.empty(0, dtype=torch.uint8).set_(storage, start, (storage.nbytes() - start,), (1,)).zero_()


def _flat(result) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, (list, tuple)):
        return [t for r in result for t in _flat(r)]
    return []


def numel_of(nbytes: int, dtype: str) -> int:
    return math.ceil(nbytes / dtype_of(dtype).itemsize)
