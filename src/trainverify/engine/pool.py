"""A supervised pool of worker processes: tasks are done side by side, and no task can take the run with it (not trusted to say what a result means).

Workers are forks. Each has a limit on memory, and on wall clock for each task. One that dies, hangs or outgrows its limit is replaced; the task that
it was at is tried once more, and then has no result but the reason (`Lost`). Tasks that waited behind it lose nothing. All of it happens while the owner
asks: there is no thread. Workers die with their owner, however that ends.
"""
from __future__ import annotations

import contextlib
import os
import pickle
import selectors
import signal
import socket
import struct
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from trainverify.contracts.docket import Lost
from trainverify.engine.beside import OUT_OF_MEMORY, is_out_of_memory, limit_memory, sendable
from trainverify.processes import die_with

AHEAD = 2                                     # tasks that a worker holds: the one that it is at, and the next
TRIES = 2
MEMORY = 4 << 30                              # bytes that a worker may allocate besides what it starts with
DEADLINE = 300.0                              # seconds for one task
_LAST_WORDS = 2.0                             # seconds in which one that has closed its pipe ends by itself, and says how
_HEAD = struct.Struct("!Q")


@dataclass(slots=True)
class _Job:
    ticket: int
    data: bytes
    tries: int = 0


@dataclass(slots=True)
class _Worker:
    pid: int
    socket: socket.socket
    jobs: deque[_Job] = field(default_factory=deque)     # the first is the one that it is at
    since: float = 0.0                                   # when it came to that
    out: bytearray = field(default_factory=bytearray)
    held: bytearray = field(default_factory=bytearray)


class Pool:
    """Runs work(task) in `workers` processes."""

    waits = False

    def __init__(self, work: Callable[[bytes], Any], workers: int, memory: int = MEMORY, deadline: float = DEADLINE):
        self._work, self._memory, self._deadline = work, memory, deadline
        self._queue: deque[_Job] = deque()
        self._done: deque[tuple[int, Any]] = deque()
        self._next = 0
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        for _ in range(workers):
            self._workers.append(self._start())

    @property
    def pids(self) -> list[int]:
        return [w.pid for w in self._workers]

    # ---- what an owner uses
    def submit(self, task: bytes, urgent: bool = False) -> int:
        job = _Job(self._next, task)
        self._next += 1
        (self._queue.appendleft if urgent else self._queue.append)(job)
        self._pump(0.0)
        return job.ticket

    def done(self) -> Iterator[tuple[int, Any]]:
        """Tickets and results; raises what a task raised (a fault of ours)."""
        self._pump(0.0)
        while self._done:
            ticket, (kind, content) = self._done.popleft()
            if kind == "error":
                error, trace = content
                error.add_note(trace)
                raise error
            yield ticket, content

    def wait(self) -> None:
        while not self._done and (self._queue or any(w.jobs for w in self._workers)):
            now = time.monotonic()
            self._pump(max(0.0, min((w.since + self._deadline - now for w in self._workers if w.jobs), default=0.0)))

    def close(self) -> None:
        for w in self._workers:
            self._end(w)
        self._workers = []
        self._selector.close()

    # ---- supervision
    def _pump(self, timeout: float) -> None:
        """Send what can be sent, read what has come (for so long at most), and look after workers."""
        self._assign()
        for key, events in self._selector.select(timeout):
            w = key.data
            if events & selectors.EVENT_READ and not self._read(w):
                self._replace(w)
            elif events & selectors.EVENT_WRITE:
                self._write(w)
        now = time.monotonic()
        for w in [w for w in self._workers if w.jobs and now - w.since > self._deadline]:
            self._replace(w, f"no result after {self._deadline:g} seconds")
        self._assign()

    def _assign(self) -> None:
        for held in range(AHEAD):                        # each has something to do before any has more
            for w in self._workers:
                if self._queue and len(w.jobs) <= held:
                    job = self._queue.popleft()
                    if not w.jobs:
                        w.since = time.monotonic()
                    w.jobs.append(job)
                    w.out += _HEAD.pack(len(job.data)) + job.data
                    self._write(w)

    def _write(self, w: _Worker) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):      # one that is gone is seen when it is read
            while w.out:
                del w.out[:w.socket.send(memoryview(bytes(w.out[:1 << 18])))]
        with contextlib.suppress(KeyError):
            self._selector.modify(w.socket, selectors.EVENT_READ | (selectors.EVENT_WRITE if w.out else 0), w)

    def _read(self, w: _Worker) -> bool:
        """Take in results; False: the worker is gone."""
        alive = True
        try:
            while data := w.socket.recv(1 << 20):
                w.held += data
            alive = False
        except BlockingIOError:
            pass
        except ConnectionError:
            alive = False
        while len(w.held) >= _HEAD.size and len(w.held) >= _HEAD.size + (n := _HEAD.unpack_from(w.held)[0]):
            result = pickle.loads(memoryview(w.held)[_HEAD.size:_HEAD.size + n].tobytes())
            del w.held[:_HEAD.size + n]
            self._done.append((w.jobs.popleft().ticket, result))
            w.since = time.monotonic()
        return alive

    def _replace(self, w: _Worker, reason: str = "") -> None:
        """Another worker in place of one that is gone, or has to go; what it was at is tried again, or is lost."""
        code = self._end(w, 0.0 if reason else _LAST_WORDS)
        self._queue.extendleft(reversed(list(w.jobs)[1:]))
        if w.jobs:
            job = w.jobs[0]
            job.tries += 1
            if job.tries < TRIES:
                self._queue.appendleft(job)
            else:
                self._done.append((job.ticket, ("done", Lost(reason or _words(code, self._memory)))))
        self._workers[self._workers.index(w)] = self._start()

    def _start(self) -> _Worker:
        mine, theirs = socket.socketpair()
        parent, pid = os.getpid(), os.fork()
        if not pid:
            _serve(self._work, theirs, [mine, *(w.socket for w in self._workers)], parent, self._memory)
        theirs.close()
        mine.setblocking(False)
        w = _Worker(pid, mine)
        self._selector.register(mine, selectors.EVENT_READ, w)
        return w

    def _end(self, w: _Worker, patience: float = 0.0) -> int:
        """End a worker if it still runs after so long; its exit code, negative for a signal."""
        with contextlib.suppress(KeyError):
            self._selector.unregister(w.socket)
        w.socket.close()
        late = time.monotonic() + patience
        while not (ended := os.waitpid(w.pid, os.WNOHANG))[0] and time.monotonic() < late:
            time.sleep(0.005)
        pid, status = ended
        if not pid:
            os.kill(w.pid, signal.SIGKILL)
            status = os.waitpid(w.pid, 0)[1]
        return os.waitstatus_to_exitcode(status)


