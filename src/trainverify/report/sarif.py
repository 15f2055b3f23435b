"""The SARIF 2.1.0 report, for code scanning: a result per cause and diagnostic with its lines, and a rule per code (no torch, not trusted).

What is TrainVerify's own fault is a notification of the run and no result: it says nothing about the code. Nothing in it depends on time.
"""
from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import quote

import msgspec

from trainverify import explain
from trainverify.diagnostics import Diagnostic, Span
from trainverify.report.model import Finding, OutputResult, Report
from trainverify.report.source import place_under, relative_to
from trainverify.report.text import diagnostic_lines, finding_lines, says
from trainverify.report.words import ascii_text, fold_names, short_path

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_LINK = re.compile(r"\[([^][]*)\]\(")
_LEVELS = {"error": "error", "warning": "warning", "note": "note"}
_VERDICT_RULES = {"REFUTED": "An output differs from the reference, and no single cause was found", "UNKNOWN": "An output is not proved"}


def render(reports: Sequence[Report], root: str) -> str:
    """One log with one run; paths are relative to `root`, the checkout's folder."""
    results = [r for report in reports for r in _results(report, root)]
    codes = list(dict.fromkeys(r["ruleId"] for r in results))
    for r in results:
        r["ruleIndex"] = codes.index(r["ruleId"])
    versions = reports[0].versions if reports else {}
    driver = {"name": "TrainVerify", "rules": [_rule(c) for c in codes]}
    if versions.get("trainverify"):
        driver["version"] = versions["trainverify"]
    run = {"tool": {"driver": driver}, "invocations": [_invocation(r, root) for r in reports], "columnKind": "utf16CodeUnits", "results": results}
    return msgspec.json.format(msgspec.json.encode({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}), indent=2).decode() + "\n"


def _rule(code: str) -> dict[str, Any]:
    title = _VERDICT_RULES.get(code) or explain.codes().get(code, code)
    rule: dict[str, Any] = {"id": code, "shortDescription": _message(title)}
    page = explain.page(code)
    if page:
        rule["help"] = {"text": _escaped(page), "markdown": _escaped(page)}
    return rule


def _invocation(report: Report, root: str) -> dict[str, Any]:
    """One run's verdict, and what failed in TrainVerify itself."""
    own = [d for d in report.diagnostics if d.severity == "internal"]
    out: dict[str, Any] = {"executionSuccessful": not own, "exitCode": report.exit_code, "exitCodeDescription": ascii_text(f"{report.verdict}: {says(report)}")}
    if report.rerun:
        out["commandLine"] = ascii_text(report.rerun)
    if own:
        out["toolExecutionNotifications"] = [{"level": "error", "descriptor": {"id": d.code}, "message": _message("\n".join(diagnostic_lines(d)))} for d in own]
    counts = {v.lower(): report.count(v) for v in ("PROVED", "REFUTED", "UNKNOWN")}
    out["properties"] = {"run": ascii_text(short_path(report.label)), "verdict": report.verdict, **counts, "seed": report.seed, "steps": report.steps, "ranks": report.ranks}
    return out


# ---- results

def _results(report: Report, root: str) -> list[dict[str, Any]]:
    out = [_result(report, f.diagnostic, finding_lines(report, i), root, f) for i, f in enumerate(report.findings)]
    out += [_result(report, d, diagnostic_lines(d), root) for d in (*report.diagnostics, *report.warnings) if d.severity in _LEVELS]
    out += _by_reason(report, "REFUTED", [o for o in report.outputs if o.verdict == "REFUTED" and o.finding < 0], root)
    return out + _by_reason(report, "UNKNOWN", report.unexplained(), root)


def _result(report: Report, d: Diagnostic, lines: Sequence[str], root: str, finding: Finding | None = None) -> dict[str, Any]:
    place = place_under(d.span, root)
    out: dict[str, Any] = {"ruleId": d.code, "level": _LEVELS.get(d.severity, "error"), "message": _message("\n".join([f"{d.message}.", "", *lines]))}
    out["locations"] = [_location(*place, function=d.span.function if d.span else "")] if place else _spec_location(report, root)
    if finding is not None:
        related = _distinct(_location(*at, "used here", s.function) for s in finding.used_at if (at := place_under(s, root)))
        if related:
            out["relatedLocations"] = related
    if d.span and d.span.stack:
        out["stacks"] = [{"message": _message("called from"), "frames": [{"location": f} for f in _frames(d.span, root)]}]
    out["partialFingerprints"] = {"trainverify/v1": _fingerprint(report, d, place)}
    known: dict[str, Any] = {"explains": finding.explains, "diagnosis": finding.diagnosis} if finding is not None else {}
    if finding is not None and finding.repair is not None:
        known["repair"] = ascii_text(str(finding.repair))
    out["properties"] = {"run": ascii_text(short_path(report.label)), "ranks": list(d.ranks), **known}
    return out


def _by_reason(report: Report, verdict: str, outputs: Sequence[OutputResult], root: str) -> list[dict[str, Any]]:
    """Outputs that no diagnostic explains, a result for each reason."""
    groups: dict[str, list[str]] = {}
    for o in outputs:
        groups.setdefault(o.algebra or o.reason or "no reason recorded", []).append(o.name)
    run = ascii_text(short_path(report.label))
    return [{"ruleId": verdict, "level": "error" if verdict == "REFUTED" else "warning", "message": _message(f"{reason}.\n\n{', '.join(fold_names(names))}"),
             "locations": _spec_location(report, root), "partialFingerprints": {"trainverify/v1": _hash(verdict, run, reason)},
             "properties": {"run": run}} for reason, names in groups.items()]


def _location(file: str, line: int, message: str = "", function: str = "") -> dict[str, Any]:
    physical: dict[str, Any] = {"artifactLocation": {"uri": quote(file)}}
    if line > 0:
        physical["region"] = {"startLine": line}
    out: dict[str, Any] = {"physicalLocation": physical}
    if function:
        out["logicalLocations"] = [{"name": ascii_text(function), "kind": "function"}]
    if message:
        out["message"] = _message(message)
    return out


def _spec_location(report: Report, root: str) -> list[dict[str, Any]]:
    """A result without a line of its own stands at the spec: code scanning shows nothing that has no place."""
    file = relative_to(report.spec, root) if report.spec.endswith(".py") else ""
    return [_location(file, 1)] if file else []


def _frames(span: Span, root: str) -> list[dict[str, Any]]:
    frames = ((span.file, span.line, span.function), *span.stack)
    return [_location(relative_to(file, root) or file, line, function=function) for file, line, function in frames if file]


def _distinct(items: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({msgspec.json.encode(x): x for x in items}.values())


def _fingerprint(report: Report, d: Diagnostic, place: tuple[str, int] | None) -> str:
    """The same while the code and the function stay the same, wherever the line moves to."""
    return _hash(d.code, short_path(report.label), place[0] if place else "", d.span.function if d.span else "", d.span.phase if d.span else "")


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _message(text: str) -> dict[str, str]:
    return {"text": _escaped(text)}


def _escaped(text: str) -> str:
    """As SARIF writes braces and brackets that are neither placeholders nor links (sections 3.11.5 and 3.11.6)."""
    return _LINK.sub(r"\\[\1\\](", ascii_text(text).replace("{", "{{").replace("}", "}}"))
