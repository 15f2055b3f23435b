"""A counterexample as text: its inputs, then both sides' values in step until they differ (no torch, not trusted)."""
from __future__ import annotations

from trainverify.report.model import Counterexample, Step
from trainverify.report.words import count_of, ranks_text, short_path, short_paths, wrap


def counterexample_lines(c: Counterexample | None, width: int) -> list[str]:
    if c is None:
        return []
    nonzero = f"{c.nonzero:,} of {count_of(c.elements, 'float input')} {'is' if c.nonzero == 1 else 'are'} not zero"
    how = f"minimised in {count_of(c.trials, 'replay')}: {nonzero}" if c.minimised else c.note
    lines = wrap("  counterexample (float64, replayed), ", how, width, indent=4)
    if c.minimised:
        inputs = [f"{name} = {value}".replace(" ", "\0") for name, value in c.inputs]
        lines += wrap("    inputs  ", ", ".join(inputs) + (", ..." if c.nonzero > len(inputs) else ""), width)
    for step in c.steps:
        lines += _step(step, width)
    if c.script:
        lines.append(f"    script  {short_path(c.script)}")
    return lines


def _step(step: Step, width: int) -> list[str]:
    same = "" if not step.expected else ": the same on both sides" if step.same else ": differs"
    lines = wrap("    ", f"{step.what}{same}" + (f", at {short_paths(step.place)}" if step.place else ""), width, indent=8)
    if step.reference_place and step.reference_place != step.place:
        lines += wrap("        ", f"in the reference at {short_paths(step.reference_place)}", width)
    expected, found = dict(step.expected), dict(step.found)
    columns = [("", step.elements)]
    for side, held in (("reference", expected), ("parallel", found)):
        alike: dict[tuple[str, ...], list[int]] = {}
        for rank, values in held.items():
            alike.setdefault(values, []).append(rank)
        columns += [(side if side == "reference" and len(alike) == 1 else f"{'reference for ' if side == 'reference' else ''}{ranks_text(ranks)}", values)
                    for values, ranks in alike.items()]
    return lines + _columns(columns, width)


def _columns(columns: list[tuple[str, tuple[str, ...]]], width: int) -> list[str]:
    """A table, of which columns that do not fit are left out."""
    sizes = [max(len(title), *map(len, values)) for title, values in columns]
    shown = len(columns)
    while shown > 2 and 6 + sum(sizes[:shown]) + 2 * shown > width - 6:
        shown -= 1
    rows = [[title for title, _ in columns], *[list(row) for row in zip(*(values for _, values in columns))]]
    left = len(columns) - shown
    lines = ["      " + "  ".join(cell.rjust(n) for cell, n in zip(row[:shown], sizes)) for row in rows]
    return [(lines[0] + (f"  and {left} more" if left else "")).rstrip(), *lines[1:]]
