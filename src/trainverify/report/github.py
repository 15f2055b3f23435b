"""The GitHub report: workflow commands that become annotations on file and line of a pull request (no torch, not trusted).

Causes come first, since GitHub shows only the first ten of each level; a closing line per run says its verdict. Every message holds the whole block of the
text report, so that the log can be read without the annotations.
"""
from __future__ import annotations

from collections.abc import Sequence

from trainverify.diagnostics import Diagnostic
from trainverify.report.model import Report
from trainverify.report.source import place_under, relative_to
from trainverify.report.text import diagnostic_lines, finding_lines, says
from trainverify.report.words import ascii_text, fold_names, short_path

_LEVELS = {"error": "error", "internal": "error", "warning": "warning", "note": "notice"}
_VERDICTS = {"PROVED": "notice", "UNKNOWN": "warning", "REFUTED": "error", "ERROR": "error"}
_ORDER = ("error", "warning", "notice")


def render(reports: Sequence[Report], root: str) -> str:
    """All annotations; `root` is the checkout's folder, to which GitHub's paths are relative."""
    lines = [a for r in reports for a in _annotations(r, root)]
    lines.sort(key=lambda a: _ORDER.index(a[0]))
    told = [_command(level, {"title": f"{r.verdict}: {short_path(r.label)}"}, says(r) + (f"\nrerun: {r.rerun}" if r.rerun else ""))
            for r in reports for level in (_VERDICTS[r.verdict],)]
    return "".join(f"{line}\n" for line in (*(text for _, text in lines), *told))


def _annotations(report: Report, root: str) -> list[tuple[str, str]]:
    """(level, command) of every cause, diagnostic and warning, and of outputs that none of them explains."""
    told = [(f.diagnostic, finding_lines(report, i)) for i, f in enumerate(report.findings)]
    told += [(d, diagnostic_lines(d)) for d in (*report.diagnostics, *report.warnings)]
    out = [_annotation(report, d, lines, root) for d, lines in told]
    unexplained = [o for o in report.outputs if o.verdict == "REFUTED" and o.finding < 0]
    for verdict, outs in (("REFUTED", unexplained), ("UNKNOWN", report.undecided())):
        by_reason: dict[str, list[str]] = {}
        for o in outs:
            by_reason.setdefault(o.algebra or o.reason or "no reason recorded", []).append(o.name)
        for reason, names in by_reason.items():
            file = relative_to(report.spec, root) if report.spec.endswith(".py") else ""
            properties = {"file": file, "title": f"{verdict}: {len(names)} outputs of {short_path(report.label)}"}
            out.append((_VERDICTS[verdict], _command(_VERDICTS[verdict], properties, f"{reason}\n{', '.join(fold_names(names))}")))
    return out


def _annotation(report: Report, d: Diagnostic, lines: Sequence[str], root: str) -> tuple[str, str]:
    level = _LEVELS.get(d.severity, "error")
    place = place_under(d.span, root)
    where = {"file": place[0], "line": str(place[1])} if place else {}
    return level, _command(level, {**where, "title": f"{d.code}: {short_path(report.label)}"}, "\n".join(lines))


def _command(level: str, properties: dict[str, str], message: str) -> str:
    given = ",".join(f"{key}={_property(value)}" for key, value in properties.items() if value)
    return f"::{level} {given}::{_data(message)}"


def _data(text: str) -> str:
    """What would end the command's line, and the escape character itself, as the runner decodes them."""
    return ascii_text(text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A"))


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
