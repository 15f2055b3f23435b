"""Patterns: where each element of a value comes from, apart from which blocks those are (trusted).

A *block* is what one micro-operation made: its elements, flattened. A value is a pattern over a few blocks. Equal patterns are one
object, so that what was done to one layer is looked up for the next one: movements cost one dictionary entry, not one step per element.
"""
from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import torch

I32, I64 = np.int32, np.int64
CONSTANT = -1                                 # in `slot`: the element is the constant whose float64 bits are in `place`
UNKNOWN = int(np.array([0x7FF8_0000_0BAD_F00D], np.uint64).view(I64)[0])      # bits for what has no meaning


class Pattern:
    """slot, place: per element of `shape`, flattened, the block it comes from (counted within the value; CONSTANT) and its position there.
    Slots are numbered by first occurrence; `slots` says how many there are. number: equal patterns have equal ones. whole: it is the first elements of
    one block, in order."""

    __slots__ = ("number", "shape", "slot", "place", "slots", "whole")

    def __init__(self, number: int, shape: tuple[int, ...], slot: np.ndarray, place: np.ndarray, slots: int):
        self.number, self.shape, self.slot, self.place, self.slots = number, shape, slot, place, slots
        self.whole = slots == 1 and bool((slot == 0).all()) and bool((place == np.arange(len(place))).all())

    def __repr__(self) -> str:
        return f"Pattern({self.number}, {self.shape}, {self.slots} blocks)"


Blocks = tuple[int, ...]


class Patterns:
    """All patterns of a run, and what movements make of them (remembered)."""

    def __init__(self) -> None:
        self._known: dict[bytes, Pattern] = {}
        self._of_block: dict[tuple[int, ...], Pattern] = {}
        self._of_constant: dict[tuple[tuple[int, ...], int], Pattern] = {}
        self._moved: dict[tuple, tuple[Pattern, Blocks]] = {}
        self._merged: dict[tuple[Blocks, ...], tuple[Blocks, tuple[Blocks, ...]]] = {}

    # ---- interning
    def make(self, shape: Sequence[int], slot: np.ndarray, place: np.ndarray) -> tuple[Pattern, Blocks]:
        """The pattern, and which of the given slots its own are."""
        slot, used = self._renumbered(slot)
        shape = tuple(shape)
        head = hashlib.blake2b(repr(shape).encode(), digest_size=20)
        head.update(slot.tobytes())
        head.update(np.ascontiguousarray(place).tobytes())
        key = head.digest()
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = Pattern(len(self._known), shape, slot, np.ascontiguousarray(place), len(used))
        return found, used

    @staticmethod
    def _renumbered(slot: np.ndarray) -> tuple[np.ndarray, Blocks]:
        if not len(slot):
            return slot.astype(I32), ()
        low = int(slot[0])
        if (slot == low).all():
            return (slot.astype(I32), ()) if low == CONSTANT else (np.zeros(len(slot), I32), (low,))
        values, first = np.unique(slot, return_index=True)
        order = np.argsort(first)
        used = [int(v) for v in values[order] if v != CONSTANT]
        number = np.full(int(values[-1]) + 2, CONSTANT, I32)
        number[used] = np.arange(len(used))
        return number[slot], tuple(used)

    def block(self, shape: Sequence[int]) -> Pattern:
        """All elements of one block, in order."""
        shape = tuple(shape)
        found = self._of_block.get(shape)
        if found is None:
            n = math.prod(shape)
            found = self._of_block[shape] = self.make(shape, np.zeros(n, I32), np.arange(n, dtype=I64))[0]
        return found

    def everywhere(self, shape: Sequence[int], place: int) -> Pattern:
        """The same constant everywhere."""
        key = (tuple(shape), place)
        found = self._of_constant.get(key)
        if found is None:
            n = math.prod(shape)
            found = self._of_constant[key] = self.make(shape, np.full(n, CONSTANT, I32), np.full(n, place, I64))[0]
        return found

    # ---- remembered work
    def moved(self, p: Pattern, key: Hashable, move: Callable[[torch.Tensor], torch.Tensor]) -> tuple[Pattern, Blocks]:
        """What a movement of torch tensors makes of the pattern; key names the movement."""
        full = (p.number, key)
        found = self._moved.get(full)
        if found is None:
            at = move(torch.arange(len(p.slot)).reshape(p.shape))
            flat = at.reshape(-1).numpy()
            found = self._moved[full] = self.make(tuple(at.shape), p.slot[flat], p.place[flat])
        return found

    def joined(self, key: Hashable, make: Callable[[], tuple[Sequence[int], np.ndarray, np.ndarray]]) -> tuple[Pattern, Blocks]:
        """A pattern made of several (shape, slots, places); key names how and of which."""
        found = self._moved.get(key)
        if found is None:
            found = self._moved[key] = self.make(*make())
        return found

    def merge(self, *parts: Blocks) -> tuple[Blocks, tuple[Blocks, ...]]:
        """All blocks of several values, by first occurrence, and where each value's are among them."""
        found = self._merged.get(parts)
        if found is None:
            number: dict[int, int] = {}
            maps = tuple(tuple(number.setdefault(b, len(number)) for b in blocks) for blocks in parts)
            found = self._merged[parts] = (tuple(number), maps)
        return found


def through(p: Pattern, slots: Blocks) -> np.ndarray:
    """The pattern's slots, renamed."""
    if not p.slots or slots == tuple(range(p.slots)):
        return p.slot
    table = np.array([*slots, CONSTANT], I32)             # CONSTANT is -1: the last entry
    return table[p.slot]


def bits(num: torch.Tensor) -> np.ndarray:
    """Float64 contents as a pattern's places."""
    flat = num.reshape(-1).numpy() + 0.0                  # there is one zero
    return np.where(np.isnan(flat), UNKNOWN, flat.view(I64))


def contents(places: np.ndarray) -> torch.Tensor:
    """Float64 contents of a pattern's places (of constants)."""
    return torch.from_numpy(places.view(np.float64).copy())
