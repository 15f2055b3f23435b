"""Values for the symbols of programs that were captured at full size, where floats have none (not trusted: a proof is for all values, a refutation is
replayed at these).

Both sides get the same numbers, as a capture at small sizes would have given them: the reference where it defines a symbol, the parallel program
where it was handed the tensor. In 32 bits they have a long mantissa, so that ordinary data is not taken for one; in 16 bits each occurs
many times over, for the same reason.
"""
from __future__ import annotations

import numpy as np
import torch

from trainverify.ir.trace import Program, Storage, TensorRef

_POSITIVE = ("sq", "square", "sum", "var")    # in the names of state and buffers that are never negative
_NARROW = 64                                  # distinct magnitudes in 16 bits
_DIFFERENT = 1 << 23                          # numbers in 32 bits: odd mantissas, two exponents
_QUARTER = 0x3E800000                         # 1/4
_MIX = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35)


def fill(reference: Program, parallel: Program) -> None:
    """Give every symbol that has no values some, in both (reduced) programs."""
    known: dict[str, np.ndarray] = {}
    given = 0
    for call in (c for c in reference.traces[0].ops if c.name == "tv.symbol"):
        kind, name, ref = call.args[:3]
        if f"symbol.{name}" not in reference.blobs[0]:
            known[name] = reference.blobs[0][f"symbol.{name}"] = _values(kind, name, ref, given)
            given += ref.numel
    for trace, blobs in zip(parallel.traces, parallel.blobs) if known else ():
        for call in (c for c in trace.ops if c.name == "tv.symbol" and c.args[1] in known):
            ref = call.args[2]
            nbytes = trace.storages[ref.storage].nbytes
            trace.storages[ref.storage] = Storage(nbytes, True)
            blobs[f"init.{ref.storage}"] = _whole(known[call.args[1]], ref, nbytes)


def _values(kind: str, name: str, ref: TensorRef, first: int) -> np.ndarray:
    """Bytes of the symbol's elements in row-major order, numbers `first` and on of all: between 1/4 and 1, of either sign where that may be."""
    number = np.arange(first + 1, first + 1 + ref.numel, dtype=np.uint64)
    for odd in _MIX:                           # each step takes different numbers to different ones
        number = number * np.uint64(odd) & np.uint64(_DIFFERENT - 1)
        number ^= number >> np.uint64(11)
    negative = (number * np.uint64(_MIX[0]) >> np.uint64(20) & np.uint64(1)).astype(bool)
    if ref.dtype in ("float32", "float64"):
        size = (np.uint32(_QUARTER) + (number.astype(np.uint32) << 1 | 1)).view(np.float32)
    else:
        size = ((number % _NARROW + _NARROW // 4) / _NARROW).astype(np.float32)
    values = size if kind in ("state", "buffer") and any(p in name for p in _POSITIVE) else np.where(negative, -size, size)
    return torch.from_numpy(values).to(getattr(torch, ref.dtype)).reshape(-1).view(torch.uint8).numpy().copy()


def _whole(data: np.ndarray, ref: TensorRef, nbytes: int) -> np.ndarray:
    """The bytes of a storage in which the tensor is."""
    dtype = getattr(torch, ref.dtype)
    whole = torch.zeros(nbytes // dtype.itemsize, dtype=dtype)
    torch.as_strided(whole, ref.size, ref.stride, ref.offset).copy_(torch.from_numpy(data).view(dtype).reshape(ref.size))
    return whole.view(torch.uint8).numpy().copy()
