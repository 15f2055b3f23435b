"""Values for the symbols of a reduced program whose capture had none (not trusted: what is proved holds for all values).

A full-size capture has no values of floats. The reduced programs are replayed in reals, and storages are recognised by the values of the symbols that they
hold, so symbols get numbers: in 32 and 64 bits all different, each with a checksum, so that a constant of the program is not taken for a symbol; in 16 bits
few different ones, which are nobody's.
"""
from __future__ import annotations

import numpy as np

CHECK_BITS = 6
MANTISSA = 23 - CHECK_BITS                    # bits that differ
HIGHEST, MOST = 126, 96                       # exponents: all numbers are below 1; octaves
ODD = 2654435761                              # times this, modulo a power of two, mixes numbers one to one
FEW = 64


class Drawer:
    """Hands out `total` values; no magnitude of 32 bits twice."""

    def __init__(self, total: int):
        self.given = 0
        self._bits = MANTISSA + 3
        while total > 1 << self._bits:
            self._bits += 1
        if 1 << (self._bits - MANTISSA) > MOST:
            raise OverflowError(f"{total} symbols are more than there are numbers to tell them apart by")

    def values(self, n: int, dtype: str, positive: bool) -> np.ndarray:
        """Bytes of n numbers of a float type."""
        numbers = np.arange(self.given, self.given + n, dtype=np.uint64)
        self.given += n
        if dtype in _WIDE:
            return self._different(numbers, positive).astype(_WIDE[dtype]).view(np.uint8)
        made = ((1 + numbers % FEW) / FEW * np.where(positive | (numbers % 2 == 0), 1.0, -1.0)).astype(np.float32)
        if dtype == "float16":
            return made.astype("<f2").view(np.uint8)
        if dtype == "bfloat16":
            return (made.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
        return np.full(n, 0x30, dtype=np.uint8)       # the float8 types

    def _different(self, numbers: np.ndarray, positive: bool) -> np.ndarray:
        """fp32 numbers: octave and mantissa by a one-to-one mixing, then a checksum in the lowest bits; any sign."""
        mixed = (numbers * np.uint64(ODD)) & np.uint64((1 << self._bits) - 1)
        mantissa, octave = mixed & np.uint64((1 << MANTISSA) - 1), mixed >> np.uint64(MANTISSA)
        sign = np.zeros_like(mixed) if positive else (numbers * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(63)
        head = (sign << np.uint64(8 + MANTISSA)) | ((np.uint64(HIGHEST) - octave) << np.uint64(MANTISSA)) | mantissa
        check = ((head * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)) % np.uint64((1 << CHECK_BITS) - 1) + np.uint64(1)
        return ((head << np.uint64(CHECK_BITS)) | check).astype(np.uint32).view(np.float32)


_WIDE = {"float32": "<f4", "float64": "<f8", "complex64": "<c8", "complex128": "<c16"}

__all__ = ["Drawer"]
