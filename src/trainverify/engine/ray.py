"""The same work on a Ray cluster that runs already: tasks go to its nodes (not trusted to say what a result means).

Each node has this version of trainverify. As in the pool, a worker that dies, hangs or outgrows its memory costs the task that it was at, which is tried
once more. The cluster gets no more tasks at a time than it has processors, so that a task's clock starts when it does.
"""
from __future__ import annotations

import functools
import os
import socket
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from trainverify import __version__
from trainverify.contracts.docket import Lost
from trainverify.diagnostics import Diagnostic, Fault
from trainverify.engine.beside import OUT_OF_MEMORY, is_out_of_memory, limit_memory, sendable
from trainverify.engine.pool import DEADLINE, MEMORY, TRIES

CONNECT = 10.0                                # seconds within which somebody answers at the address


@dataclass(slots=True)
class _Job:
    ticket: int
    data: bytes
    tries: int = 0
    since: float = 0.0


class OnRay:
    """Runs work(task) on the cluster at an address."""

    waits = False

    def __init__(self, work: Callable[[bytes], Any], address: str, memory: int = MEMORY, deadline: float = DEADLINE):
        self._ray = _connected(address)
        self._remote = self._ray.remote(max_retries=0, num_cpus=1)(_at_a_node)
        self._work, self._memory, self._deadline = work, memory, deadline
        self._room = max(1, int(self._ray.cluster_resources().get("CPU", 1)))
        self._queue: deque[_Job] = deque()
        self._jobs: dict[Any, _Job] = {}
        self._done: deque[tuple[int, Any]] = deque()
        self._next = 0

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
        while not self._done and (self._queue or self._jobs):
            now = time.monotonic()
            self._pump(max(0.0, min((j.since + self._deadline - now for j in self._jobs.values()), default=0.0)))

    def close(self) -> None:
        for ref in self._jobs:
            self._ray.cancel(ref, force=True)
        self._jobs.clear()
        self._ray.shutdown()

    # ---- supervision
    def _pump(self, timeout: float) -> None:
        self._assign()
        if not self._jobs:
            return
        ready, _ = self._ray.wait(list(self._jobs), num_returns=1 if timeout else len(self._jobs), timeout=timeout)
        for ref in ready:
            self._take(ref, self._jobs.pop(ref))
        now = time.monotonic()
        for ref in [r for r, j in self._jobs.items() if now - j.since > self._deadline]:
            self._ray.cancel(ref, force=True)
            self._again(self._jobs.pop(ref), f"no result after {self._deadline:g} seconds")
        self._assign()

    def _assign(self) -> None:
        while self._queue and len(self._jobs) < self._room:
            job = self._queue.popleft()
            job.since = time.monotonic()
            self._jobs[self._remote.remote(self._work, job.data, self._memory, __version__)] = job

    def _take(self, ref: Any, job: _Job) -> None:
        try:
            self._done.append((job.ticket, self._ray.get(ref)))
        except self._ray.exceptions.RayTaskError as unable:
            raise Fault(Diagnostic("RAY001", f"--engine ray: a node of the cluster cannot do the work: {str(unable).strip().splitlines()[-1]}",
                                   fix="install this version of trainverify on every node")) from unable
        except self._ray.exceptions.RayError as gone:    # the worker or its node: what the work raises comes back as a result
            self._again(job, _words(gone, self._memory))

    def _again(self, job: _Job, reason: str) -> None:
        job.tries += 1
        if job.tries < TRIES:
            self._queue.appendleft(job)
        else:
            self._done.append((job.ticket, ("done", Lost(reason))))


def _connected(address: str) -> Any:
    try:
        import ray
    except ImportError as missing:
        raise Fault(Diagnostic("RAY001", f"--engine ray: {missing}", fix="pip install trainverify[ray]")) from missing
    try:
        host, _, port = address.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), CONNECT).close()     # Ray itself would try for minutes
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", configure_logging=False)
    except (OSError, ValueError, RuntimeError) as failed:
        raise Fault(Diagnostic("RAY001", f"--engine ray: no cluster at {address}: {str(failed).splitlines()[0]}",
                               fix="start one (ray start --head), and name its address: --address HOST:PORT")) from failed
    return ray


def _words(gone: Exception, memory: int) -> str:
    text = str(gone)
    if f"exit code {OUT_OF_MEMORY}" in text or "emory" in type(gone).__name__:
        return f"it needs more than {memory >> 20:,} MB"
    return f"its worker was lost ({type(gone).__name__})"


@functools.cache
def _limited(memory: int) -> None:
    """A worker of the cluster is limited once."""
    limit_memory(memory)


def _at_a_node(work: Callable[[bytes], Any], data: bytes, memory: int, version: str) -> tuple[str, Any]:
    """A task, in a worker of the cluster."""
    if version != __version__:
        return "error", (RuntimeError(f"trainverify is {version} here and {__version__} on a node of the cluster"), "")
    _limited(memory)
    try:
        return "done", work(data)
    except BaseException as error:
        if is_out_of_memory(error):
            os._exit(OUT_OF_MEMORY)
        return "error", (sendable(error), traceback.format_exc())
