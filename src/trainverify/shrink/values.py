"""Values for the symbols of programs that were captured at full size, where floats have none (not trusted: a proof is for all values, a refutation is
replayed at these).

Both sides get the same numbers, as a capture at small sizes would have given them: the reference where it defines a symbol, the parallel program
where it was handed the tensor. They are as large as those of a model that was just made: weights by how many elements of them a sum has, in the *recorded*
program, since its literals stay (a norm divides by the recorded size), and what scales a norm's result is near 1. So forward and backward stay finite at any
depth. In 32 bits they have a long mantissa of their own, and scales are powers of two, so that no two are equal and ordinary data is not taken for one; in
16 bits each occurs many times over, for the same reason.
"""
from __future__ import annotations

import math

import numpy as np
import torch

from trainverify.ir.trace import OpCall, Program, Storage, TensorRef

_POSITIVE = ("sq", "square", "sum", "var")    # in the names of state and buffers that are never negative
_NARROW = 64                                  # distinct magnitudes in 16 bits
_DIFFERENT = 1 << 22                          # numbers in 32 bits: odd mantissas
_QUARTER = 0x3E800000                         # 1/4
_MIX = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35)
_BIAS = -4                                    # of biases: 2 to the power of it


def fill(reference: Program, parallel: Program, recorded: Program) -> None:
    """Give every symbol that has no values some, in both (reduced) programs; `recorded`: the reference before it was reduced."""
    known: dict[str, np.ndarray] = {}
    given = 0
    symbols = {c.args[1]: c.args[2] for c in recorded.traces[0].ops if c.name == "tv.symbol"}
    tables = _tables(recorded.traces[0].ops)
    for call in (c for c in reference.traces[0].ops if c.name == "tv.symbol"):
        kind, name, ref = call.args[:3]
        if f"symbol.{name}" not in reference.blobs[0]:
            scale = _scale(kind, name, symbols[name], symbols[name].storage in tables)
            known[name] = reference.blobs[0][f"symbol.{name}"] = _values(ref, given, scale, _is_positive(kind, name, ref))
            given += ref.numel
    for trace, blobs in zip(parallel.traces, parallel.blobs) if known else ():
        for call in (c for c in trace.ops if c.name == "tv.symbol" and c.args[1] in known):
            ref = call.args[2]
            nbytes = trace.storages[ref.storage].nbytes
            trace.storages[ref.storage] = Storage(nbytes, True)
            blobs[f"init.{ref.storage}"] = _whole(known[call.args[1]], ref, nbytes)


def _tables(ops: list[OpCall]) -> set[int]:
    """Storages of which rows are taken: embeddings."""
    return {call.args[0].storage for call in ops if call.name.startswith("aten.embedding.") and isinstance(call.args[0], TensorRef)}


def _is_bias(name: str) -> bool:
    return "bias" in name.rpartition(".")[2]


def _is_positive(kind: str, name: str, ref: TensorRef) -> bool:
    if kind in ("state", "buffer"):
        return any(p in name for p in _POSITIVE)
    return kind == "weight" and len(ref.size) < 2 and not _is_bias(name)


def _scale(kind: str, name: str, ref: TensorRef, is_table: bool) -> int:
    """The symbol's elements are between 1/4 and 1 times two to the power of this. `ref`: as recorded."""
    if kind != "weight":
        return 0
    if _is_bias(name):
        return _BIAS
    if len(ref.size) < 2:                     # what a norm is multiplied by
        return 1
    if is_table:
        return 0
    added = ref.size[-1] if len(ref.size) == 2 else max(ref.size[-2:])       # of a stack of matrices, either may be the inner dimension
    return 1 - round(math.log2(max(1, added)) / 2)


def _values(ref: TensorRef, first: int, scale: int, positive: bool) -> np.ndarray:
    """Bytes of the symbol's elements in row-major order, numbers `first` and on of all: of either sign where that may be."""
    number = np.arange(first + 1, first + 1 + ref.numel, dtype=np.uint64)
    for odd in _MIX:                           # each step takes different numbers to different ones
        number = number * np.uint64(odd) & np.uint64(_DIFFERENT - 1)
        number ^= number >> np.uint64(11)
    drawn = number * np.uint64(_MIX[0])
    negative, larger = ((drawn >> np.uint64(bit) & np.uint64(1)).astype(bool) for bit in (20, 21))
    if ref.dtype in ("float32", "float64"):
        size = (np.uint32(_QUARTER) + (number.astype(np.uint32) << 1 | 1)).view(np.float32) * np.where(larger, np.float32(2), np.float32(1))
    else:
        size = ((number % _NARROW + _NARROW // 4) / _NARROW).astype(np.float32)
    values = np.ldexp(size if positive else np.where(negative, -size, size), scale)
    return torch.from_numpy(values).to(getattr(torch, ref.dtype)).reshape(-1).view(torch.uint8).numpy().copy()


def _whole(data: np.ndarray, ref: TensorRef, nbytes: int) -> np.ndarray:
    """The bytes of a storage in which the tensor is."""
    dtype = getattr(torch, ref.dtype)
    whole = torch.zeros(nbytes // dtype.itemsize, dtype=dtype)
    torch.as_strided(whole, ref.size, ref.stride, ref.offset).copy_(torch.from_numpy(data).view(dtype).reshape(ref.size))
    return whole.view(torch.uint8).numpy().copy()
