"""The whole pipeline: capture both programs, replay, compare, diagnose, report. The one place that knows every part."""
from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from trainverify.diagnostics import Diagnostic, Fault
from trainverify.engine.options import Options
from trainverify.report.model import Phase, Report


def _quiet(phase: str, detail: str = "", fraction: float | None = None) -> None:
    """Progress that nobody watches."""


def verify_spec(path: str | os.PathLike, options: Options = Options(), progress: Callable = _quiet) -> Report:
    """Capture the spec's two programs and verify them. User faults are in the report (verdict ERROR), never raised."""
    from trainverify.capture.spec import load_spec

    return _verify(lambda: load_spec(Path(path)), options, progress, str(path))


def verify(reference, parallel=None, *, ranks: int | None = None, case: dict | None = None, steps: int = 2, seed: int = 0,
           timeout: float = 300.0, accept: tuple[str, ...] = (), ops=()) -> Report:
    """Verify a spec file, or two functions as a spec file would define them (ops: as its OPS)."""
    options = Options(ranks, dict(case or {}), steps, seed, timeout, tuple(accept))
    if parallel is None:
        return verify_spec(reference, options)
    from trainverify.capture.spec import spec_of

    return _verify(lambda: spec_of(reference, parallel, ranks, ops), options, _quiet, getattr(parallel, "__module__", ""))


def assert_equivalent(reference, parallel=None, **options) -> Report:
    """For tests: raises AssertionError, whose message is the text report, unless nothing was found different or faulty.

    Until every proof exists, outputs that are equal in the field count as passed; the report says so.
    """
    report = verify(reference, parallel, **options)
    if report.exit_code not in (0, 3) or any(o.verdict == "UNKNOWN" and not o.reason.startswith("equal") for o in report.outputs):
        from trainverify.report.text import render

        raise AssertionError("\n" + render(report))
    return report


def capture_spec(path, out: Path, options: Options = Options(), progress: Callable = _quiet) -> Report:
    """Capture only; the traces stay in `out`, and verify_dir works from them. The report has no outputs: nothing was compared."""
    from trainverify.capture.spec import load_spec

    return _verify(lambda: load_spec(Path(path)), replace(options, workdir=Path(out), keep=True), progress, str(path), compare=False)


def verify_dir(path, options: Options = Options(), progress: Callable = _quiet) -> Report:
    """Verify from traces on disk, as `capture_spec` wrote them."""
    from trainverify.ir.files import load_program

    def programs():
        return load_program(Path(path) / "reference"), load_program(Path(path) / "parallel")

    started = time.perf_counter()
    report = Report(spec=str(path), steps=options.steps, seed=options.seed)
    return _finish(report, started, lambda: _analyse(report, *programs(), (), options, progress))


def _verify(load: Callable, options: Options, progress: Callable, name: str, compare: bool = True) -> Report:
    started = time.perf_counter()
    report = Report(spec=name, case=dict(options.case), steps=options.steps, seed=options.seed)

    def body():
        from trainverify.capture.session import capture

        spec = load()
        captured = capture(spec, options, progress)
        report.ranks = captured.ranks
        report.case = captured.case
        report.phases += captured.phases
        report.diagnostics += captured.diagnostics
        report.peak_memory = max(report.peak_memory, captured.peak_memory)
        if captured.parallel is None or captured.reference is None:
            report.verdict = "ERROR"
        elif compare:
            _analyse(report, captured.reference, captured.parallel, spec.op_rows(), options, progress)

    return _finish(report, started, body)


def _finish(report: Report, started: float, body: Callable) -> Report:
    try:
        body()
    except Fault as fault:
        report.diagnostics += fault.diagnostics
        report.verdict = "ERROR"
    report.seconds = time.perf_counter() - started
    report.rerun = rerun_line(report)
    return report


def rerun_line(report: Report) -> str:
    case = ",".join(f"{k}={v}" for k, v in report.case.items())
    return f"trainverify verify {report.spec}" + (f" --case {case}" if case else "") + f" --seed {report.seed}"


def _analyse(report: Report, reference, parallel, extra_rows, options: Options, progress: Callable) -> None:
    from trainverify.diagnose.explain import explain
    from trainverify.diagnose.origin import Watch
    from trainverify.engine.analysis import analyse, survey
    from trainverify.engine.build import fill, fill_survey
    from trainverify.engine.weak import weak_spec

    groups = {g.ranks: g.axis for t in parallel.traces for g in t.groups if len(g.ranks) > 1}
    if options.dry_run:
        return fill_survey(report, survey(reference, parallel, extra_rows=extra_rows, progress=progress), reference, parallel, groups)
    watch = Watch()
    analysis = analyse(reference, parallel, seed=options.seed, accept=options.accept, extra_rows=extra_rows, progress=progress, watch=watch)
    findings, explained = [], {}
    if analysis.second is not None:
        clock = time.perf_counter()
        early = [d for d in analysis.diagnostics if d.code == "REL007"]
        findings, explained = explain(parallel, analysis.second, watch, analysis.judgements, groups, early)
        analysis.phases.append(Phase("diagnose", time.perf_counter() - clock))
    fill(report, analysis, reference, parallel, groups, findings, explained)
    report.warnings = weak_spec(analysis, parallel, groups, options.steps)
