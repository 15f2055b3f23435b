"""Capture of a spec's two programs: forks the ranks, runs the user's functions under the recorder, brings the traces back (trusted)."""
from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from trainverify import adapters
from trainverify.adapters import standins
from trainverify.api import Reference, Training
from trainverify.capture import meta
from trainverify.capture.digits import DIGITS, needed, tell_apart
from trainverify.capture.early import Early, EarlySymbols, read_before_defined
from trainverify.capture.groups import process_groups
from trainverify.capture.kernels import attention_kernels, plain_lstm
from trainverify.capture.model import chunks_of, whole_tensor
from trainverify.capture.options import CaptureOptions
from trainverify.capture.outputs import Outputs
from trainverify.capture.placing import place_tags, reads_weights, unwrapped
from trainverify.capture.provenance import SCALARS, decided_otherwise, mark_changes, something_leaves, tag_table
from trainverify.capture.recorder import Recorder
from trainverify.capture.ring_attention import ring_attention
from trainverify.capture.scalars import ScalarMode
from trainverify.capture.shim import cuda_shim
from trainverify.capture.spec import Spec
from trainverify.capture.symbols import Handed, Symbols, announce_batch
from trainverify.capture.sync_batch_norm import sync_batch_norm
from trainverify.capture.tags import Tagger
from trainverify.capture.userframes import call_through
from trainverify.capture.world import Rank, run_world
from trainverify.diagnostics import Diagnostic, Fault
from trainverify.ir.files import load_program, save_program, save_rank, write_index
from trainverify.ir.trace import Group, Program

_decode_handed = msgspec.msgpack.Decoder(Handed).decode


class Phase(msgspec.Struct, frozen=True):
    """Seconds of one part of the capture, for the report."""

    name: str
    seconds: float
    detail: str = ""


@dataclass(frozen=True)
class Stats:
    """Of one side, over all ranks: recorded calls, seconds of CPU and of waiting, memory (PSS, bytes); calls and seconds of CPU during
    the steps, starting and saving left out."""

    ops: int = 0
    cpu: float = 0.0
    waited: float = 0.0
    memory: int = 0
    stepped_ops: int = 0
    stepped_cpu: float = 0.0

    @property
    def ops_per_second(self) -> float:
        return self.stepped_ops / max(self.stepped_cpu, 1e-9)


@dataclass(frozen=True)
class SideCapture:
    """One side. program is None if it faulted; the diagnostics then say why."""

    program: Program | None
    diagnostics: tuple[Diagnostic, ...]
    stats: Stats
    seconds: float


@dataclass(frozen=True)
class ReferenceCapture(SideCapture):
    """The reference, with what the parallel program is handed."""

    handed: Handed = field(default_factory=Handed)
    checkpoint: Path = Path()


@dataclass(frozen=True)
class ParallelCapture(SideCapture):
    """The parallel program in one case."""

    case: dict[str, Any] = field(default_factory=dict)
    ranks: int = 0


@dataclass
class Captured:
    """Both sides; a side that faulted is None."""

    reference: Program | None = None
    parallel: Program | None = None
    ranks: int = 0
    case: dict[str, Any] = field(default_factory=dict)
    phases: list[Phase] = field(default_factory=list)
    diagnostics: list[Diagnostic] = field(default_factory=list)
    peak_memory: int = 0

    def add(self, name: str, side: SideCapture) -> None:
        setattr(self, name, side.program)
        self.diagnostics += side.diagnostics
        self.peak_memory = max(self.peak_memory, side.stats.memory)
        speed = f"{side.stats.ops:,} calls, {side.stats.ops_per_second:,.0f} per CPU second" if side.program is not None else ""
        self.phases.append(Phase(f"capture {name}", side.seconds, speed))


class _Result(msgspec.Struct):
    """What a rank sends back besides its files."""

    ops: int
    cpu: float
    memory: int
    handed: bytes = b""
    early: list[Early] = []                    # not empty: the reference stopped behind its construction, which must define these
    stepped: tuple[int, float] = (0, 0.0)      # calls and seconds of CPU in the steps


# ---- in the parent

def capture(spec: Spec, options: Any = CaptureOptions(), progress: Callable | None = None) -> Captured:
    """Capture the reference, then the parallel program; once more with other values of the symbols if floats leave tensors.

    `options`: CaptureOptions, or anything with its fields' names.
    """
    case = spec.case(dict(options.case))
    options = CaptureOptions(options.steps, options.seed, options.timeout, options.workdir, spec.world_size(options.ranks, case), case,
                             getattr(options, "second_run", None), full_size=getattr(options, "full_size", False), accept=(*options.accept, *spec.accept),
                             routing=getattr(options, "routing", 0))
    with _folder(options.workdir) as folder:
        done = _capture_both(spec, options, folder, progress)
        if options.full_size:
            return done                        # values say nothing: there are none
        if done.parallel is not None and needed(done.reference, done.parallel):
            _tell_apart(spec, options, folder, progress, done)
        if done.parallel is not None and options.second_run is not False:
            _look_for_changes(spec, options, folder, progress, done)
    return done


