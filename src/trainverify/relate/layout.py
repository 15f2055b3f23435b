"""Lineage in the field's words: which slice of a reference parameter a rank holds, and how an output is laid out over ranks."""
from __future__ import annotations

import numpy as np

from trainverify.relate.compare import Compared, Lineage
from trainverify.relate.symbols import Symbols


def describe(symbols: Symbols, line: Lineage) -> str:
    """"layers.0.wq.weight[0:8, :]" for what a rank's parameter holds; several sources are joined with " + "."""
    flat = line.numbers.reshape(-1)
    held = flat[flat >= 0]
    if not len(held):
        return "no reference element"
    parts = []
    owners = symbols.owner(held)
    for b in dict.fromkeys(owners.tolist()):
        block = symbols.blocks_in_order[b]
        parts.append(block.name + slices(held[owners == b] - block.first, block.shape))
    return " + ".join(parts[:4]) + (f" + {len(parts) - 4} more" if len(parts) > 4 else "")


def slices(flat: np.ndarray, shape: tuple[int, ...]) -> str:
    """The box that flat element positions fill ("[0:8, :]"), else "[n elements, permuted or scattered]"; "" for the whole in order."""
    n = int(np.prod(shape, dtype=np.int64))
    if len(flat) == n and (flat == np.arange(n)).all():
        return ""
    if not shape:
        return ""
    index = np.unravel_index(np.unique(flat), shape)
    lows, highs = [int(i.min()) for i in index], [int(i.max()) + 1 for i in index]
    if int(np.prod([h - l for l, h in zip(lows, highs)], dtype=np.int64)) != len(np.unique(flat)):
        return f"[{len(flat)} elements]"
    box = "[" + ", ".join(":" if (l, h) == (0, s) else f"{l}:{h}" for l, h, s in zip(lows, highs, shape)) + "]"
    return box + ("" if (np.diff(flat) > 0).all() else " permuted")


def layout(c: Compared, shape: tuple[int, ...], groups: dict[tuple[int, ...], str]) -> str:
    """"replicated", "shard(tp)", "shard(dp) x replicate(tp)" where process groups have names, else by rank counts."""
    if not c.pieces or not len(c.pieces[0].numbers):
        return "replicated" if len(c.pieces) > 1 else "on one rank"
    held = {p.rank: frozenset(p.numbers.tolist()) for p in c.pieces}
    words = []
    for ranks, axis in groups.items():
        mine = [held[r] for r in ranks if r in held]
        if axis and len(mine) == len(ranks) > 1 and not any(axis in w for w in words):
            words.append(f"replicate({axis})" if len(set(mine)) == 1 else f"shard({axis})")
    if words:
        return " x ".join(words)
    distinct = len(set(held.values()))
    if distinct == 1:
        return "replicated" if len(held) > 1 else "on one rank"
    return f"shard({distinct} ways)"
