"""The text report of several runs: one summary table, then the full report of every run that is not PROVED. Shows what the reports hold and decides
nothing, not trusted."""
from __future__ import annotations

import os

from trainverify.report import text
from trainverify.report.model import Report, Suite
from trainverify.report.text import by_severity, facts, says
from trainverify.report.words import WIDTH, count_of, join_wrapped, short_path, wrap

_NAME = 22                                    # columns of a run's name; longer ones stand on a line of their own
_SORTS = ("PROVED", "REFUTED", "UNKNOWN")


def render(suite: Suite, *, width: int = WIDTH, saved: str = "") -> str:
    """The whole suite as text; `saved` is where the JSON was written."""
    sections = [_header(suite, width), wrap(f"{suite.verdict}: ", _says(suite), width, indent=2), _rows(suite, width)]
    told: dict[tuple, str] = {}
    for report in suite.reports:
        if report.verdict == "PROVED":
            continue
        name, causes = short_path(report.label), _causes(report)
        rule = [f"---- {name} ".ljust(width, "-")]
        if causes and causes in told:
            sections.append([*rule, "", *wrap("", f"{report.verdict}, with the same causes as {told[causes]}: {', '.join(_at(*c) for c in causes)}", width)])
            continue
        told.setdefault(causes, name)
        sections.append([*rule, "", text.render(report, width=width).rstrip("\n")])
    proved = [r for r in suite.reports if r.verdict == "PROVED"]
    sections.insert(3, facts(proved, width, partly=len(proved) < len(suite.reports)))
    last = [_says(suite), f"{suite.seconds:.1f} s", *([f"report: {short_path(saved)}"] if saved else [])]
    sections.append(join_wrapped(last, " | ", width) + ([f"rerun: {suite.rerun}"] if suite.rerun else []))
    made = "\n\n".join("\n".join(s) for s in sections if s) + "\n"
    return made.encode("ascii", "backslashreplace").decode("ascii")


def _header(suite: Suite, width: int) -> list[str]:
    specs = list(dict.fromkeys(short_path(r.spec) for r in suite.reports))
    parts = [f"{k} {v}" for k, v in suite.versions.items() if k in ("trainverify", "torch")]
    parts += [specs[0] if len(specs) == 1 else count_of(len(specs), "spec"), count_of(len(suite.reports), "run")]
    for noun, values in (("step", {r.steps for r in suite.reports if r.steps}), ("seed", {r.seed for r in suite.reports})):
        if len(values) == 1:
            (value,) = values
            parts.append(count_of(value, noun) if noun == "step" else f"{noun} {value}")
    return join_wrapped(parts, " | ", width)


def _says(suite: Suite) -> str:
    """How many runs have which verdict, the worst kind first."""
    counts = [f"{suite.count(v)} {v.lower()}" for v in ("REFUTED", "ERROR", "UNKNOWN", "PROVED") if suite.count(v)]
    return f"{count_of(len(suite.reports), 'run')}: {', '.join(counts)}" if counts else "nothing was run"


def _rows(suite: Suite, width: int) -> list[str]:
    """A row per run: ranks, verdict, outputs by verdict, time, and what is behind it."""
    single = len({r.spec for r in suite.reports}) == 1
    lines = [f"  {'case' if single else 'spec and case':<{_NAME}} ranks  verdict proved refuted unknown   time"]
    for r in suite.reports:
        case = ",".join(f"{k}={v}" for k, v in r.case.items()) or "(defaults)"
        name = case + (f" routing {r.routing + 1}" if r.routing else "") if single else short_path(r.label)
        numbers = "".join(f"{(r.count(v) if r.outputs else '-'):>{len(v) + 1}}" for v in _SORTS)
        row = f"{r.ranks or '-':>5}  {r.verdict:<7}{numbers} {r.seconds:>6.1f}"
        if len(name) > _NAME:
            lines += [f"  {name}", f"  {'':<{_NAME}} {row}"]
        else:
            lines.append(f"  {name:<{_NAME}} {row}")
        what = ", ".join(_at(*c) for c in _causes(r)) or (says(r) if r.verdict != "PROVED" else "")
        lines += wrap(" " * (_NAME + 5), what, width) if what else []
    return lines


def _causes(report: Report) -> tuple[tuple[str, str], ...]:
    """Code and place of what went wrong; runs for which these are the same are explained once."""
    found = [*[f.diagnostic for f in report.findings], *by_severity(report.diagnostics, ("internal", "error"))]
    return tuple(dict.fromkeys((d.code, os.path.basename(str(d.span)) if d.span and d.span.file else "") for d in found))


def _at(code: str, place: str) -> str:
    return f"{code} at {place}" if place else code
