"""The text report: what a person reads first. Plain ASCII lines that fit 80 columns (only a path, a name or a command that is longer is not broken); colour
is laid over the finished text for a terminal and carries no meaning of its own. Shows what the report model holds and decides nothing, not trusted."""
from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from typing import TextIO

import msgspec

from trainverify.diagnostics import Diagnostic, Span
from trainverify.report.advice import advice
from trainverify.report.counterexample import counterexample_lines
from trainverify.report.model import Finding, OutputResult, Report
from trainverify.report.selftest import self_test_lines
from trainverify.report.shapes import sentence
from trainverify.report.source import excerpt
from trainverify.report.words import (JOIN, WIDTH, count_of, fold_names, int_ranges, join_wrapped, memory_text, number, ranks_text, short_path, short_paths,
                                      wrap)

KINDS = ("scalar", "gradient", "parameter", "buffer", "state")
TITLES = {"scalar": "scalars", "gradient": "gradients", "parameter": "updated parameters", "buffer": "buffers", "state": "optimizer state"}
_NOUNS = {"parameter": "updated parameter", "state": "optimizer state"}
_SEVERITY = {"error": "error", "internal": "internal error", "warning": "warning", "note": "note"}
_VALUES = 8                                   # values of one output that a counterexample shows; the JSON report has all
_INPUT = re.compile(r"input \d+$")
_LEADING = re.compile(r"^\d+\b")
_STATUS = {"REFUTED": "differ", "UNKNOWN": "unknown", "ERROR": "error", "PROVED": "proved"}


def render(report: Report, *, width: int = WIDTH, saved: str = "", traces: str = "") -> str:
    """The whole report as text; `saved` is where the JSON report was written, `traces` where a capture left its traces."""
    sections = [
        _header(report, width),
        _headline(report, width),
        *[finding_lines(report, i, width) for i in range(len(report.findings))],
        counterexample_lines(report.counterexample, width),
        *[diagnostic_lines(d, width) for d in by_severity(report.diagnostics, ("error", "internal"))],
        _bindings(report, width),
        _table(report, width),
        *[diagnostic_lines(d, width) for d in by_severity(report.diagnostics, ("warning", "note"))],
        self_test_lines(report.self_test, width),
        _facts(report, width),
        _summary(report, width, saved, traces),
    ]
    text = "\n\n".join("\n".join(s) for s in sections if s) + "\n"
    return text.encode("ascii", "backslashreplace").decode("ascii")


# ---- the first screen

def _header(report: Report, width: int) -> list[str]:
    case = ",".join(f"{k}={v}" for k, v in report.case.items())
    parts = [f"{k} {v}" for k, v in report.versions.items() if k in ("trainverify", "torch")]
    if report.spec:
        parts.append(short_path(report.spec) + (f"[{case}]" if case else ""))
    if report.ranks:
        parts.append(count_of(report.ranks, "rank") + (f": {report.mesh}" if report.mesh else ""))
    if report.steps:
        parts.append(count_of(report.steps, "step"))
    lines = join_wrapped([*parts, f"seed {report.seed}"], " | ", width)
    if report.bound[1]:
        lines.append(f"  bound    {report.bound[0]} of {report.bound[1]} parameters to reference elements")
    if report.data:
        lines += wrap("  data     ", report.data, width)
    return lines


def headline(report: Report) -> str:
    """The verdict in one line."""
    return f"{_word(report)}: {says(report)}"


def _headline(report: Report, width: int) -> list[str]:
    lines = wrap(f"{_word(report)}: ", says(report), width, indent=2)
    if report.mode == "verify" and report.verdict == "UNKNOWN" and report.evidence and any(map(report.equal_only, report.outputs)):
        lines += wrap("  evidence  ", f"{report.evidence}: this is evidence, not a proof", width)
    return lines


def _word(report: Report) -> str:
    if report.verdict == "ERROR" or report.mode == "verify":
        return report.verdict
    return {"dry-run": "DRY RUN", "capture": "CAPTURED"}[report.mode]


