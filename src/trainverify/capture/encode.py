"""Arguments as trace data: tensors become references to numbered storages (trusted: two storages never share a number).

A number belongs to a StorageImpl for as long as the trace is recorded: a weak reference pins its address, so that it cannot be
taken by a later storage, while its memory is freed as the program wants. What C++ or numpy puts into integer tensors, or into
memory that no recorded call has written, is data: such a storage gets a new number with its bytes as they are found. Other
writes that nobody recorded show in the digests.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch._C._distributed_c10d import ProcessGroup, ReduceOp
from torch.multiprocessing.reductions import StorageWeakRef

from trainverify.capture.digest import clear, is_large, is_zero, sampled_crc, storage_bytes, storage_crc
from trainverify.ir.trace import Arg, Name, ScalarRef, Sequence, Storage, TensorRef

_BOXED_REDUCE_OPS = {int(v): k.lower() for k, v in ReduceOp.RedOpType.__members__.items()}
_BLANK = -1                                    # in the place of a checksum: a large storage that was zeroed, of which only what is read is looked at
_STRIDED = torch.strided
_INT64 = (-(1 << 63), (1 << 64) - 1)


def dtype_name(dtype: torch.dtype) -> str:
    return _DTYPES[dtype]


def _all_dtypes() -> dict[torch.dtype, str]:
    return {d: str(d).removeprefix("torch.") for d in vars(torch).values() if isinstance(d, torch.dtype)}


_DTYPES = _all_dtypes()


class NotStrided(Exception):
    """A sparse or otherwise laid out tensor: a reference cannot say that."""


class LazyBits(Exception):
    """A tensor whose elements are the conjugates or negatives of what its memory holds: a reference cannot say that."""


class Encoder:
    """One rank's storages, and the encoding of everything that a call takes or returns."""

    def __init__(self, pending_scalars: list, sampled: bool = False):
        self._crc = sampled_crc if sampled else storage_crc
        self.blobs: dict[str, np.ndarray] = {}
        self.sizes: list[int] = []
        self.present: dict[int, int] = {}      # bytes of the storages that were resized
        self.initial: list[bool] = []
        self._watched: dict[int, int] = {}     # crc32 of the storages of integers, and of those that nothing has written yet
        self._ids: dict[int, int] = {}
        self._pins: list[StorageWeakRef] = []
        self._pending = pending_scalars
        self.handlers: dict[type, Callable[[Any], Arg]] = {
            type(None): _same, bool: _same, str: _same, int: self._int, float: self._float,
            list: self._sequence, tuple: self._sequence, torch.Size: self._sequence,
            torch.Tensor: self.read, torch.nn.Parameter: self.read,
            complex: lambda a: Name("complex", repr(a)), torch.dtype: lambda a: Name("dtype", _DTYPES[a]),
            torch.device: lambda a: Name("device", str(a)), torch.layout: lambda a: Name("layout", str(a).removeprefix("torch.")),
            torch.memory_format: lambda a: Name("memory_format", str(a).removeprefix("torch.")),
            torch.Generator: lambda a: Name("generator", str(a.device)), torch.ScriptObject: _script_object,
            ScalarRef: _same, TensorRef: _same, Name: _same, Sequence: _same}

    # ---- storages
    def storage(self, storage: torch.UntypedStorage, made: bool) -> int:
        """The storage's number; made: the call that is being recorded has just made or filled it."""
        key = storage._cdata
        sid = self._ids.get(key)
        if sid is None:
            sid = self._ids[key] = len(self._pins)
            self._pins.append(StorageWeakRef(storage))
            nbytes = storage.nbytes()
            self.sizes.append(nbytes)
            keep = not made and storage.device.type != "meta"
            self.initial.append(keep)
            if keep:
                self.blobs[f"init.{sid}"] = storage_bytes(storage)
        return sid

    def known(self, storage: torch.UntypedStorage) -> bool:
        """Whether the storage has a number."""
        return storage._cdata in self._ids

    def given(self, storage: torch.UntypedStorage, data: np.ndarray) -> None:
        """A storage without memory (capture/meta.py) whose contents are these bytes."""
        sid = self.storage(storage, True)
        self.initial[sid] = True
        self.blobs[f"init.{sid}"] = data

    def resized(self, storage: torch.UntypedStorage) -> int | None:
        """Notes a storage's present size; its number if that differs from what was noted before, else None."""
        sid = self._ids.get(storage._cdata)
        if sid is None:
            return None
        nbytes, before = storage.nbytes(), self.sizes[sid]
        if sid in self.present:
            before = self.present[sid]
        if nbytes == before:
            return None
        self.present[sid] = nbytes
        clear(storage, before)
        if before == 0 or sid in self._watched:
            self._watched[sid] = self._crc(storage)
        self.sizes[sid] = max(self.sizes[sid], nbytes)
        return sid

    # ---- contents that change unseen
    def wrote(self, t: torch.Tensor, sid: int) -> None:
        """A recorded call has written a tensor."""
        if not t.dtype.is_floating_point:
            self._watched[sid] = self._crc(t.untyped_storage())
        elif sid in self._watched:
            del self._watched[sid]

    def fresh(self, t: torch.Tensor) -> Arg:
        """A tensor of uninitialised memory: zero it, so that a capture is deterministic, and see whether anyone fills it unseen."""
        if t.layout is not _STRIDED:
            raise _not_strided(t)
        storage = t.untyped_storage()
        clear(storage)
        sid = self.storage(storage, True)
        self._watched[sid] = _BLANK if is_large(storage) else self._crc(storage)
        return TensorRef(sid, t.storage_offset(), tuple(t.shape), t.stride(), _DTYPES[t.dtype])

    def _as_found(self, t: torch.Tensor, sid: int) -> int:
        """The number under which a watched storage is read."""
        if self._watched.get(sid) == _BLANK and is_zero(t):
            return sid
        storage = t.untyped_storage()
        now = self._crc(storage)
        if self._watched.setdefault(sid, now) == now:
            return sid
        del self._ids[storage._cdata]
        sid = self.storage(storage, False)
        self._watched[sid] = now
        return sid

    # ---- values
    def tensor(self, t: torch.Tensor, made: bool) -> Arg:
        if t.layout is not _STRIDED:
            raise _not_strided(t)
        if t.is_neg() or t.is_conj():
            raise LazyBits
        storage, dtype = t.untyped_storage(), t.dtype
        sid = self._ids.get(storage._cdata)
        if sid is None:
            sid = self.storage(storage, made)
        if sid in self._watched or not dtype.is_floating_point:
            if made:
                self.wrote(t, sid)
            else:
                sid = self._as_found(t, sid)
        return TensorRef(sid, t.storage_offset(), tuple(t.shape), t.stride(), _DTYPES[dtype])

    def read(self, t: torch.Tensor) -> Arg:
        return self.tensor(t, False)

    def arg(self, a: Any) -> Arg:
        """An argument, before the call."""
        handler = self.handlers.get(type(a))
        return handler(a) if handler is not None else self.other(a)

    def result(self, a: Any) -> Arg:
        """A returned value, after the call."""
        if isinstance(a, torch.Tensor):
            return self.tensor(a, True)
        if isinstance(a, (list, tuple)):
            return Sequence(tuple([self.result(x) for x in a]))
        return self.arg(a)

    def storages(self) -> list[Storage]:
        return [Storage(n, i) for n, i in zip(self.sizes, self.initial)]

    def _float(self, a: float) -> Arg:
        for tracked in self._pending:
            if float.__eq__(tracked, a) and float.hex(float.__pos__(tracked)) == float.hex(a):
                return tracked.ref
        return a

    def _int(self, a: int) -> Arg:
        return a if _INT64[0] <= a <= _INT64[1] else Name("opaque", f"integer {a}")

    def _sequence(self, a) -> Sequence:
        handlers = self.handlers
        out = []
        for x in a:
            handler = handlers.get(type(x))
            out.append(handler(x) if handler is not None else self.other(x))
        return Sequence(tuple(out))

    def other(self, a: Any) -> Arg:
        """What has no exact type of its own above."""
        if isinstance(a, torch.Tensor):
            return self.read(a)
        if isinstance(a, float):
            return a.ref if hasattr(a, "ref") else self._float(float.__pos__(a))
        if isinstance(a, int):
            return self._int(int.__pos__(a))
        if isinstance(a, (list, tuple)):
            return self._sequence(a)
        if isinstance(a, np.generic):
            return self.arg(a.item())
        if isinstance(a, torch.UntypedStorage):
            return Name("storage", str(self.storage(a, False)))
        return Name("opaque", type(a).__name__)


def _not_strided(t: torch.Tensor) -> NotStrided:
    return NotStrided(str(t.layout).removeprefix("torch."))


def _same(a: Arg) -> Arg:
    return a


def _script_object(a: torch.ScriptObject) -> Name:
    kind = a._type().name()
    if kind == "ProcessGroup":
        return Name("group", ProcessGroup.unbox(a).group_name)
    if kind == "ReduceOp":
        return Name("reduce_op", _BOXED_REDUCE_OPS[a.op()])
    return Name("opaque", kind)
