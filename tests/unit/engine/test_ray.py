"""Theorems on a Ray cluster: two nodes on this machine, which the test starts."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

from trainverify.contracts.docket import Lost
from trainverify.diagnostics import Fault
from trainverify.engine.ray import OnRay

pytestmark = pytest.mark.slow
STORE = 80 << 20

SPEC = '''
import torch
import torch.distributed as dist
import trainverify as tv

RANKS = 2


def program(share):
    torch.manual_seed(0)
    net = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    x = torch.arange(16.0).reshape(4, 4).sin()

    def step():
        loss = share(net(x)).square().sum()
        loss.backward()
        return {"loss": loss}
    return net, x, step


def reference():
    net, x, step = program(lambda y: y)
    return tv.Training(net, step, batch={"x": x})


def parallel(ref):
    dist.init_process_group("gloo")
    net, x, _ = program(lambda y: y)
    net.load_state_dict(ref.weights)
    x, rank = ref.batch["x"], dist.get_rank()

    def step():
        loss = net(x[2 * rank:2 * rank + 2]).square().sum()
        loss.backward()
        for p in net.parameters():
            dist.all_reduce(p.grad)
        loss = loss.detach()
        dist.all_reduce(loss)
        return {"loss": loss}
    return tv.Training(net, step)
'''


@pytest.fixture(scope="module")
def cluster():
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False})
    found.add_node(num_cpus=1, object_store_memory=STORE)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])      # the nodes cannot import this file
    yield found
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    found.shutdown()


def results(engine: OnRay, tasks: list[bytes]) -> list:
    try:
        tickets, found = [engine.submit(t) for t in tasks], {}
        while len(found) < len(tickets):
            engine.wait()
            found.update(engine.done())
        return [found[t] for t in tickets]
    finally:
        engine.close()


def at_node(task: bytes) -> tuple[bytes, str]:
    return task.upper(), ray.get_runtime_context().get_node_id()


def test_both_nodes_work(cluster):
    found = results(OnRay(at_node, cluster.address), [b"a%d" % i for i in range(20)])
    assert [f[0] for f in found] == [b"A%d" % i for i in range(20)] and len({f[1] for f in found}) == 2


def harmful(task: bytes) -> bytes:
    if task == b"killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == b"hangs":
        while True:
            signal.pause()
    if task == b"grows":
        held = []
        while True:
            held.append(np.ones(1 << 22))
    return task.upper()


def test_a_worker_that_is_lost_costs_its_task(cluster):
    tasks = [b"a", b"killed", b"b", b"hangs", b"c", b"grows", b"d"]
    found = results(OnRay(harmful, cluster.address, memory=256 << 20, deadline=5.0), tasks)
    assert [f for f in found if not isinstance(f, Lost)] == [b"A", b"B", b"C", b"D"]
    assert isinstance(found[1], Lost) and "no result after 5 seconds" in found[3] and isinstance(found[5], Lost)


def failing(task: bytes) -> bytes:
    raise ZeroDivisionError("seven")


def test_what_a_task_raises_is_raised_here(cluster):
    with pytest.raises(ZeroDivisionError, match="seven"):
        results(OnRay(failing, cluster.address), [b"x"])


RUN = """
import sys
from trainverify import cli
from trainverify.engine import analysis
analysis.DEEP = 0
sys.exit(cli.main(["verify", "spec.py", "--steps", "1", "-q", "--no-cache", "--format", "json", *sys.argv[1:]]))
"""


def report_of(folder: Path, *more: str) -> dict:
    """Of a process of its own: forks do not go well with what Ray runs in this one."""
    done = subprocess.run([sys.executable, "-c", RUN, *more], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_report_is_the_same(cluster, tmp_path):
    (tmp_path / "spec.py").write_text(SPEC)
    here, there = report_of(tmp_path, "--jobs", "1"), report_of(tmp_path, "--engine", "ray", "--address", cluster.address)
    details = [next(p["detail"] for p in r["phases"] if p["name"] == "prove") for r in (here, there)]
    assert details[0] == details[1] and "distinct obligations" in details[0] and here["verdict"] == "PROVED"
    for report in (here, there):
        for name in ("seconds", "peak_memory", "phases", "rerun"):
            del report[name]
    assert here == there


def test_no_cluster_is_a_fault():
    with pytest.raises(Fault) as caught:
        OnRay(at_node, "127.0.0.1:1")
    assert [d.code for d in caught.value.diagnostics] == ["RAY001"]
