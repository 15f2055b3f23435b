"""Floats that a script reads from tensors: their names, and which of them both sides have; and whether both read the same data (trusted: a float is left
out or compared, never renamed after it is known what it is).

A script returns nothing, but it prints and logs. What it reads with item(), float() or a format is named by the expression that it is read from
(`loss.detach().item()` is "loss"); the second one of that name in a step is "loss#2". A name is compared where both sides read it equally often
in a step; else it is listed as not compared.
"""
from __future__ import annotations

import ast
import linecache
from collections import Counter, defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

from trainverify.capture.userframes import calling_frame, is_torch_file
from trainverify.diagnostics import Diagnostic
from trainverify.ir.files import save_program
from trainverify.ir.trace import OpCall, Program, Trace

ROWS = "rows"                                  # blob: (length, crc32) of the rows of integers that modules were given
_SAME_VALUE = frozenset({"item", "detach", "cpu", "cuda", "float", "double", "clone", "squeeze", "full_tensor", "to_local", "contiguous", "numpy", "data"})


def reader(frame: FrameType) -> FrameType | None:
    """Who reads a float; None where it is torch for purposes of its own."""
    found = calling_frame(frame)
    return None if found is None or is_torch_file(found.f_code.co_filename) else found


def name_of(frame: FrameType) -> str:
    """What a frame's present call reads, as an expression; "file.py:12" where the source does not tell."""
    code = frame.f_code
    place = f"{Path(code.co_filename).name}:{frame.f_lineno}"
    positions = list(code.co_positions())
    line, end, column, end_column = positions[frame.f_lasti // 2] if 0 <= frame.f_lasti // 2 < len(positions) else (None,) * 4
    if None in (line, end, column, end_column):
        return place
    lines = [linecache.getline(code.co_filename, n).encode() for n in range(line, end + 1)]
    lines[-1] = lines[-1][:end_column]
    lines[0] = lines[0][column:]
    try:
        node: ast.expr = ast.parse(b"(" + b"".join(lines) + b")", mode="eval").body
    except (SyntaxError, ValueError):
        return place
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("float", "round") and node.args:
        node = node.args[0]
    elif not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "item"):
        return place
    return ast.unparse(_value(node))


def _value(node: ast.expr) -> ast.expr:
    """The expression without calls and attributes that leave its value as it is."""
    while True:
        inner = node.func if isinstance(node, ast.Call) and not node.args and not node.keywords else node
        if not isinstance(inner, ast.Attribute) or inner.attr not in _SAME_VALUE:
            return node
        node = inner.value


# ---- both sides

def settle(scripts: Any, reference: Program, parallel: Program, folder: Path) -> tuple[Diagnostic, ...]:
    """Leave out the floats that the sides do not read alike, say which, and mark the others: a verdict must know which ranks read them."""
    theirs = [_read(t) for t in parallel.traces]
    mine = _read(reference.traces[0])
    left: dict[tuple[str, str], set[int]] = defaultdict(set)
    for step, name in sorted({key for side in (mine, *theirs) for key in side}):
        held = [side[step, name] for side in theirs if side[step, name]]
        why = _why_not(name in scripts.skip, len(mine[step, name]), [len(calls) for calls in held])
        if why:
            left[name, why].add(step)
            for call in (c for calls in (mine[step, name], *held) for c in calls):
                call.name, call.args, call.kwargs = "tv.escape", ("item", call.args[3]), {}
        else:
            for call in (c for calls in held for c in calls):
                call.kwargs["read"] = "all" if len(held) == len(theirs) else "some"
    for program, side in ((reference, "reference"), (parallel, "parallel")):
        save_program(program, folder / side)
    return other_data(reference, parallel) + tuple(Diagnostic("SCRIPT006", f"not compared: {name} ({_steps(steps)}): {why}", "note") for (name, why), steps in sorted(left.items()))


def other_data(reference: Program, parallel: Program) -> tuple[Diagnostic, ...]:
    """Whether ranks give their modules rows of integers that the reference never has, though it has others of that length."""
    known = {tuple(row) for row in reference.blobs[0].get(ROWS, ())}
    lengths = {length for length, _ in known}
    found = {trace.rank: [row for row in blobs.get(ROWS, ()) if row[0] in lengths and tuple(row) not in known] for trace, blobs in zip(parallel.traces, parallel.blobs)}
    ranks = tuple(rank for rank, rows in found.items() if rows)
    if not ranks:
        return ()
    most = max(map(len, found.values()))
    return (Diagnostic("SCRIPT008", f"the parallel script reads other data than the reference: up to {most} rows of integers on a rank are none of the reference's", "warning",
                       ranks=ranks, fix="Make both read the same samples in a step: by seeds, samplers and batch sizes."),)


def _read(trace: Trace) -> dict[tuple[int, str], list[OpCall]]:
    found: dict[tuple[int, str], list[OpCall]] = defaultdict(list)
    for call in trace.ops:
        if call.name == "tv.output" and call.args[0] == "scalar":
            found[call.args[2], call.args[1].split("#")[0]].append(call)
    return found


def _why_not(skipped: bool, reference: int, ranks: list[int]) -> str:
    if skipped:
        return "--skip"
    if not reference:
        return "only the parallel script reads it"
    if not ranks:
        return "only the reference script reads it"
    if {*ranks} != {reference}:
        return f"the reference script reads it {_times(reference)} in a step, parallel ranks {', '.join(_times(n) for n in sorted(Counter(ranks)))}"
    return ""


def _times(n: int) -> str:
    return {1: "once", 2: "twice"}.get(n, f"{n} times")


def _steps(steps: set[int]) -> str:
    return ("steps " if len(steps) > 1 else "step ") + ", ".join(map(str, sorted(steps)))
