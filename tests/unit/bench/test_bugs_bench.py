"""The table of the bug benchmark counts what it says."""
import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

FILE = Path(__file__).parents[3] / "bench" / "bugs.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_bugs", FILE)
    module = sys.modules["bench_bugs"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_bugs"]


def slower_first(n):
    time.sleep(0.02 * (3 - n))
    return {"verdict": "PROVED", "seconds": n, "alarm": False, "why": ""}


def row(id, verdict="PROVED", alarm=False, **broken):
    right = {"found": True, "line": True, "diagnosis": True, "repairable": True, "repaired": True, "seconds": 2.0, **broken}
    return {"id": id, "broken": None if id[0] == "X" else right, "fixed": {"verdict": verdict, "alarm": alarm, "seconds": 1.0, "why": "" if verdict == "PROVED" else "a reason"}}


def test_table(bench):
    rows = [row("A1"), row("A2", line=False, repaired=False), row("B1", "UNKNOWN", repairable=False, repaired=False), row("X1", "REFUTED", True)]
    lines = [line.split() for line in bench.table(rows).split("\n")]
    by_class = {line[0]: line[-8:] for line in lines[2:]}
    assert by_class["A"] == ["2", "2/2", "1/2", "2/2", "1/2", "2/2", "0", "6"]
    assert by_class["B"] == ["1", "1/1", "1/1", "1/1", "0/0", "0/1", "0", "3"]
    assert by_class["X"] == ["0", "0/0", "0/0", "0/0", "0/0", "0/1", "1", "1"]
    assert by_class["all"] == ["3", "3/3", "2/3", "3/3", "1/2", "2/4", "1", "10"]
    assert bench.misses(rows) == ["  A2: line, repair", "  B1: fixed is UNKNOWN (a reason)", "  X1: ALARM ON THE CORRECT PROGRAM, fixed is REFUTED (a reason)"]


def test_results_come_back_in_order_however_many_run_at_a_time(bench, tmp_path):
    tasks = [bench.Task("generated", str(n), slower_first, n) for n in range(3)]
    alone, together = bench.run(tasks, 1, tmp_path / "1"), bench.run(tasks, 2, tmp_path / "2")
    assert alone == together == [{"what": "generated", "id": str(n), **slower_first(n)} for n in range(3)]
    files = [sorted((tmp_path / name).read_text().splitlines()) for name in "12"]
    assert files[0] == files[1] and [json.loads(line) for line in files[0]] == alone
    assert bench.shown(alone) == bench.shown(together[::-1]) == "\n0 of 3 generated correct programs alarm; 3 are proved; 3 CPU seconds"
