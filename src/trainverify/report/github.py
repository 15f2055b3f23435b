"""The GitHub report: workflow commands that become annotations on file and line of a pull request (no torch, not trusted).

Causes come first, since GitHub shows only the first ten of each level; a closing line per run says its verdict. Every message holds the whole block of the
text report, so that the log can be read without the annotations.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainverify.report.model import Report
from trainverify.report.source import place_under, relative_to
from trainverify.report.text import diagnostic_lines, finding_lines, says
from trainverify.report.words import ascii_text, count_of, fold_names, short_path

_LEVELS = {"error": "error", "internal": "error", "warning": "warning", "note": "notice"}
_VERDICTS = {"PROVED": "notice", "UNKNOWN": "warning", "REFUTED": "error", "ERROR": "error"}
_ORDER = ("error", "warning", "notice")


@dataclass(frozen=True)
class _Note:
    """One annotation: its level, its place, what it says first and in full, and the run that it belongs to."""

    level: str
    place: tuple[str, int] | None
    head: str
    first: str
    text: str
    run: str


def render(reports: Sequence[Report], root: str) -> str:
    """All annotations; `root` is the checkout's folder, to which GitHub's paths are relative."""
    groups: dict[tuple, list[_Note]] = {}
    for note in (n for r in reports for n in _notes(r, root)):
        groups.setdefault((_ORDER.index(note.level), note.place or ("", 0), note.head, note.first), []).append(note)
    told = [_annotation(notes) for _, notes in sorted(groups.items(), key=lambda group: group[0][0])]
    told += [_command(_VERDICTS[r.verdict], {"title": f"{r.verdict}: {short_path(r.label)}"}, says(r) + (f"\nrerun: {r.rerun}" if r.rerun else ""))
             for r in reports]
    return "".join(f"{line}\n" for line in told)


def _notes(report: Report, root: str) -> list[_Note]:
    """Every cause, diagnostic and warning, and outputs that none of them explains."""
    run = short_path(report.label)
    told = [(f.diagnostic, finding_lines(report, i)) for i, f in enumerate(report.findings)]
    told += [(d, diagnostic_lines(d)) for d in (*report.diagnostics, *report.warnings)]
    out = [_Note(_LEVELS.get(d.severity, "error"), place_under(d.span, root), d.code, d.message, "\n".join(lines), run) for d, lines in told]
    spec = relative_to(report.spec, root) if report.spec.endswith(".py") else ""
    unexplained = [o for o in report.outputs if o.verdict == "REFUTED" and o.finding < 0]
    for verdict, outs in (("REFUTED", unexplained), ("UNKNOWN", report.unexplained())):
        by_reason: dict[str, list[str]] = {}
        for o in outs:
            by_reason.setdefault(o.algebra or o.reason or "no reason recorded", []).append(o.name)
        for reason, names in by_reason.items():
            text = f"{reason}\n{', '.join(fold_names(names))}"
            out.append(_Note(_VERDICTS[verdict], (spec, 1) if spec else None, f"{verdict}: {count_of(len(names), 'output')}", text, text, run))
    return out


def _annotation(notes: Sequence[_Note]) -> str:
    """One for what several runs say alike, at the same place."""
    first = notes[0]
    others = f" and {count_of(len(notes) - 1, 'more run')}" if len({n.run for n in notes}) > 1 else ""
    where = {"file": first.place[0], "line": str(first.place[1])} if first.place else {}
    return _command(first.level, {**where, "title": f"{first.head}: {first.run}{others}"}, first.text)


def _command(level: str, properties: dict[str, str], message: str) -> str:
    given = ",".join(f"{key}={_property(value)}" for key, value in properties.items() if value)
    return f"::{level} {given}::{_data(message)}"


def _data(text: str) -> str:
    """What would end the command's line, and the escape character itself, as the runner decodes them."""
    return ascii_text(text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A"))


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
