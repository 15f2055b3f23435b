"""No process outlives a world, however its parent ends; ranks get a torchrun-like process; large messages do not block."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from trainverify.capture.wire import Signature
from trainverify.capture.world import run_world

LIMIT = 60.0

# Each rank starts a grandchild, writes both process numbers, and waits for ever.
PARENT = """
import os, signal, subprocess, sys, time
from trainverify.capture.world import run_world

signal.signal(signal.SIGINT, signal.default_int_handler)      # a job in the background of a shell inherits that it is ignored

def child(rank):
    sleeper = subprocess.Popen(["sleep", "1000"])
    rank.channel.progress(f"{os.getpid()} {sleeper.pid}")
    time.sleep(1000)

def progress(rank, text):
    print(text, flush=True)

try:
    run_world(3, child, timeout=1000, on_progress=progress)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def alive(pid):
    """Whether a process runs (a zombie that nobody has reaped yet does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until_gone(pids):
    give_up = time.monotonic() + 30
    while any(map(alive, pids)) and time.monotonic() < give_up:
        time.sleep(0.02)
    return [pid for pid in pids if alive(pid)]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_behind(how):
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for _ in range(3) for pid in parent.stdout.readline().split()]
    assert len(pids) == 6 and all(map(alive, pids))
    parent.send_signal(how)
    rest = parent.stdout.read()                # ends when every holder of the pipe has ended
    parent.wait(30)
    assert ("interrupted" in rest) == (how == signal.SIGINT)
    assert wait_until_gone(pids) == []


def test_an_exception_in_the_parent_ends_the_ranks():
    pids = []

    def progress(rank, text):
        pids.append(int(text))
        if len(pids) == 2:
            raise RuntimeError("display is broken")

    def child(rank):
        rank.channel.progress(str(os.getpid()))
        time.sleep(1000)

    with pytest.raises(RuntimeError, match="display is broken"):
        run_world(2, child, timeout=LIMIT, on_progress=progress)
    assert len(pids) == 2 and not any(map(alive, pids))


def test_a_fault_ends_the_ranks_and_what_they_started():
    pids = []

    def child(rank):
        sleeper = subprocess.Popen(["sleep", "1000"])
        rank.channel.progress(f"{os.getpid()} {sleeper.pid}")
        rank.channel.recv(1 - rank.rank, 0)

    world = run_world(2, child, timeout=LIMIT, on_progress=lambda rank, text: pids.extend(map(int, text.split())))
    assert world.faults[0].code == "RUN001"
    assert len(pids) == 4 and wait_until_gone(pids) == []


def test_worlds_can_be_nested():
    def child(rank):
        inner = run_world(2, lambda r: bytes([r.rank]), timeout=LIMIT)
        return b"".join(inner.results)
    assert run_world(2, child, timeout=LIMIT).results == [b"\0\1", b"\0\1"]


def test_the_environment_of_a_rank():
    def child(rank):
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
        values = [os.environ[n] for n in names]
        return " ".join([*values, str(torch.get_num_threads()), str(torch.initial_seed())]).encode()
    world = run_world(2, child, timeout=LIMIT)
    assert world.results == [f"{r} {r} 2 2 0 127.0.0.1 29500 1 67280421310721".encode() for r in range(2)]
    assert "RANK" not in os.environ


def test_unseeded_generators_differ_between_ranks_and_not_between_runs():
    def child(rank):
        import random

        import numpy
        return f"{random.random()} {numpy.random.rand()} {torch.rand(1).item()}".encode()
    first, second = (run_world(2, child, timeout=LIMIT).results for _ in range(2))
    assert first == second
    (py0, np0, torch0), (py1, np1, torch1) = (line.split() for line in first)
    assert py0 != py1 and np0 != np1 and torch0 == torch1


def test_output_goes_to_files(capfd, tmp_path):
    def child(rank):
        print(f"hello from {rank.rank}")
        os.system("echo from a shell")
        print("to stderr", file=sys.stderr)
    world = run_world(2, child, timeout=LIMIT, output_dir=tmp_path)
    assert capfd.readouterr() == ("", "")
    assert sorted(world.output[1].splitlines()) == ["from a shell", "hello from 1", "to stderr"]
    assert world.output_paths[1].read_text() == world.output[1]
    assert run_world(1, child, timeout=LIMIT).output_paths == ()


def test_large_payloads():
    size = 2_500_000                           # 10 MB from each rank, at the same time

    def child(rank):
        mine = torch.full((size,), float(rank.rank))
        rank.channel.send((rank.rank + 1) % 3, 0, [mine])
        gathered = rank.channel.exchange((0, 1, 2), 1, Signature("all_gather", group_name="0"), [mine])
        (received,) = rank.channel.recv((rank.rank - 1) % 3, 0)
        assert [g[0].mean().item() for g in gathered] == [0.0, 1.0, 2.0]
        return bytes([int(received.mean().item())]) * (10 << 20)
    world = run_world(3, child, timeout=LIMIT)
    assert not world.faults
    assert [(len(r), r[0]) for r in world.results] == [(10 << 20, 2), (10 << 20, 0), (10 << 20, 1)]
    assert all(u.cpu > 0 for u in world.usage)


def test_a_dead_receiver_does_not_block_the_others():
    def child(rank):
        if rank.rank == 0:
            os._exit(1)
        rank.channel.send(0, 0, [torch.zeros(2_500_000)])
        return b"sent"
    world = run_world(2, child, timeout=LIMIT)
    assert [f.code for f in world.faults] == ["RUN010"]
