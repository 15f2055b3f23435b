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
from typing import Any, NoReturn

from trainverify import __version__
from trainverify.diagnostics import Fault
from trainverify.processes import Terminated, ended_in_order
from trainverify.report.formats import FORMATS
from trainverify.report.text import WIDTH
from trainverify.report.words import wrap

FOLDER = Path(".trainverify")
_EXITS = """exit codes:
  0    PROVED
  1    REFUTED, or the program cannot run
  2    usage: an option or a path is wrong
  3    UNKNOWN
  4    an error of TrainVerify itself
  130  interrupted
"""
_CAPTURE_EXITS = _EXITS.replace("PROVED", "captured").replace("REFUTED, or the", "the").replace("  3    UNKNOWN\n", "")
_LINEAGE_EXITS = _CAPTURE_EXITS.replace("captured", "listed")
_SCRIPTS = """scripts in place of a spec (docs/scripts.md says more):
  trainverify verify --ranks 4 --reference train.py -- train.py --tp 2
  trainverify verify --reference train.py --run "ranks=4 train.py --tp 2" \\
                     --run "ranks=8 train.py --tp 2 --pp 2"

"""
_START = """a spec is a Python file that defines reference() and parallel(ref):
  trainverify verify spec.py            compare the two, and print the report
  trainverify verify spec.py --dry-run  only see which weights each rank holds
  trainverify explain REL002            what a code in a report means
`trainverify COMMAND --help` shows the options of a command

"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    _open_streams()
    args = _parser().parse_args(argv)
    try:
        with ended_in_order():
            return args.run(args, list(sys.argv[1:] if argv is None else argv))
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


# ---- arguments

class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments, and not again what there is; lines of an epilog stay as they are."""

    def __init__(self, **given: Any):
        super().__init__(**given, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """What follows -- is a script's command line, not ours."""
        words = list(sys.argv[1:] if args is None else args)
        at = words.index("--") if "--" in words else len(words)
        parsed = super().parse_args(words[:at], namespace)
        parsed.script = words[at + 1:]
        return parsed

    def error(self, message: str) -> NoReturn:
        print("\n".join(wrap(f"{self.prog}: ", f"error: {message}", WIDTH, indent=2)), file=sys.stderr)
        self.exit(2, f"`{self.prog} --help` shows the arguments\n")


def _parser() -> argparse.ArgumentParser:
    top = _Parser(prog="trainverify", description="Checks that a distributed PyTorch training step equals its single-device model.",
                  epilog=_START + _EXITS)
    top.add_argument("--version", action="version", version=f"trainverify {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    verify = _command(commands, "verify", "check a spec, the traces of an earlier capture, or scripts", _SCRIPTS + _EXITS)
    verify.add_argument("path", metavar="SPEC.py|DIR", type=_existing, nargs="?", help="the spec, or a folder that `trainverify capture` wrote; without it: the specs of [tool.trainverify] in pyproject.toml")
    verify.add_argument("--all-cases", action="store_true", help="every entry of the spec's CASES, with one table")
    verify.add_argument("--reference", metavar="COMMAND", default="", help="scripts in place of a spec: the one that runs on one device; the parallel one follows --")
    verify.add_argument("--run", metavar="COMMAND", dest="runs", action="append", default=[], help="with --reference: a parallel script, which may begin with ranks=N; several make one table")
    verify.add_argument("--local", metavar="NAME=HOW", action="append", default=[], help="scripts: this float is each rank's share of a mean or a sum")
    verify.add_argument("--skip", metavar="NAME", action="append", default=[], help="scripts: do not compare this float")
    _capture_arguments(verify)
    verify.add_argument("--accept", metavar="FILE:LINE", action="append", default=[], type=_place, help="take the unmatched decision at this line as an assumption")
    verify.add_argument("--dry-run", action="store_true", help="bindings and data coverage only; compares nothing, so never exits 0")
    verify.add_argument("--jobs", type=int, choices=(1, 2), default=2, help="2: prove in a process beside the replay (default); 1: in this one; the report is the same")
    verify.add_argument("--no-cache", action="store_true", help="work the verdict out again, also where an earlier run on identical programs has")
    verify.add_argument("--no-repair", action="store_true", help="where outputs differ, do not try what would mend them")
    verify.add_argument("--self-test", action="store_true", help="also plant bugs in the recorded program, and say which of them this spec would show")
    verify.add_argument("--reduce", action="store_true", help="verify at small sizes that stand for the recorded ones (pip install trainverify[shapes]; docs/shape-reduction.md)")
    verify.add_argument("--cross-check", action="store_true", help="with --reduce: at a second choice of small sizes too")
    verify.add_argument("--second-opinion", choices=("z3", "cvc5"), default="", help="ask this prover about every obligation that was proved (pip install trainverify[smt])")
    verify.add_argument("--certificate", metavar="FILE", type=_new_file, help="write the proved obligations, for `trainverify recheck`")
    verify.add_argument("--counterexample", metavar="FILE.py", type=_new_file, help="if refuted: minimise the inputs, and write a script of plain PyTorch that shows the difference")
    verify.add_argument("--dump-unknown", metavar="DIR", type=_new_folder, help="write the obligations that were not proved, to read and as SMT-LIB")
    verify.add_argument("--format", choices=FORMATS, default="text", help="what stdout gets, or FILE with -o (default: text)")
    verify.add_argument("-o", "--output", metavar="FILE", type=_new_file, help="write the report here in --format; stdout then gets the text")
    verify.set_defaults(run=_verify)

    capture = _command(commands, "capture", "run both sides and keep their traces in a folder", _CAPTURE_EXITS)
    capture.add_argument("path", metavar="SPEC.py", type=_spec)
    capture.add_argument("-o", "--output", metavar="DIR", type=_new_folder, required=True, help="folder for the traces, which `trainverify verify DIR` works from")
    _capture_arguments(capture)
    capture.set_defaults(run=_capture)

    lineage = _command(commands, "lineage", "what every float result of every rank holds of the reference; proves nothing", _LINEAGE_EXITS)
    lineage.add_argument("path", metavar="SPEC.py|DIR", type=_existing, help="the spec, or a folder that `trainverify capture` wrote")
    lineage.add_argument("--rank", metavar="R", type=int, action="append", default=[], help="only this rank (may be repeated)")
    lineage.add_argument("--op", metavar="PATTERN", default="", help="only operations whose name contains this, or that it fits: mm, \"aten.*_backward*\"")
    lineage.add_argument("--format", choices=("text", "json"), default="text", help="(default: text)")
    _capture_arguments(lineage)
    lineage.set_defaults(run=_lineage)

    shapes = _command(commands, "shapes", "which dimensions have the same indices, and the sizes of a reduction; proves nothing", _LINEAGE_EXITS)
    shapes.add_argument("path", metavar="SPEC.py|DIR", type=_existing, help="the spec, or a folder that `trainverify capture` wrote")
    shapes.add_argument("--format", choices=("text", "json"), default="text", help="(default: text)")
    _capture_arguments(shapes)
    shapes.set_defaults(run=_shapes)

    recheck = _command(commands, "recheck", "prove the obligations of a certificate again, with the kernel alone; with --traces the theorem itself",
                       "exit codes:\n  0    every obligation is proved again (with --traces: and every output)\n"
                       "  1    one is not, or the file is damaged, or it is not the traces' own\n  2    usage\n  3    with --traces: some output is UNKNOWN\n")
    recheck.add_argument("path", metavar="FILE", type=_file, help="what `trainverify verify --certificate FILE` wrote")
    recheck.add_argument("--traces", metavar="DIR", type=_folder, help="the folder from which the certificate was made: replay the programs too")
    recheck.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    recheck.set_defaults(run=_recheck)

    ops = _command(commands, "ops", "the op table: name, meaning, kind, source, tests")
    ops.add_argument("--format", choices=("text", "json"), default="text", help="(default: text)")
    ops.set_defaults(run=_ops)

    explain = _command(commands, "explain", "the page of a diagnostic code; without a code, the list")
    explain.add_argument("code", metavar="CODE", nargs="?", help="as it stands in a report: REL002")
    explain.set_defaults(run=_explain)
    return top


def _command(commands: Any, name: str, what: str, epilog: str = "") -> argparse.ArgumentParser:
    return commands.add_parser(name, help=what, description="\n".join(wrap("", f"{what[0].upper()}{what[1:]}.", WIDTH - 2)), epilog=epilog)


def _capture_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--ranks", metavar="N", type=_positive, help="world size (default: RANKS of the spec)")
    p.add_argument("--case", metavar="K=V,...", type=_case, action="append", default=[], help="arguments of parallel(ref, ...); can be given several times")
    p.add_argument("--stand-in", metavar="NAME,...", type=_stand_ins, default=(), help="take this package's functions as plain PyTorch: apex, flash_attn, grouped_gemm, transformer_engine")
    p.add_argument("--steps", metavar="K", type=_positive, help="training steps (default: 2)")
    p.add_argument("--seed", metavar="S", type=_seed, default=0, help="of the values that weights and inputs take (default: 0)")
    p.add_argument("--timeout", metavar="SECONDS", type=_seconds, help="wall-clock limit of each side's capture (default: 300)")
    p.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    p.add_argument("--debug", action="store_true", help=f"keep the traces and what each rank printed in {FOLDER / 'traces'}, and print the traceback of an internal error")


def _existing(text: str) -> Path:
    path = Path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{text}: no such file or folder")
    if path.is_file() and path.suffix != ".py":
        raise argparse.ArgumentTypeError(f"{text}: a spec is a .py file")
    return path


def _spec(text: str) -> Path:
    path = _existing(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: is a folder; a spec is a .py file")
    return path


def _file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text}: {'is a folder' if path.is_dir() else 'no such file'}")
    return path


def _folder(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: {'is no folder' if path.exists() else 'no such folder'}")
    return path


def _new_file(text: str) -> Path:
    """A file to be written after the run: that it cannot be is said before."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: is a folder")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: cannot be written")
    return path


def _new_folder(text: str) -> Path:
    """A folder to be written, which need not exist."""
    path = Path(text)
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: {there} is no folder")
    if not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: the folder {there} cannot be written")
    return path


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0 on")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def _stand_ins(text: str) -> tuple[str, ...]:
    from trainverify.adapters.standins import STANDINS
    names = tuple(text.split(","))
    if unknown := [n for n in names if n not in STANDINS]:
        raise argparse.ArgumentTypeError(f"there is no stand-in for {unknown[0]!r} (there are {', '.join(STANDINS)})")
    return names


def _place(text: str) -> str:
    file, _, line = text.rpartition(":")
    if not file or not line.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not FILE:LINE")
    return text


def _case(text: str) -> dict[str, str | int | float | bool]:
    """"tp=4,sp=true" -> {"tp": 4, "sp": True}; what is no number and no truth value stays a string."""
    case = {}
    for part in text.split(","):
        key, eq, value = part.partition("=")
        if not eq or not key.strip().isidentifier():
            raise argparse.ArgumentTypeError(f"{part or text!r} is not NAME=VALUE")
        case[key.strip()] = _literal(value.strip())
    return case


def _literal(text: str) -> str | int | float | bool:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


# ---- verify and capture

def _options(args: argparse.Namespace, case: dict[str, Any], defaults: Any = None, **more: Any) -> Any:
    """What the engine is told: the command line, else the project's table, else the defaults."""
    options = importlib.import_module("trainverify.engine.options").Options
    given = {name: next((v for v in (getattr(args, name), getattr(defaults, name, None)) if v is not None), None) for name in ("steps", "timeout")}
    given = {k: v for k, v in given.items() if v is not None}
    return options(ranks=args.ranks, case=case, seed=args.seed, keep=args.debug, jobs=getattr(args, "jobs", 2), repair=not getattr(args, "no_repair", False),
                   cache=not getattr(args, "no_cache", True), stand_ins=args.stand_in,
                   reduce=getattr(args, "reduce", False), cross_check=getattr(args, "cross_check", False),
                   **given, **more)


def _case_given(args: argparse.Namespace) -> dict[str, Any]:
    return {k: v for part in args.case for k, v in part.items()}


def _verify(args: argparse.Namespace, argv: list[str]) -> int:
    asked = [f"--{name.replace('_', '-')}" for name in ("self_test", "second_opinion", "certificate", "dump_unknown", "counterexample") if getattr(args, name)]
    if asked and args.dry_run:
        return _usage(f"verify: error: {asked[0]} needs a comparison, and --dry-run makes none")
    if args.reference or args.script or args.runs:
        return _verify_scripts(args, argv, asked)
    if args.local or args.skip:
        return _usage("verify: error: --local and --skip are for scripts: there is no --reference")
    if args.cross_check and not args.reduce:
        return _usage("verify: error: --cross-check is for --reduce")
    if args.path is None or args.all_cases:
        return _usage(f"verify: error: {asked[0]} is for one case of one spec") if asked else _verify_all(args, argv)
    fixed = [f"--{name}" for name in ("ranks", "case", "steps", "timeout") if getattr(args, name)]
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
             "--case and --all-cases are for specs" if args.case or args.all_cases else f"{asked[0]} is for one parallel command line" if asked and len(lines) > 1 else "")
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
    if len(given) > 1:
        started = time.perf_counter()
        runs = [cases.Run(s, _options(args, {}, **more, **({"workdir": FOLDER / f"traces-{i}"} if args.debug else {}))) for i, s in enumerate(given, 1)]
        reports = cases.run_all(runs, args.quiet, lambda text: _keep("internal-error.txt", text.encode()))
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
    reports += cases.run_all(runs, args.quiet, lambda text: _keep("internal-error.txt", text.encode()))
    return _deliver(Suite(reports, time.perf_counter() - started, versions=versions()), args, argv, args.format, args.output)


def _planned(args: argparse.Namespace, config: Any) -> tuple[list[Any], list[Any]]:
    """The runs to make, and the reports of specs that cannot even be asked for their cases."""
    from trainverify import cases
    from trainverify.report.model import Report

    runs, broken = [], []
    for spec in config.specs if config is not None else (args.path,):
        spec = Path(os.path.relpath(spec)) if spec.is_relative_to(Path.cwd()) else spec
        try:
            given = [_case_given(args)] if args.case else config.cases if config is not None and config.cases and not args.all_cases else cases.cases_of(spec, args.stand_in)
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
    """One step unless more are asked for: the next ones mostly repeat it."""
    from trainverify.report import lineage
    from trainverify.report.model import Report
    from trainverify.report.text import diagnostic_lines
    fixed = [f"--{name}" for name in ("ranks", "case", "steps", "timeout") if getattr(args, name)]
    if fixed and args.path.is_dir():
        return _usage(f"lineage: error: {fixed[0]} is for a capture, and {args.path} holds one that was made")
    args.steps = args.steps or 1
    table = _run(args, options := _options(args, _case_given(args)), "lineage_table", args.path, options)
    if isinstance(table, Report):
        print("\n".join(line for d in table.diagnostics for line in diagnostic_lines(d)), file=sys.stderr)
        return table.exit_code
    if beyond := [r for r in args.rank if not 0 <= r < table.ranks]:
        return _usage(f"lineage: error: there is no rank {beyond[0]}: the program has ranks 0 to {table.ranks - 1}")
    found = lineage.selected(table, args.rank, args.op)
    with _printing():
        sys.stdout.write(lineage.encode(found).decode() if args.format == "json" else lineage.render(found))
    return 0


def _shapes(args: argparse.Namespace, argv: list[str]) -> int:
    """One step unless more are asked for: the next ones mostly repeat it."""
    from trainverify.report import shapes
    from trainverify.report.model import Report
    from trainverify.report.text import diagnostic_lines
    fixed = [f"--{name}" for name in ("ranks", "case", "steps", "timeout") if getattr(args, name)]
    if fixed and args.path.is_dir():
        return _usage(f"shapes: error: {fixed[0]} is for a capture, and {args.path} holds one that was made")
    args.steps = args.steps or 1
    found = _run(args, options := _options(args, _case_given(args)), "shape_classes", args.path, options)
    if isinstance(found, Report):
        print("\n".join(line for d in found.diagnostics for line in diagnostic_lines(d)), file=sys.stderr)
        return found.exit_code
    with _printing():
        sys.stdout.write(shapes.encode(found).decode() if args.format == "json" else shapes.render(found))
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
