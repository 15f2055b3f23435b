"""The table of frameworks: totals, planted bugs apart, and a reason for everything that is not proved."""
import importlib.util
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[3] / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    spec = importlib.util.spec_from_file_location("bench_frameworks", BENCH / "frameworks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delitem(sys.modules, "run", raising=False)
    return module


def row(name, proved, refuted=0, reasons=(), **more):
    unknown = sum(n for verdict, _, n, _ in reasons if verdict == "UNKNOWN")
    return {"name": name, "verdict": "PROVED", "ranks": 2, "ops": 12345, "outputs": proved + refuted + unknown, "PROVED": proved, "REFUTED": refuted,
            "UNKNOWN": unknown, "capture": 10.4, "verify": 20.6, "wall": 31.0, "cpu": 40.2, "memory": 510_000_000, "failed": [], "reasons": list(reasons),
            "assumed": [], **more}


def test_document(bench, monkeypatch):
    monkeypatch.setattr(bench, "CASES", [bench.Case("a.py", {"tp": 2}, why="The reduction is left out."), bench.Case("wrong/b.py")])
    rows = [row("a[tp=2]", 7, reasons=[["UNKNOWN", f"no row: {bench.ROOT}/x.py:3 <op>", 2, "scalar loss of step 1, gradient w of step 2"]], assumed=["stand-in: f computes g (x.py:1)"]),
            row("wrong/b", 5, refuted=1, reasons=[["REFUTED", "differs", 1, ""]])]
    text = bench.document(rows)
    assert text.startswith("1 cases, 9 outputs: 7 PROVED, 0 REFUTED, 2 UNKNOWN.\n")
    first, _, rest = text.partition("## Planted bugs")
    assert "| `a[tp=2]` | 2 | 12,345 | 9 | 7 | 0 | 2 | 10 | 21 | 40 | 0.5 |" in first and "`wrong/b`" not in first
    assert "| `wrong/b` | 2 | 12,345 | 6 | 5 | 1 | 0 |" in rest
    assert "**`a[tp=2]`** The reduction is left out.\n\n- 2 x UNKNOWN: no row: x.py:3 (op) (scalar loss of step 1, gradient w of step 2)\n" in rest
    assert "- stand-in: f computes g (x.py:1): in `a`" in rest


def test_a_run_that_failed_says_so(bench, monkeypatch):
    monkeypatch.setattr(bench, "CASES", [bench.Case("a.py")])
    assert "- RUN009 rank 0 raised" in bench.document([row("a", 0, failed=["RUN009 rank 0 raised ImportError"])])


def test_each_output_that_is_not_proved_is_told(bench, monkeypatch):
    def output(name, verdict, reason="", finding=-1, kind="gradient"):
        return {"kind": kind, "name": name, "step": 1, "verdict": verdict, "reason": reason, "finding": finding}
    diagnostic = {"code": "REL001", "message": "first operation", "span": {"file": f"{bench.ROOT}/a.py", "line": 3}, "severity": "error"}
    report = {"ranks": 2, "verdict": "REFUTED", "phases": [{"name": "capture parallel", "seconds": 2.0}], "diagnostics": [], "assumptions": [],
              "findings": [{"diagnostic": diagnostic}],
              "outputs": [output("loss", "UNKNOWN", "no witness", kind="scalar"), output("w", "PROVED"), *(output(f"b{i}", "REFUTED", "differs", 0) for i in range(9))]}
    cost = {"verdict": "REFUTED", "ops": 5, "wall": 5.0, "cpu": 4.0, "peak_memory": 1}
    monkeypatch.setattr(bench.bench, "measure", lambda arguments: (cost, report))
    measured = bench.measure(bench.Case("a.py"))
    assert measured["reasons"] == [["REFUTED", "differs; REL001 first operation at a.py:3", 9, "9 of kind gradient of step 1"],
                                   ["UNKNOWN", "no witness", 1, "scalar loss of step 1"]]