def _capture_both(spec: Spec, options: CaptureOptions, folder: Path, progress: Callable | None) -> Captured:
    done = Captured(ranks=options.ranks, case=options.case)
    reference = capture_reference(spec, options, folder, progress)
    done.add("reference", reference)
    if reference.program is None:
        return done
    faults = spec.before_parallel(reference.handed, options, folder)
    done.diagnostics += faults
    if not faults:
        done.add("parallel", capture_parallel(spec, reference, options.case, options, folder, progress))
    if done.parallel is not None:
        done.diagnostics += spec.settle(done.reference, done.parallel, folder)
    return done


def _tell_apart(spec: Spec, options: CaptureOptions, folder: Path, progress: Callable | None, done: Captured) -> None:
    """Loaded 16 bit weights whose tags repeat: further captures show which is which."""
    started = time.perf_counter()
    told = (lambda phase, detail="", fraction=None: progress("capture digits", detail, fraction)) if progress else None
    with tempfile.TemporaryDirectory(prefix="trainverify-", dir=folder) as again:
        captures = [_capture_both(spec, replace(options, digit=k), Path(again), told) for k in range(DIGITS)]
        if tell_apart(done, captures):
            for side in ("reference", "parallel"):
                save_program(getattr(done, side), folder / side)
    done.phases.append(Phase("capture digits", time.perf_counter() - started, f"{DIGITS} times with other 16 bit values"))


def _look_for_changes(spec: Spec, options: CaptureOptions, folder: Path, progress: Callable | None, done: Captured) -> None:
    """Values that leave tensors may come back untracked: a second capture with other values of the symbols shows them."""
    started = time.perf_counter()
    table = tag_table(done.reference)
    if not options.second_run and not any(something_leaves(p, table) for p in (done.reference, done.parallel)):
        return
    with tempfile.TemporaryDirectory(prefix="trainverify-", dir=folder) as again:
        told = (lambda phase, detail="", fraction=None: progress("capture again", detail, fraction)) if progress else None
        second = _capture_both(spec, replace(options, seed=options.seed + 1), Path(again), told)
        if second.parallel is not None and decided_otherwise(done, second):
            # Values so close that decisions come out alike let the rest be compared too.
            second = _capture_both(spec, replace(options, nudge=1), Path(again), told)
    if second.parallel is None:
        done.diagnostics += second.diagnostics
        done.reference = done.parallel = None
        return
    found = 0
    for side in ("reference", "parallel"):
        program = getattr(done, side)
        changes = mark_changes(program, getattr(second, side), table, tag_table(second.reference))
        if changes:
            save_program(program, folder / side)
        found += changes
    done.phases.append(Phase("capture again", time.perf_counter() - started, f"other values; {found} untracked" if found else "other values"))


def capture_reference(spec: Spec, options: Any, folder: Path | None = None, progress: Callable | None = None) -> ReferenceCapture:
    """Run the reference in a process of its own; once more if its construction reads weights that are symbols by then."""
    reference_child, _ = spec.children or (_reference_child, _parallel_child)
    with _folder(folder or options.workdir) as base:
        side, results = _run("reference", 1, partial(reference_child, spec, options, base, []), base, options, progress)
        if results and results[0].early:
            child = partial(reference_child, spec, options, base, results[0].early)
            side, results = _run("reference", 1, child, base, options, progress)
        handed = _decode_handed(results[0].handed) if results else Handed()
        return ReferenceCapture(**vars(side), handed=handed, checkpoint=base / "checkpoint")


