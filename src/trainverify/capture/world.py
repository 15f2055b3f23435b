"""The world: one forked process per rank, joined by the coordinator; no process outlives the call (trusted to run the user's code as it is).

`run_world` forks, serves the ranks' messages until all have ended or no rank can go on, and returns their results with the
faults. A rank is the leader of its own process group and dies with its parent; a small guardian process
kills the groups, with whatever the ranks have started, when the parent is killed outright.
"""
from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import random
import selectors
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from trainverify.capture import faults as fault_texts
from trainverify.capture import wire
from trainverify.capture.coordinator import RUNNING, Coordinator
from trainverify.capture.userframes import frames_of_exception, frames_of_stack_dump, is_internal
from trainverify.capture.wire import Key, Signature
from trainverify.diagnostics import Diagnostic, Fault
from trainverify.processes import die_with

if TYPE_CHECKING:
    import torch

_FRESH_PROCESS_SEED = 67280421310721          # what torch's default CPU generator starts with
_STACK_SIGNAL = signal.SIGRTMIN + 3           # a rank dumps its Python stack; frameworks use the ordinary signals
_PID = struct.Struct("<i")
_POLL = 0.1                                   # seconds between looks for ranks that died
_TAIL = 1 << 14                               # characters kept of a rank's output


class Channel:
    """A rank's end of the line to the coordinator. Calls of several threads are done one after the other."""

    def __init__(self, sock: socket.socket):
        self._sock = sock
        self._lock = threading.Lock()
        self._ticket = 0

    def exchange(self, group: tuple[int, ...], seq: int, signature: Signature,
                 payload: list[torch.Tensor] | None) -> list[list[torch.Tensor] | None]:
        """Collective number `seq` of a group: blocks; returns each member's payload in group order."""
        return self._ask(self._post(group, seq, signature, payload, wait=True))

    def post(self, group: tuple[int, ...], seq: int, signature: Signature, payload: list[torch.Tensor] | None) -> int:
        """Like exchange, but does not block: returns a ticket for `complete`."""
        post = self._post(group, seq, signature, payload, wait=False)
        with self._lock:
            wire.send_frame(self._sock, *post)
        return post[0].ticket

    def complete(self, ticket: int) -> list[list[torch.Tensor] | None]:
        """Blocks until the collective posted as `ticket` is complete; returns each member's payload in group order."""
        return self._ask((wire.Wait(ticket), []))

    def send(self, dst: int, key: Key, payload: list[torch.Tensor], signature: Signature | None = None) -> None:
        """A message to a global rank; does not block."""
        with _modes_off():
            metas, parts = wire.pack(payload)
            with self._lock:
                wire.send_frame(self._sock, wire.Send(dst, key, metas, signature), parts)

    def recv(self, src: int, key: Key, signature: Signature | None = None) -> list[torch.Tensor]:
        """The next message from a global rank under this key; blocks."""
        (payload,) = self._ask((wire.Recv(src, key, signature), []))
        return payload

    def progress(self, text: str) -> None:
        """Tell the parent's progress display."""
        self._tell(wire.Progress(text))

    def _post(self, group, seq, signature, payload, wait):
        with _modes_off():
            metas, parts = wire.pack(payload)
        with self._lock:
            self._ticket += 1
            return wire.Post(self._ticket, tuple(group), seq, signature, metas, wait), parts

    def _tell(self, message: wire.Message, parts=()) -> None:
        with self._lock:
            wire.send_frame(self._sock, message, parts)

    def _ask(self, question) -> list[list[torch.Tensor] | None]:
        with self._lock:
            wire.send_frame(self._sock, *question)
            reply, body = wire.read_frame(self._sock)
        with _modes_off():
            return wire.unpack(reply.payloads, body)


@dataclass(frozen=True)
class Rank:
    """What a child function is given."""

    rank: int
    world_size: int
    channel: Channel


