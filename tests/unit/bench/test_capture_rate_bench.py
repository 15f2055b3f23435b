"""The benchmark separates what a program costs by itself from what capture adds."""
import importlib.util
from pathlib import Path

import pytest

from trainverify.capture.session import Stats

FILE = Path(__file__).parents[3] / "bench" / "capture_rate.py"
SPEC = """
import torch, torch.distributed as dist
import trainverify as tv

RANKS = 2

def training(model, batch, scale):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    def step():
        loss = model(batch).square().mean() * scale
        if dist.is_initialized():
            dist.all_reduce(loss)
        loss.backward()
        optimizer.step()
        return {"loss": loss}
    return tv.Training(model, step, batch=batch)

def reference():
    return training(torch.nn.Linear(3, 2), torch.randn(4, 3), 1.0)

def parallel(ref, scale=0.5):
    dist.init_process_group("gloo")
    model = torch.nn.Linear(3, 2)
    model.load_state_dict(ref.weights)
    return training(model, ref.batch, scale)
"""


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_capture_rate", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rates(bench):
    row = bench.row("x.py 2 ranks", 2, Stats(ops=1200, cpu=3.0, stepped_ops=1000, stepped_cpu=0.25), 0.05)
    assert (row["rate"], row["cpu_per_rank"]) == (4000.0, 1.5) and row["added_rate"] == pytest.approx(5000.0)
    assert bench.table([row]).split("\n")[2].split() == ["x.py", "2", "ranks", "1,000", "0.25", "0.05", "4,000", "5,000", "1.50"]
    assert bench.table([bench.row("x.py", 1, Stats(stepped_ops=10, stepped_cpu=1.0), None)]).split()[-5:] == ["1.00", "-", "10", "-", "0.00"]


@pytest.mark.slow
def test_both_sides_are_measured(bench, tmp_path):
    spec = tmp_path / "spec.py"
    spec.write_text(SPEC)
    reference, parallel = bench.measure(f"{spec}:scale=0.25", 1)
    for row in (reference, parallel):
        assert row["calls"] > 10 and row["captured"] > 0 and row["plain"] > 0
    assert parallel["program"].endswith("2 ranks")