def capture_parallel(spec: Spec, reference: ReferenceCapture, case: dict[str, Any], options: Any, folder: Path | None = None,
                     progress: Callable | None = None) -> ParallelCapture:
    """Run the parallel program, one process per rank."""
    _, parallel_child = spec.children or (_reference_child, _parallel_child)
    ranks = spec.world_size(options.ranks, case)
    with _folder(folder or options.workdir) as base:
        child = partial(parallel_child, spec, reference.handed, reference.checkpoint, case, options, base)
        side, _ = _run("parallel", ranks, child, base, options, progress)
        return ParallelCapture(**vars(side), case=case, ranks=ranks)


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    """A folder for traces; a temporary one is removed."""
    if given is not None:
        Path(given).mkdir(parents=True, exist_ok=True)
        yield Path(given)
        return
    made = Path(tempfile.mkdtemp(prefix="trainverify-"))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _run(side: str, n: int, child: Callable[[Rank], bytes], base: Path, options: Any, progress: Callable | None) -> tuple[SideCapture, list[_Result]]:
    started = time.perf_counter()
    shutil.rmtree(base / side, ignore_errors=True)
    told = (lambda rank, text: progress(f"capture {side}", text)) if progress else None
    if progress:
        progress(f"capture {side}", f"{n} ranks" if n > 1 else "1 rank")
    output = base / f"{side}.output" if options.workdir is not None else None
    world = run_world(n, child, timeout=options.timeout, on_progress=told, output_dir=output)
    while any([standins.provide_missing(name) for name in world.missing]):     # the program cannot run without the package: again, with its stand-in
        shutil.rmtree(base / side, ignore_errors=True)
        world = run_world(n, child, timeout=options.timeout, on_progress=told, output_dir=output)
    faults = world.faults
    if side == "reference":
        faults = tuple(msgspec.structs.replace(d, notes=("it was the reference that ran", *d.notes)) if d.code.startswith("RUN") else d for d in faults)
    faulted = any(d.severity in ("error", "internal") for d in faults)
    results = [] if faulted else [msgspec.msgpack.decode(r, type=_Result) for r in world.results]
    program = None
    if results:
        write_index(base / side, side, n)
        program = load_program(base / side)
    stats = Stats(sum(r.ops for r in results), sum(r.cpu for r in results), sum(u.waited for u in world.usage), sum(r.memory for r in results),
                  sum(r.stepped[0] for r in results), sum(r.stepped[1] for r in results))
    return SideCapture(program, faults, stats, time.perf_counter() - started), results


# ---- in a rank

class Session:
    """One rank of one side while it is captured."""

    def __init__(self, side: str, rank: Rank, options: Any, base: Path, symbols: bool):
        self.options, self.base, self.rank = options, base, rank
        self.full_size = getattr(options, "full_size", False)
        floats = meta.MetaFloats() if self.full_size else None
        self.recorder = Recorder(side, rank.rank, rank.world_size, rank.channel, floats, tuple(getattr(options, "accept", ())))
        self.symbols = Symbols(self.recorder, Tagger(options.seed, getattr(options, "nudge", 0), getattr(options, "digit", -1),
                                                       getattr(options, "routing", 0))) if symbols else None
        self.outputs = Outputs(self.recorder, self.symbols)
        self.stepped = (0, 0.0)
        self.meshes: list[DeviceMesh] = []

    @contextmanager
    def environment(self) -> Iterator[None]:
        """What the program meets: process groups, GPUs that are none, optimizers that are watched."""
        note = self.recorder.note
        with ExitStack() as stack:
            self.meshes = stack.enter_context(process_groups(self.rank.rank, self.rank.world_size, note))
            stack.enter_context(cuda_shim(self.recorder, local_rank=self.rank.rank, count=self.rank.world_size))
            stack.enter_context(ring_attention(note))
            stack.enter_context(standins.noting(note))
            stack.enter_context(attention_kernels(note))
            stack.enter_context(sync_batch_norm(note))
            stack.enter_context(plain_lstm())
            if self.full_size:
                stack.enter_context(meta.full_size())
            stack.enter_context(self.outputs)
            yield

    @contextmanager
    def recording(self) -> Iterator[None]:
        with self.recorder.recording(), ScalarMode(self.recorder):
            yield

    def training(self, function: Callable, args: tuple, kwargs: dict) -> Training:
        made = call_through(function, args, kwargs)
        if not isinstance(made, Training):
            name = getattr(function, "__name__", "the function")
            raise Fault(Diagnostic("SPEC008", f"{name}() returned {'nothing' if made is None else 'a ' + type(made).__name__}", ranks=(self.rank.rank,),
                                   fix="Return tv.Training(model, step)."))
        return made

    def steps(self, training: Training) -> None:
        """All steps, then finish(), each followed by its outputs."""
        last = self.options.steps
        calls, clock = len(self.recorder.ops), time.process_time()
        for n in range(1, last + 1):
            self.rank.channel.progress(f"step {n} of {last}")
            self.outputs.begin_step(n)
            reported = call_through(training.step, (), {})
            self.outputs.after_step(reported)
            if n < last:
                self.outputs.parameters() if training.finish is None else self.outputs.parameters_later()
        if training.finish is not None:
            call_through(training.finish, (), {})
        self.outputs.parameters()
        self.outputs.end()
        self.stepped = len(self.recorder.ops) - calls, time.process_time() - clock

    def save(self, handed: bytes = b"", early: Sequence[Early] = ()) -> bytes:
        told = {"torch": str(torch.__version__), "argv": " ".join(sys.argv), "seed": str(self.options.seed), "case": repr(dict(self.options.case)),
                "optimizers": msgspec.json.encode(self.outputs.settings).decode(), "patches": msgspec.json.encode(adapters.HOOK.applied).decode()}
        if self.full_size:
            told[meta.KEY] = meta.VALUE
        trace = self.recorder.trace(groups=_groups(self.meshes), steps=self.options.steps, meta=told)
        self.recorder.blobs[SCALARS] = np.array(self.recorder.scalar_values, dtype=np.float64)
        result = _Result(len(trace.ops), time.process_time(), _pss(), handed, list(early), self.stepped)
        save_rank(self.base / trace.side, trace, self.recorder.blobs)
        return msgspec.msgpack.encode(result)


