"""The whole pipeline: capture both programs, replay, compare, diagnose, report. The one place that knows every part."""
from __future__ import annotations

import contextlib
import os
import shlex
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from trainverify.api import ROUTING
from trainverify.diagnostics import Diagnostic, Fault
from trainverify.engine.options import Options
from trainverify.report.model import LineageTable, Phase, Report

KEPT = Path(".trainverify") / "traces"        # traces of a run in which we failed, or that is debugged
INDEX = "capture.json"


def _quiet(phase: str, detail: str = "", fraction: float | None = None) -> None:
    """Progress that nobody watches."""


class CaptureIndex(msgspec.Struct):
    """What a folder of traces says of its making."""

    spec: str                                 # absolute path, "" for functions
    crc32: int
    ops: bool                                 # the spec explains operations: its file is needed to verify
    case: dict[str, Any]
    accept: tuple[str, ...] = ()              # the spec's ACCEPT


# ---- entry points

def verify_spec(path: str | os.PathLike, options: Options = Options(), progress: Callable = _quiet) -> Report:
    """Capture the spec's two programs and verify them. User faults are in the report (verdict ERROR), never raised."""
    from trainverify.capture.spec import load_spec

    return _verify(lambda: load_spec(Path(path), options.stand_ins), options, progress, str(path))


def verify_scripts(scripts, options: Options = Options(), progress: Callable = _quiet) -> Report:
    """Run two scripts (`capture.script.parse_scripts`) in place of a spec's functions, and verify them as `verify_spec` does."""
    from trainverify.capture.script import load_scripts

    report = _verify(lambda: load_scripts(scripts.routed(options.routing)), options, progress, str(scripts))
    report.rerun = shlex.join(["trainverify", "verify", *scripts.options(options.ranks), *_rerun_options(options), "--seed", str(report.seed), "--", *shlex.split(str(scripts.parallel))])
    return report


def verify(reference, parallel=None, *, ranks: int | None = None, case: dict | None = None, steps: int = 2, seed: int = 0,
           timeout: float = 300.0, accept: Sequence[str] = (), ops: Sequence = (), dry_run: bool = False, repair: bool = True,
           stand_ins: Sequence[str] = ()) -> Report:
    """Verify a spec file, or two functions as a spec file would define them (ops: as its OPS; stand_ins: as --stand-in)."""
    options = Options(ranks, dict(case or {}), steps, seed, timeout, tuple(accept), dry_run, repair=repair, stand_ins=tuple(stand_ins))
    if parallel is None:
        if callable(reference):
            raise TypeError("verify(reference, parallel): give both functions, or the path of a spec")
        if ops:
            raise TypeError("verify(spec, ops=...): a spec file has its own OPS")
        return verify_spec(reference, options)
    from trainverify.capture.spec import spec_of

    return _verify(lambda: spec_of(reference, parallel, ranks, ops, stand_ins), options, _quiet, "")


def capture_spec(path, out: Path, options: Options = Options(), progress: Callable = _quiet) -> Report:
    """Capture only; the traces stay in `out`, and verify_dir works from them. The report has no outputs: nothing was compared."""
    from trainverify.capture.spec import load_spec

    report = _verify(lambda: load_spec(Path(path), options.stand_ins), replace(options, workdir=Path(out), keep=True), progress, str(path), compare=False)
    report.mode = "capture"
    return report


def verify_dir(path, options: Options = Options(), progress: Callable = _quiet) -> Report:
    """Verify from traces on disk, as `capture_spec` wrote them. A spec that explains operations must still be where it was."""
    report = Report(spec=str(path), steps=options.steps, seed=options.seed)

    def body() -> None:
        options.check()
        programs = _loaded(Path(path), report)
        shared = _index(Path(path)).accept
        _analyse(report, *programs, replace(options, accept=(*options.accept, *shared)), progress)
        _forget_idle(report, shared, options)

    return _finish(report, options, body)


