"""Fills the report from an analysis: outputs with verdicts and layouts, bindings, assumptions, counts."""
from __future__ import annotations

from trainverify.diagnostics import Diagnostic
from trainverify.engine.analysis import Analysis, Survey
from trainverify.engine.facts import Facts, valid_tokens
from trainverify.engine.notes import Notes, detailed, notes_of
from trainverify.engine.verdict import DISTRUSTED, OPAQUE
from trainverify.ir.trace import Program
from trainverify.relate.compare import Comparison
from trainverify.relate.coverage import Coverage
from trainverify.relate.layout import describe, layout
from trainverify.relate.routing import covered, is_choice
from trainverify.relate.symbols import Symbols
from trainverify.report.model import Assumption, Binding, Finding, OutputResult, Report

KINDS = ("scalar", "gradient", "parameter", "buffer", "state")


def fill(report: Report, analysis: Analysis, reference: Program, parallel: Program, groups: dict[tuple[int, ...], str], findings: list[Finding], explained: dict) -> None:
    first = analysis.first
    report.findings = findings
    report.outputs = _outputs(analysis, groups, explained)
    notes = notes_of(reference, parallel)
    told = [d for d in analysis.diagnostics if all(d is not f.diagnostic for f in findings)]
    report.diagnostics = [*report.diagnostics, *detailed(told, notes), *notes.warnings, *_unbound(analysis.first.comparison, told), *_absent(analysis)]
    report.verdict = overall(report)
    report.ranks = report.ranks or len(parallel.traces)
    report.mesh = mesh_text(groups)
    _inputs(report, analysis)
    report.assumptions = assumptions(analysis, parallel, notes)
    report.not_run = notes.not_run
    report.phases = [*report.phases, *analysis.phases]
    worlds = (first.reference, first.parallel)
    report.ops = sum(m.ops for w in worlds for m in w.machines)
    report.elements = sum(m.elements for w in worlds for m in w.machines)
    report.evidence = analysis.evidence


def fill_survey(report: Report, found: Survey, reference: Program, parallel: Program, groups: dict[tuple[int, ...], str]) -> None:
    """The report of a dry run: bindings and data coverage, and no outputs."""
    report.mode = "dry-run"
    notes = notes_of(reference, parallel)
    report.diagnostics = [*report.diagnostics, *detailed(found.diagnostics, notes), *notes.warnings, *_unbound(found.comparison, found.diagnostics)]
    report.not_run = notes.not_run
    report.ranks = report.ranks or len(parallel.traces)
    report.mesh = mesh_text(groups)
    _inputs(report, found)
    report.phases = [*report.phases, *found.phases]
    report.verdict = overall(report)


def _inputs(report: Report, found: Analysis | Survey) -> None:
    """Bindings, and how the batch is read."""
    comparison = found.first.comparison if isinstance(found, Analysis) else found.comparison
    report.bindings = bindings(found.symbols, comparison)
    names = {b.name for b in report.bindings}
    loose = {b.name for b in report.bindings if not b.bound and b.elements}
    report.bound = (len(names) - len(loose), len(names))
    report.data = found.coverage.text(valid_text(found.facts["parallel"], found.coverage))
    report.diagnostics = [*report.diagnostics, *found.coverage.diagnostics()]


def valid_text(facts: Facts, coverage: Coverage) -> str:
    """"valid tokens 61, 48, 55" of the last step, one number per loss call of each rank that reads its own samples."""
    counts = valid_tokens(facts, coverage)
    if not counts:
        return ""
    parts = [str(n[0]) if len(n) == 1 else f"({', '.join(map(str, n))})" for n in counts]
    shown = parts if len(parts) <= 8 else [*parts[:7], f"... {len(parts) - 7} more"]
    return "valid tokens " + ", ".join(shown)


def overall(report: Report) -> str:
    """REFUTED over program fault over internal error over UNKNOWN over PROVED."""
    if any(o.verdict == "REFUTED" for o in report.outputs):
        return "REFUTED"
    if any(d.severity == "internal" or d.code in DISTRUSTED for d in report.diagnostics):
        return "ERROR"
    return "UNKNOWN" if any(o.verdict != "PROVED" for o in report.outputs) or not report.outputs else "PROVED"


def _outputs(analysis: Analysis, groups, explained: dict) -> list[OutputResult]:
    out = []
    for j in analysis.judgements:
        kind, name, step = j.key
        ranks = tuple(sorted({p.rank for p in j.compared.pieces}))
        shape = j.compared.reference.ref.size if j.compared.reference.ref is not None else ()
        out.append(OutputResult(kind, name, step, ranks, j.verdict, j.reason, layout(j.compared, shape, groups), "", explained.get(j.key, -1)))
    return sorted(out, key=lambda o: (KINDS.index(o.kind), o.step, o.name))


