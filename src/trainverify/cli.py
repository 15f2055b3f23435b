"""The command line: arguments in, report on stdout, progress and troubles on stderr, exit codes 0 (PROVED), 1 (REFUTED, or the program faulted), 2 (usage),
3 (UNKNOWN), 4 (our own error), 130 (interrupted). Internal exceptions are caught here and nowhere else. Not trusted; torch is imported by the commands that need it."""
from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainverify import __version__
from trainverify.diagnostics import Fault

FOLDER = Path(".trainverify")
_EXITS = "exit codes: 0 PROVED, 1 REFUTED or the program faulted, 2 usage, 3 UNKNOWN, 4 an error of TrainVerify itself, 130 interrupted"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = _parser().parse_args(argv)
    try:
        code = args.run(args, list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("trainverify: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of stdout left (`| head`); the interpreter must not try to flush to it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as e:  # noqa: BLE001 - the edge: every exception that comes here is our own bug
        return _internal_error(e, getattr(args, "debug", False))


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

def _parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="trainverify", description="Checks that a distributed PyTorch training step equals its single-device model.", epilog=_EXITS)
    top.add_argument("--version", action="version", version=f"trainverify {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    verify = commands.add_parser("verify", help="check a spec, or the traces of an earlier capture", epilog=_EXITS)
    verify.add_argument("path", metavar="SPEC.py|DIR", type=_existing)
    _capture_arguments(verify)
    verify.add_argument("--accept", metavar="FILE:LINE", action="append", default=[], type=_place, help="take the unmatched decision at this line as an assumption")
    verify.add_argument("--dry-run", action="store_true", help="bindings and data coverage only; compares nothing, so never exits 0")
    verify.add_argument("--format", choices=("text", "json"), default="text", help="what stdout gets, or FILE with -o (default: text)")
    verify.add_argument("-o", "--output", metavar="FILE", type=Path, help="write the report here in --format; stdout then gets the text")
    verify.set_defaults(run=_verify)

    capture = commands.add_parser("capture", help="run both sides and keep their traces in a folder")
    capture.add_argument("path", metavar="SPEC.py", type=_spec)
    capture.add_argument("-o", "--output", metavar="DIR", type=Path, required=True)
    _capture_arguments(capture)
    capture.set_defaults(run=_capture)

    ops = commands.add_parser("ops", help="the op table: name, meaning, kind, source, tests")
    ops.add_argument("--format", choices=("text", "json"), default="text")
    ops.set_defaults(run=_ops)

    explain = commands.add_parser("explain", help="the page of a diagnostic code; without a code, the list")
    explain.add_argument("code", metavar="CODE", nargs="?")
    explain.set_defaults(run=_explain)
    return top


def _capture_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--ranks", metavar="N", type=_positive, help="world size (default: RANKS of the spec)")
    p.add_argument("--case", metavar="K=V,...", type=_case, action="append", default=[], help="arguments of parallel(ref, ...)")
    p.add_argument("--steps", metavar="K", type=_positive, default=2, help="training steps (default: 2)")
    p.add_argument("--seed", metavar="S", type=int, default=0, help="of symbols and field points (default: 0)")
    p.add_argument("--timeout", metavar="SECONDS", type=_seconds, default=300.0, help="wall-clock limit of each side's capture (default: 300)")
    p.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    p.add_argument("--debug", action="store_true", help="keep the traces, and print the traceback of an internal error")


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


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: not a positive integer")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: not a positive number of seconds")
    return value


def _place(text: str) -> str:
    file, _, line = text.rpartition(":")
    if not file or not line.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: not FILE:LINE")
    return text


def _case(text: str) -> dict[str, str | int | float | bool]:
    """"tp=4,sp=true" -> {"tp": 4, "sp": True}; what is no number and no truth value stays a string."""
    case = {}
    for part in text.split(","):
        key, eq, value = part.partition("=")
        if not eq or not key.strip().isidentifier():
            raise argparse.ArgumentTypeError(f"{part or text}: not NAME=VALUE")
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

def _options(args: argparse.Namespace, **more: Any) -> Any:
    options = importlib.import_module("trainverify.engine.options")
    case = {k: v for part in args.case for k, v in part.items()}
    return options.Options(ranks=args.ranks, case=case, steps=args.steps, seed=args.seed, timeout=args.timeout, keep=args.debug, **more)


def _verify(args: argparse.Namespace, argv: list[str]) -> int:
    options = _options(args, accept=tuple(args.accept), dry_run=args.dry_run)
    entry = "verify_dir" if args.path.is_dir() else "verify_spec"
    report = _run(args, entry, args.path, options)
    if args.dry_run:
        report.mode = "dry-run"
    return _deliver(report, args, argv, args.format, args.output)


def _capture(args: argparse.Namespace, argv: list[str]) -> int:
    report = _run(args, "capture_spec", args.path, args.output, _options(args))
    report.mode = "capture"
    return _deliver(report, args, argv, "text", None, str(args.output) if report.verdict != "ERROR" else "")


def _run(args: argparse.Namespace, entry: str, *arguments: Any) -> Any:
    """Call the engine; a fault that it could not put into a report of its own becomes one here."""
    from trainverify.progress import progress_to
    from trainverify.report.model import Report
    progress = progress_to(sys.stderr, args.quiet)
    try:
        progress("start", str(args.path))
        return getattr(importlib.import_module("trainverify.verify"), entry)(*arguments, progress)
    except Fault as fault:
        case = {k: v for part in args.case for k, v in part.items()}
        return Report(verdict="ERROR", spec=str(args.path), case=case, ranks=args.ranks or 0, steps=args.steps, seed=args.seed,
                      diagnostics=list(fault.diagnostics))
    finally:
        progress.close()


def _deliver(report: Any, args: argparse.Namespace, argv: list[str], form: str, output: Path | None, traces: str = "") -> int:
    """Keep the report, write it where it was asked for, and say its exit code."""
    from trainverify.report import json_, text
    from trainverify.report.versions import versions
    report.rerun = _rerun(argv)
    report.versions = report.versions or versions()
    data = json_.encode(report)
    rendered = text.render(report, saved=_keep("last.json", data), traces=traces)
    if output:
        try:
            output.write_bytes(data if form == "json" else rendered.encode())
        except OSError as e:
            print(f"trainverify: cannot write {output}: {e.strerror}", file=sys.stderr)
            text.show(rendered, sys.stdout)
            return 2
    if form == "json" and not output:
        sys.stdout.write(data.decode())
    else:
        text.show(rendered, sys.stdout)
    return report.exit_code


def _rerun(argv: list[str]) -> str:
    """The same command without what only says where the report goes."""
    kept, skip = [], False
    for a in argv:
        if skip:
            skip = False
        elif a in ("--format", "-o", "--output") and argv[0] == "verify":
            skip = True
        elif not a.startswith(("--format=", "--output=")) and a not in ("-q", "--quiet"):
            kept.append(a)
    return shlex.join(["trainverify", *kept])


# ---- ops and explain

def _ops(args: argparse.Namespace, argv: list[str]) -> int:
    from trainverify.optable import op_records, op_text
    records = op_records()
    if args.format == "json":
        import msgspec
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(records), indent=2).decode() + "\n")
    else:
        sys.stdout.write(op_text(records))
    return 0


def _explain(args: argparse.Namespace, argv: list[str]) -> int:
    from trainverify.explain import codes, page
    if args.code is None:
        for code, title in codes().items():
            print(f"{code:<9} {title}")
        return 0
    found = page(args.code)
    if found is None:
        close = [c for c in codes() if c[:3] == args.code.upper()[:3]]
        print(f"trainverify: no page for {args.code}" + (f"; there are {', '.join(close)}" if close else "; `trainverify explain` lists the codes"), file=sys.stderr)
        return 2
    sys.stdout.write(found)
    return 0