def verify_certificate(certificate: Path, folder: Path, progress: Callable = _quiet) -> Report:
    """Verify from the traces that a certificate was made from: every move is made again, and the proof may use no obligation that the
    certificate lacks. Raises Fault with CERT001 or CERT002 (no certificate), CERT004 (other traces) or CERT005 (not its obligations)."""
    from trainverify.certify.certificate import read_certificate

    held = read_certificate(certificate)
    with tempfile.TemporaryDirectory() as scratch:
        new = Path(scratch) / "again"
        accept = msgspec.json.decode(held.made.get("accept", "[]"), type=tuple[str, ...])
        report = verify_dir(folder, Options(seed=int(held.made.get("seed", "0")), accept=accept, certificate=new, repair=False), progress)
        if not new.exists():                  # a fault: the report says which
            return report
        again = read_certificate(new)
    for side in ("reference", "parallel"):
        if held.made.get(side) != again.made[side]:
            raise Fault(Diagnostic("CERT004", f"{folder}: its {side} program is not the one that {certificate} was made from",
                                   fix="Name the folder of traces from which `trainverify verify DIR --certificate FILE` made it."))
    if strange := {e.digest for e in again.obligations} - {e.digest for e in held.obligations}:
        raise Fault(Diagnostic("CERT005", f"{certificate} lacks {len(strange)} obligations that the proof from {folder} needs, such as {min(strange)}",
                               fix="Make the certificate again with `trainverify verify DIR --certificate FILE`."))
    return report


def lineage_table(path, options: Options = Options(), progress: Callable = _quiet) -> LineageTable:
    """What every float result of every rank holds of the reference; nothing is proved or judged. Raises Fault where a side cannot run."""
    from trainverify.diagnose.lineage import lineages

    report = Report(spec=str(path), case=dict(options.case), steps=options.steps, seed=options.seed)
    reference, parallel, extra_rows = _programs(path, options, report, progress)
    found = lineages(reference, parallel, extra_rows, options.seed, progress)
    return LineageTable(report.spec, report.case, len(parallel.traces), report.steps, options.seed, found, report.diagnostics)


def shape_classes(path, options: Options = Options(), progress: Callable = _quiet):
    """The classes of dimensions of both programs and the sizes that a reduction would give them. Raises Fault where a side cannot run."""
    from trainverify.ops.standard import standard_table
    from trainverify.shrink.describe import describe
    from trainverify.shrink.reduce import classified

    reference, parallel, extra_rows = _programs(path, options, Report(spec=str(path), case=dict(options.case)), progress)
    return describe(*classified(reference, parallel, standard_table(extra_rows)))


def _programs(path, options: Options, report: Report, progress: Callable) -> tuple:
    """Both programs and the op rows of their spec: from a folder of traces, or captured."""
    if Path(path).is_dir():
        return _loaded(Path(path), report)
    from trainverify.capture.session import capture
    from trainverify.capture.spec import load_spec

    spec = load_spec(Path(path), options.stand_ins)
    captured = capture(spec, options, progress)
    if captured.reference is None or captured.parallel is None:
        raise Fault(*captured.diagnostics)
    report.case = captured.case
    report.diagnostics += captured.diagnostics
    return captured.reference, captured.parallel, spec.op_rows()


def _loaded(folder: Path, report: Report) -> tuple:
    """Both programs from disk, and the op rows of their spec."""
    from trainverify.ir.files import load_program

    reference, parallel = load_program(folder / "reference"), load_program(folder / "parallel")
    index = _index(folder)
    report.steps, report.case = reference.traces[0].steps, index.case
    return reference, parallel, _rows_again(index, reference, parallel, report)


def _index(folder: Path) -> CaptureIndex:
    return msgspec.json.decode((folder / INDEX).read_bytes(), type=CaptureIndex) if (folder / INDEX).is_file() else CaptureIndex("", 0, False, {})


# ---- the parts in order

