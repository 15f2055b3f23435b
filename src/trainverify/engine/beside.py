"""Work in a second process, beside this one: a forked child that is told something once, and answers once.

The child dies with its parent; a child that dies alone costs its answer only.
"""
from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_PR_SET_PDEATHSIG = 1
_STEPS = 40                                   # messages about progress for each phase: a pipe holds that many unread


class Lost(Exception):
    """The child gave no answer."""


class Beside:
    """Runs work(told, progress) in a child; told() waits for what `answer` hands over."""

    def __init__(self, work: Callable[[Callable[[], Any], Callable], Any]):
        fork = multiprocessing.get_context("fork")
        self._mine, theirs = fork.Pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self._process = fork.Process(target=_child, args=(work, theirs, os.getpid()), daemon=True)
        self._process.start()
        theirs.close()

    def answer(self, told: Any, progress: Callable) -> Any:
        """Hand over what the child waits for, and wait. Raises Lost; what the child raised is raised here with its traceback as a note."""
        try:
            self._exchange(self._mine.send, told)
            while True:
                kind, content = self._exchange(self._mine.recv)
                if kind == "progress":
                    progress(*content)
                elif kind == "done":
                    return content
                else:
                    error, trace = content
                    error.add_note(trace)
                    raise error
        finally:
            self.close()

    def _exchange(self, call: Callable, *content: Any) -> Any:
        try:
            return call(*content)
        except (EOFError, OSError) as gone:
            self._process.join(5)
            raise Lost(f"exit code {self._process.exitcode}") from gone

    def close(self) -> None:
        """End the child if it still runs."""
        self._mine.close()
        if self._process.is_alive():
            self._process.kill()
        self._process.join()


def _child(work: Callable, pipe: Connection, parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)      # the parent decides
    last: dict[tuple, int] = {}

    def progress(phase: str, detail: str = "", fraction: float | None = None) -> None:
        at = -1 if fraction is None else int(fraction * _STEPS)
        if last.get((phase, detail)) != at:
            last[phase, detail] = at
            pipe.send(("progress", (phase, detail, fraction)))
    try:
        message = ("done", work(pipe.recv, progress))
    except EOFError:
        os._exit(1)                           # nobody waits any more
    except BaseException as error:
        message = ("error", (error, traceback.format_exc()))
    try:
        pipe.send(message)
    except (BrokenPipeError, ConnectionResetError):
        pass                                  # nobody waits any more
    pipe.close()
    os._exit(0)
