"""A script in a rank: where its training begins, its steps part, and it is stopped; where its weights come from (trusted, as capture/session.py is).

A script is not asked for anything: it is watched. Its training begins at the first forward of a module with trainable parameters after an
optimizer was made (or at an optimizer's step, if that comes first): what the script has built by then is its model. A step ends where, after an
optimizer's step, the next such forward begins or a message from another rank is awaited; there the state is read that a spec's step() leaves. At the
end of the last step the script is stopped by an exception that no `except Exception` catches; what it does behind that is nobody's concern.
"""
from __future__ import annotations

import gc
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from trainverify.api import Training
from trainverify.capture import read_floats
from trainverify.capture.digest import crc
from trainverify.capture.early import Early, EarlySymbols, read_before_defined
from trainverify.capture.placing import place_tags, unwrapped
from trainverify.capture.quiet import unseen
from trainverify.capture.scalars import ScalarMode, TrackedFloat
from trainverify.capture.script import Command, Scripts
from trainverify.capture.session import Session, write_checkpoint
from trainverify.capture.symbols import Handed
from trainverify.capture.userframes import call_through
from trainverify.capture.world import Rank, run_world
from trainverify.diagnostics import Diagnostic, Fault

_FAKE = torch._C._TorchDispatchModeKey.FAKE
_RECEIVES = ("recv_", "recv_any_source_")


class _Stop(BaseException):
    """Ends the script: all that is to be recorded has been."""


class _Run:
    """One rank's script while it is watched. begin(chunks): weights become what they are to be; end(): the result, from what was recorded."""

    def __init__(self, session: Session, scripts: Scripts, begin: Callable[[list[torch.nn.Module]], None], end: Callable[[], bytes]):
        self.session, self.scripts = session, scripts
        self.recorder, self.outputs = session.recorder, session.outputs
        self.begin, self.end = begin, end
        self.step = 0
        self.stepped = False                   # whether an optimizer has stepped in this step
        self.read: dict[str, Any] = {}         # floats of this step, by name
        self.result: bytes | None = None
        self.fault: Exception | None = None    # of ours, which no handler of the script may take for its own
        self._rows: set[tuple[int, int]] = set()
        self._calls, self._clock = 0, 0.0

    # ---- the whole
    def run(self, command: Command) -> bytes:
        """Run the script to the end of its last step; raises Fault where it ends before."""
        os.environ.update(TORCHELASTIC_RUN_ID="none", TORCHELASTIC_RESTART_COUNT="0", TORCHELASTIC_MAX_RESTARTS="0")
        try:
            with self._watched(), self.session.environment():
                dist.destroy_process_group()   # the script makes its own, if it wants one
                with self.recorder.recording(), ScalarMode(self.recorder, self._read_float):
                    call_through(command.run, (), {})
                    self._ended()
        except _Stop:
            pass
        except SystemExit as e:
            if not self._is_stopped and e.code not in (None, 0):
                raise
            self._ended()
        except Exception:
            if not self._is_stopped:           # else all is recorded, and this is how the script takes being interrupted
                raise
        if self.fault is not None:
            raise self.fault
        return self.result

    @property
    def _is_stopped(self) -> bool:
        """Whether nothing that the script still does is recorded."""
        return self.result is not None or self.fault is not None

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Hooks come before all others: those of the optimizer see a step that has begun."""
        handles = [register_module_forward_pre_hook(self._forward), register_optimizer_step_pre_hook(self._before_step),
                   register_optimizer_step_post_hook(self._after_step)]
        collectives = self.recorder.collectives
        call = collectives.call

        def watched_call(func, args, kwargs):
            if func._opname in _RECEIVES and self.stepped and not self._is_stopped:
                self._move(self._boundary)
            return call(func, args, kwargs)

        collectives.call = watched_call
        self.recorder.drawn_is_data = self._outside_the_model
        try:
            yield
        finally:
            collectives.call = call
            for handle in handles:
                handle.remove()

    def _ended(self) -> None:
        """The script is through."""
        if self._is_stopped:
            return
        if self.stepped and self.step == self.session.options.steps:
            self._finish()
            return
        done = self.step - (not self.stepped)
        if done < 1:
            raise Fault(Diagnostic("SCRIPT003", "the script has ended and no optimizer of torch.optim has made a step", ranks=(self.session.rank.rank,),
                                   fix="Pass the arguments with which it trains; what it printed is kept with --debug."))
        raise Fault(Diagnostic("SCRIPT004", f"the script ends after {done} of {self.session.options.steps} optimizer steps", ranks=(self.session.rank.rank,),
                               fix=f"Let it train longer, or pass --steps {done}."))

    # ---- what happens in the script
    def _forward(self, module: torch.nn.Module, args) -> None:
        self._stop_again()
        self._note_rows(args)
        if (self.step and not self.stepped) or self.recorder.spans.optimizers or not (self.step or self.outputs.optimizers):
            return
        if torch._C._get_dispatch_mode(_FAKE) is not None or not any(p.requires_grad and not p.is_meta for p in module.parameters()):
            return
        self._move(self._boundary if self.step else self._begin)

    def _note_rows(self, args: tuple) -> None:
        """Remember the rows of integers that modules are given: token ids are such, and both sides must read the same."""
        for t in args:
            if isinstance(t, torch.Tensor) and t.dim() == 2 and t.dtype in (torch.int32, torch.int64) and type(t) is torch.Tensor and not t.is_meta:
                with unseen():
                    self._rows.update((t.shape[1], crc([row.to(torch.int64)])) for row in t)

    def _before_step(self, optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        self._stop_again()
        if not self.step:
            self._move(self._begin)

    def _after_step(self, optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        self.stepped = True

    def _read_float(self, value: TrackedFloat) -> None:
        if not self.step or self.result is not None or self.recorder.spans.optimizers:
            return
        frame = read_floats.reader(sys._getframe(1))
        if frame is None:
            return
        name, n = (base := read_floats.name_of(frame)), 1
        while name in self.read:
            n += 1
            name = f"{base}#{n}"
        self.read[name] = self.scripts.reported(self.recorder.side, base, value)

    def _outside_the_model(self) -> bool:
        """Whether random numbers that are drawn now make up data, as a script's loop does, and are no part of the model."""
        spans = self.recorder.spans
        data = bool(self.step) and not spans.inside_module() and not spans.optimizers and torch._C._current_autograd_node() is None
        if data:
            self.recorder.note("ASSUME", "random numbers that a script draws between forwards are data as recorded: the verdict is for these")
        return data

    # ---- steps
    def _stop_again(self) -> None:
        if self._is_stopped:
            raise _Stop

    def _move(self, how: Callable[[], None]) -> None:
        """Go on to the next step, deep inside the script, whose handlers must not see what goes wrong here: `run` raises it."""
        try:
            how()
        except Exception as e:
            self.fault = e
            raise _Stop from e

    def _begin(self) -> None:
        chunks = live_models(self.outputs.optimizers)
        if not chunks:
            raise Fault(Diagnostic("SCRIPT003", "no module holds parameters when the training begins", ranks=(self.session.rank.rank,),
                                   fix="Keep the parameters in a torch.nn.Module."))
        self.begin(chunks)
        self._calls, self._clock = len(self.recorder.ops), time.process_time()
        self._next()

    def _next(self) -> None:
        self.step += 1
        self.stepped = False
        self.read = {}
        self.session.rank.channel.progress(f"step {self.step} of {self.session.options.steps}")
        self.outputs.begin_step(self.step)

    def _boundary(self) -> None:
        if self.step == self.session.options.steps:
            self._finish()
            raise _Stop
        self.outputs.after_step(self.read)
        self.outputs.parameters()
        self._next()

    def _finish(self) -> None:
        self.outputs.after_step(self.read)
        self.outputs.parameters()
        self.outputs.end()
        self.recorder.blobs[read_floats.ROWS] = np.array(sorted(self._rows), dtype=np.int64).reshape(-1, 2)
        self.session.stepped = len(self.recorder.ops) - self._calls, time.process_time() - self._clock
        self.result = self.end()

    def stop_with(self, result: bytes) -> None:
        """Stop before the first step."""
        self.result = result
        raise _Stop