def _verify(load: Callable, options: Options, progress: Callable, name: str, compare: bool = True) -> Report:
    report = Report(spec=name, case=dict(options.case), steps=options.steps, seed=options.seed, routing=options.routing, mode="dry-run" if options.dry_run else "verify")
    if options.keep and options.workdir is None:
        options = replace(options, workdir=KEPT)

    def body() -> None:
        from trainverify.capture.session import capture

        options.check()
        with _numbered(options.routing):
            spec = load()
            captured = capture(spec, options, progress)
        report.ranks = captured.ranks
        report.case = captured.case
        report.phases += captured.phases
        report.diagnostics += captured.diagnostics
        report.peak_memory = max(report.peak_memory, captured.peak_memory)
        if captured.parallel is None or captured.reference is None:
            report.verdict = "ERROR"
            return
        report.ops = sum(len(t.ops) for p in (captured.reference, captured.parallel) for t in p.traces)
        if options.workdir is not None:
            _write_index(options.workdir, spec, captured.case)
        if compare:
            accepting = replace(options, accept=(*options.accept, *spec.accept))
            _analyse(report, captured.reference, captured.parallel, spec.op_rows(), accepting, progress)
            _forget_idle(report, spec.accept, options)

    return _finish(report, options, body)


@contextlib.contextmanager
def _numbered(routing: int) -> Iterator[None]:
    """The environment says which routing it is: to the spec, which may ask when it is loaded, and to the ranks."""
    before = os.environ.get(ROUTING)
    os.environ[ROUTING] = str(routing)
    try:
        yield
    finally:
        os.environ.pop(ROUTING)
        os.environ.update({} if before is None else {ROUTING: before})


def _finish(report: Report, options: Options, body: Callable[[], None]) -> Report:
    from trainverify.report.versions import versions

    started = time.perf_counter()
    try:
        body()
    except Fault as fault:
        report.diagnostics += fault.diagnostics
        report.verdict = "ERROR"
    report.seconds = time.perf_counter() - started
    report.peak_memory = max(report.peak_memory, _own_peak())
    report.versions = versions()
    report.rerun = rerun_line(report, options)
    return report


def _forget_idle(report: Report, shared: tuple[str, ...], options: Options) -> None:
    """A spec's ACCEPT is for all of its cases: a place that this one does not need is no mistake."""
    from trainverify.relate.decisions import idle_accepts

    if report.case:
        others = idle_accepts(tuple(a for a in shared if a not in options.accept), ())
        report.diagnostics = [d for d in report.diagnostics if d not in others]


