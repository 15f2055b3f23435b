"""Tags: the values that symbols have while a program is captured (trusted: two symbols never share a value that decodes).

Every symbol gets a value near its initial one, distinct from all others of the run. Tags of 32 and 64 bit floats are fp32 numbers
whose low mantissa bits are a checksum of the others, so that ordinary data does not decode by accident; tags of 16 bit floats
are distinct numbers of their type, which is possible for a few hundred elements only.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_CHECK_BITS = 6
_CHECK_MASK = (1 << _CHECK_BITS) - 1
_ROUNDS = 40
_NARROW_ZEROS = 13                            # low bits of an fp32 number that a 16 bit float leaves zero
_NARROW_LIMIT = 1024                          # more elements than that cannot be distinct near each other
_LARGEST = 1e38
_NUDGE = 2.0 ** -15                            # relative; a few distinct fp32 numbers with checksum away
_FAR = 8.0                                     # times the usual distance from the initial values
BASE = 1024                                    # of digits that 16 bit tags show
_STEPS, _OCTAVE = 128, -5                  # numbers of 8 significant bits from 2^-5 down: the same in bfloat16 and in float16
WIDE, NARROW = ("float32", "float64"), ("bfloat16", "float16")


@dataclass(frozen=True)
class Tags:
    """fp32 values for one symbol block; distinct: all differ from each other and from those of all other blocks."""

    values: np.ndarray
    distinct: bool


class Tagger:
    """Hands out tags; remembers all that it gave. nudge: other tags, those of 32 bits and more close to what they are without.
    digit: 16 bit tags show this digit of the element's number (capture/digits.py). routing: from 1 on, tags farther from the initial values."""

    def __init__(self, seed: int, nudge: int = 0, digit: int = -1, routing: int = 0):
        self._nudge, self._blocks = nudge, 0
        self._digit, self._numbered = digit, 0
        self._start, self._spread = [seed, 0x7A6, *([routing] if routing else [])], _FAR if routing else 1.0
        self._wide = np.zeros(1 << (32 - _CHECK_BITS), dtype=bool)      # which numbers were given, by their bits above the checksum
        self._narrow = np.zeros(1 << (32 - _NARROW_ZEROS), dtype=bool)  # ... by the bits that a 16 bit float has

    def tag(self, initial: np.ndarray, dtype: str, positive: bool = False) -> Tags:
        """Tags for a flat fp32 array of initial values of a tensor of `dtype`. positive: no tag is negative."""
        base = np.nan_to_num(initial.astype(np.float64), nan=0.0, posinf=1.0, neginf=-1.0)
        self._blocks += 1
        self._random = np.random.default_rng([*self._start, self._blocks])
        if dtype in WIDE:
            return Tags(self._apart(self._nudged(self._near(base, positive, self._spread)).astype(np.float32)), True)
        if self._digit >= 0:
            self._numbered += base.size
            return Tags(digit_values(np.arange(self._numbered - base.size, self._numbered), self._digit), True)
        if self._nudge:
            self._random = np.random.default_rng([*self._start, self._blocks, self._nudge])
        make = _NARROW[dtype]
        values = make(self._near(base, positive, self._spread)).astype(np.float32)
        again = self._clashes(values, np.arange(values.size))
        for round_ in range(1, _ROUNDS if values.size <= _NARROW_LIMIT else 1):
            if not again.size:
                break
            values[again] = make(self._near(base[again], positive, self._spread + 0.25 * round_))
            again = self._clashes(values, again)
        return Tags(values, not again.size)

    def _apart(self, values: np.ndarray) -> np.ndarray:
        """Each value, or where that is taken the next larger one (in magnitude) that is free."""
        head = values.view(np.uint32).astype(np.int64) >> _CHECK_BITS
        pending = _taken(self._wide, head, np.arange(head.size))
        for sign in (0, 1):
            mine = pending[head[pending] >> (31 - _CHECK_BITS) == sign]
            mine = mine[np.argsort(head[mine], kind="stable")]
            if mine.size:
                head[mine] = _free(self._wide, head[mine], sign)
                self._wide[head[mine]] = True
        return _checksummed(head)

    def _near(self, base: np.ndarray, positive: bool, spread: float) -> np.ndarray:
        """Perturbed values: a tenth of the magnitude, and never near 0, where a wrong factor would not show."""
        scale = float(np.sqrt(np.mean(base * base))) if base.size else 0.0
        typical = scale if scale > 0 else 0.1
        noise = self._random.uniform(-1.0, 1.0, base.shape)
        sign = np.where(noise < 0, -1.0, 1.0)
        moved = base + spread * 0.1 * noise * np.maximum(np.abs(base), 0.2 * typical)
        small = np.abs(moved) < 0.05 * typical
        moved = np.where(small, sign * typical * self._random.uniform(0.05, 0.3, base.shape) * spread, moved)
        moved = np.clip(moved, -_LARGEST, _LARGEST)
        return np.abs(moved) if positive else moved

    def _nudged(self, values: np.ndarray) -> np.ndarray:
        """By steps of one sign per element, so that no value stays."""
        if not self._nudge:
            return values
        random = np.random.default_rng([*self._start, self._blocks, self._nudge])
        return values * (1.0 + _NUDGE * random.uniform(1.0, 2.0, values.shape) * random.choice([-1.0, 1.0], values.shape))

    def _clashes(self, values: np.ndarray, among: np.ndarray) -> np.ndarray:
        """Which of these elements have a value that was given before, or stands earlier among them; the others now have theirs."""
        return _taken(self._narrow, values.view(np.uint32) >> _NARROW_ZEROS, among)


