"""Work in a second process, beside this one: a forked child that is told something once, and answers once.

The child dies with its parent; a child that dies alone, outgrows the machine's memory or gives no sign of life for long costs its answer only.
"""
from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import torch

from trainverify.processes import die_with

OUT_OF_MEMORY = 77                            # exit code
SILENCE = 1800.0                              # seconds without any message after which a child hangs
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
            if not self._mine.poll(SILENCE):
                raise Lost(f"no sign of life for {SILENCE:g} seconds")
            return self._mine.recv()
        except (EOFError, OSError) as gone:
            self._process.join(5)
            code = self._process.exitcode
            raise Lost("out of memory" if code == OUT_OF_MEMORY else f"exit code {code}") from gone

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
    limit_memory(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    torch.set_num_threads(1)                  # the threads of the process that was forked are not here, and would be waited for
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
        if is_out_of_memory(error):
            os._exit(OUT_OF_MEMORY)
        say("error", (sendable(error), traceback.format_exc()))
    os._exit(0)


def sendable(error: BaseException) -> BaseException:
    """The exception, or its words where it does not survive the way to another process."""
    try:
        return error if type(pickle.loads(pickle.dumps(error))) is type(error) else Unsent(_words(error))
    except Exception:  # noqa: BLE001 - a class may do anything when it is pickled
        return Unsent(_words(error))


def _words(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip()


def limit_memory(more: int) -> None:
    """Let this process allocate so many bytes more, and fail at that (where the system knows such a limit)."""
    if sys.platform != "linux":
        return
    with open("/proc/self/status", encoding="ascii") as status:
        held = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData:"))
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    wanted = held + more
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory could not be had: Python's and numpy's word for it, or PyTorch's."""
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and "allocate memory" in str(error)
