"""Classes of dimensions as text and JSON (no torch, not trusted)."""
from __future__ import annotations

import msgspec

from trainverify.report.model import Reduction
from trainverify.report.words import WIDTH, short_paths, wrap


def encode(found: Reduction) -> bytes:
    return msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n"


def sentence(found: Reduction) -> str:
    """"hidden 20 to 6, vocabulary 36 to 20": the named classes that are smaller, at most six."""
    named: dict[str, None] = {}
    for c in found.classes:
        if c.reduced < c.size:
            named[f"{c.name or 'a dimension'} {c.size:,} to {c.reduced}"] = None
    shown = list(named)[:6]
    return ", ".join(shown) + (f" and {len(named) - 6} more" if len(named) > 6 else "") if named else "the sizes as recorded: none could be smaller"


def render(found: Reduction, width: int = WIDTH) -> str:
    """One class after the other, with the dimensions that it joins; then what keeps its size, and why."""
    lines = [f"{sum(c.many for c in found.classes)} classes of dimensions; sizes as recorded and reduced"]
    for c in found.classes:
        many = f" ({c.many} classes)" if c.many > 1 else ""
        head = f"  {c.size:>7,} -> {c.reduced:<6,} "
        lines += wrap(head, f"{c.name or '-'}{many}: {short_paths(', '.join(c.joins)) or 'inner dimensions only'}", width, indent=len(head))
        if c.pinned:
            lines += wrap(" " * len(head), f"pinned: {c.pinned}", width)
    if found.pins:
        lines.append("pinned at full size")
        lines += [line for p in found.pins for line in wrap("  ", short_paths(p), width, indent=4)]
    return "\n".join(lines) + "\n"