def live_models(optimizers: Iterable[torch.optim.Optimizer]) -> list[torch.nn.Module]:
    """The outermost modules that hold what the optimizers step, in the optimizers' order; where they step copies, all that hold trainable parameters."""
    order: dict[int, int] = {}
    for p in (p for o in optimizers for group in o.param_groups for p in group["params"]):
        order.setdefault(id(p), len(order))
    gc.collect()                               # a model that was given up is none
    modules = [m for m in gc.get_objects() if issubclass(type(m), torch.nn.Module)]
    inner = {id(child) for m in modules for child in m._modules.values() if child is not None}
    roots = [(m, [p for p in m.parameters() if p.requires_grad and not p.is_meta]) for m in modules if id(m) not in inner]
    ranked = sorted(((min(order.get(id(p), len(order)) for p in held), i, m, held) for i, (m, held) in enumerate(roots) if held), key=lambda r: r[:2])
    stepped = [r for r in ranked if r[0] < len(order)]
    chosen: list[torch.nn.Module] = []
    seen: set[int] = set()
    for _, _, m, held in stepped or ranked:
        if any(id(p) not in seen for p in held):
            seen.update(map(id, held))
            chosen.append(unwrapped(m))
    return chosen


# ---- the two sides

def reference_child(scripts: Scripts, options: Any, base: Path, early: list[Early], rank: Rank) -> bytes:
    """The reference script in its process; as a spec's reference() it may have to run once more for symbols that it reads early."""
    session = Session("reference", rank, options, base, symbols=True)
    recorder, symbols = session.recorder, session.symbols
    command, left = scripts.reference.without("checkpoint", "dcp")
    scratch = base / "reference-save"
    scratch.mkdir(parents=True, exist_ok=True)
    handed = b""

    def begin(chunks: list[torch.nn.Module]) -> None:
        nonlocal handed
        recorder.watch = None
        if watch is not None:
            watch.check()
        made = len(recorder.ops)
        session.outputs.begin(chunks)
        if not early and (found := read_before_defined(recorder.ops[:made], symbols.defined)):
            run.stop_with(session.save(early=found))
        given = symbols.hand_over(chunks, None)
        handed = msgspec.msgpack.encode(given)
        write_checkpoint(Training(chunks, lambda: None, save=partial(_save_all, scripts, given, chunks)), chunks, base / "checkpoint")

    run = _Run(session, scripts, begin, lambda: session.save(handed))
    recorder.watch = watch = EarlySymbols(symbols, early) if early else None
    for option in left:
        recorder.note("ASSUME", f"the reference script ran without {option}: the weights in that file are its own initial ones")
    return run.run(command.filled({"save": scratch}))