def _reference_child(spec: Spec, options: Any, base: Path, early: list[Early], rank: Rank) -> bytes:
    session = Session("reference", rank, options, base, symbols=True)
    with session.environment():
        with session.recording():
            if session.full_size:
                session.recorder.note("ASSUME", meta.COVERED.format(spec.path or "the spec"))
            session.recorder.watch = watch = EarlySymbols(session.symbols, early) if early else None
            training = session.training(spec.reference, (), spec.for_reference(options.case))
            session.recorder.watch = None
            if watch is not None:
                watch.check()
            made = len(session.recorder.ops)
            chunks = chunks_of(training.model, "reference()")
            session.outputs.begin(chunks)
            session.symbols.define_batch(training.batch)
            if not early and (early := read_before_defined(session.recorder.ops[:made], session.symbols.defined)):
                return session.save(early=early)
            announce_batch(session.recorder, training.batch)
        handed = msgspec.msgpack.encode(session.symbols.hand_over(chunks, training.batch))
        if not session.full_size:
            write_checkpoint(training, chunks, base / "checkpoint")
        with session.recording():
            session.steps(training)
        return session.save(handed)


def _parallel_child(spec: Spec, handed: Handed, checkpoint: Path, case: dict[str, Any], options: Any, base: Path, rank: Rank) -> bytes:
    session = Session("parallel", rank, options, base, symbols=False)
    tensors, weights, batch = handed.build()
    with session.environment():
        for given, tensor in zip(handed.tensors, tensors):
            if given.symbol:
                plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
                session.recorder.emit("tv.symbol", given.kind, given.symbol, plain)
        announce_batch(session.recorder, batch)
        with session.recording():
            given = (meta.SizesOnly if session.full_size else Reference)(weights, batch, checkpoint)
            training = session.training(spec.parallel, (given,), case)
            chunks = chunks_of(training.model, "parallel()")
            if session.full_size and not reads_weights(session.recorder):
                place_tags([unwrapped(chunk) for chunk in chunks], weights, session.recorder)
            session.outputs.begin(chunks)
            session.steps(training)
        return session.save()


def write_checkpoint(training: Training, chunks: list[torch.nn.Module], folder: Path) -> None:
    """Let the reference save itself, in a fork: whatever saving does to the program must not be part of it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    report = folder.parent / "checkpoint.error"
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if training.save is not None:
                training.save(str(folder))
            else:
                _save_weights(chunks, folder)
            status = 0
        except BaseException as e:             # it is told by the parent; this process must not go on
            report.write_text(f"{type(e).__name__}: {e}\n" + traceback.format_exc())
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    if status:
        text = report.read_text() if report.exists() else f"status {status}"
        raise Fault(Diagnostic("SPEC012", f"the reference's save() failed: {text.splitlines()[0]}", notes=tuple(text.splitlines()[-12:]),
                               fix="save(dir) must write a checkpoint into the folder that it is given."))


def _save_weights(chunks: list[torch.nn.Module], folder: Path) -> None:
    from safetensors.torch import save_file

    entries = {k: v for chunk in chunks for k, v in chunk.state_dict().items() if isinstance(v, torch.Tensor)}
    save_file({k: whole_tensor(v).detach().clone().contiguous() for k, v in entries.items()}, folder / "model.safetensors")


def _groups(meshes: list[DeviceMesh]) -> list[Group]:
    """All process groups of this rank, with the mesh axes that they belong to (the shortest name where several meshes share a group)."""
    axes: dict[str, str] = {}
    for mesh in meshes:
        for axis, name in zip(mesh.mesh_dim_names or (), getattr(mesh, "_dim_group_names", ())):
            axes[name] = min(axes.get(name, axis), axis, key=lambda a: (len(a), a))
    world = dist.distributed_c10d._world
    return [Group(pg.group_name, tuple(dist.get_process_group_ranks(pg)), axes.get(pg.group_name, "")) for pg in world.pg_map]


def _pss() -> int:
    """Proportional set size in bytes (0 where the system does not tell)."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