def _words(code: int, memory: int) -> str:
    if code == OUT_OF_MEMORY:
        return f"it needs more than {memory >> 20:,} MB"
    return f"its process was ended by {signal.Signals(-code).name}" if code < 0 else f"its process ended with exit code {code}"


# ---- the worker
def _serve(work: Callable[[bytes], Any], mine: socket.socket, others: list[socket.socket], parent: int, memory: int) -> NoReturn:
    """Never returns: nothing of the owner's is to be unwound in its fork."""
    try:
        die_with(parent)
        signal.signal(signal.SIGINT, signal.SIG_IGN)     # the owner decides
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for s in others:
            s.close()
        limit_memory(memory)
        torch.set_num_threads(1)             # the threads of the process that was forked are not here, and would be waited for
        while (head := _exactly(mine, _HEAD.size)) and (data := _exactly(mine, _HEAD.unpack(head)[0])) is not None:
            reply = pickle.dumps(_done(work, data))
            mine.sendall(_HEAD.pack(len(reply)) + reply)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except BaseException:                                # the owner sees that it has gone
        os._exit(1)
    os._exit(0)


def _done(work: Callable[[bytes], Any], data: bytes) -> tuple[str, Any]:
    try:
        return "done", work(data)
    except BaseException as error:
        if is_out_of_memory(error):
            raise MemoryError from error
        return "error", (sendable(error), traceback.format_exc())


def _exactly(s: socket.socket, n: int) -> bytes | None:
    """n bytes; None: nobody sends any more."""
    held = bytearray()
    while len(held) < n:
        data = s.recv(min(n - len(held), 1 << 20))
        if not data:
            return None
        held += data
    return bytes(held)
