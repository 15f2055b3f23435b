"""The op table as a listing for people and scripts: what each row means, where its meaning comes from, which tests cover it (reads the table, not trusted)."""
from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

import msgspec

TESTS = Path(__file__).resolve().parents[2] / "tests" / "ops"


class OpRecord(msgspec.Struct, frozen=True):
    name: str
    meaning: str
    kind: str
    source: str
    tests: tuple[str, ...]                    # test files that check every row of its module; empty outside a checkout, which has no tests to read


def op_records() -> list[OpRecord]:
    """One record per row, by kind and name."""
    from trainverify.ops.standard import standard_table
    rows = sorted(standard_table().rows.values(), key=lambda r: (r.kind, r.name))
    homes, tests = _modules(), _tests_by_module()
    return [OpRecord(r.name, r.summary, r.kind, r.source, tests.get(homes[r.name], ())) for r in rows]


def _modules() -> dict[str, str]:
    """The module of trainverify.ops that defines each row."""
    from trainverify.ops.table import Rows
    loaded = [(name.rsplit(".", 1)[1], getattr(module, "rows", None)) for name, module in sys.modules.items() if name.startswith("trainverify.ops.")]
    return {row.name: module for module, rows in loaded if isinstance(rows, Rows) for row in rows.items}


def _tests_by_module() -> dict[str, tuple[str, ...]]:
    """Test files of each op module: those that import it (each ends by asserting that it checked every row)."""
    found: dict[str, tuple[str, ...]] = {}
    for file in sorted(TESTS.glob("test_*.py")) if TESTS.is_dir() else ():
        for names in re.findall(r"(?m)^from trainverify\.ops import (.+)$", file.read_text(encoding="utf-8")):
            for module in names.split(","):
                found[module.strip()] = (*found.get(module.strip(), ()), f"tests/ops/{file.name}")
    return found


def op_text(records: list[OpRecord]) -> str:
    """A block per op; the kinds are headings."""
    lines: list[str] = []
    for kind in dict.fromkeys(r.kind for r in records):
        members = [r for r in records if r.kind == kind]
        lines += ["", f"{kind} ({len(members)})"] if lines else [f"{kind} ({len(members)})"]
        for r in members:
            lines.append(f"  {r.name}")
            lines += textwrap.wrap(r.meaning or "(no summary)", 80, initial_indent="      ", subsequent_indent="      ", break_on_hyphens=False)
            lines.append(f"      source: {r.source}")
            lines += [f"      tests:  {', '.join(r.tests)}"] if r.tests else []
    text = "\n".join([*lines, "", f"{len(records)} ops"]) + "\n"
    return text.encode("ascii", "backslashreplace").decode("ascii")
