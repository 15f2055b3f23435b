"""The arguments of each command, and what they may be: a path that is not there, or cannot be written, is said before a run. Not trusted."""
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from trainverify import __version__
from trainverify.report.formats import FORMATS
from trainverify.report.words import WIDTH, wrap

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


def parser() -> argparse.ArgumentParser:
    """Of all commands; what is parsed names its `command`."""
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
    verify.add_argument("--routings", metavar="N", type=_positive, default=1, help="where data decides a routing: verify it for N draws of the values of weights and float inputs, and of token ids where the spec seeds them by tv.routing(), a script by {routing}")
    verify.add_argument("--dry-run", action="store_true", help="bindings and data coverage only; compares nothing, so never exits 0")
    verify.add_argument("--jobs", metavar="N", type=_positive, default=2, help="from 2 on (default: 2): prove in a process beside the replay, and theorems about deep programs in N - 2 more; 1: all in this one; the report is the same")
    verify.add_argument("--engine", choices=("local", "ray"), default="local", help="where theorems about deep programs are proved: on this machine (default), or by a Ray cluster (pip install trainverify[ray])")
    verify.add_argument("--address", metavar="HOST:PORT", default="", help="with --engine ray: of the cluster, which runs already")
    verify.add_argument("--no-cache", action="store_true", help="work the verdict out again, also where an earlier run on identical programs has")
    verify.add_argument("--no-repair", action="store_true", help="where outputs differ, do not try what would mend them")
    verify.add_argument("--self-test", action="store_true", help="also plant bugs in the recorded program, and say which of them this spec would show")
    verify.add_argument("--reduce", action="store_true", help="verify at small sizes that stand for the recorded ones (pip install trainverify[shapes]; docs/shape-reduction.md)")
    _full_size(verify)
    verify.add_argument("--cross-check", action="store_true", help="with --reduce: at a second choice of small sizes too")
    verify.add_argument("--second-opinion", choices=("z3", "cvc5"), default="", help="ask this prover about every obligation that was proved (pip install trainverify[smt])")
    verify.add_argument("--certificate", metavar="FILE", type=_new_file, help="write the proved obligations, for `trainverify recheck`")
    verify.add_argument("--counterexample", metavar="FILE.py", type=_new_file, help="if refuted: minimise the inputs, and write a script of plain PyTorch that shows the difference")
    verify.add_argument("--dump-unknown", metavar="DIR", type=_new_folder, help="write the obligations that were not proved, to read and as SMT-LIB")
    verify.add_argument("--format", choices=FORMATS, default="text", help="what stdout gets, or FILE with -o (default: text)")
    verify.add_argument("-o", "--output", metavar="FILE", type=_new_file, help="write the report here in --format; stdout then gets the text")
    verify.set_defaults(command="verify")

    capture = _command(commands, "capture", "run both sides and keep their traces in a folder", _CAPTURE_EXITS)
    capture.add_argument("path", metavar="SPEC.py", type=_spec)
    capture.add_argument("-o", "--output", metavar="DIR", type=_new_folder, required=True, help="folder for the traces, which `trainverify verify DIR` works from")
    _full_size(capture)
    _capture_arguments(capture)
    capture.set_defaults(command="capture")

    lineage = _command(commands, "lineage", "what every float result of every rank holds of the reference; proves nothing", _LINEAGE_EXITS)
    lineage.add_argument("path", metavar="SPEC.py|DIR", type=_existing, help="the spec, or a folder that `trainverify capture` wrote")
    lineage.add_argument("--rank", metavar="R", type=int, action="append", default=[], help="only this rank (may be repeated)")
    lineage.add_argument("--op", metavar="PATTERN", default="", help="only operations whose name contains this, or that it fits: mm, \"aten.*_backward*\"")
    lineage.add_argument("--format", choices=("text", "json"), default="text", help="(default: text)")
    _capture_arguments(lineage)
    lineage.set_defaults(command="lineage")

    shapes = _command(commands, "shapes", "which dimensions have the same indices, and the sizes of a reduction; proves nothing", _LINEAGE_EXITS)
    shapes.add_argument("path", metavar="SPEC.py|DIR", type=_existing, help="the spec, or a folder that `trainverify capture` wrote")
    shapes.add_argument("--format", choices=("text", "json"), default="text", help="(default: text)")
    _full_size(shapes)
    _capture_arguments(shapes)
    shapes.set_defaults(command="shapes")

    recheck = _command(commands, "recheck", "prove the obligations of a certificate again, with the kernel alone; with --traces the theorem itself",
                       "exit codes:\n  0    every obligation is proved again (with --traces: and every output)\n"
                       "  1    one is not, or the file is damaged, or it is not the traces' own\n  2    usage\n  3    with --traces: some output is UNKNOWN\n")
    recheck.add_argument("path", metavar="FILE", type=_file, help="what `trainverify verify --certificate FILE` wrote")
    recheck.add_argument("--traces", metavar="DIR", type=_folder, help="the folder from which the certificate was made: replay the programs too")
    recheck.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    recheck.set_defaults(command="recheck")

    ops = _command(commands, "ops", "the op table: name, meaning, kind, source, tests")
    ops.add_argument("--format", choices=("text", "json"), default="text", help="(default: text)")
    ops.set_defaults(command="ops")

    explain = _command(commands, "explain", "the page of a diagnostic code; without a code, the list")
    explain.add_argument("code", metavar="CODE", nargs="?", help="as it stands in a report: REL002")
    explain.set_defaults(command="explain")
    return top


def _command(commands: Any, name: str, what: str, epilog: str = "") -> argparse.ArgumentParser:
    return commands.add_parser(name, help=what, description="\n".join(wrap("", f"{what[0].upper()}{what[1:]}.", WIDTH - 2)), epilog=epilog)


def _full_size(p: argparse.ArgumentParser) -> None:
    p.add_argument("--full-size", action="store_true", help="capture real sizes without memory: floats have no values; implies --reduce, and one step unless --steps says more (docs/shape-reduction.md)")


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