@dataclass(frozen=True)
class Usage:
    """Seconds that a rank computed, and that it was blocked in communication."""

    cpu: float
    waited: float


@dataclass(frozen=True)
class WorldResult:
    """Results per rank (empty where a rank did not return), faults (errors first), usage, and the tail of each rank's output;
    missing: modules whose import failed, where that ended a rank.

    output_paths are the full outputs; they exist only if run_world was given an output_dir.
    """

    results: list[bytes]
    faults: tuple[Diagnostic, ...]
    usage: tuple[Usage, ...]
    output: tuple[str, ...]
    output_paths: tuple[Path, ...] = ()
    missing: tuple[str, ...] = ()


def preload() -> None:
    """Import what nearly every program needs, in the parent, so that the ranks share it."""
    import torch
    with warnings.catch_warnings(action="ignore"):     # torch's own, about itself
        import torch._dynamo
        import torch.distributed.checkpoint
        import torch.distributed.fsdp
        import torch.distributed.optim         # compiles TorchScript when imported: before anything is patched
        import torch.distributed.pipelining
        import torch.distributed.tensor.experimental
        import torch.distributed.tensor.parallel
        import torch.nn.attention.flex_attention
        import torch.nn.attention.varlen
        import torch.nn.parallel
        import torch.testing._internal.distributed.fake_pg  # noqa: F401


def run_world(n: int, child: Callable[[Rank], bytes | None], *, timeout: float,
              on_progress: Callable[[int, str], None] | None = None, output_dir: Path | None = None) -> WorldResult:
    """Run child(rank) in n forked processes until all end, none can go on, or `timeout` seconds have passed."""
    preload()
    outputs = Path(output_dir or tempfile.mkdtemp(prefix="trainverify-"))
    outputs.mkdir(parents=True, exist_ok=True)
    world = _World(n, outputs, on_progress)
    try:
        try:
            world.start(child)
            world.serve(time.monotonic() + timeout)
            stacks = world.stacks() if world.timed_out else {}
        finally:
            world.stop()
        tails = tuple(_tail(world.output_path(r)) for r in range(n))
        found = fault_texts.diagnose(world.coordinator, tails, timeout if world.timed_out else None, stacks)
        results = [m.result for m in world.coordinator.members]
        usage = tuple(Usage(world.cpu[r], world.waited[r]) for r in range(n))
        paths = tuple(map(world.output_path, range(n))) if output_dir else ()
        missing = tuple(m.raised.missing for m in world.coordinator.members if m.raised is not None and m.raised.missing)
        return WorldResult(results, found, usage, tails, paths, missing)
    finally:
        if output_dir is None:
            shutil.rmtree(outputs, ignore_errors=True)


class _Line:
    """The parent's end of one rank's socket."""

    def __init__(self, rank: int, sock: socket.socket):
        self.rank, self.sock = rank, sock
        self.incoming = wire.Buffer()
        self.outgoing: deque[memoryview] = deque()
        self.open = True

    def receive(self) -> Iterator[tuple[wire.Message, bytes]]:
        """All messages that have come so far; never blocks."""
        while self.open:
            try:
                data = self.sock.recv(1 << 20)
            except BlockingIOError:
                return
            except ConnectionError:
                data = b""
            if not data:
                self.open = False
                return
            yield from self.incoming.feed(data)

    def flush(self) -> None:
        """Write what the socket takes; never blocks."""
        while self.outgoing and self.open:
            try:
                sent = self.sock.send(self.outgoing[0])
            except BlockingIOError:
                return
            except ConnectionError:            # the rank is dead: its exit status tells why
                self.outgoing.clear()
                return
            rest = self.outgoing[0][sent:]
            if len(rest):
                self.outgoing[0] = rest
            else:
                self.outgoing.popleft()


