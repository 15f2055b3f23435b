"""An open-addressing map from 62-bit keys to rows of int64, in batches (a wrong answer would be noticed: the store compares rows)."""
from __future__ import annotations

import numpy as np

_EMPTY = -1
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class HashTable:
    """Keys are nonnegative int64; each has `width` int64 values. The first value that is put under a key stays."""

    def __init__(self, width: int = 1, bits: int = 12):
        self._width = width
        self._allocate(bits)

    def __len__(self) -> int:
        return int((self._keys != _EMPTY).sum())

    def _allocate(self, bits: int) -> None:
        self._bits, self._used = bits, 0
        self._keys = np.full(1 << bits, _EMPTY, dtype=np.int64)
        self._values = np.zeros((1 << bits, self._width), dtype=np.int64)

    def _start(self, keys: np.ndarray) -> np.ndarray:
        return ((keys.view(np.uint64) * _MULTIPLIER) >> np.uint64(64 - self._bits)).view(np.int64)

    def get(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(found, values [n, width]); values of missing keys are arbitrary."""
        slot, last = self._start(keys), (1 << self._bits) - 1
        seen = self._keys[slot]
        found = seen == keys
        pending = np.flatnonzero(~found & (seen != _EMPTY))
        while pending.size:
            slot[pending] = at = (slot[pending] + 1) & last
            seen = self._keys[at]
            hit = seen == keys[pending]
            found[pending[hit]] = True
            pending = pending[~hit & (seen != _EMPTY)]
        return found, self._values[slot]

    def put(self, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Adds what is missing; returns the values [n, width] that hold from now on."""
        self._reserve(len(keys))
        slot, last = self._start(keys), (1 << self._bits) - 1
        pending = np.arange(len(keys))
        while pending.size:
            at = slot[pending]
            new = pending[self._keys[at] == _EMPTY][::-1]      # of equal slots numpy keeps the last written: the earliest element
            if new.size:
                self._keys[slot[new]] = keys[new]
                self._values[slot[new]] = values[new]
                self._used += len(new)
            pending = pending[self._keys[at] != keys[pending]]
            slot[pending] = (slot[pending] + 1) & last
        return self._values[slot]

    def _reserve(self, n: int) -> None:
        if 2 * (self._used + n) <= 1 << self._bits:
            return
        self._used = len(self)                # duplicates had been counted
        bits = self._bits
        while 2 * (self._used + n) > 1 << bits:
            bits += 1
        if bits > self._bits:
            self._grow(bits)

    def _grow(self, bits: int) -> None:
        """A larger table with the same contents: in the order of their first slots, each key gets that slot or the next free one."""
        keep = self._keys != _EMPTY
        keys, values = self._keys[keep], self._values[keep]
        self._allocate(bits)
        start = self._start(keys)
        order = np.argsort(start, kind="stable")
        n = np.arange(len(order))
        slot = np.maximum.accumulate(start[order] - n) + n
        fits = slot < 1 << bits
        at, here = order[fits], slot[fits]
        self._keys[here], self._values[here], self._used = keys[at], values[at], len(at)
        rest = order[~fits]                   # past the end: they go on at the beginning
        self.put(keys[rest], values[rest])
