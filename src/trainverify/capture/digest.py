"""Digests of tensor bytes: what lets a later replay notice a write that nobody recorded (trusted)."""
from __future__ import annotations

import ctypes
import functools
import zlib
from collections.abc import Iterable

import numpy as np
import torch

_crc32 = zlib.crc32
_byte = ctypes.c_char
_strided = torch.strided
_LARGE, _PAGE, _DONTNEED = 1 << 26, 1 << 12, 4     # bytes of memory that is better given back than overwritten; of a page; MADV_DONTNEED
_WHOLE, _PIECE, _PIECES = 1 << 20, 1 << 10, 256    # bytes: a storage that is looked at as a whole; of a larger one a piece; how many of them


def crc(tensors: Iterable[torch.Tensor]) -> int:
    """crc32 over the tensors' elements, one tensor after the other, each in row-major order. Dispatch modes must be off."""
    value = 0
    for t in tensors:
        n = t.nbytes
        if n and not t.is_meta:
            if not t.is_contiguous():
                t = t.contiguous()
            address = t.data_ptr()
            if address:                        # the memory may have been given back (FSDP)
                value = _crc32(_bytes(n).from_address(address), value)
    return value


@functools.lru_cache(4096)
def _bytes(n: int) -> type:
    """The type of n bytes in memory (ctypes keeps none that nobody uses, and making one is slow)."""
    return _byte * n


def contents(t: torch.Tensor) -> np.ndarray:
    """A copy of a tensor's bytes, elements in row-major order. Dispatch modes must be off."""
    t = t.detach().contiguous()
    return _copy(t.data_ptr(), t.nbytes)


def storage_bytes(storage: torch.UntypedStorage) -> np.ndarray:
    """A copy of a storage's bytes."""
    return _copy(storage.data_ptr(), storage.nbytes())


def storage_crc(storage: torch.UntypedStorage) -> int:
    """crc32 of a storage's bytes; 0 where it has none in memory."""
    n = storage.nbytes()
    return _crc32(_bytes(n).from_address(storage.data_ptr())) if n and storage.device.type != "meta" else 0


def sampled_crc(storage: torch.UntypedStorage) -> int:
    """Like storage_crc, of a part of a large storage: where full-size masks are read in every layer."""
    n = storage.nbytes()
    if n <= _WHOLE or storage.device.type == "meta":
        return storage_crc(storage)
    value, start = 0, storage.data_ptr()
    for at in range(0, n - _PIECE, n // _PIECES):
        value = _crc32((_byte * _PIECE).from_address(start + at), value)
    return value


def clear(storage: torch.UntypedStorage, start: int = 0) -> None:
    """Zero a storage's bytes from `start` on. Of a large one the system takes its pages back, and has zeros for whoever touches them."""
    n = storage.nbytes() - start
    if n > 0 and storage.device.type != "meta":
        begin = storage.data_ptr() + start
        end = begin + n
        if is_large(storage):
            first, last = -(-begin // _PAGE) * _PAGE, end // _PAGE * _PAGE
            if ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _DONTNEED) == 0:
                ctypes.memset(begin, 0, first - begin)
                begin = last
        ctypes.memset(begin, 0, end - begin)


def is_large(storage: torch.UntypedStorage) -> bool:
    """Whether a storage's memory is a mapping of its own (malloc takes none for less than 32 MB), of which untouched pages cost nothing."""
    return storage.nbytes() >= _LARGE and storage.device.type == "cpu" and not storage.is_shared()


def is_zero(t: torch.Tensor) -> bool:
    """Whether all bytes of a tensor's elements are zero. Dispatch modes must be off."""
    if not t.is_contiguous():
        t = t.contiguous()
    return not t.nbytes or not np.frombuffer((ctypes.c_uint8 * t.nbytes).from_address(t.data_ptr()), dtype=np.uint8).any()


def _copy(address: int, n: int) -> np.ndarray:
    if not n:
        return np.empty(0, dtype=np.uint8)
    return np.frombuffer((ctypes.c_uint8 * n).from_address(address), dtype=np.uint8).copy()