class _World:
    """The processes and their lines."""

    def __init__(self, n: int, outputs: Path, on_progress):
        self.n, self.outputs, self.on_progress = n, outputs, on_progress
        self.coordinator = Coordinator(n)
        self.pids: list[int] = []
        self.lines: list[_Line] = []
        self.selector = selectors.DefaultSelector()
        self.guardian: tuple[int, int] | None = None
        self.cpu = [0.0] * n
        self.waited = [0.0] * n
        self.blocked_since: dict[int, float] = {}
        self.timed_out = False

    def output_path(self, rank: int) -> Path:
        return self.outputs / f"rank{rank}.log"

    def stack_path(self, rank: int) -> Path:
        return self.outputs / f"rank{rank}.stack"

    def start(self, child) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        with _signals_blocked() as mask:
            gc.freeze()                        # collections in the ranks leave the shared pages alone
            try:
                self.guardian = _fork_guardian()
                for rank in range(self.n):
                    self._fork(rank, child, mask)
            finally:
                gc.unfreeze()

    def _fork(self, rank: int, child, mask) -> None:
        ours, theirs = socket.socketpair()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            ours.close()
            for line in self.lines:
                line.sock.close()
            os.close(self.guardian[1])
            self.selector.close()
            _run_child(Rank(rank, self.n, Channel(theirs)), child, self, parent, mask)
        theirs.close()
        ours.setblocking(False)
        with contextlib.suppress(OSError):     # the child does it too: whoever comes first
            os.setpgid(pid, pid)
        self.pids.append(pid)
        os.write(self.guardian[1], _PID.pack(pid))
        line = _Line(rank, ours)
        self.lines.append(line)
        self.selector.register(ours, selectors.EVENT_READ, line)

    def serve(self, deadline: float) -> None:
        last_look = 0.0
        while not self.coordinator.stuck():
            now = time.monotonic()
            if now > deadline:
                self.timed_out = True
                return
            for key, events in self.selector.select(_POLL):
                if events & selectors.EVENT_WRITE:
                    self._write(key.data)
                if events & selectors.EVENT_READ:
                    self._read(key.data)
            if now - last_look >= _POLL:
                last_look = now
                self._look_for_deaths()

    def _read(self, line: _Line) -> None:
        for message, body in line.receive():
            if isinstance(message, wire.Progress):
                if self.on_progress:
                    self.on_progress(line.rank, message.text)
                continue
            for rank, reply, bodies in self.coordinator.handle(line.rank, message, body):
                target = self.lines[rank]
                target.outgoing.extend(map(memoryview, wire.frame(reply, bodies)))
                self._write(target)
            self._account()
        if not line.open:
            self.selector.unregister(line.sock)

    def _write(self, line: _Line) -> None:
        line.flush()
        if line.open:
            more = selectors.EVENT_WRITE if line.outgoing else 0
            self.selector.modify(line.sock, selectors.EVENT_READ | more, line)

    def _account(self) -> None:
        now = time.monotonic()
        for member in self.coordinator.members:
            if member.waiting is not None:
                self.blocked_since.setdefault(member.rank, now)
            elif member.rank in self.blocked_since:
                self.waited[member.rank] += now - self.blocked_since.pop(member.rank)

    def _look_for_deaths(self) -> None:
        for member in self.coordinator.live():
            status = os.waitid(os.P_PID, self.pids[member.rank], os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if status is None:
                continue
            line = self.lines[member.rank]
            if line.open:
                self._read(line)               # its last words
            if member.status == RUNNING:
                self.coordinator.died(member.rank, _how_it_died(status))

    def stacks(self) -> dict[int, list[tuple[str, int, str]]]:
        """The user frames (innermost first) that the ranks are executing, of those that answer within a second."""
        running = [m.rank for m in self.coordinator.live() if m.waiting is None]
        before = {r: self.stack_path(r).stat().st_size if self.stack_path(r).exists() else 0 for r in running}
        for rank in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[rank], _STACK_SIGNAL)
        give_up = time.monotonic() + 1.0
        while time.monotonic() < give_up and any(not _grown(self.stack_path(r), before[r]) for r in running):
            time.sleep(0.02)
        return {r: frames_of_stack_dump(self.stack_path(r).read_text()[before[r]:]) for r in running}

    def stop(self) -> None:
        """Kill and reap everything. Until a leader is reaped its group's number cannot be taken by others."""
        with _signals_blocked():
            for pid in self.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if self.guardian:
                pid, pipe = self.guardian
                with contextlib.suppress(BrokenPipeError):
                    os.write(pipe, _PID.pack(0))
                os.close(pipe)
                os.waitpid(pid, 0)
            for rank, pid in enumerate(self.pids):
                _, _, use = os.wait4(pid, 0)
                self.cpu[rank] = use.ru_utime + use.ru_stime
            for line in self.lines:
                line.sock.close()
            self.selector.close()


