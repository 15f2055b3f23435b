"""Small pieces of wording that reports share: ranks, folded names, numbers, wrapped lines. Pure string functions, no torch, not trusted."""
from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Iterable, Sequence
from itertools import pairwise

WIDTH = 80                                    # columns of a plain report
JOIN = "\0"                                   # in a text to be wrapped: a space at which no line ends


def int_ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def ranks_text(ranks: Sequence[int]) -> str:
    """(3,) -> "rank 3"; (0, 1, 2) -> "ranks 0-2"; (0, 2, 4, 6) -> "ranks 0-6 by 2"; () -> ""; of very many pieces the first few."""
    if not ranks:
        return ""
    numbers = sorted(set(ranks))
    gaps = {b - a for a, b in pairwise(numbers)}
    if len(numbers) > 3 and len(gaps) == 1 and gaps != {1}:
        return f"ranks {numbers[0]}-{numbers[-1]} by {gaps.pop()}"
    pieces = int_ranges(numbers).split(",")
    if len(pieces) > 12:
        return f"ranks {','.join(pieces[:8])},... ({len(numbers)} of them)"
    return ("rank " if len(numbers) == 1 else "ranks ") + ",".join(pieces)


def fold_names(names: Iterable[str]) -> list[str]:
    """Dotted names that differ only in numbered components become one: layers.0.norm, layers.1.norm -> layers.0-1.norm.

    Only whole components fold (norm1 and norm2 stay two names), and only complete products do, so no name is invented. Optimizer
    states (a parameter's name, "::", a key) fold over their keys as well: w::exp_avg, w::step -> w::{exp_avg,step}.
    """
    keys: dict[tuple[str, str], list[str]] = {}
    for n in dict.fromkeys(names):
        parameter, separator, key = n.partition("::")
        keys.setdefault((parameter, separator), []).append(key)
    by_keys: dict[str, list[str]] = {}
    for (parameter, separator), its in keys.items():
        by_keys.setdefault(separator + (its[0] if len(its) == 1 else "{" + ",".join(its) + "}"), []).append(parameter)
    return [name + suffix for suffix, parameters in by_keys.items() for name in _fold(parameters)]


def _fold(names: list[str]) -> list[str]:
    rows = [tuple(n.split(".")) for n in names]
    for slot in range(max((len(r) for r in rows), default=0)):
        groups: dict[tuple, list[tuple[str, ...]]] = {}
        for row in rows:
            numbered = slot < len(row) and row[slot].isdecimal()
            key = (row[:slot], row[slot + 1:]) if numbered else (row, None)
            groups.setdefault(key, []).append(row)
        rows = [_merge(slot, members) for members in groups.values()]
    return [".".join(r) for r in rows]


def _merge(slot: int, members: list[tuple[str, ...]]) -> tuple[str, ...]:
    if len(members) == 1:
        return members[0]
    text = int_ranges(int(m[slot]) for m in members)
    text = f"{{{text}}}" if "," in text else text
    return members[0][:slot] + (text,) + members[0][slot + 1:]


def number(x: float) -> str:
    """A value as a reader would write it: 3, 0.25, 1.5e-07, NaN."""
    if math.isnan(x):
        return "NaN"
    if math.isinf(x):
        return "inf" if x > 0 else "-inf"
    return str(int(x)) if x == int(x) and abs(x) < 1e15 else f"{x:.9g}"


def count_of(n: int, noun: str) -> str:
    """(1, "step") -> "1 step"; (2, "step") -> "2 steps"."""
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def memory_text(nbytes: int) -> str:
    """Bytes in GB, or MB below a tenth of one."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.0f} MB"


def ascii_text(text: str) -> str:
    """Printable ASCII and newlines; everything else as its escape ("\\x1b", "\\xe9"), which no document format forbids."""
    return "".join(c if c == "\n" or " " <= c <= "~" else c.encode("unicode_escape").decode() for c in text)


def short_path(path: str) -> str:
    """Relative to the current folder where it lies in it, else as it is."""
    if not os.path.isabs(path):
        return path
    rel = os.path.relpath(path)
    return path if rel.startswith("..") else rel


def short_paths(text: str) -> str:
    """A text with the paths in it relative to the current folder where they lie in it."""
    here = os.path.join(os.getcwd(), "")
    return text.replace(here, "") if here != os.sep else text


def wrap(first: str, text: str, width: int, indent: int | None = None) -> list[str]:
    """`first` then `text`, later lines indented under it; words, paths and commands are never broken, nor is a line at a JOIN."""
    hang = " " * (len(first) if indent is None else indent)
    lines = textwrap.wrap(text, width, initial_indent=first, subsequent_indent=hang, break_long_words=False, break_on_hyphens=False)
    return [line.replace(JOIN, " ") for line in lines] or [first.rstrip()]


def join_wrapped(parts: Sequence[str], separator: str, width: int, indent: str = "  ") -> list[str]:
    """Parts on as few lines as fit, a line ending in the separator where it goes on."""
    lines = [""]
    for i, part in enumerate(parts):
        tail = separator if i < len(parts) - 1 else ""
        start = not lines[-1].strip()
        if not start and len((lines[-1] + part + tail).rstrip()) > width:
            lines.append(indent)
        lines[-1] += part + tail
    return [line.rstrip() for line in lines]
