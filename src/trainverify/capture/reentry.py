"""A torch function mode that stays active inside backward (trusted: what it does not see, no mode of ours sees).

torch takes a mode off the stack while it handles a call. `Tensor.backward` is such a call, so hooks, autograd.Functions and
recomputed forwards, all user code, would run unseen. `ReentrantMode` puts itself back for the time of the autograd engine.
"""
from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode


class ReentrantMode(TorchFunctionMode, ABC):
    """Puts itself back on the stack while autograd's engine runs."""

    def __init__(self) -> None:
        super().__init__()
        self._taken_off = 0
        self._engine = None

    @abstractmethod
    def handle(self, func, args: tuple, kwargs: dict):
        """What a call becomes; func is called through `userframes.call_through`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self._taken_off += 1
        try:
            return self.handle(func, args, kwargs or {})
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
        self._engine = torch.autograd._engine_run_backward
        torch.autograd._engine_run_backward = self._run_backward
        return super().__enter__()

    def __exit__(self, *exc):
        torch.autograd._engine_run_backward = self._engine
        return super().__exit__(*exc)
