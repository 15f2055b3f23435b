"""A torch function mode that stays active inside backward (trusted: what it does not see, no mode of ours sees).

torch takes a mode off the stack while it handles a call. `Tensor.backward` is such a call, so hooks, autograd.Functions and
recomputed forwards, all user code, would run unseen. `ReentrantMode` puts itself back for the time of the autograd engine.
A mode that is entered directly above another becomes a layer of it, since torch takes its time with every mode on its stack.
What only asks a tensor for one of its attributes goes straight to torch: half of all calls, and no mode of ours has a say in them.
"""
from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode, _push_mode

from trainverify.capture.userframes import call_through

_ASKED = frozenset(["dim", "ndimension", "numel", "nelement", "size", "stride", "storage_offset", "element_size", "is_contiguous", "is_complex",
                    "is_floating_point", "is_signed", "is_inference", "is_conj", "is_neg"])


def _questions() -> frozenset:
    """Functions that answer about a tensor: attributes as they are read, and methods that take no device and give no number of its contents."""
    base = torch._C.TensorBase
    attributes = [getattr(base, name).__get__ for name in dir(base) if type(getattr(base, name)).__name__ == "getset_descriptor"]
    return frozenset([*attributes, *(getattr(torch.Tensor, name) for name in _ASKED)])


_QUESTIONS = _questions()


class ReentrantMode(TorchFunctionMode, ABC):
    """Puts itself back on the stack while autograd's engine runs. While a layer handles a call, the mode that it is a layer of sees what goes
    through `call` only: what else the handler does is our own work."""

    def __init__(self) -> None:
        super().__init__()
        self._taken_off = 0
        self._engine = None
        self._layers: list[ReentrantMode] = [self]     # that handle calls for the mode on torch's stack, the last of them first
        self._base: ReentrantMode | None = None        # the mode on the stack, where this one is a layer
        self._below: ReentrantMode | None = None       # the layer below

    @abstractmethod
    def handle(self, func, args: tuple, kwargs: dict):
        """What a call becomes; func is called through `call`."""

    def call(self, func, args: tuple, kwargs: dict):
        """The call itself, or what the layer below makes of it."""
        below = self._below
        return call_through(func, args, kwargs) if below is None else below.handle(func, args, kwargs)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _QUESTIONS:
            return call_through(func, args, kwargs or {})
        self._taken_off += 1
        try:
            return self._layers[-1].handle(func, args, kwargs or {})
        finally:
            self._taken_off -= 1

    def _run_backward(self, *args, **kwargs):
        if not self._taken_off:
            return self._engine(*args, **kwargs)
        taken_off, self._taken_off = self._taken_off, 0
        _push_mode(self)
        try:
            return self._engine(*args, **kwargs)
        finally:
            _pop_mode()
            self._taken_off = taken_off

    def __enter__(self):
        base = _get_current_function_mode()
        if isinstance(base, ReentrantMode):
            self._base, self._below = base, base._layers[-1]
            base._layers.append(self)
            return self
        self._engine = torch.autograd._engine_run_backward
        torch.autograd._engine_run_backward = self._run_backward
        return super().__enter__()

    def __exit__(self, *exc):
        if self._base is not None:
            self._base._layers.remove(self)
            self._base = self._below = None
            return None
        torch.autograd._engine_run_backward = self._engine
        return super().__exit__(*exc)
