"""What the verdict tests assert. Equality is PROVED, or UNKNOWN with a reason that begins with "equal"."""
from __future__ import annotations

import inspect
from collections.abc import Callable

from trainverify.diagnostics import Diagnostic
from trainverify.report.model import OutputResult, Report


def line_of(function: Callable, text: str) -> int:
    """The number of the one line of a function's source that contains the text."""
    lines, first = inspect.getsourcelines(function)
    found = [first + i for i, line in enumerate(lines) if text in line]
    assert len(found) == 1, f"{text!r} is on {len(found)} lines of {function.__name__}"
    return found[0]


def output(report: Report, name: str, kind: str = "", step: int = 1) -> OutputResult:
    found = [o for o in report.outputs if o.name == name and o.step == step and kind in ("", o.kind)]
    assert len(found) == 1, f"{len(found)} outputs {kind} {name}: {summary(report)}"
    return found[0]


def is_equal(o: OutputResult) -> bool:
    return o.verdict == "PROVED" or (o.verdict == "UNKNOWN" and o.reason.startswith("equal at"))


def codes(report: Report) -> set[str]:
    return {d.code for d in messages(report)}


def messages(report: Report) -> list[Diagnostic]:
    return [*report.diagnostics, *(f.diagnostic for f in report.findings)]


def summary(report: Report) -> str:
    """For assertion messages."""
    lines = [report.verdict]
    lines += [f"  {o.verdict} {o.kind} {o.name}: {o.reason}" for o in report.outputs]
    for d in messages(report):
        lines += [f"  {d.severity}[{d.code}] {d.message} at {d.span} ranks {d.ranks}", *(f"    {n}" for n in d.notes)]
    return "\n".join(lines)


def assert_equal(report: Report, proved: bool = True) -> None:
    """Every output is proved (or, where a proof is beyond the tool, equal in the field), and nothing else was said."""
    assert report.verdict == ("PROVED" if proved else "UNKNOWN"), summary(report)
    assert report.outputs and all(is_equal(o) for o in report.outputs), summary(report)
    assert not [d for d in messages(report) if d.severity in ("error", "internal")], summary(report)


def assert_refuted(report: Report, *lines: int, code: str = "") -> None:
    """Differs, with a witness; a finding names one of the lines."""
    assert report.verdict == "REFUTED", summary(report)
    assert report.findings and any(o.verdict == "REFUTED" for o in report.outputs), summary(report)
    assert any(f.witnesses for f in report.findings), summary(report)
    if lines:
        assert_line(report, *lines)
    if code:
        assert code in codes(report), summary(report)


def assert_not_equal(report: Report, *outputs: str) -> None:
    """Never passes: some output (each of the named ones) is neither PROVED nor equal."""
    assert report.verdict != "PROVED" and report.exit_code != 0, summary(report)
    if report.verdict == "ERROR":
        return
    strange = {o.name for o in report.outputs if not is_equal(o)}
    assert strange >= set(outputs) if outputs else strange, summary(report)


def assert_unknown(report: Report, code: str, *lines: int) -> None:
    """Not decided, for the reason that the code names, at one of the lines."""
    assert report.verdict == "UNKNOWN", summary(report)
    assert_not_equal(report)
    assert code in codes(report) or any(code in o.reason for o in report.outputs), summary(report)
    if lines:
        assert any(d.code == code and d.span is not None and d.span.line in lines for d in messages(report)), summary(report)


def assert_not_refuted(report: Report) -> None:
    """A right program (or one whose difference no input shows): no alarm, no fault; equality may be beyond the tool."""
    assert report.verdict in ("PROVED", "UNKNOWN"), summary(report)
    assert not [o for o in report.outputs if o.verdict == "REFUTED"], summary(report)


def assert_line(report: Report, *lines: int) -> None:
    named = {d.span.line for d in messages(report) if d.span is not None}
    assert named & set(lines), f"named {sorted(named)}, expected one of {sorted(lines)}\n{summary(report)}"