def says(report: Report) -> str:
    """The verdict in one sentence."""
    total = len(report.outputs)
    if report.verdict == "ERROR":
        return _error_sentence(report)
    if report.mode == "dry-run":
        return "bindings and data coverage only; nothing was compared (so the exit code is not 0)"
    if report.mode == "capture":
        how_many = f"{report.ops:,} operations" if report.ops else "both programs"
        return f"{how_many} on {count_of(report.ranks, 'rank')}; nothing was compared"
    if report.verdict == "PROVED":
        return f"all {total} outputs equal the reference" + _by_reduction(report)
    if report.verdict == "REFUTED":
        causes = sum(f.diagnostic.severity == "error" for f in report.findings)
        cause = {0: "no single cause found", 1: "one cause"}.get(causes, f"{causes} causes")
        return f"{report.count('REFUTED')} of {total} outputs differ, {cause}"
    equal = sum(report.equal_only(o) for o in report.outputs)
    points = report.evidence.split(",")[0] or "equal in the field"
    if not total:
        return "no output was compared"
    if equal == total:
        return f"all {total} outputs {points}; not proved"
    proved = report.count("PROVED")
    parts = [f"{total - equal - proved} of {total} outputs are undecided (reasons below)"]
    parts += [f"{equal} {points}, not proved"] if equal else []
    parts += [f"{proved} proved"] if proved else []
    return "; ".join(parts)


def _by_reduction(report: Report) -> str:
    return "" if report.reduction is None else f" for the recorded sizes, by reduction ({sentence(report.reduction)})"


def _error_sentence(report: Report) -> str:
    faults = by_severity(report.diagnostics, ("internal", "error"))
    if any(d.severity == "internal" for d in faults):
        return "TrainVerify itself failed; this is our fault and says nothing about the program"
    cannot = {"SPEC": "the spec cannot be used", "FILE": "the traces cannot be read", "FILE006": "a file that was asked for cannot be written"}
    code = faults[0].code if faults else ""
    return cannot.get(code, cannot.get(code[:4], "the program cannot run"))


def by_severity(diagnostics: Sequence[Diagnostic], severities: Sequence[str]) -> list[Diagnostic]:
    return [d for s in severities for d in diagnostics if d.severity == s]


# ---- one diagnostic or finding

def diagnostic_lines(d: Diagnostic, width: int = WIDTH, op: str = "", extra: Sequence[tuple[str, str]] = ()) -> list[str]:
    """One diagnostic: what is wrong, where, the source line, then what is known about it. `extra` holds further (label, text)."""
    lines = wrap(f"{_SEVERITY.get(d.severity, d.severity)}[{d.code}]: ", short_paths(d.message), width, indent=2)
    notes = d.notes
    if d.span and d.span.file:
        place = _place(d.span, d.ranks, op, width)
        own = f"{d.span.file}:{d.span.line} in {d.span.function}: "   # a note that repeats the source line shown above it
        notes = tuple(n for n in notes if not n.startswith(own)) if any(line.endswith("^") for line in place) else notes
        lines += place
    elif d.ranks:
        lines.append(f"  --> {ranks_text(d.ranks)}")
    for label, text in [*extra, *[("", n) for n in notes], *([("help:", d.fix)] if d.fix else [])]:
        lines += wrap(f"   = {label:<12} " if label else "   = ", short_paths(text), width)
    return lines


def _place(span: Span, ranks: Sequence[int], op: str, width: int) -> list[str]:
    where = [*([span.phase] if span.phase else []), *([f"step {span.step}"] if span.step else []),
             *([f"microbatch {span.microbatch}"] if span.microbatch >= 0 else []), *([ranks_text(ranks)] if ranks else [])]
    inside = f" in {span.function}" if span.function else ""
    parts = [f"  --> {short_path(span.file)}" + (f":{span.line}" if span.line else ""), inside, f" ({'; '.join(where)})" if where else ""]
    lines = [parts[0]]
    for part in filter(None, parts[1:]):
        lines = [*lines[:-1], lines[-1] + part] if len(lines[-1] + part) <= width else [*lines, *wrap("      ", part.strip(), width, indent=7)]
    # A backward call's span is its forward line: only an op that names its forward op says which part of that line.
    shown = excerpt(span.file, span.line, op if span.phase != "backward" or "backward" in op else "")
    if shown:
        gutter = max(3, len(str(shown.line)) + 1)
        shown = shown.clipped(width - gutter - 2)
        lines += [f"{'':{gutter}}|", f"{shown.line:<{gutter}}| {shown.text}", f"{'':{gutter}}| {shown.carets}"]
    return lines


