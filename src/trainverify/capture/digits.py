"""Digit tags: how many 16 bit symbols are told apart (trusted: an element is bound to the symbol whose digits it shows in every capture).

A 16 bit float has a few hundred values near each other, so the tags of a larger tensor repeat. Where the program reads such weights from
a file, they are captured twice more, and each capture gives every element one digit (to the base 1024) of its number as its value.
The digits' values differ from capture to capture in their sign, so that data which stay the same are no digits.
"""
from __future__ import annotations

import numpy as np

from trainverify.capture.provenance import decoded, has_tags, width
from trainverify.capture.tags import BASE, digits_of
from trainverify.ir.trace import OpCall, Program, inputs

DIGITS = 2


def needed(reference: Program, parallel: Program) -> bool:
    """Whether tags repeat, and the parallel program reads memory that may hold them, and few enough elements are 16 bits wide."""
    if not any(n.code == "CAP002" for n in reference.traces[0].notes):
        return False
    narrow = sum(c.args[2].numel for c in _symbols(reference) if width(c.args[2].dtype) == 2)
    return narrow <= BASE ** DIGITS and any(_loaded(t.ops, b) for t, b in zip(parallel.traces, parallel.blobs))


def tell_apart(done, captures: list) -> bool:
    """Note in the parallel program of `done` which symbols its memory began with, by the digits of `captures` (all with `reference` and
    `parallel`): blob `from.<storage>`, symbols counted as they are defined, -1 where none is shown."""
    if len(captures) != DIGITS or any(c.parallel is None for c in captures):
        return False
    tags = _values(done.reference, done.reference)
    symbols = np.full(BASE ** DIGITS, -1, dtype=np.int64)
    shown = [digits_of(_values(done.reference, c.reference), k) for k, c in enumerate(captures)]
    number, known = _numbers(shown)
    narrow = known & np.concatenate([np.full(c.args[2].numel, width(c.args[2].dtype) == 2) for c in _symbols(done.reference)])
    symbols[number[narrow]] = np.flatnonzero(narrow)
    for rank, (trace, blobs) in enumerate(zip(done.parallel.traces, done.parallel.blobs)):
        for storage, dtype in _loaded(trace.ops, blobs).items():
            others = [c.parallel.blobs[rank].get(f"init.{storage}") for c in captures]
            first = _floats(blobs[f"init.{storage}"], dtype)
            if any(o is None or len(o) != len(blobs[f"init.{storage}"]) for o in others):
                continue
            number, known = _numbers([digits_of(_floats(o, dtype), k) for k, o in enumerate(others)])
            found = np.where(known, symbols[np.where(known, number, 0)], -1)
            found[(found < 0) | (tags[found] != first)] = -1
            if (found >= 0).any():
                blobs[f"from.{storage}"] = found
    done.reference.traces[0].notes[:] = [n for n in done.reference.traces[0].notes if n.code != "CAP002"]
    return True


def _numbers(digits: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of which these are the digits, and where all digits are there."""
    return sum(np.maximum(d, 0) * BASE ** k for k, d in enumerate(digits)), np.logical_and.reduce([d >= 0 for d in digits])


def _symbols(reference: Program) -> list[OpCall]:
    return list({c.args[1]: c for c in reversed(reference.traces[0].ops) if c.name == "tv.symbol"}.values())[::-1]


def _values(order: Program, reference: Program) -> np.ndarray:
    """The values of all symbols in one capture, in the order of another."""
    parts = [decoded(np.ascontiguousarray(reference.blobs[0][f"symbol.{c.args[1]}"]).view(np.uint8), c.args[2].dtype) for c in _symbols(order)]
    return np.concatenate([p.reshape(-1) for p in parts])


def _floats(raw: np.ndarray, dtype: str) -> np.ndarray:
    return decoded(np.ascontiguousarray(raw)[: len(raw) // width(dtype) * width(dtype)], dtype)


def _loaded(ops: list[OpCall], blobs: dict) -> dict[int, str]:
    """Storages with first contents that were not handed over, and their types (a file's reader may have looked at bytes before)."""
    seen: dict[int, str] = {}
    handed = {c.args[2].storage for c in ops if c.name == "tv.symbol"}
    for call in ops:
        for ref in inputs(call):
            if ref.storage not in seen and has_tags(ref.dtype) and ref.storage not in handed and f"init.{ref.storage}" in blobs:
                seen[ref.storage] = ref.dtype
    return seen