def _own_peak() -> int:
    """Bytes that this process held at most."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def rerun_line(report: Report, options: Options) -> str:
    """The command that repeats the run; "" where functions were verified, which no command can name."""
    if not report.spec:
        return ""
    words = ["trainverify", "verify", report.spec]
    words += ["--case", ",".join(f"{k}={v}" for k, v in report.case.items())] if report.case and not Path(report.spec).is_dir() else []
    words += ["--ranks", str(options.ranks)] if options.ranks is not None else []
    return shlex.join([*words, *_rerun_options(options), "--seed", str(report.seed)])


def _rerun_options(options: Options) -> list[str]:
    words = ["--steps", str(options.steps)] if options.steps != (1 if options.full_size else Options().steps) else []
    words += [w for place in options.accept for w in ("--accept", place)] + (["--dry-run"] if options.dry_run else [])
    words += ["--routings", str(options.routing + 1)] if options.routing else []
    words += [word for word, asked in (("--no-repair", not options.repair), ("--full-size", options.full_size), ("--reduce", options.reduce and not options.full_size), ("--cross-check", options.cross_check)) if asked]
    return words


def _analyse(report: Report, reference, parallel, extra_rows, options: Options, progress: Callable) -> None:
    """Fill the report: with what an earlier run found for identical programs, or anew."""
    from trainverify import cache

    if options.reduce and not options.dry_run:
        from trainverify.shrink.verdict import Runs

        return Runs(report, lambda r, a, b: _analyse_anew(r, a, b, extra_rows, options, progress), options.cross_check, options.jobs, progress).run(reference, parallel, extra_rows)
    address = cache.key(reference, parallel, options, report.diagnostics) if cache.is_used(options, extra_rows) else ""
    if address and cache.recall(address, report):
        return
    _analyse_anew(report, reference, parallel, extra_rows, options, progress)
    if address:
        cache.remember(address, report)


def _analyse_anew(report: Report, reference, parallel, extra_rows, options: Options, progress: Callable):
    """Fill the report; what was found (None: nothing was compared)."""
    try:
        analysis = _compare(report, reference, parallel, extra_rows, options, progress)
    except Fault:
        raise
    except Exception as error:                # our own: whoever reports it needs the traces
        kept = _keep_traces(reference, parallel)
        if kept:
            error.add_note(f"the traces are kept in {kept}")
        raise
    if any(d.severity == "internal" for d in report.diagnostics) and (kept := _keep_traces(reference, parallel)):
        report.diagnostics.append(Diagnostic("CONF003", f"the traces are kept in {kept}: attach them to a bug report", "note"))
    return analysis


def _compare(report: Report, reference, parallel, extra_rows, options: Options, progress: Callable):
    from trainverify.diagnose.explain import explain
    from trainverify.diagnose.watch import Watch
    from trainverify.engine.analysis import analyse, survey
    from trainverify.engine.build import fill, fill_survey
    from trainverify.engine.weak import weak_spec

    groups = {g.ranks: g.axis for t in parallel.traces for g in t.groups if len(g.ranks) > 1}
    if options.dry_run:
        return fill_survey(report, survey(reference, parallel, extra_rows=extra_rows, progress=progress), reference, parallel, groups)
    watch = Watch(reference, parallel)
    analysis = analyse(reference, parallel, seed=options.seed, accept=options.accept, extra_rows=extra_rows, jobs=options.jobs, ray=options.address, progress=progress, watch=watch,
                       in_field=options.self_test)
    findings, explained = [], {}
    if analysis.second is not None:
        clock = time.perf_counter()
        told = explain(analysis.second, watch, analysis.judgements, analysis.diagnostics)
        findings, explained, analysis.diagnostics = told.findings, told.explained, told.diagnostics
        analysis.phases.append(Phase("diagnose", time.perf_counter() - clock))
        if options.repair:
            findings = _repaired(reference, parallel, analysis, told, options, progress)
        report.counterexample = _counterexample(analysis, told, reference, parallel, report.spec, options, progress)
    elif any(j.verdict == "REFUTED" for j in analysis.judgements):
        from trainverify.diagnose.deep import explain_deep

        clock = time.perf_counter()
        told = explain_deep(analysis, reference, parallel)
        findings, explained = told.findings, told.explained
        analysis.phases.append(Phase("diagnose", time.perf_counter() - clock))
    if options.counterexample is not None and analysis.second is None:
        analysis.diagnostics.append(_no_counterexample("the program was judged by its numbers" if findings else "no output is refuted"))
    _second_opinion(analysis, options, progress)
    fill(report, analysis, reference, parallel, groups, findings, explained)
    _keep_obligations(report, analysis, reference, parallel, options)
    report.warnings = weak_spec(analysis, reference, parallel, groups, report.steps)
    _self_test(report, analysis, reference, parallel, options, progress)
    return analysis


def _self_test(report: Report, analysis, reference, parallel, options: Options, progress: Callable) -> None:
    """Plant bugs, and see which this spec would have shown, where the user asked for it."""
    if not options.self_test:
        return
    from trainverify.diagnose.selftest import self_test

    clock = time.perf_counter()
    report.self_test = self_test(reference, parallel, analysis, options.seed, progress)
    report.phases.append(Phase("self-test", time.perf_counter() - clock, f"{report.self_test.replayed:,} calls"))


def _repaired(reference, parallel, analysis, told, options: Options, progress: Callable) -> list:
    """The findings with the repairs that were tried and mend them."""
    from trainverify.diagnose.repair import Job, repaired

    clock = time.perf_counter()
    job = Job(reference, parallel, analysis, told, options.seed, options.accept, progress)
    findings = repaired(job)
    if job.trials:
        analysis.phases.append(Phase("repair", time.perf_counter() - clock, f"{job.trials} trials"))
    return findings


def _counterexample(analysis, told, reference, parallel, spec: str, options: Options, progress: Callable):
    """Look for small inputs that show the first difference, and write a script of them, where the user asked for it."""
    if options.counterexample is None:
        return None
    from trainverify.diagnose.counterexample import counterexample
    from trainverify.diagnose.script import script

    clock = time.perf_counter()
    found = counterexample(analysis, told, reference, parallel, progress)
    analysis.phases.append(Phase("counterexample", time.perf_counter() - clock, "" if isinstance(found, str) else f"{found.told.trials} replays"))
    if isinstance(found, str):
        analysis.diagnostics.append(_no_counterexample(found))
        return None
    try:
        options.counterexample.write_text(script(found, spec))
    except OSError as e:
        analysis.diagnostics.append(_no_counterexample(f"cannot write {options.counterexample}: {e.strerror}"))
        return found.told
    return msgspec.structs.replace(found.told, script=str(options.counterexample))


def _no_counterexample(why: str) -> Diagnostic:
    return Diagnostic("CEX001", f"no script of a counterexample was written: {why}", "warning")


def _second_opinion(analysis, options: Options, progress: Callable) -> None:
    """Ask another prover about every distinct obligation; where it disagrees, the fault is ours and the run is an error."""
    if not options.second_opinion:
        return
    from trainverify.certify.second import second_opinion

    clock = time.perf_counter()
    opinions = second_opinion(analysis.proof.obligations, options.second_opinion, progress=lambda n, of: progress("second opinion", options.second_opinion, n / of))
    analysis.diagnostics += opinions.diagnostics()
    analysis.phases.append(Phase("second opinion", time.perf_counter() - clock, opinions.summary()))


def _keep_obligations(report: Report, analysis, reference, parallel, options: Options) -> None:
    """Write what was proved as a certificate, and what was not to a folder, where the user asked for it."""
    if options.certificate is not None:
        from trainverify.certify.certificate import write_certificate
        from trainverify.ir.digest import digest
        from trainverify.report.versions import versions

        made = {"spec": report.spec, "case": ",".join(f"{k}={v}" for k, v in report.case.items()), "verdict": report.verdict,
                "reference": digest(reference), "parallel": digest(parallel), "seed": str(options.seed),
                "accept": msgspec.json.encode(options.accept).decode(), **versions()}
        write_certificate(options.certificate, analysis.proof.obligations, [f"{a.code} {a.text}" for a in report.assumptions], made)
    if options.dump_unknown is not None:
        from trainverify.certify.dump import Item, dump_unknown

        dump_unknown(options.dump_unknown, [Item(*failure) for failure in analysis.proof.failures])


# ---- traces on disk

def _keep_traces(reference, parallel) -> str:
    """Save both programs for a bug report; where, or "" if that cannot be done."""
    from trainverify.ir.files import save_program

    try:
        for program, side in ((reference, "reference"), (parallel, "parallel")):
            save_program(program, KEPT / side)
    except OSError:
        return ""
    return str(KEPT)


def _write_index(folder: Path, spec, case: dict) -> None:
    """Note beside the traces from where they come."""
    file = Path(spec.path).resolve() if spec.path else None
    crc = zlib.crc32(file.read_bytes()) if file is not None and file.is_file() else 0
    (Path(folder) / INDEX).write_bytes(msgspec.json.encode(CaptureIndex(str(file or ""), crc, bool(spec.ops), case, spec.accept), enc_hook=str))


def _rows_again(index: CaptureIndex, reference, parallel, report: Report) -> tuple:
    """The spec's own op rows. Its file is loaded if it explains operations, or registers some that the traces call."""
    from trainverify.capture.spec import load_spec
    from trainverify.replay.native import unregistered

    missing = unregistered(reference, parallel)
    if not index.ops and not missing:
        return ()
    what = f"registers {missing[0]}" if missing else "says what its own operations mean"
    if not Path(index.spec).is_file():
        raise Fault(Diagnostic("FILE004", f"the spec that {what} is needed, and is not at {index.spec or 'a known place'}",
                               fix="put the spec back, or capture again"))
    if zlib.crc32(Path(index.spec).read_bytes()) != index.crc32:
        report.diagnostics.append(Diagnostic("FILE005", f"{index.spec} has changed since the capture; its OPS are taken as they are now", "warning",
                                             fix="capture again if anything else in it has changed"))
    rows = load_spec(index.spec).op_rows()
    if missing := unregistered(reference, parallel):
        raise Fault(Diagnostic("FILE004", f"the traces call {missing[0]}, which {index.spec} does not register", fix="capture again"))
    return rows
