"""The table of mutation scores counts what it says, and a proved mutant is loud."""
import importlib.util
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[3] / "bench" / "mutants.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_mutants", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module           # its functions are sent to processes by name
    spec.loader.exec_module(module)
    return module


def row(kind, result, **more):
    return {"spec": "spec.py", "kind": kind, "text": "something else", "place": "train.py:1", "ranks": [0], "result": result, "seconds": 1.0, **more}


def test_table(bench):
    rows = [*[row("collective dropped", r) for r in ("REFUTED", "REFUTED", "UNKNOWN", "same", "invalid")], row("other factor", "same")]
    lines = {line[:22].strip(): line[22:].split() for line in bench.table(rows).split("\n")[2:]}
    assert lines == {"collective dropped": ["5", "1", "1", "2", "1", "0", "66%"], "other factor": ["1", "0", "1", "0", "0", "0", "-"],
                     "all": ["6", "1", "2", "2", "1", "0", "66%"]}


@pytest.mark.parametrize(("results", "code"), [(("REFUTED", "same"), 0), (("REFUTED", "PROVED"), 1), ((), 1)])
def test_exit_code(bench, monkeypatch, capsys, results, code):
    monkeypatch.setattr(bench, "rows", lambda *asked: iter([row("other factor", r) for r in results]))
    monkeypatch.setattr("sys.argv", ["mutants.py", "spec.py"])
    assert bench.main() == code
    assert ("PROVED, AND ITS OUTPUT IS CHANGED" in capsys.readouterr().out) == ("PROVED" in results)