def parallel_child(scripts: Scripts, handed: Handed, checkpoint: Path, case: dict[str, Any], options: Any, base: Path, rank: Rank) -> bytes:
    """The parallel script in one rank."""
    session = Session("parallel", rank, options, base, symbols=False)
    tensors, weights, _ = handed.build()
    for given, tensor in zip(handed.tensors, tensors):
        if given.symbol:
            plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            session.recorder.emit("tv.symbol", given.kind, given.symbol, plain)

    def begin(chunks: list[torch.nn.Module]) -> None:
        if not scripts.loads:
            place_tags(chunks, weights, session.recorder)
        session.outputs.begin(chunks)

    run = _Run(session, scripts, begin, session.save)
    paths = {"checkpoint": checkpoint, "dcp": checkpoint / "dcp", "save": base / "save"}
    return run.run(scripts.parallel.filled(paths))


def _save_all(scripts: Scripts, given: Handed, chunks: list[torch.nn.Module], folder: str) -> None:
    """The weights in every format that the parallel script asks for. The process is a fork that does nothing else."""
    from safetensors.torch import save_file

    target = Path(folder)
    with unseen():
        _, weights, _ = given.build()
        separate = {name: t.clone() for name, t in weights.items()}
        if scripts.parallel.names("checkpoint"):
            for model in (c for c in chunks if hasattr(c, "save_pretrained") and hasattr(c, "config")):
                model.config.save_pretrained(folder)
            save_file(separate, target / "model.safetensors", metadata={"format": "pt"})
            torch.save(separate, target / "model.pt")
        if scripts.parallel.names("dcp"):
            import torch.distributed.checkpoint as dcp

            dcp.save({**separate, "model": separate}, checkpoint_id=target / "dcp", no_dist=True)


# ---- the script's own checkpoint

def save(scripts: Scripts, handed: Handed, options: Any, base: Path) -> tuple[Diagnostic, ...]:
    """Run the reference script for the checkpoint that it writes itself: with the tagged weights, which its optimizer steps leave as they are."""
    folder = base / "save"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    world = run_world(1, partial(_save_child, scripts, handed, options, base), timeout=options.timeout)
    faults = tuple(msgspec.structs.replace(d, notes=("it was the reference script that ran, to write {save}", *d.notes)) for d in world.faults)
    if faults or any(folder.iterdir()):
        return faults
    return (Diagnostic("SCRIPT005", "the reference script has written nothing to {save}",
                       fix="Give {save} to the reference, as the argument that says where it saves, and let it reach its first save."),)


def _save_child(scripts: Scripts, handed: Handed, options: Any, base: Path, rank: Rank) -> bytes:
    session = Session("reference", rank, options, base / "unused", symbols=False)
    _, weights, _ = handed.build()
    kept: list[torch.nn.Module] = []

    def put() -> None:
        for chunk in kept:
            place_tags([chunk], weights, session.recorder)

    def begin() -> None:
        kept.extend(live_models(session.outputs.optimizers))
        put()

    def forward(module: torch.nn.Module, args) -> None:
        if not kept and session.outputs.optimizers and torch._C._get_dispatch_mode(_FAKE) is None and any(p.requires_grad for p in module.parameters()):
            begin()

    def before(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        if not kept:
            begin()

    def after(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        with unseen():
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            trained = any(bool(_plain(g).any()) for g in gradients)
        if trained:                            # a step with gradients of zero is how torch creates state in order to save it
            put()
            optimizer.state.clear()

    handles = [register_module_forward_pre_hook(forward), register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    command, _ = scripts.reference.without("checkpoint", "dcp")
    try:
        with session.environment():
            dist.destroy_process_group()
            with session.recording():
                call_through(command.filled({"save": base / "save"}).run, (), {})
    except SystemExit as e:
        if e.code not in (None, 0):
            raise
    finally:
        for handle in handles:
            handle.remove()
    return b""


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return getattr(tensor, "_local_tensor", tensor)
