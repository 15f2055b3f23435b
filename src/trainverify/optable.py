"""The op table as a listing for people and scripts: what each row means, where its meaning comes from, which tests cover it (reads the table, not trusted)."""
from __future__ import annotations

import textwrap
from pathlib import Path

import msgspec

TESTS = Path(__file__).resolve().parents[2] / "tests"


class OpRecord(msgspec.Struct, frozen=True):
    name: str
    meaning: str
    kind: str
    source: str
    tests: tuple[str, ...]                    # test files that name the op; empty outside a checkout, where there are no tests to read


def op_records() -> list[OpRecord]:
    """One record per row, by kind and name."""
    from trainverify.ops.table import standard_table
    sources = {p.relative_to(TESTS.parent).as_posix(): p.read_text(encoding="utf-8") for p in sorted(TESTS.rglob("*.py"))} if TESTS.is_dir() else {}
    rows = standard_table().rows.values()
    return [OpRecord(r.name, r.summary, r.kind, r.source, _tests_of(r.name, sources)) for r in sorted(rows, key=lambda r: (r.kind, r.name))]


def _tests_of(name: str, sources: dict[str, str]) -> tuple[str, ...]:
    marks = (f'"{name}"', f"'{name}'", f'"{name}.')
    return tuple(file for file, text in sources.items() if any(m in text for m in marks))


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