def _run_child(rank: Rank, child, world: _World, parent: int, mask) -> NoReturn:
    """The life of a rank. Never returns into the parent's stack."""
    try:
        os.setpgid(0, 0)
        die_with(parent)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _redirect(world.output_path(rank.rank))
        stack = open(world.stack_path(rank.rank), "w")
        faulthandler.enable(stack, all_threads=False)
        faulthandler.register(_STACK_SIGNAL, stack, all_threads=False)
        _environment(rank.rank, rank.world_size)
        try:
            result = child(rank)
            message, parts = wire.Done(), [result or b""]
        except BaseException as error:         # a rank may end with SystemExit or anything else: it is all reported
            traceback.print_exc()
            message, parts = _raised(error), []
        sys.stdout.flush()
        sys.stderr.flush()
        rank.channel._tell(message, parts)
    finally:
        os._exit(0)


def _raised(error: BaseException) -> wire.Raised:
    diagnostics = error.diagnostics if isinstance(error, Fault) else ()
    text = "".join(traceback.format_exception(error))
    kind = type(error).__name__
    missing = (error.name or "") if isinstance(error, ModuleNotFoundError) else ""
    return wire.Raised(kind, str(error), frames_of_exception(error), tuple(diagnostics), is_internal(error), text[-_TAIL:], missing)


def _environment(rank: int, n: int) -> None:
    """What torchrun and a fresh process give: environment, seeds (unseeded Python and numpy generators differ per rank)."""
    import numpy
    import torch

    os.environ.update({
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1", "ROLE_RANK": str(rank), "ROLE_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1"})
    torch.set_num_threads(1)
    torch.manual_seed(_FRESH_PROCESS_SEED)
    random.seed(_FRESH_PROCESS_SEED + 1 + rank)
    numpy.random.seed(1 + rank)


def _redirect(path: Path) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(null, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", buffering=1, closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)


def _fork_guardian() -> tuple[int, int]:
    """A process that kills the groups whose numbers it was told when our end of the pipe closes without a farewell (0)."""
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(read)
        return pid, write
    try:
        os.setsid()
        os.close(write)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        groups = []
        while data := os.read(read, _PID.size):
            (group,) = _PID.unpack(data)
            if not group:
                os._exit(0)
            groups.append(group)
        for group in groups:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
    finally:
        os._exit(0)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[set[signal.Signals]]:
    """Ctrl-C and SIGTERM wait: they must not come between a fork and its bookkeeping. Yields the mask as it was."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield before
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _modes_off() -> contextlib.AbstractContextManager[None]:
    """Our own tensor work; the import is late because the command line imports this module without torch."""
    from trainverify.capture.quiet import unseen

    return unseen()


def _how_it_died(status) -> str:
    if status.si_code == os.CLD_EXITED:
        return f"exited with code {status.si_status}"
    try:
        name = signal.Signals(status.si_status).name
    except ValueError:
        name = f"signal {status.si_status}"
    hint = " (often: out of memory)" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"


def _grown(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size > size


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-_TAIL:] if path.exists() else ""
