"""The JUnit report: one test suite per run, one test case per group of outputs, for the test pages of CI systems (no torch, not trusted).

PROVED passes; REFUTED and UNKNOWN fail; a program or a
spec that cannot run is an error of the first test case. Which test cases there are does not depend on the verdict.
"""
from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

from trainverify.diagnostics import Diagnostic
from trainverify.report.model import OutputResult, Report
from trainverify.report.text import TITLES, by_severity, diagnostic_lines, finding_lines, says
from trainverify.report.words import WIDTH, ascii_text, fold_names, ranks_text, short_path, wrap

RAN, COMPARED = "both programs run", "outputs"


def render(reports: Sequence[Report]) -> str:
    """The whole document."""
    suites = [_suite(r) for r in reports]
    top = ElementTree.Element("testsuites", name="trainverify", **_totals(suites), time=f"{sum(r.seconds for r in reports):.3f}")
    top.extend(suites)
    ElementTree.indent(top)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(top, encoding="unicode") + "\n"


def _totals(suites: Sequence[ElementTree.Element]) -> dict[str, str]:
    return {key: str(sum(int(s.get(key, "0")) for s in suites)) for key in ("tests", "failures", "errors", "skipped")}


def _suite(report: Report) -> ElementTree.Element:
    name = short_path(report.label)
    cases = [_ran(report, name), *_compared(report, name)]
    counts = {tag: sum(c.find(tag) is not None for c in cases) for tag in ("failure", "error", "skipped")}
    suite = ElementTree.Element("testsuite", name=ascii_text(name), tests=str(len(cases)), failures=str(counts["failure"]), errors=str(counts["error"]),
                                skipped=str(counts["skipped"]), time=f"{report.seconds:.3f}")
    properties = ElementTree.SubElement(suite, "properties")
    facts = {"verdict": report.verdict, "exit_code": str(report.exit_code), "ranks": str(report.ranks), "mesh": report.mesh, "steps": str(report.steps),
             "seed": str(report.seed), "rerun": report.rerun, **{f"version {k}": v for k, v in report.versions.items()}}
    for key, value in facts.items():
        ElementTree.SubElement(properties, "property", name=key, value=ascii_text(value))
    suite.extend(cases)
    return suite


def _case(suite: str, name: str, seconds: float = 0.0) -> ElementTree.Element:
    return ElementTree.Element("testcase", classname=ascii_text(suite), name=ascii_text(name), time=f"{seconds:.3f}")


def _ran(report: Report, suite: str) -> ElementTree.Element:
    """The first test case: whether there was anything to compare."""
    case = _case(suite, RAN, report.seconds)
    if report.verdict == "ERROR":
        faults = by_severity(report.diagnostics, ("internal", "error"))
        lines = [line for d in faults for line in (*diagnostic_lines(d), "")]
        kind = f"{faults[0].severity} {faults[0].code}" if faults else "error"
        _problem(case, "error", kind, f"{says(report)}: {faults[0].message}" if faults else says(report), lines)
    return case


def _compared(report: Report, suite: str) -> list[ElementTree.Element]:
    groups: dict[str, list[OutputResult]] = {}
    for o in report.outputs:
        title = o.name if o.kind == "scalar" else TITLES.get(o.kind, o.kind)
        groups.setdefault(f"{title}, step {o.step}", []).append(o)
    cases = [_group(report, suite, name, members) for name, members in groups.items()]
    if not cases and report.verdict != "ERROR":
        case = _case(suite, COMPARED)
        if report.mode == "verify":
            _problem(case, "failure", "UNKNOWN", says(report), [])
        else:
            ElementTree.SubElement(case, "skipped", message=ascii_text(says(report)))
        cases.append(case)
    return cases


def _group(report: Report, suite: str, name: str, members: Sequence[OutputResult]) -> ElementTree.Element:
    case = _case(suite, name)
    wrong = [o for o in members if o.verdict in ("REFUTED", "ERROR")]
    undecided = [o for o in members if o.verdict == "UNKNOWN"]
    if wrong:
        causes = [i for i in dict.fromkeys(o.finding for o in wrong) if 0 <= i < len(report.findings)]
        what = "; ".join(_in_one_line(report.findings[i].diagnostic) for i in causes) or "no single cause found"
        lines = [line for i in causes for line in (*finding_lines(report, i), "")]
        _problem(case, "failure", "REFUTED", f"{len(wrong)} of {len(members)} differ: {what}", lines + _listed(wrong))
    elif undecided:
        reasons = "; ".join(dict.fromkeys(o.reason or "no reason recorded" for o in undecided))
        faults = [line for d in by_severity(report.diagnostics, ("error",)) for line in (*diagnostic_lines(d), "")]
        _problem(case, "failure", "UNKNOWN", f"{len(undecided)} of {len(members)} undecided: {reasons}", faults + _listed(undecided))
    return case


def _in_one_line(d: Diagnostic) -> str:
    return f"{d.code} {d.message}" + (f" at {short_path(d.span.file)}:{d.span.line}" if d.span else "")


def _listed(outputs: Sequence[OutputResult]) -> list[str]:
    """Every output of a failing group, those with the same words together."""
    by_words: dict[str, list[OutputResult]] = {}
    for o in outputs:
        by_words.setdefault("; ".join(t for t in (o.algebra, o.reason, o.layout, ranks_text(o.ranks)) if t), []).append(o)
    return [line for words, members in by_words.items()
            for line in wrap("", f"{', '.join(fold_names(o.name for o in members))}: {words or members[0].verdict}", WIDTH, indent=4)]


def _problem(case: ElementTree.Element, tag: str, kind: str, message: str, lines: Sequence[str]) -> None:
    problem = ElementTree.SubElement(case, tag, type=kind, message=ascii_text(message))
    problem.text = "\n" + "\n".join(map(ascii_text, lines)).strip("\n") + "\n"
