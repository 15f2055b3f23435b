"""Workers that die, hang or take too much memory: what they were at is tried once more, and then lost; all else has its result, and no process is left."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from trainverify import cli
from trainverify.contracts.docket import Lost
from trainverify.diagnostics import Fault
from trainverify.engine.options import Options
from trainverify.engine.pool import Pool


def results(pool: Pool, tasks: list[bytes]) -> list:
    try:
        tickets = [pool.submit(t) for t in tasks]
        found = {}
        while len(found) < len(tickets):
            pool.wait()
            found.update(pool.done())
        return [found[t] for t in tickets]
    finally:
        pool.close()


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"


def upper(task: bytes) -> bytes:
    return task.upper()


def test_tasks_are_done_and_nobody_is_left():
    pool = Pool(upper, 2)
    pids = pool.pids
    assert results(pool, [b"%d a" % i for i in range(100)]) == [b"%d A" % i for i in range(100)]
    assert len(pids) == 2 and all(map(gone, pids))


def test_long_tasks_and_results_do_not_block():
    tasks = [bytes([65 + i]) * (3 << 20) for i in range(6)]
    assert results(Pool(upper, 2), tasks) == tasks


def test_an_urgent_task_goes_first(tmp_path):
    def noted(task: bytes) -> bytes:
        with open(tmp_path / "order", "ab") as file:
            file.write(task)
        return task
    pool = Pool(noted, 1)
    for t in b"abcd":
        pool.submit(bytes([t]))
    last = pool.submit(b"!", urgent=True)
    found = {}
    while len(found) < 5:
        pool.wait()
        found.update(pool.done())
    pool.close()
    assert found[last] == b"!" and (tmp_path / "order").read_bytes().index(b"!") < 4


def test_what_a_task_raises_is_raised_here():
    def failing(task: bytes) -> bytes:
        raise ZeroDivisionError("seven")
    with pytest.raises(ZeroDivisionError, match="seven") as caught:
        results(Pool(failing, 1), [b"x"])
    assert "in failing" in caught.value.__notes__[0]


def once(folder: Path, task: bytes) -> bool:
    """Whether this task comes for the first time."""
    try:
        (folder / task.decode()).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def hang() -> None:
    while True:
        time.sleep(60)


def grow() -> None:
    held = []
    while True:
        held.append(np.ones(1 << 22))


@pytest.mark.parametrize("harm, words", [(lambda: os.kill(os.getpid(), signal.SIGKILL), "ended by SIGKILL"), (lambda: os._exit(5), "exit code 5"),
                                         (hang, "no result after 0.4 seconds"), (grow, "more than 256 MB")], ids=["killed", "exit", "hung", "memory"])
def test_a_lost_worker_costs_its_task_which_is_tried_once_more(harm, words, tmp_path):
    def work(task: bytes) -> bytes:
        if task == b"always" or task == b"first" and once(tmp_path, task):
            harm()
        return task.upper()
    tasks = [b"a", b"first", b"b", b"always", b"c", b"d"]
    found = results(Pool(work, 2, memory=256 << 20, deadline=0.4 if "0.4" in words else 60.0), tasks)
    assert [f for t, f in zip(tasks, found) if t != b"always"] == [b"A", b"FIRST", b"B", b"C", b"D"]
    assert isinstance(found[3], Lost) and words in found[3]


def test_a_worker_that_is_killed_between_tasks_costs_nothing():
    pool = Pool(upper, 1)
    os.kill(pool.pids[0], signal.SIGKILL)
    assert results(pool, [b"a", b"b"]) == [b"A", b"B"]


@pytest.mark.parametrize("words", [["--engine", "ray"], ["--address", "127.0.0.1:6379"]], ids=" ".join)
def test_what_cannot_be_asked_for_is_usage(words, tmp_path, capsys):
    (tmp_path / "spec.py").write_text("")
    assert cli.main(["verify", str(tmp_path / "spec.py"), *words]) == 2 and words[0] in capsys.readouterr().err


@pytest.mark.parametrize("given", [{"engine": "ray"}, {"address": "127.0.0.1:6379"}, {"jobs": 0}, {"engine": "elsewhere"}], ids=str)
def test_what_cannot_be_asked_for_is_a_fault(given):
    with pytest.raises(Fault, match=next(iter(given))) as caught:
        Options(**given).check()
    assert caught.value.diagnostics[0].code == "OPT001"


INTERRUPTED = '''
import sys, time
from trainverify.engine.beside import Beside
from trainverify.engine.pool import Pool

def slow(task):
    time.sleep(600)

def work(told, progress):
    pool = Pool(slow, 2)
    print(*pool.pids, flush=True)
    pool.submit(b"")
    pool.wait()

beside = Beside(work)
print("begun", flush=True)
try:
    beside.answer(None, print)
finally:
    beside.close()
'''


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_no_worker_outlives_its_owner(how):
    owner = subprocess.Popen([sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    told = [owner.stdout.readline().split() for _ in range(2)]         # an interrupt while it forks may be lost
    pids = [int(p) for line in told if line != ["begun"] for p in line]
    assert len(pids) == 2 and not any(map(gone, pids))
    owner.send_signal(how)
    assert owner.wait(30) != 0
    late = time.monotonic() + 30
    while not all(map(gone, pids)) and time.monotonic() < late:
        time.sleep(0.02)
    assert all(map(gone, pids))
