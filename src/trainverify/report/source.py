"""The source line that a diagnostic points at, with the part of it that ran underlined. Reads the user's files, nothing trusted: a guess about what to
underline costs clarity only, and a file that cannot be read costs the excerpt only."""
from __future__ import annotations

import ast
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

from trainverify.diagnostics import Span

_OPERATORS = {
    "add": ast.Add, "sub": ast.Sub, "rsub": ast.Sub, "mul": ast.Mult, "div": ast.Div, "matmul": ast.MatMult, "mm": ast.MatMult, "bmm": ast.MatMult,
    "pow": ast.Pow, "remainder": ast.Mod, "floor_divide": ast.FloorDiv, "neg": ast.USub,
}

_CUT = "..."


@dataclass(frozen=True, slots=True)
class Excerpt:
    """One source line (ASCII, no tabs, not indented) and the columns [start, end) to underline."""

    line: int
    text: str
    start: int
    end: int

    @property
    def carets(self) -> str:
        return " " * self.start + "^" * max(1, self.end - self.start)

    def clipped(self, room: int) -> Excerpt:
        """At most `room` columns of a longer line, around the underlined part; "..." stands for what is left out."""
        if len(self.text) <= room:
            return self
        left = 0 if self.end <= room - len(_CUT) else max(0, min(self.start - len(_CUT), len(self.text) - room))
        head = _CUT if left else ""
        tail = _CUT if left + room < len(self.text) else ""
        text = head + self.text[left + len(head):left + room - len(tail)] + tail
        start = min(max(self.start - left, len(head)), room - 1)
        return Excerpt(self.line, text, start, max(start + 1, min(self.end - left, room - len(tail))))


def excerpt(file: str, line: int, op: str = "") -> Excerpt | None:
    """The line as it is in the file now, or None; `op` ("aten.mul.Tensor") narrows the underlining to its expression."""
    try:
        source = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError):
        return None
    lines = source.split("\n")
    if not 1 <= line <= len(lines) or not lines[line - 1].strip():
        return None
    raw = lines[line - 1].rstrip()
    start, end = _columns(source, line, raw, op)
    # Non-ASCII characters become one "?" each and a tab one space, so that the carets stay under their columns.
    text = "".join(c if " " <= c <= "~" else " " if c == "\t" else "?" for c in raw)
    indent = len(text) - len(text.lstrip())
    return Excerpt(line, text[indent:], max(0, start - indent), max(0, end - indent))


def relative_to(file: str, root: str) -> str:
    """The path as seen from the folder `root`, with "/" between its parts; "" where it does not lie in it."""
    if not file:
        return ""
    rel = os.path.relpath(file, root)
    return "" if rel == os.pardir or rel.startswith(os.pardir + os.sep) else rel.replace(os.sep, "/")


def place_under(span: Span | None, root: str) -> tuple[str, int] | None:
    """File and line of the innermost frame that lies in `root`: the user's own code where the span itself is in a library."""
    if span is None:
        return None
    for file, line, *_ in ((span.file, span.line), *span.stack):
        if rel := relative_to(file, root):
            return rel, max(line, 1)          # 0: the file as a whole
    return None


def _columns(source: str, line: int, raw: str, op: str) -> tuple[int, int]:
    whole = len(raw) - len(raw.lstrip()), len(raw)
    base = _base_name(op)
    if not base:
        return whole
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return whole
    hits = [n for n in ast.walk(tree) if getattr(n, "lineno", 0) == line and _runs(n, base)]
    if len(hits) != 1:
        return whole
    node = hits[0]
    start = len(raw.encode()[:node.col_offset].decode(errors="ignore"))
    end = len(raw.encode()[:node.end_col_offset].decode(errors="ignore")) if node.end_lineno == line else len(raw)
    return (start, end) if start < end else whole


def _base_name(op: str) -> str:
    """"aten.mul_.Tensor" -> "mul"; "c10d.allreduce_.default" -> "allreduce"; "aten.silu_backward.default" -> "silu"."""
    parts = op.split(".")
    return (parts[1] if len(parts) > 1 else op).strip("_").removeprefix("foreach_").removesuffix("_backward")


def _runs(node: ast.AST, base: str) -> bool:
    """Whether this expression is what would run an op of that name."""
    if isinstance(node, (ast.BinOp, ast.UnaryOp)):
        return isinstance(node.op, _OPERATORS.get(base, ()))
    if isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id if isinstance(node.func, ast.Name) else ""
        return called.strip("_").replace("_", "") == base.replace("_", "")
    return False
