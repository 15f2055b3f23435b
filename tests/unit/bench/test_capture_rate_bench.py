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
    row = bench.row("x.py 2 ranks", 2, Stats(cpu=3.0), ([1000, 800, 800], [0.5, 0.25, 0.15]), ([0.25, 0.1, 0.1], "gloo"))
    assert bench.rates(row) == ["2,000", "4,000", "4,000", "8,000"]
    assert bench.table([row]).split("\n")[1].split() == ["x.py", "2", "ranks", "2,600", "0.90", "0.45", "2,000", "4,000", "4,000", "8,000", "1.50"]


def test_what_is_not_known_is_not_shown(bench):
    one_step = bench.row("x.py", 1, Stats(), ([10], [1.0]), ([0.5], "nothing"))
    assert bench.table([one_step]).split()[-7:] == ["1.00", "0.50*", "10", "20", "-", "-", "0.00"]
    alone = bench.row("x.py", 1, Stats(), ([10], [1.0]), (None, ""))
    assert bench.table([alone]).split()[-6:] == ["-", "10", "-", "-", "-", "0.00"]


@pytest.mark.slow
def test_both_sides_are_measured(bench, tmp_path):
    spec = tmp_path / "spec.py"
    spec.write_text(SPEC)
    reference, parallel = bench.measure(f"{spec}:scale=0.25", 2)
    for row in (reference, parallel):
        assert min(row["calls"]) > 5 and min(row["captured"]) > 0 and len(row["plain"]) == len(row["calls"]) == 2 and min(row["plain"]) > 0
    assert parallel["program"].endswith("2 ranks") and parallel["communication"] == "gloo" and reference["communication"] == ""
