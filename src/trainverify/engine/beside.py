"""Work in a second process, beside this one: a forked child that is told something once, and answers once.

The child dies with its parent; a child that dies alone costs its answer only.
"""
from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from trainverify.processes import die_with

_STEPS = 40                                   # messages about progress for each phase: a pipe holds that many unread


class Lost(Exception):
    """The child gave no answer."""


class Unsent(Exception):
    """The child raised an exception that cannot be handed over: its type and text."""


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
            with contextlib.suppress(OSError):   # a child that has ended has said why
                self._mine.send(told)
            while True:
                kind, content = self._next()
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

    def _next(self) -> tuple[str, Any]:
        try:
            return self._mine.recv()
        except (EOFError, OSError) as gone:
            self._process.join(5)
            raise Lost(f"exit code {self._process.exitcode}") from gone

    def close(self) -> None:
        """End the child if it still runs."""
        self._mine.close()
        if self._process.is_alive():
            self._process.kill()
        self._process.join()


def _child(work: Callable, pipe: Connection, parent: int) -> NoReturn:
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)      # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    last: dict[tuple, int] = {}

    def told() -> Any:
        try:
            return pipe.recv()
        except (EOFError, ConnectionError):
            os._exit(1)                       # nobody waits any more

    def say(kind: str, content: Any) -> None:
        try:
            pipe.send((kind, content))
        except ConnectionError:
            os._exit(1)

    def progress(phase: str, detail: str = "", fraction: float | None = None) -> None:
        at = -1 if fraction is None else int(fraction * _STEPS)
        if last.get((phase, detail)) != at:
            last[phase, detail] = at
            say("progress", (phase, detail, fraction))
    try:
        say("done", work(told, progress))
    except BaseException as error:            # whatever it is, the parent raises it
        say("error", (_sendable(error), traceback.format_exc()))
    os._exit(0)


def _sendable(error: BaseException) -> BaseException:
    """The exception, or its words where it does not survive the way to another process."""
    try:
        return error if type(pickle.loads(pickle.dumps(error))) is type(error) else Unsent(_words(error))
    except Exception:  # noqa: BLE001 - a class may do anything when it is pickled
        return Unsent(_words(error))


def _words(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip()