def finding_lines(report: Report, index: int, width: int = WIDTH) -> list[str]:
    """One cause, what to do about it, all that is known of it, and its counterexample."""
    f = report.findings[index]
    span = f.diagnostic.span
    modules = f.modules or ((span.module,) if span and span.module else ())
    extra = [("algebra:", f.algebra), ("repair:", "" if f.repair is None else str(f.repair)), ("help:", f.diagnostic.fix), ("try:", advice(f)),
             ("explains:", count_of(f.explains, "output") + _explained_kinds(report, index) if f.explains else ""),
             ("modules:", ", ".join(fold_names(modules))), ("operation:", f.op), *_operands(f)]
    extra += [("used at:", f"{short_path(s.file)}:{s.line}" + (f" in {s.function}" if s.function else "")) for s in f.used_at if s.file]
    if span and span.stack:
        extra.append(("called from:", " < ".join(f"{short_path(file)}:{line} {name}" for file, line, name in span.stack)))
    extra = [(label, text) for label, text in extra if text]
    return diagnostic_lines(msgspec.structs.replace(f.diagnostic, fix=""), width, f.op, extra) + _counterexample(f, width)


def _operands(f: Finding) -> list[tuple[str, str]]:
    """The operation's operands, inputs that are alike together."""
    alike: dict[str, list[str]] = {}
    for o in f.operands:
        alike.setdefault(f"{list(o.shape)} {o.dtype}" + (f", {o.lineage}" if o.lineage else ""), []).append(o.role)
    out = []
    for what, roles in alike.items():
        inputs = [int(r.removeprefix("input ")) for r in roles if _INPUT.match(r)]
        names = [f"input{'s' if len(inputs) > 1 else ''} {int_ranges(inputs)}"] if inputs else []
        out += [(f"{name}:", what) for name in [*names, *[r for r in roles if not _INPUT.match(r)]]]
    return out


def _explained_kinds(report: Report, index: int) -> str:
    outs = [o for o in report.outputs if o.finding == index]
    kinds = {k: sum(o.kind == k for o in outs) for k in sorted({o.kind for o in outs}, key=lambda k: (*KINDS, k).index(k))}
    return ": " + ", ".join(count_of(n, _NOUNS.get(k, k)) for k, n in kinds.items()) if kinds else ""


def _counterexample(f: Finding, width: int) -> list[str]:
    """Values on which the sides differ; ranks that hold the same value stand together."""
    if not f.witnesses:
        return []
    lines = ["", "  counterexample (float64, replayed)"]
    for w in f.witnesses:
        by_value: dict[str, list[int]] = {}
        for rank, x in w.parallel:
            by_value.setdefault(number(x), []).append(rank)
        values = [f"{ranks_text(ranks)}: {value}" for value, ranks in by_value.items()]
        more = [f"and {len(values) - _VALUES} other values"] if len(values) > _VALUES else []
        lines += wrap("    ", w.output, width, indent=8)
        lines += join_wrapped([f"      reference: {number(w.reference)}", *values[:_VALUES], *more], "   ", width, " " * 8)
    return lines


# ---- bindings and the table of outputs

def _bindings(report: Report, width: int) -> list[str]:
    """A dry run lists every binding; else only the parameters that hold elements which are not the reference's."""
    rows = [b for b in report.bindings if report.mode == "dry-run" or b.bound < b.elements]
    if not rows:
        return []
    groups: dict[tuple, list[int]] = {}
    for b in rows:
        groups.setdefault((b.name, b.shape, b.source, b.bound, b.elements), []).append(b.rank)
    title = "bindings (parameter, its shape on a rank, the reference elements it holds)"
    lines = [f"  {title if report.mode == 'dry-run' else 'parameters that hold more than reference elements'}"]
    for (name, shape, source, bound, elements), ranks in groups.items():
        held = "" if bound == elements else f" ({bound} of {elements} elements)"
        what = f"{name}{list(shape)}".replace(" ", JOIN)
        lines += wrap("    ", f"{what} = {source or 'no reference element'}{held}, {ranks_text(ranks)}", width, indent=6)
    return lines


def _table(report: Report, width: int) -> list[str]:
    """Outputs by kind: how many, in which layouts, and under each kind what is not proved, with its reason and every name."""
    if not report.outputs:
        return []
    kinds = [*KINDS, *sorted({o.kind for o in report.outputs} - set(KINDS))]
    groups = [(k, [o for o in report.outputs if o.kind == k]) for k in kinds]
    groups = [(k, _title(k, outs), outs) for k, outs in groups if outs]
    pad = max(20, *[len(title) for _, title, _ in groups])
    lines = [f"  {'output':<{pad}}  {'count':>6}   layout found"]
    for kind, title, outs in groups:
        lines += wrap(f"  {title:<{pad}}  {len(outs):>6}   ", _layouts(kind, outs, width - pad - 14), width)
        lines += _not_proved(report, outs, pad, width)
    return lines


