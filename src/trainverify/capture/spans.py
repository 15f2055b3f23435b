"""Where each recorded call comes from: user frames, module path, phase, step (not trusted: messages and nothing else).

A forward call has the innermost user frames. A backward call has the frames of the forward call that it differentiates, found by
the autograd node's sequence number, unless user code (an autograd.Function, a hook, a recomputed forward) runs inside the
engine: then it has that code's own. An AccumulateGrad has the parameter's name as its module.
"""
from __future__ import annotations

import sys
from collections.abc import Iterable
from types import CodeType, FrameType

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from trainverify.capture import world
from trainverify.capture.userframes import is_user_file
from trainverify.diagnostics import Span

Frames = tuple[int, ...]                       # numbers of places, innermost first

_DEPTH = 4                                     # user frames kept
_OTHER, _USER, _ENGINE, _BOTTOM = range(4)
_WORLD = world.__file__                        # below it stands whoever started the capture
_ENGINE_FUNCTION = "_engine_run_backward"
_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})
_sequence_number = torch._C._autograd._get_sequence_nr
_current_node = torch._C._current_autograd_node


class Spans:
    """Interned spans of one rank; `here()` is called for every recorded call."""

    def __init__(self) -> None:
        self.items: list[Span] = []
        self.phase = "setup"
        self.step = 0
        self.optimizers = 0                    # depth of optimizer.step calls
        self.in_engine = False                 # whether the last call that was asked for ran inside autograd's engine
        self._after_backward = False
        self._ids: dict[tuple, int] = {}
        self._kinds: dict[str, int] = {}
        self._places: list[tuple[str, int, str]] = []
        self._numbers: dict[tuple[str, int, str], int] = {}
        self._at: dict[int, tuple[CodeType, dict[int, int]]] = {}     # by a code object's id (it would be hashed with all its constants): the place at each
                                                                      # instruction, since a line number is slow to ask for
        self._forward: dict[int, tuple[Frames, str]] = {}
        self._next = _sequence_number()
        self._modules: list[tuple[int, str]] = []
        self._paths: dict[int, str] = {}
        self._parameters: dict[int, str] = {}

    # ---- names
    def name_model(self, chunks: Iterable[torch.nn.Module]) -> None:
        """Learn the module paths and parameter names of the model."""
        for chunk in chunks:
            inner = chunk.module if isinstance(chunk, torch.nn.parallel.DistributedDataParallel) else chunk
            for path, module in inner.named_modules():
                self._paths.setdefault(id(module), clean_path(path))
            for name, parameter in inner.named_parameters():
                self._parameters.setdefault(id(parameter), clean_path(name))

    def module_hooks(self) -> list:
        """Install the global forward hooks; the handles remove them."""
        return [register_module_forward_pre_hook(self._enter), register_module_forward_hook(self._leave, always_call=True)]

    def _enter(self, module: torch.nn.Module, args) -> None:
        path = self._paths.get(id(module))
        if path is None:
            path = self._modules[-1][1] if self._modules else type(module).__name__
        self._modules.append((id(module), path))
        if _current_node() is None:
            self._after_backward = False

    def _leave(self, module: torch.nn.Module, args, result) -> None:
        # Modules that were left by an exception which some caller swallowed are still on the stack.
        while self._modules:
            if self._modules.pop()[0] == id(module):
                return

    def inside_module(self) -> bool:
        """Whether a module's forward is running."""
        return bool(self._modules)

    def begin_step(self, n: int) -> None:
        self.step, self.phase, self._after_backward = n, "forward", False
        self._modules.clear()

    # ---- spans
    def here(self) -> int:
        """Number of the span of the call that is being made."""
        frames, in_engine = self._walk(sys._getframe(2))
        module = self._modules[-1][1] if self._modules else ""
        self._remember(frames, module)
        node = _current_node()
        phase = self.phase
        if in_engine or node is not None:
            phase = "backward"
            self._after_backward = True
            if in_engine:
                frames, module, phase = self._backward(node, frames)
        elif self.optimizers or self._after_backward:
            phase = "optimizer"
        self.in_engine = in_engine
        key = (frames, module, phase, self.step)
        found = self._ids.get(key)
        if found is None:
            found = self._ids[key] = len(self.items)
            places = tuple([self._places[i] for i in frames])
            file, line, function = places[0] if places else ("", 0, "")
            self.items.append(Span(file, line, function, module, phase, self.step, places[1:]))
        return found

    def span(self) -> Span:
        """The span itself, for a message."""
        return self.items[self.here()]

    def notice(self) -> None:
        """A view op: it is not recorded, but its autograd node may be met again in the backward."""
        if _sequence_number() != self._next:
            self._remember(self._walk(sys._getframe(2))[0], self._modules[-1][1] if self._modules else "")

    def _remember(self, frames: Frames, module: str) -> None:
        now = _sequence_number()
        # Nodes between the last call and this one: theirs is this call (a Function's own node comes before the calls in its forward).
        if now > self._next:
            for number in range(self._next, now):
                self._forward[number] = (frames, module)
            self._next = now

    def _backward(self, node, outer: Frames) -> tuple[Frames, str, str]:
        if node is None:
            return outer, "", "hook"
        found = self._forward.get(node._sequence_nr())
        if found is not None:
            return (*found, "backward")
        variable = getattr(node, "variable", None)
        if variable is not None:
            return outer, self._parameters.get(id(variable), ""), "hook"
        return outer, "", "backward"

    def _walk(self, frame: FrameType | None) -> tuple[Frames, bool]:
        """The innermost user frames, and whether autograd's engine is further in than all of them."""
        kinds, found, in_engine = self._kinds, [], False
        while frame is not None:
            code = frame.f_code
            file = code.co_filename            # a code object would be hashed with all its constants
            try:
                kind = kinds[file]
            except KeyError:
                kind = kinds[file] = self._kind(file)
            if kind:                           # most frames are of no interest
                if kind == _USER:
                    try:
                        found.append(self._at[id(code)][1][frame.f_lasti])
                    except KeyError:
                        found.append(self._place(frame))
                    if len(found) == _DEPTH:
                        break
                elif kind == _BOTTOM:
                    break
                elif not found and code.co_name == _ENGINE_FUNCTION:
                    in_engine = True
            frame = frame.f_back
        return tuple(found), in_engine

    def _place(self, frame: FrameType) -> int:
        """The number of the place where a frame is."""
        code = frame.f_code
        place = code.co_filename, frame.f_lineno, code.co_name
        number = self._numbers.setdefault(place, len(self._places))
        if number == len(self._places):
            self._places.append(place)
        self._at.setdefault(id(code), (code, {}))[1][frame.f_lasti] = number
        return number

    @staticmethod
    def _kind(file: str) -> int:
        if file.endswith("torch/autograd/graph.py"):
            return _ENGINE
        if file == _WORLD:
            return _BOTTOM
        return _USER if is_user_file(file) else _OTHER


def clean_path(path: str) -> str:
    """A module path without the parts that wrappers insert."""
    return ".".join(p for p in path.split(".") if p not in _WRAPPERS)
