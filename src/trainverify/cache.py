"""Verdicts that were reached before, on disk (trusted where one is used: a report says so, and --no-cache leaves it out).

A report is kept under the address of everything that it follows from: both captured programs, the options, and this installation
(our own source text, the versions of torch, numpy and Python). Programs are captured anew in every run; if nothing in them has changed, the
analysis and the proof are not repeated.
"""
from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import msgspec

from trainverify.diagnostics import Diagnostic
from trainverify.engine.options import Options
from trainverify.ir.digest import digest
from trainverify.ir.trace import Program
from trainverify.report.json_ import decode, encode
from trainverify.report.model import Phase, Report
from trainverify.report.versions import versions

FOLDER = Path(".trainverify") / "cache"
KEEP = 64                                     # reports; the oldest go first
OF_THE_RUN = ("phases", "seconds", "peak_memory", "versions", "rerun", "spec")      # are never taken from another one


def key(reference: Program, parallel: Program, options: Options, captured: Sequence[Diagnostic]) -> str:
    """The address of a verdict on two programs and on what their capture said."""
    asked = (options.seed, options.accept, options.repair, msgspec.json.encode(captured))
    return hashlib.blake2b(repr((digest(reference), digest(parallel), asked, installation())).encode(), digest_size=20).hexdigest()


@cache
def installation() -> str:
    """A digest of this package's source text and of the versions below it."""
    h = hashlib.blake2b(repr(sorted(versions().items())).encode(), digest_size=20)
    root = Path(__file__).parent
    for file in sorted(root.rglob("*.py")):
        h.update(f"{file.relative_to(root)} {file.stat().st_size}\n".encode())
        h.update(file.read_bytes())
    return h.hexdigest()


def is_used(options: Options, extra_rows) -> bool:
    """Whether a verdict may come from an earlier run: not where it depends on Python functions of the spec, nor where more is asked for than a report."""
    return options.cache and not extra_rows and not any((options.dry_run, options.self_test, options.second_opinion, options.certificate, options.dump_unknown, options.counterexample))


def recall(address: str, report: Report) -> bool:
    """Fill a report with what was found for the same programs; False if nothing was."""
    try:
        known = decode((FOLDER / address).with_suffix(".json").read_bytes())
    except (OSError, msgspec.MsgspecError):
        return False                          # never asked before, or damaged: then it is worked out again
    for name in Report.__struct_fields__:
        if name not in OF_THE_RUN:
            setattr(report, name, getattr(known, name))
    report.phases.append(Phase("recalled", 0.0, "the verdict of an earlier run on identical programs; --no-cache works it out again"))
    return True


def remember(address: str, report: Report) -> None:
    """Keep a report, but for one of a run that failed or that lost its proof: the next may not. A folder that cannot be written keeps nothing."""
    if report.verdict == "ERROR" or any(d.code == "PROVE001" for d in report.diagnostics):
        return
    try:
        FOLDER.mkdir(parents=True, exist_ok=True)
        new = FOLDER / f"{address}.{os.getpid()}.new"
        new.write_bytes(encode(report))
        new.replace((FOLDER / address).with_suffix(".json"))
        kept = sorted(FOLDER.glob("*.json"), key=lambda p: (p.stat().st_mtime, p.name))
        for old in kept[:-KEEP]:
            old.unlink(missing_ok=True)
    except OSError:
        return
