"""Several runs one after the other, each in a forked process of its own: what one spec imports, patches or leaves behind reaches no other run, and a run
that dies costs its own verdict only (imports torch when called, not trusted)."""
from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import msgspec

from trainverify.diagnostics import Diagnostic, Fault
from trainverify.engine.options import Options
from trainverify.processes import Terminated, die_with
from trainverify.progress import progress_to
from trainverify.report import json_
from trainverify.report.model import Report
from trainverify.report.versions import versions

_PATIENCE = (1.0, 4.0)                        # seconds for an interrupted run to end: by itself, and when told again


@dataclass(frozen=True)
class Run:
    """One run to be made: of a spec, or of scripts (`capture.script.Scripts`)."""

    spec: Any
    options: Options


class _Answer(msgspec.Struct):
    """What a forked process hands back: a value, or why there is none."""

    value: bytes = b""
    faults: list[Diagnostic] = []
    error: str = ""
    traceback: str = ""


def cases_of(path: str | os.PathLike, stand_ins: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The CASES of a spec, or one empty case where it lists none; raises Fault where the spec cannot be used."""
    answer = _in_child(lambda: _listed(Path(path), stand_ins))
    if answer.faults:
        raise Fault(*answer.faults)
    if answer.error:
        raise Fault(_own_fault(answer, f"reading {path}"))
    return msgspec.json.decode(answer.value, type=list[dict[str, Any]]) or [{}]


def scripts_of(reference: str, parallel: str | Sequence[str], ranks: int | None = None, local: Sequence[str] = (), skip: Sequence[str] = ()) -> Any:
    """Two command lines as a run takes them in place of a spec; raises Fault where one cannot be used."""
    return importlib.import_module("trainverify.capture.script").parse_scripts(reference, parallel, ranks, local, skip)


def preload() -> None:
    """Import once what every run needs; the forked processes share it."""
    importlib.import_module("trainverify.capture.world").preload()


def run_all(runs: Sequence[Run], quiet: bool, keep_error: Callable[[str], str], routings: int = 1) -> list[Report]:
    """A report of every run, in order; `keep_error` writes the traceback of an error of our own and says where. A run whose choices depend on
    data is repeated for as many routings."""
    preload()
    reports: list[Report] = []
    waiting, i = list(runs), 0
    while waiting:
        run, i = waiting.pop(0), i + 1
        case = Report(spec=str(run.spec), case=run.options.case, routing=run.options.routing)
        if not quiet:
            print(f"run {i} of {i + len(waiting)}: {case.label}", file=sys.stderr, flush=True)
        started = time.perf_counter()
        answer = _in_child(lambda run=run: json_.encode(_verified(run, quiet)))
        if answer.value:
            reports.append(json_.decode(answer.value))
            if not run.options.routing and any(a.code == "A4" for a in reports[-1].assumptions):
                waiting[:0] = [replace(run, options=_routed(run.options, n)) for n in range(1, routings)]
            continue
        own = [] if answer.faults else [_own_fault(answer, "the run", keep_error(answer.traceback) if answer.traceback else "")]
        reports.append(Report(verdict="ERROR", spec=str(run.spec), case=run.options.case, ranks=run.options.ranks or 0, steps=run.options.steps,
                              routing=run.options.routing, seed=run.options.seed, seconds=time.perf_counter() - started, diagnostics=[*answer.faults, *own], versions=versions()))
    return reports


def _routed(options: Options, n: int) -> Options:
    """The same run for the n-th further routing; its traces stand beside those of the first."""
    return replace(options, routing=n, workdir=options.workdir and options.workdir.with_name(f"{options.workdir.name}-routing-{n + 1}"))


def _listed(path: Path, stand_ins: Sequence[str]) -> bytes:
    """In the child: CASES as JSON."""
    spec = importlib.import_module("trainverify.capture.spec").load_spec(path, stand_ins)
    for case in spec.cases:
        for key, value in case.items():
            if not isinstance(value, (str, int, float, bool)):
                raise Fault(Diagnostic("SPEC004", f"CASES holds {key}={value!r}, which is no string, number or truth value",
                                       fix="Give the case a name, and look the object up in parallel()."))
    return msgspec.json.encode(spec.cases)


def _verified(run: Run, quiet: bool) -> Report:
    """In the child: one verification."""
    progress = progress_to(sys.stderr, quiet)
    try:
        entry = "verify_spec" if isinstance(run.spec, Path) else "verify_scripts"
        return getattr(importlib.import_module("trainverify.verify"), entry)(run.spec, run.options, progress)
    finally:
        progress.close()


def _own_fault(answer: _Answer, what: str, kept: str = "") -> Diagnostic:
    fix = f"attach {kept} to a bug report" if kept else "run it alone with --debug, and attach what it prints to a bug report"
    return Diagnostic("CASE001", f"{what} failed inside TrainVerify: {answer.error}", "internal", fix=fix)


# ---- one forked process

def _in_child(function: Callable[[], bytes]) -> _Answer:
    """Run the function in a forked process. Its standard output goes to our standard error: ours is for reports."""
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        pid = os.fork()
        if not pid:
            _child(file, parent, function)
        try:
            _, status = os.waitpid(pid, 0)
        except BaseException:
            _end(pid)
            raise
        file.seek(0)
        data = file.read()
    if data:
        return msgspec.msgpack.decode(data, type=_Answer)
    code = os.waitstatus_to_exitcode(status)
    if code == 130:
        raise KeyboardInterrupt
    how = f"exited with code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}" + (" (often: out of memory)" if code == -signal.SIGKILL else "")
    return _Answer(error=f"its process {how}")


def _child(file: BinaryIO, parent: int, function: Callable[[], bytes]) -> NoReturn:
    code = 1
    try:
        die_with(parent)
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):   # a stdout that is no descriptor, too
            file.write(msgspec.msgpack.encode(_answer(function)))
        file.flush()
        sys.stderr.flush()
        code = 0
    except Terminated:
        code = 143
    except KeyboardInterrupt:
        code = 130
    finally:
        os._exit(code)


def _answer(function: Callable[[], bytes]) -> _Answer:
    try:
        return _Answer(function())
    except Fault as fault:
        return _Answer(faults=list(fault.diagnostics))
    except Exception as error:  # noqa: BLE001 - the edge of this process: the parent reports it as our own error
        notes = "".join(f"; {n}" for n in getattr(error, "__notes__", ()))
        return _Answer(error=f"{type(error).__name__}: {error}{notes}", traceback="".join(traceback.format_exception(error)))


def _end(pid: int) -> None:
    """After Ctrl-C, which a terminal sends to the child as well: let it clean up, tell it again, then kill it."""
    for seconds, told in zip(_PATIENCE, (signal.SIGINT, signal.SIGKILL), strict=True):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return
            time.sleep(0.02)
        os.kill(pid, told)
    os.waitpid(pid, 0)