def _taken(given: np.ndarray, slot: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Which elements' slots were given before, or are those of earlier elements; the other slots are given now."""
    free = among[~given[slot[among]]]
    free = free[np.unique(slot[free], return_index=True)[1]]
    given[slot[free]] = True
    return np.setdiff1d(among, free, assume_unique=True)


def _free(given: np.ndarray, heads: np.ndarray, sign: int) -> np.ndarray:
    """For ascending heads of one sign: distinct ones that nobody has, each at or above its own."""
    end = (sign << (31 - _CHECK_BITS)) + (0x7F800000 >> _CHECK_BITS)    # infinity
    reach = 4 * heads.size + 4096
    while True:
        free = heads[0] + np.flatnonzero(~given[heads[0]:min(heads[-1] + reach, end)])
        order = np.arange(heads.size)
        at = order + np.maximum.accumulate(np.searchsorted(free, heads) - order)
        if at[-1] < free.size:
            return free[at]
        if heads[-1] + reach >= end:
            raise OverflowError("more symbols of one sign than fp32 numbers")
        reach *= 8


def _checksummed(head: np.ndarray) -> np.ndarray:
    """The fp32 numbers with these bits above the checksum."""
    head = head.astype(np.uint32)
    return ((head << _CHECK_BITS) | _check(head)).astype(np.uint32).view(np.float32)


def _check(head: np.ndarray) -> np.ndarray:
    """1 .. 63: never 0, so that short numbers (0.5, 1, 0.02 in bf16) are no tags."""
    mixed = (head.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
    return (mixed % np.uint64(_CHECK_MASK) + np.uint64(1)).astype(np.uint32)


def is_checksummed(values: np.ndarray) -> np.ndarray:
    """Which fp32 values carry the checksum."""
    bits = values.astype(np.float32).view(np.uint32)
    return (bits & _CHECK_MASK) == _check(bits >> _CHECK_BITS)


def _bfloat16(x: np.ndarray) -> np.ndarray:
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32)


def _float16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float32)


_NARROW = {"bfloat16": _bfloat16, "float16": _float16}


def digit_values(numbers: np.ndarray, digit: int) -> np.ndarray:
    """The fp32 values that show one digit of these numbers."""
    d = numbers // BASE ** digit % BASE
    return (np.ldexp(1.0 + d % _STEPS / _STEPS, _OCTAVE - d // _STEPS) * (-1.0) ** digit).astype(np.float32)


def digits_of(values: np.ndarray, digit: int) -> np.ndarray:
    """The digits that fp32 values show, -1 where they show none."""
    mantissa, exponent = np.frexp(np.nan_to_num(values.astype(np.float64) * (-1.0) ** digit, nan=0.0, posinf=0.0, neginf=0.0))
    m, octave = (2.0 * mantissa - 1.0) * _STEPS, _OCTAVE - (exponent - 1)
    fits = (mantissa > 0) & (m == np.floor(m)) & (octave >= 0) & (octave < BASE // _STEPS)
    return np.where(fits, octave * _STEPS + m, -1).astype(np.int64)


class TagTable:
    """From values back to symbols: blocks of symbols in the order of their definition, numbered one after the other."""

    def __init__(self, blocks: list[tuple[str, np.ndarray]]):
        self.names = [name for name, _ in blocks]
        self.first = np.cumsum([0] + [v.size for _, v in blocks])[:-1]
        self.values = np.concatenate([v.reshape(-1).astype(np.float32) for _, v in blocks] or [np.empty(0, np.float32)])
        bits = self.values.view(np.uint32)
        order = np.argsort(bits, kind="stable")
        shared = np.zeros(bits.shape, dtype=bool)
        same = bits[order][1:] == bits[order][:-1]
        shared[order[1:][same]] = shared[order[:-1][same]] = True
        keep = order[~shared[order]]
        self._bits, self._numbers = bits[keep], keep.astype(np.int64)

    def decode(self, values: np.ndarray) -> np.ndarray:
        """The symbol number of each fp32 value, -1 where it is no symbol's alone."""
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        if not self._bits.size:
            return np.full(bits.shape, -1, dtype=np.int64)
        at = np.minimum(np.searchsorted(self._bits, bits), self._bits.size - 1)
        return np.where(self._bits[at] == bits, self._numbers[at], -1)

    def name(self, number: int) -> tuple[str, int]:
        """Name and element of a symbol number."""
        block = int(np.searchsorted(self.first, number, side="right")) - 1
        return self.names[block], int(number - self.first[block])
