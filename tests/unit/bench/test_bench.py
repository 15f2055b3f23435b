"""The benchmark measures what it says: the whole process tree, and the figures of the report."""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[3] / "bench" / "run.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_run", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_memory_covers_the_whole_tree(bench):
    """A grandchild that holds 64 MB counts."""
    hold = "import sys; x = b'1' * 64_000_000; print(len(x), flush=True); sys.stdin.read()"
    parent = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {hold!r}], stdin=subprocess.PIPE); sys.stdin.read(); p.communicate()"
    before = bench.pss(os.getpid())
    process = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline().strip() == b"64000000"
    tree = bench.descendants(process.pid)
    assert len(tree) == 2 and set(tree) <= set(bench.descendants(os.getpid()))
    assert bench.pss(process.pid) > 64_000_000 and bench.pss(os.getpid()) > before
    process.communicate()
    assert bench.descendants(process.pid) == [process.pid] and bench.pss(process.pid) == 0


def test_table(bench):
    row = {"spec": "examples/x.py", "verdict": "UNKNOWN", "wall": 12.34, "cpu": 20.0, "peak_memory": 1_500_000_000, "ops": 40_123, "elements": 3_000_000,
           "capture_rate": 18_000, "phases": {"capture": 8.0, "replay": 4.0}}
    head, _, first, phases = bench.table([row]).split("\n")
    assert head.split() == "spec verdict wall s CPU s PSS GB ops elements captured ops/CPU s".split()
    assert first.split() == ["examples/x.py", "UNKNOWN", "12.3", "20.0", "1.50", "40,123", "3,000,000", "18,000"]
    assert phases.strip() == "capture 8.0, replay 4.0"


def test_named_specs_exist(bench):
    assert [s for s in bench.SPECS if not (bench.ROOT / s.partition(":")[0]).exists()] == []
