"""The command line: arguments in, report on stdout, progress and troubles on stderr, exit codes 0 (PROVED), 1 (REFUTED, or the program faulted), 2 (usage),
3 (UNKNOWN), 4 (our own error), 130 (interrupted). Internal exceptions are caught here and nowhere else. Not trusted; torch is imported by the commands that need it."""
from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shlex
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trainverify import __version__
from trainverify.arguments import FOLDER, parser
from trainverify.diagnostics import Fault
from trainverify.processes import Terminated, ended_in_order
from trainverify.report.words import WIDTH, wrap


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    _open_streams()
    args = parser().parse_args(argv)
    try:
        with ended_in_order():
            return COMMANDS[args.command](args, list(sys.argv[1:] if argv is None else argv))
    except Terminated:
        print("trainverify: terminated", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("trainverify: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:                    # the reader left (`| head`)
        _silence_stdout()
        return 141
    except _StdoutFails as e:
        print(f"trainverify: cannot write to stdout: {e}", file=sys.stderr)
        _silence_stdout()
        return 2
    except Exception as e:  # noqa: BLE001 - the edge: every exception that comes here is our own bug
        return _internal_error(e, getattr(args, "debug", False))


def _open_streams() -> None:
    """A standard stream that is closed becomes the null device: else the next file that is opened would have its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)     # the lowest free number: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))


class _StdoutFails(Exception):
    """What was to be printed cannot be written."""


@contextlib.contextmanager
def _printing() -> Iterator[None]:
    """Around all that goes to stdout: a full disk is no error of ours."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as e:
        raise _StdoutFails(e.strerror) from e


def _silence_stdout() -> None:
    """The interpreter must not fail again when it flushes at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _internal_error(e: Exception, debug: bool) -> int:
    text = "".join(traceback.format_exception(e))
    kept = _keep("internal-error.txt", (f"trainverify {__version__}, python {sys.version.split()[0]}\n{shlex.join(sys.argv)}\n\n{text}").encode())
    print(f"trainverify: internal error, which is our fault and says nothing about your program: {type(e).__name__}: {e}", file=sys.stderr)
    for note in getattr(e, "__notes__", ()):
        print(f"trainverify: {note}", file=sys.stderr)
    print(f"trainverify: attach {kept} to a bug report" if kept else text, file=sys.stderr)
    if debug and kept:
        print(text, file=sys.stderr)
    return 4


def _keep(name: str, data: bytes) -> str:
    """Write a file under .trainverify; "" (and a line on stderr) where that cannot be done."""
    try:
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / name).write_bytes(data)
    except OSError as e:
        print(f"trainverify: cannot write {FOLDER / name}: {e.strerror}", file=sys.stderr)
        return ""
    return str(FOLDER / name)


# ---- verify and capture

def _options(args: argparse.Namespace, case: dict[str, Any], defaults: Any = None, **more: Any) -> Any:
    """What the engine is told: the command line, else the project's table, else the defaults."""
    options = importlib.import_module("trainverify.engine.options").Options
    given = {name: next((v for v in (getattr(args, name), getattr(defaults, name, None)) if v is not None), None) for name in ("steps", "timeout")}
    full_size = getattr(args, "full_size", False)
    given = {**({"steps": 1} if full_size else {}), **{k: v for k, v in given.items() if v is not None}}
    return options(ranks=args.ranks, case=case, seed=args.seed, keep=args.debug, jobs=getattr(args, "jobs", 2), engine=getattr(args, "engine", "local"), address=getattr(args, "address", ""), repair=not getattr(args, "no_repair", False),
                   cache=not getattr(args, "no_cache", True), stand_ins=args.stand_in,
                   reduce=getattr(args, "reduce", False) or full_size, full_size=full_size, cross_check=getattr(args, "cross_check", False),
                   **given, **more)


def _case_given(args: argparse.Namespace) -> dict[str, Any]:
    return {k: v for part in args.case for k, v in part.items()}


def _verify(args: argparse.Namespace, argv: list[str]) -> int:
    asked = [f"--{name.replace('_', '-')}" for name in ("self_test", "second_opinion", "certificate", "dump_unknown", "counterexample") if getattr(args, name)]
    if asked and args.dry_run:
        return _usage(f"verify: error: {asked[0]} needs a comparison, and --dry-run makes none")
    if bool(args.address) != (args.engine == "ray"):
        return _usage("verify: error: --engine ray needs --address HOST:PORT, and nothing else does")
    if args.reference or args.script or args.runs:
        return _verify_scripts(args, argv, asked)
    if args.local or args.skip:
        return _usage("verify: error: --local and --skip are for scripts: there is no --reference")
    if args.cross_check and not (args.reduce or args.full_size):
        return _usage("verify: error: --cross-check is for --reduce")
    fixed = [f"--{name.replace('_', '-')}" for name in ("ranks", "case", "steps", "timeout", "full_size") if getattr(args, name, None)]
    fixed += ["--routings"] if args.routings > 1 else []
    if args.routings > 1 and args.full_size:
        return _usage("verify: error: --routings is for values, and with --full-size floats have none")
    if args.path is None or args.all_cases or args.routings > 1 and not args.path.is_dir():
        return _usage(f"verify: error: {asked[0]} is for one run of one spec") if asked else _verify_all(args, argv)
    if fixed and args.path.is_dir():
        return _usage(f"verify: error: {fixed[0]} is for a capture, and {args.path} holds one that was made")
    options = _options(args, _case_given(args), accept=tuple(args.accept), dry_run=args.dry_run, self_test=args.self_test, second_opinion=args.second_opinion,
                       certificate=args.certificate, dump_unknown=args.dump_unknown, counterexample=args.counterexample)
    entry = "verify_dir" if args.path.is_dir() else "verify_spec"
    report = _run(args, options, entry, args.path, options)
    if args.dry_run:
        report.mode = "dry-run"
    kept = str(FOLDER / "traces") if args.debug and not args.path.is_dir() and report.verdict != "ERROR" else ""
    return _deliver(report, args, argv, args.format, args.output, kept)


def _verify_scripts(args: argparse.Namespace, argv: list[str], asked: list[str]) -> int:
    """Scripts in place of a spec: one parallel command line, or several with one table."""
    from trainverify import cases
    from trainverify.report.model import Suite
    from trainverify.report.text import diagnostic_lines
    from trainverify.report.versions import versions

    lines = [*args.runs, *([args.script] if args.script else [])]
    wrong = ("scripts need --reference \"SCRIPT ...\"" if not args.reference else "scripts need a parallel command line, after -- or in --run" if not lines else
             f"{args.path} is a spec, and --reference a script: give one of them" if args.path is not None else
             "--case and --all-cases are for specs" if args.case or args.all_cases else "--full-size is for specs" if args.full_size else f"{asked[0]} is for one parallel command line" if asked and (len(lines) > 1 or args.routings > 1) else "")
    if wrong:
        return _usage(f"verify: error: {wrong}")
    try:
        given = [cases.scripts_of(args.reference, line, args.ranks, args.local, args.skip) for line in lines]
    except Fault as fault:
        print("\n".join(line for d in fault.diagnostics for line in diagnostic_lines(d)), file=sys.stderr)
        return 2
    if any(scripts.ranks is None for scripts in given):
        return _usage("verify: error: scripts need --ranks N")
    more = {"accept": tuple(args.accept), "dry_run": args.dry_run}
    if len(given) > 1 or args.routings > 1:
        started = time.perf_counter()
        runs = [cases.Run(s, _options(args, {}, **more, **({"workdir": FOLDER / f"traces-{i}"} if args.debug else {}))) for i, s in enumerate(given, 1)]
        reports = cases.run_all(runs, args.quiet, lambda text: _keep("internal-error.txt", text.encode()), args.routings)
        return _deliver(Suite(reports, time.perf_counter() - started, versions=versions()), args, argv, args.format, args.output)
    args.path = given[0]
    options = _options(args, {}, **more, self_test=args.self_test, second_opinion=args.second_opinion, certificate=args.certificate,
                       dump_unknown=args.dump_unknown, counterexample=args.counterexample)
    report = _run(args, options, "verify_scripts", args.path, options)
    report.mode = "dry-run" if args.dry_run else report.mode
    return _deliver(report, args, argv, args.format, args.output, str(FOLDER / "traces") if args.debug and report.verdict != "ERROR" else "")


def _verify_all(args: argparse.Namespace, argv: list[str]) -> int:
    """Every case of a spec, or what the project's table names."""
    from trainverify import cases
    from trainverify.config import load_config
    from trainverify.report.model import Suite
    from trainverify.report.text import diagnostic_lines
    from trainverify.report.versions import versions

    if args.case and args.all_cases:
        return _usage("verify: error: --all-cases and --case exclude each other")
    if args.path is not None and args.path.is_dir():
        return _usage(f"verify: error: --all-cases needs a spec: {args.path} holds the traces of one case")
    config = None
    if args.path is None:
        try:
            config = load_config(Path.cwd())
        except Fault as fault:
            print("\n".join(line for d in fault.diagnostics for line in diagnostic_lines(d)), file=sys.stderr)
            return 2
    started = time.perf_counter()
    cases.preload()
    runs, reports = _planned(args, config)
    reports += cases.run_all(runs, args.quiet, lambda text: _keep("internal-error.txt", text.encode()), args.routings)
    return _deliver(Suite(reports, time.perf_counter() - started, versions=versions()), args, argv, args.format, args.output)


def _planned(args: argparse.Namespace, config: Any) -> tuple[list[Any], list[Any]]:
    """The runs to make, and the reports of specs that cannot even be asked for their cases."""
    from trainverify import cases
    from trainverify.report.model import Report

    runs, broken = [], []
    for spec in config.specs if config is not None else (args.path,):
        spec = Path(os.path.relpath(spec)) if spec.is_relative_to(Path.cwd()) else spec
        try:
            given = [_case_given(args)] if args.case or args.path is not None and not args.all_cases else config.cases if config is not None and config.cases and not args.all_cases else cases.cases_of(spec, args.stand_in)
        except Fault as fault:
            broken.append(Report(verdict="ERROR", spec=str(spec), ranks=args.ranks or 0, seed=args.seed, diagnostics=list(fault.diagnostics)))
            continue
        for case in given:
            kept = {"workdir": FOLDER / f"traces-{len(runs) + 1}"} if args.debug else {}
            runs.append(cases.Run(spec, _options(args, case, config, accept=tuple(args.accept), dry_run=args.dry_run, **kept)))
    return runs, broken


def _usage(text: str) -> int:
    print("\n".join(wrap("trainverify ", text, WIDTH, indent=2)), file=sys.stderr)
    return 2


def _capture(args: argparse.Namespace, argv: list[str]) -> int:
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        return _usage(f"capture: error: the folder {args.output} cannot be written: {e.strerror}")
    options = _options(args, _case_given(args))
    report = _run(args, options, "capture_spec", args.path, args.output, options)
    report.mode = "capture"
    return _deliver(report, args, argv, "text", None, str(args.output) if report.verdict != "ERROR" else "")


def _lineage(args: argparse.Namespace, argv: list[str]) -> int:
    from trainverify.report import lineage
    table = _listed(args, "lineage_table")
    if isinstance(table, int):
        return table
    if beyond := [r for r in args.rank if not 0 <= r < table.ranks]:
        return _usage(f"lineage: error: there is no rank {beyond[0]}: the program has ranks 0 to {table.ranks - 1}")
    return _print_listing(args, lineage, lineage.selected(table, args.rank, args.op))


def _shapes(args: argparse.Namespace, argv: list[str]) -> int:
    from trainverify.report import shapes
    found = _listed(args, "shape_classes")
    return found if isinstance(found, int) else _print_listing(args, shapes, found)


def _listed(args: argparse.Namespace, entry: str) -> Any:
    """What the engine lists of one step, unless more are asked for (the next ones mostly repeat it); the exit code if it cannot."""
    from trainverify.report.model import Report
    from trainverify.report.text import diagnostic_lines
    fixed = [f"--{name.replace('_', '-')}" for name in ("ranks", "case", "steps", "timeout", "full_size") if getattr(args, name, None)]
    if fixed and args.path.is_dir():
        return _usage(f"{args.command}: error: {fixed[0]} is for a capture, and {args.path} holds one that was made")
    args.steps = args.steps or 1
    options = _options(args, _case_given(args))
    found = _run(args, options, entry, args.path, options)
    if isinstance(found, Report):
        print("\n".join(line for d in found.diagnostics for line in diagnostic_lines(d)), file=sys.stderr)
        return found.exit_code
    return found


def _print_listing(args: argparse.Namespace, listing: Any, found: Any) -> int:
    with _printing():
        sys.stdout.write(listing.encode(found).decode() if args.format == "json" else listing.render(found))
    return 0


def _run(args: argparse.Namespace, options: Any, entry: str, *arguments: Any) -> Any:
    """Call the engine; a fault that it could not put into a report of its own becomes one here. What the spec prints goes to stderr: stdout is the report's."""
    from trainverify.progress import progress_to
    from trainverify.report.model import Report
    progress = progress_to(sys.stderr, args.quiet)
    try:
        progress("start", str(args.path))
        with contextlib.redirect_stdout(sys.stderr):
            return getattr(importlib.import_module("trainverify.verify"), entry)(*arguments, progress)
    except Fault as fault:
        return Report(verdict="ERROR", spec=str(args.path), case=options.case, ranks=args.ranks or 0, steps=options.steps, seed=args.seed,
                      diagnostics=list(fault.diagnostics))
    finally:
        progress.close()


def _deliver(result: Any, args: argparse.Namespace, argv: list[str], form: str, output: Path | None, traces: str = "") -> int:
    """Keep the report (or the suite of reports), write it where it was asked for, and say its exit code."""
    from trainverify.report import formats, table, text
    from trainverify.report.model import Suite
    from trainverify.report.versions import versions
    result.rerun = _rerun(argv)
    result.versions = result.versions or versions()
    saved = _keep("last.json", formats.render("json", result, "").encode())
    rendered = table.render(result, saved=saved) if isinstance(result, Suite) else text.render(result, saved=saved, traces=traces)
    written = rendered if form == "text" else formats.render(form, result, os.environ.get("GITHUB_WORKSPACE") or os.getcwd())
    if output:
        try:
            output.write_bytes(written.encode())
        except OSError as e:
            print(f"trainverify: cannot write {output}: {e.strerror}", file=sys.stderr)
            with _printing():
                text.show(rendered, sys.stdout)
            return 2
    with _printing():
        if form == "text" or output:
            text.show(rendered, sys.stdout)
        else:
            sys.stdout.write(written)
    return result.exit_code


def _rerun(argv: list[str]) -> str:
    """The same command without what only says where the report goes."""
    kept, skip = [], False
    ours = argv[:argv.index("--")] if "--" in argv else argv
    for a in ours:
        if skip:
            skip = False
        elif a in ("--format", "-o", "--output") and argv[0] == "verify":
            skip = True
        elif not (a.startswith(("--format=", "--output=", "-o")) and argv[0] == "verify") and a not in ("-q", "--quiet"):
            kept.append(a)
    return shlex.join(["trainverify", *kept, *argv[len(ours):]])


# ---- recheck, ops and explain

_THEOREM = ("for all values of the symbols for which the reference is defined and takes its recorded decisions, the parallel program of these traces "
            "is defined and its outputs equal the reference's")


def _recheck(args: argparse.Namespace, argv: list[str]) -> int:
    """Exit code 0 if every obligation is proved again, 1 if one is rejected or the file is no certificate; with traces, also their verdict's."""
    from trainverify.certify.certificate import recheck
    from trainverify.progress import progress_to
    from trainverify.report.text import diagnostic_lines
    progress = progress_to(sys.stderr, args.quiet)
    done = report = None
    try:
        done = recheck(args.path, lambda n, of: progress("recheck", str(args.path), n / of))
        problems = done.rejected
        if args.traces is not None and done.accepted:
            report = importlib.import_module("trainverify.verify").verify_certificate(args.path, args.traces, progress)
            problems = tuple(d for d in report.diagnostics if report.verdict == "ERROR")
    except Fault as fault:
        problems = tuple(fault.diagnostics)
    finally:
        progress.close()
    lines = [line for d in problems for line in diagnostic_lines(d)]
    if done is not None:
        what = "every one is proved again" if done.accepted else f"{len(done.rejected)} rejected"
        lines.append(f"{args.path}: {done.obligations} obligations, {what}")
        if report is not None:
            lines.append(f"{args.traces}: {report.verdict}, {report.count('PROVED')} of {len(report.outputs)} outputs follow from them")
        proved = report is not None and report.verdict == "PROVED"
        lines += wrap("  establishes  ", _THEOREM if proved else done.establishes, WIDTH)
        lines += [line for a in done.assumptions for line in wrap("  assumes      ", a, WIDTH)]
    with _printing():
        print("\n".join(lines))
    if done is None or not done.accepted or args.traces is not None and report is None:
        return 1
    return report.exit_code if report is not None else 0


def _ops(args: argparse.Namespace, argv: list[str]) -> int:
    from trainverify.optable import op_records, op_text
    records = op_records()
    with _printing():
        if args.format == "json":
            import msgspec
            sys.stdout.write(msgspec.json.format(msgspec.json.encode(records), indent=2).decode() + "\n")
        else:
            sys.stdout.write(op_text(records))
    return 0


def _explain(args: argparse.Namespace, argv: list[str]) -> int:
    from trainverify.explain import codes, page
    if args.code is None:
        with _printing():
            for code, title in codes().items():
                print(f"{code:<9} {title}")
        return 0
    found = page(args.code)
    if found is None:
        close = [c for c in codes() if c[:3] == args.code.upper()[:3]]
        print(f"trainverify: no page for {args.code!r}" + (f"; there are {', '.join(close)}" if close else "; `trainverify explain` lists the codes"), file=sys.stderr)
        return 2
    with _printing():
        sys.stdout.write(found)
    return 0


COMMANDS = {"verify": _verify, "capture": _capture, "lineage": _lineage, "shapes": _shapes, "recheck": _recheck, "ops": _ops, "explain": _explain}