def _title(kind: str, outs: Sequence[OutputResult]) -> str:
    """The row's first column: scalars by name while they are few."""
    names = ", ".join(dict.fromkeys(o.name for o in outs)) if kind == "scalar" else ""
    return names if 0 < len(names) <= 24 else TITLES.get(kind, kind)


def _layouts(kind: str, outs: Sequence[OutputResult], room: int) -> str:
    """The row's last column: each layout with its count, which stand on one line where they fit; the keys of optimizer state."""
    counts: dict[str, int] = {}
    for o in outs:
        counts[o.layout or "none found"] = counts.get(o.layout or "none found", 0) + 1
    found = list(counts) if len(counts) == 1 else [f"{n} {layout}" for layout, n in sorted(counts.items(), key=lambda kv: -kv[1])]
    keys = [f"({', '.join(dict.fromkeys(_state_key(o) for o in outs))})"] if kind == "state" else []
    told = [part.replace(" ", JOIN) if len(part) < room else part for part in (*found, *keys)]
    return " ".join([", ".join(told[:len(found)]), *told[len(found):]])


def _state_key(o: OutputResult) -> str:
    return o.name.partition("::")[2]


def _not_proved(report: Report, outs: Sequence[OutputResult], pad: int, width: int) -> list[str]:
    """Outputs that are not proved: verdict, reason, and all names with their steps.

    Reasons that differ only in a leading number ("40 elements differ") stand together, with the range of it.
    """
    groups: dict[tuple[str, str], list[OutputResult]] = {}
    for o in outs:
        if o.verdict != "PROVED" and not (o.verdict == "UNKNOWN" and o.reason == report.evidence):
            groups.setdefault((o.verdict, _LEADING.sub("", _why(report, o))), []).append(o)
    lines = []
    for (verdict, _), members in sorted(groups.items(), key=lambda group: group[0][0] != "REFUTED"):
        why = _why(report, members[0])
        numbers = sorted({int(found[0]) for o in members if (found := _LEADING.match(_why(report, o)))})
        if len(numbers) > 1:
            why = _LEADING.sub(f"{numbers[0]} to {numbers[-1]}", why)
        lines += wrap(f"    {_STATUS[verdict]:<{pad - 2}}  {len(members):>6}   ", why, width)
        if outs[0].kind != "scalar" or len({o.name for o in outs}) > 1:
            lines += wrap("      ", _names_by_step(members, outs), width, indent=8)
    return lines


def _why(report: Report, o: OutputResult) -> str:
    cause = ""
    if 0 <= o.finding < len(report.findings):
        d = report.findings[o.finding].diagnostic
        cause = d.code + (f" at {os.path.basename(d.span.file)}:{d.span.line}" if d.span else "")
    reason = "" if cause and o.verdict == "REFUTED" else o.reason   # "differs" is said already
    if report.evidence and reason.startswith(f"{report.evidence}; "):
        reason = f"equal, but {reason.removeprefix(f'{report.evidence}; ')}"   # the evidence stands above
    return "; ".join(t for t in (o.algebra, reason, cause) if t) or "no reason recorded"


def _names_by_step(members: Sequence[OutputResult], outs: Sequence[OutputResult]) -> str:
    """The folded names of each step ("all", or "all exp_avg", where none is missing); steps with the same names share one list."""
    by_names: dict[tuple[str, ...], list[int]] = {}
    for step in dict.fromkeys(o.step for o in members):
        mine = [o for o in members if o.step == step]
        rest = {o.name for o in outs if o.step == step} - {o.name for o in mine}
        left = {name.partition("::")[2] for name in rest}   # keys of which some are not among these
        complete = [] if len(mine) == 1 else ["all"] if not rest else [f"all {key}" for key in dict.fromkeys(map(_state_key, mine)) if key not in left]
        told = fold_names(o.name for o in mine if len(mine) == 1 or rest and _state_key(o) in left)
        by_names.setdefault((*complete, *told), []).append(step)
    return "; ".join(f"{ranks_text(steps).replace('rank', 'step')}: {', '.join(names)}" for names, steps in by_names.items())


# ---- what it rests on, and the last lines

