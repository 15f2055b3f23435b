"""What is compared, named at its place in the trace: scalars, gradients, parameters, buffers, optimizer state (trusted: nothing else is looked at).

Gradients are read when an optimizer is about to, after all hooks of its own. Everything else is read when step() has returned, but for parameters
that a program completes later: those are read when the next step has used them and no optimizer has changed them yet.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Replicate
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from trainverify.api import Local
from trainverify.capture.digest import crc
from trainverify.capture.model import is_real_float, kept_share, named_buffers, named_parameters, optimizer_names
from trainverify.capture.patches import Patches
from trainverify.capture.quiet import unseen
from trainverify.capture.recorder import Recorder
from trainverify.capture.scalars import TrackedFloat
from trainverify.capture.symbols import Symbols
from trainverify.diagnostics import Diagnostic, Fault
from trainverify.ir.trace import ScalarRef, Sequence


class Outputs:
    """Watches the optimizers and the model of one rank, and emits tv.output, tv.stepped and tv.param calls."""

    def __init__(self, recorder: Recorder, symbols: Symbols | None):
        self.recorder, self.symbols = recorder, symbols
        self.optimizers: list[torch.optim.Optimizer] = []
        self.chunks: list[torch.nn.Module] = []
        self.step = 0
        self._stepped: list[torch.optim.Optimizer] = []
        self._parameters: list[tuple[torch.optim.Optimizer, torch.Tensor]] = []   # that were stepped; some libraries show each to the optimizer for a step only
        self._names: dict[int, str] = {}
        self._last_hooks: dict[int, Any] = {}
        self._late: int | None = None              # a step whose parameters are read in the next one
        self._emitted: set[tuple[str, str, int]] = set()
        self.settings: list[dict[str, Any]] = []   # of each optimizer's groups, as it makes its first step
        self._integers: dict[str, int] = {}
        self._patches = Patches()
        self._handles: list = []

    # ---- life
    def __enter__(self) -> Outputs:
        original, found = torch.optim.Optimizer.__init__, self.optimizers

        def remember(optimizer, *args, **kwargs):
            original(optimizer, *args, **kwargs)
            found.append(optimizer)

        self._patches.set(torch.optim.Optimizer, "__init__", remember)
        self._handles = [register_optimizer_step_pre_hook(self._before_step), register_optimizer_step_post_hook(self._after_step)]
        return self

    def __exit__(self, *exc) -> None:
        self._patches.restore()
        for handle in (*self._handles, *self._last_hooks.values()):
            handle.remove()

    def begin(self, chunks: list[torch.nn.Module]) -> None:
        """The model is built: name it, and state that exists already."""
        self.chunks = chunks
        self.recorder.spans.name_model(chunks)
        if self.symbols is not None:
            self.symbols.define_model(chunks)
            with unseen():
                names = optimizer_names(self.optimizers, chunks)
            for optimizer in self.optimizers:
                self.symbols.define_state(optimizer, names)
        for name, parameter in named_parameters(chunks):
            self.recorder.emit("tv.param", name, self._local(parameter))
        for name, buffer in named_buffers(chunks):
            if is_real_float(buffer):
                self.recorder.emit("tv.param", name, self._local(buffer))
            else:
                self._integers[name] = self._crc(buffer)

    def begin_step(self, n: int) -> None:
        self.step = n
        self._emitted.clear()
        self.recorder.spans.begin_step(n)
        self.recorder.spans.optimizers = 0
        self.recorder.emit("tv.step", n)

    # ---- optimizers
    def _before_step(self, optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        self.recorder.spans.optimizers += 1
        if not self.step or _wraps_another(optimizer):
            return
        self._read_late()
        if not any(o is optimizer for o in self._stepped):
            self._stepped.append(optimizer)
        self._meet(optimizer)
        # The optimizer's own hooks may still change gradients: be the last of them.
        previous = self._last_hooks.pop(id(optimizer), None)
        if previous is not None:
            previous.remove()
        self._last_hooks[id(optimizer)] = optimizer.register_step_pre_hook(self._read_gradients)

    def _after_step(self, optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        self.recorder.spans.optimizers -= 1

    def _meet(self, optimizer: torch.optim.Optimizer) -> None:
        """Name the parameters that the optimizer has not stepped before."""
        known = {id(p) for o, p in self._parameters if o is optimizer}
        new = [p for p in _parameters(optimizer) if id(p) not in known]
        if not new:
            return
        for group in optimizer.param_groups:
            if any(id(p) not in known for p in group["params"]):
                numbers = {k: _setting(group[k]) for k in ("lr", "weight_decay", "momentum") if isinstance(group.get(k), (int, float, torch.Tensor))}
                self.settings.append({"optimizer": type(optimizer).__name__, **numbers})
        with unseen():
            names = optimizer_names(self._stepped, self.chunks)
        for i, name in names.items():
            if i not in self._names:
                self._names[i] = _unused(name, self._names)
        if self.symbols is not None:
            self.symbols.define_state(optimizer, self._names)
        for parameter in new:
            self._parameters.append((optimizer, parameter))
            self.recorder.emit("tv.stepped", self._names[id(parameter)], self._local(parameter))

    def _read_gradients(self, optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        for parameter in _parameters(optimizer):
            gradient = parameter.grad
            self._emit("gradient", self._names[id(parameter)], None if gradient is None else self._local(gradient))

    # ---- after a step
    def after_step(self, reported: Mapping[str, Any] | None) -> None:
        """Scalars that step() returned, buffers and optimizer state."""
        if reported is not None and not isinstance(reported, Mapping):
            raise Fault(Diagnostic("SPEC011", f"step() returned a {type(reported).__name__}", fix='Return a dict of scalars like {"loss": loss}, or None.'))
        self._read_late()
        for name, value in (reported or {}).items():
            self._scalar(str(name), value)
        for optimizer, parameter in self._parameters:
            if parameter in optimizer.state:
                self._state(self._names[id(parameter)], optimizer.state[parameter])

    def parameters(self) -> None:
        """Parameters and buffers as they are now."""
        self._read_parameters()
        self._read_buffers()

    def parameters_later(self) -> None:
        """Buffers as they are now, parameters as the next step's first optimizer meets them: after its forward and backward."""
        self._read_buffers()
        if self._stepped:
            self._late = self.step
        else:                                  # nothing will say when
            self._read_parameters()

    def _read_late(self) -> None:
        if self._late is not None:
            now, self.step, self._late = self.step, self._late, None
            self._read_parameters()
            self.step = now

    def _read_parameters(self) -> None:
        for name, parameter in named_parameters(self.chunks):
            self._emit("parameter", name, self._local(parameter))

    def _read_buffers(self) -> None:
        for name, buffer in named_buffers(self.chunks):
            if is_real_float(buffer) or self._integers.get(name) != self._crc(buffer):
                self._emit("buffer", name, self._local(buffer))

    def end(self) -> None:
        if not self._stepped:
            self.recorder.note("CAP004", "no optimizer of torch.optim made a step: gradients and optimizer state are not compared")

    def _state(self, name: str, state: Mapping[str, Any]) -> None:
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                self._emit("state", f"{name}::{key}", self._local(value))
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                self._emit("state", f"{name}::{key}", _number(value))
            elif value is not None:
                self.recorder.note("CAP005", f"optimizer state {key} is a {type(value).__name__} and is not compared")

    def _scalar(self, name: str, value: Any) -> None:
        declared = {}
        if isinstance(value, Local):
            declared = {"declare": value.reduce}
            if value.group is not None:
                declared["group"] = Sequence(_ranks(value.group))
            value = value.value
        if value is None:
            return
        if isinstance(value, torch.Tensor):
            value = self._whole(name, value)
        elif isinstance(value, np.generic):
            value = value.item()
        if not isinstance(value, (torch.Tensor, int, float)):
            raise Fault(Diagnostic("SPEC011", f"step() reports {name!r} as a {type(value).__name__}", fix="Report numbers, tensors of one element, or None."))
        self._emit("scalar", name, _number(value) if not isinstance(value, torch.Tensor) else value, **declared)

    def _whole(self, name: str, value: torch.Tensor) -> torch.Tensor:
        value = value.detach()
        if isinstance(value, DTensor):
            value = value.to_local() if all(p.is_replicate() for p in value.placements) else value.full_tensor()
        if isinstance(value, AsyncCollectiveTensor):
            value = value.wait()
        if value.numel() != 1:
            raise Fault(Diagnostic("SPEC011", f"step() reports {name!r} of shape {list(value.shape)}", fix="Report tensors of one element."))
        return value.reshape(())

    # ---- helpers
    def _emit(self, kind: str, name: str, value: Any, **more: Any) -> None:
        key, n = name, 1
        while (kind, key, self.step) in self._emitted:    # a second optimizer step within one step()
            n += 1
            key = f"{name}#{n}"
        self._emitted.add((kind, key, self.step))
        self.recorder.emit("tv.output", kind, key, self.step, value, **more)

    @staticmethod
    def _local(tensor: torch.Tensor) -> torch.Tensor:
        """This rank's part of a tensor, complete: shares of a DTensor are summed and a pending collective is waited for, as any reader would."""
        if isinstance(tensor, DTensor):
            if any(p.is_partial() for p in tensor.placements):
                tensor = tensor.detach().redistribute(placements=[Replicate() if p.is_partial() else p for p in tensor.placements])
            tensor = tensor._local_tensor
        if isinstance(tensor, AsyncCollectiveTensor):
            tensor = tensor.wait()
        share = kept_share(tensor)
        with unseen():
            return (tensor if share is None else share).detach()

    @staticmethod
    def _crc(tensor: torch.Tensor) -> int:
        with unseen():
            return crc([tensor])


def _unused(name: str, names: dict[int, str]) -> str:
    """The name, with a number where it is another parameter's: of those that stand in one place of the optimizer by turns."""
    taken, n = set(names.values()), 1
    while (found := name if n == 1 else f"{name}.turn{n}") in taken:
        n += 1
    return found


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _wraps_another(optimizer: torch.optim.Optimizer) -> bool:
    """Sharding optimizers hold the one that does the work, containers several; their own steps are what counts."""
    held = [w for v in vars(optimizer).values() for w in (v if isinstance(v, (list, tuple)) else (v,))]
    return any(isinstance(v, torch.optim.Optimizer) for v in held)


def _setting(value: Any) -> float:
    """A number of an optimizer, for the report only: reading it is no part of the program."""
    with unseen():
        return float.__pos__(value) if isinstance(value, float) else float(value)


def _number(value: float) -> ScalarRef | int | float:
    if isinstance(value, TrackedFloat):
        return value.ref
    return value if isinstance(value, int) else float(value)


def _ranks(group: Any) -> tuple[int, ...]:
    if hasattr(group, "get_group"):            # a DeviceMesh
        group = group.get_group()
    return tuple(dist.get_process_group_ranks(group))
