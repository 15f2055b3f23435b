"""The table of `trainverify lineage`: what every float result of every rank holds of the reference (no torch, not trusted).

Ranks whose results of one call hold the same in the same words stand in one row.
"""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase

import msgspec

from trainverify.report.model import Lineage, LineageTable
from trainverify.report.words import count_of, int_ranges, short_path, short_paths, wrap

RANKS = 7                                     # width of the first column
_NAMESPACE = re.compile(r"\b(aten|c10d)\.(\w+)(\.\w+)?\b")


def selected(table: LineageTable, ranks: Sequence[int], pattern: str) -> LineageTable:
    """Only these ranks (all if there are none), and operations that a pattern with * and ? fits, or that contain it."""
    def fits(op: str) -> bool:
        return not pattern or pattern in op or fnmatchcase(op, pattern)
    return msgspec.structs.replace(table, lineages=[x for x in table.lineages if (not ranks or x.rank in ranks) and fits(x.op)])


def render(table: LineageTable, width: int = 80) -> str:
    """Two lines and more for each result: ranks, operation, shape and place, and below what it holds."""
    case = ",".join(f"{k}={v}" for k, v in table.case.items())
    title = f"{short_path(table.spec)}{f'[{case}]' if case else ''}: {count_of(table.ranks, 'rank')}, {count_of(table.steps, 'step')}, seed {table.seed}"
    lines = [*wrap("lineage of ", title, width), "", f"{'ranks':<{RANKS}}operation, shape, place", f"{'':<{RANKS}}  what it holds of the reference", ""]
    for ranks, x in _rows(table.lineages):
        head = f"{int_ranges(ranks):<{RANKS - 1}} {_short(x.op)} {_shape(x)}"
        place = f"{short_path(x.place)} ({x.phase}{f', step {x.step}' if x.step else ''})" if x.place else ""
        lines += _two(head, place, width)
        lines += wrap(" " * (RANKS + 2), _short(short_paths(x.text)), width, indent=RANKS + 4)
    counts = Counter(x.kind for x in table.lineages)
    total = ", ".join(f"{n:,} {kind}" for kind, n in sorted(counts.items(), key=lambda kv: (-kv[1], kv[0])))
    lines += ["", *wrap("results of all ranks: ", total or "none", width, indent=2)]
    return "\n".join(lines).encode("ascii", "backslashreplace").decode("ascii") + "\n"


def encode(table: LineageTable) -> bytes:
    """The table as indented JSON, ending in a newline."""
    plain = msgspec.to_builtins({**{f: getattr(table, f) for f in table.__struct_fields__ if f != "diagnostics"}, "diagnostics": [d.message for d in table.diagnostics]})
    return msgspec.json.format(msgspec.json.encode(plain), indent=2) + b"\n"


def _rows(lineages: Sequence[Lineage]) -> list[tuple[list[int], Lineage]]:
    """Results of the same call, by place and the how-manieth time it comes there, that are told in the same words."""
    times: Counter = Counter()
    rows: dict[tuple, tuple[list[int], Lineage]] = {}
    for x in lineages:
        call = (x.op, x.place, x.phase, x.step, x.shape)
        times[(x.rank, call)] += 1
        key = (call, times[(x.rank, call)], x.text)
        rows.setdefault(key, ([], x))[0].append(x.rank)
    return list(rows.values())


def _two(head: str, place: str, width: int) -> list[str]:
    one = f"{head}  {place}".rstrip()
    return [one] if len(one) <= width else [head, *wrap(" " * (RANKS + 2), place, width)]


def _shape(x: Lineage) -> str:
    return str(list(x.shape)) + ("" if x.dtype == "float32" else f" {x.dtype}")


def _short(text: str) -> str:
    """aten.mm.default -> mm."""
    return _NAMESPACE.sub(lambda m: m.group(2), text)
