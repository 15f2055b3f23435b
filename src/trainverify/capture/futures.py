"""Futures of communication calls: complete when somebody waits, not when somebody asks (trusted: a wait must not be recorded too early).

torch's DDP asks each reduction of a bucket for its future as soon as it is issued and waits for all of them when the backward ends; so
do communication hooks, which may chain functions to it. Until then the bucket holds garbage. A future is therefore left open, whoever
waits for it in Python completes it, and the end of the backward completes the rest, in front of the reducer's own wait in C++.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import Variable

_current_node = torch._C._current_autograd_node


class Deferred(torch.futures.Future):
    """A future that `complete` sets, in time for whoever waits in Python."""

    def __init__(self, complete: Callable[[], None]):
        super().__init__()
        self._complete = complete

    def wait(self) -> Any:
        self._complete()
        return super().wait()

    def done(self) -> bool:
        self._complete()
        return super().done()

    def then(self, callback: Callable) -> Deferred:
        follows = Deferred(self._complete)

        def run(done) -> None:
            try:
                follows.set_result(callback(done))
            except Exception as e:
                follows.set_exception(e)
        self.add_done_callback(run)
        return follows


class Futures:
    """The open futures of one rank."""

    def __init__(self) -> None:
        self._open: list[Callable[[], None]] = []

    def future(self, finish: Callable[[], list[torch.Tensor]]) -> torch.futures.Future:
        """A future of what finish() gives. Outside of a backward, and behind it, whoever asks waits."""
        if _current_node() is None:
            future: torch.futures.Future = torch.futures.Future()
            future.set_result(finish())
            return future
        left: list[Callable] = [finish]

        def complete() -> None:
            if left:
                future.set_result(left.pop()())
        future = Deferred(complete)
        self._open.append(complete)
        Variable._execution_engine.queue_callback(self._complete_all)
        return future

    def _complete_all(self) -> None:
        """At the end of a backward: a reentrant one may have the reducer's wait behind its own, for buckets of the outer one too."""
        while self._open:
            self._open.pop(0)()