def _facts(report: Report, width: int) -> list[str]:
    lines = facts([report], width)
    if report.phases:
        times = [f"{p.name} {p.seconds:.1f}{JOIN}s" + (f" ({p.detail})" if p.detail else "") for p in report.phases]
        lines += _listed("time", [", ".join(times)], width)
    if report.ops and report.mode == "verify":
        lines += _listed("replayed", [f"{report.ops:,} operations, {report.elements:,} elements"], width)
    told = [d.code for d in (*[f.diagnostic for f in report.findings], *report.diagnostics, *report.warnings)]
    if told:
        lines += _listed("codes", [f"trainverify explain CODE tells more: {', '.join(dict.fromkeys(told))}"], width)
    return lines


def facts(reports: Sequence[Report], width: int = WIDTH, partly: bool = False) -> list[str]:
    """For what the verdicts of these runs (partly: of more than these) hold, on what they rest, and what their inputs could not have shown; what
    several say is said once."""
    scope = [f"these token ids, sizes, {count_of(r.ranks, 'rank')} and this case" for r in reports if r.outputs and r.verdict in ("PROVED", "UNKNOWN")]
    scope = ["in each run, its token ids, sizes, ranks and case"] if len(scope) > 1 else scope
    proved = ["every value of the weights, over the real numbers" + (", where PROVED" if partly else "") for r in reports if r.verdict == "PROVED" and r.outputs]
    assumed = [f"{a.code} {a.text}" + (f" ({', '.join(short_path(p) for p in a.places)})" if a.places else "") for r in reports for a in r.assumptions]
    not_run = [short_paths(t) for r in reports for t in r.not_run]
    weak = [f"{d.message} [{d.code}]" + (f" ({short_path(d.span.file)}:{d.span.line})" if d.span else "") for r in reports for d in r.warnings]
    pins = [f"keeps its size: {short_paths(p)}" for r in reports if r.reduction is not None for p in r.reduction.pins]
    told = (("holds for", proved), ("only for", scope), ("assumes", assumed), ("not run", not_run), ("reduction", pins), ("weak spec", weak))
    return [line for label, items in told for line in _listed(label, list(dict.fromkeys(items)), width)]


def _listed(label: str, items: Sequence[str], width: int) -> list[str]:
    return [line for i, text in enumerate(items) for line in wrap(f"{label if i == 0 else '':<11} ", text, width)]


def _summary(report: Report, width: int, saved: str, traces: str) -> list[str]:
    counts = [f"{report.count(v)} {v.lower()}" for v in ("PROVED", "REFUTED", "UNKNOWN")]
    counts += [f"{report.count('ERROR')} error"] if report.count("ERROR") else []
    cost = f"{report.seconds:.1f} s" + (f", {memory_text(report.peak_memory)}" if report.peak_memory else "")
    parts = [*([", ".join(counts)] if report.outputs else []), cost, *([f"report: {short_path(saved)}"] if saved else [])]
    kept = [f"traces: {short_path(traces)} (to verify them: trainverify verify {shlex.quote(short_path(traces))})"] if traces else []
    return join_wrapped(parts, " | ", width) + kept + ([f"rerun: {report.rerun}"] if report.rerun else [])


# ---- to a stream

_COLOURS = (
    (r"(?m)^(PROVED|CAPTURED)(?=: )", "bold green"), (r"(?m)^(REFUTED|ERROR)(?=: )", "bold red"), (r"(?m)^(UNKNOWN|DRY RUN)(?=: )", "bold yellow"),
    (r"(?m)^(internal error|error)\[\w+\]", "bold red"), (r"(?m)^warning\[\w+\]", "bold yellow"), (r"(?m)^note\[\w+\]", "bold cyan"),
    (r"(?m)^ +--> ", "blue"), (r"(?m)^[ \d]+\|", "blue"), (r"\^+(?= |$)", "red"), (r"(?m)^rerun:.*$", "dim"),
)


def show(text: str, stream: TextIO) -> None:
    """Write a rendered report; on a terminal that wants colour (NO_COLOR, TERM=dumb say no), with the key words coloured."""
    from rich.console import Console
    from rich.text import Text
    console = Console(file=stream, highlight=False, soft_wrap=True)
    if not console.is_terminal or console.no_color or console.color_system is None:
        stream.write(text)
        return
    styled = Text(text)
    for pattern, style in _COLOURS:
        styled.highlight_regex(pattern, style)
    console.print(styled, end="")
