"""`[tool.trainverify]` of a project's pyproject.toml: what `trainverify verify` checks when it is given no spec (no torch, not trusted)."""
from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainverify.diagnostics import Diagnostic, Fault, Span

FILE, TABLE = "pyproject.toml", "tool.trainverify"
ALL = "all"
_EXAMPLE = f'Write [{TABLE}] with specs = ["spec.py"], or name a spec: trainverify verify spec.py'


@dataclass(frozen=True)
class Config:
    """specs: files, in the order of the table; cases: None for all CASES of each spec; steps and timeout: None where the table says nothing."""

    specs: tuple[Path, ...]
    cases: tuple[dict[str, Any], ...] | None = None
    steps: int | None = None
    timeout: float | None = None


def load_config(folder: Path) -> Config:
    """The table of the nearest pyproject.toml in `folder` or above; raises Fault (CFG001-CFG003) where it cannot be used."""
    file = _find(folder)
    try:
        text = file.read_text(encoding="utf-8")
        table = tomllib.loads(text).get("tool", {}).get("trainverify")
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise Fault(Diagnostic("CFG003", f"{file} cannot be read: {error}", span=_span(file, "", ""), fix="Mend it, or name a spec.")) from error
    if not isinstance(table, dict):
        raise Fault(Diagnostic("CFG003", f"no spec was named, and {file} has no table [{TABLE}]", fix=_EXAMPLE))
    for key in table:
        if key not in _KEYS:
            raise Fault(Diagnostic("CFG001", f"[{TABLE}] has an unknown key: {key}", span=_span(file, text, key),
                                   fix=f"The keys are {', '.join(_KEYS)}."))
    values = {}
    for key, value in table.items():
        read, form = _KEYS[key]
        try:
            values[key] = read(value, file.parent)
        except ValueError as error:
            raise Fault(Diagnostic("CFG002", f"{key} of [{TABLE}]: {error}", span=_span(file, text, key), fix=f"Write {form}.")) from error
    if not values.get("specs"):
        raise Fault(Diagnostic("CFG003", f"no spec was named, and [{TABLE}] of {file} names none", span=_span(file, text, ""), fix=_EXAMPLE))
    return Config(**values)


def _find(folder: Path) -> Path:
    start = folder.resolve()
    for place in (start, *start.parents):
        if (place / FILE).is_file():
            return place / FILE
    raise Fault(Diagnostic("CFG003", f"no spec was named, and there is no {FILE} in {start} or above", fix=_EXAMPLE))


def _span(file: Path, text: str, key: str) -> Span:
    """The line of a key in the table, or of the table itself."""
    lines = text.split("\n")
    start = next((i for i, line in enumerate(lines) if re.match(rf"\s*\[\s*{re.escape(TABLE)}\s*\]", line)), 0)
    found = next((i for i, line in enumerate(lines[start:], start) if key and re.match(rf"""\s*["']?{re.escape(key)}["']?\s*=""", line)), start)
    return Span(str(file), found + 1, "", phase="")


# ---- the values; each raises ValueError with what is wrong

def _specs(value: Any, folder: Path) -> tuple[Path, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise ValueError(f"{value!r} is no list of paths")
    files = []
    for pattern in value:
        found = sorted(folder.glob(pattern)) if re.search(r"[*?\[]", pattern) else [folder / pattern]
        if not found or not all(f.is_file() and f.suffix == ".py" for f in found):
            raise ValueError(f"{pattern!r} names no spec (a .py file) in {folder}")
        files += found
    return tuple(dict.fromkeys(files))


def _cases(value: Any, folder: Path) -> tuple[dict[str, Any], ...] | None:
    if value == ALL:
        return None
    if not isinstance(value, list) or not value or not all(isinstance(v, dict) for v in value):
        raise ValueError(f"{value!r} is neither {ALL!r} nor a list of tables")
    wrong = [v for case in value for v in case.values() if not isinstance(v, (str, int, float, bool))]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is no string, number or truth value")
    return tuple(value)


def _steps(value: Any, folder: Path) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} is no positive integer")
    return value


def _timeout(value: Any, folder: Path) -> float:
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise ValueError(f"{value!r} is no positive number of seconds")
    return float(value)


_KEYS: dict[str, tuple[Callable[[Any, Path], Any], str]] = {
    "specs": (_specs, 'specs = ["tests/spec.py", "specs/*.py"]'),
    "cases": (_cases, 'cases = "all", or cases = [{tp = 2}, {tp = 4, sp = true}]'),
    "steps": (_steps, "steps = 2"),
    "timeout": (_timeout, "timeout = 300"),
}