def bindings(symbols: Symbols, comparison: Comparison) -> list[Binding]:
    out = []
    for (rank, how, name), line in sorted(comparison.lineage.items(), key=lambda item: (item[0][2], item[0][0])):
        if how == "param":
            source = describe(symbols, line) if line.numbers.size else "nothing (an empty shard)"
            out.append(Binding(name, rank, tuple(line.numbers.shape), source, int(line.numbers.size), line.bound))
    return out


def _unbound(comparison: Comparison, diagnostics: list[Diagnostic]) -> list[Diagnostic]:
    """Stepped parameters that derive from no reference element: they were initialised on their own. Not those that were bound when they came, if
    some operation has no meaning: its results are no reference element either, and that is told already."""
    out: dict[str, set[int]] = {}
    opaque = any(d.code in OPAQUE for d in diagnostics)
    for (rank, how, name), line in comparison.lineage.items():
        came = comparison.lineage.get((rank, "param", name))
        if how == "stepped" and line.numbers.size and not line.bound and not (opaque and came is not None and came.bound):
            out.setdefault(name, set()).add(rank)
    return [Diagnostic("BIND001", f"parameter {name} derives from no element of the reference", "error", None, tuple(sorted(ranks)),
                       ("its values are not the reference's weights: it was initialised on its own, or loaded past them",),
                       "load the reference's weights: ref.weights or ref.checkpoint()") for name, ranks in sorted(out.items())]


def _absent(analysis: Analysis) -> list[Diagnostic]:
    """Outputs that are missing or shares, one diagnostic for each reason."""
    told = {"REL005": ("error", "an output of the reference is missing", "report or hold it on some rank"),
            "REL006": ("warning", "a scalar is a rank's share", "declare it with tv.local (of a script: --local NAME=mean, or --skip NAME)")}
    out: dict[tuple[str, str], list[str]] = {}
    for j in analysis.judgements:
        if j.code in told:
            out.setdefault((j.code, j.reason), []).append(f"{j.key[0]} {j.key[1]}, step {j.key[2]}")
    return [Diagnostic(code, f"{told[code][1]}: {reason}", told[code][0], notes=tuple(names[:8]), fix=told[code][2])
            for (code, reason), names in out.items()]


def assumptions(analysis: Analysis, parallel: Program, notes: Notes) -> list[Assumption]:
    out = [Assumption("A1", "casts between float types are the identity: rounding is not checked"),
           Assumption("A2", "token ids, sizes, masks and the number of ranks as recorded")]
    merged = analysis.rounding
    if merged:
        places = _places(merged, analysis, parallel)
        out.append(Assumption("A3", f"rounding of constants: {len(merged)} values were taken for the reference's within 4 ulp of float32", places))
    if any(is_choice(d.kind) for m in analysis.first.parallel.machines for d in m.decisions):
        routing = covered(analysis.first.reference)
        out.append(Assumption("A4", "routing and other data-dependent choices as recorded" + (f": {routing}" if routing else "")))
    if analysis.accepted:
        out.append(Assumption("A5", "decisions accepted by the user choose as the reference does", analysis.accepted))
    further = [*_custom(analysis), *notes.assumptions]
    return out + [Assumption(f"A{6 + i}", text, places) for i, (text, places) in enumerate(further)]


def _custom(analysis: Analysis) -> list[tuple[str, tuple[str, ...]]]:
    """The spec's own ops, as far as the run met them."""
    rows = [r for r in analysis.table.rows.values() if r.kind == "custom"]
    if not rows:
        return []
    machines = (*analysis.first.reference.machines, *analysis.first.parallel.machines)
    met: dict[str, dict[str, None]] = {}
    for m in machines:
        for call in m.trace.ops:
            found = analysis.table.lookup(call.name)
            if found is not None and found.row.kind == "custom":
                span = m.span(call)
                met.setdefault(found.row.name, {})[str(span) if span else ""] = None
    return [(f"{r.name} {r.source}" if r.ctx else f"{r.name} means what its row says ({r.source})", tuple(p for p in met[r.name] if p)[:8])
            for r in rows if r.name in met]


def _places(merged, analysis: Analysis, parallel: Program) -> tuple[str, ...]:
    found = []
    for m in merged:
        where = getattr(m, "where", None)
        spans = parallel.traces[where[0]].spans if isinstance(where, tuple) else []
        if where is not None and 0 <= where[2] < len(spans):
            found.append(str(spans[where[2]]))
    return tuple(dict.fromkeys(found))[:8]


def mesh_text(groups: dict[tuple[int, ...], str]) -> str:
    """"dp=3 x tp=2" from the named axes of the device mesh."""
    sizes: dict[str, int] = {}
    for ranks, axis in groups.items():
        if axis:
            sizes.setdefault(axis, len(ranks))
    return " x ".join(f"{a}={n}" for a, n in sizes.items())
