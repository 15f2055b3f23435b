"""Counterexamples: small inputs that show the difference and leave every decision as it was, and scripts that reproduce it with torch alone."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainverify.algebra.real import RealValue
from trainverify.diagnose.minimise import Minimiser
from trainverify.engine.inputs import Trial, _falls_alike
from trainverify.engine.options import Options
from trainverify.ir.trace import OpCall
from trainverify.replay.machine import Decision
from trainverify.report.counterexample import counterexample_lines
from trainverify.verify import verify_spec

SPECS = Path(__file__).parent / "specs"
WRONG = Path(__file__).parents[3] / "examples" / "wrong"


def minimised(path: Path, script: Path):
    """The run's counterexample, after its script has shown the difference in a process of its own that knows torch only."""
    report = verify_spec(path, Options(counterexample=script, steps=1, repair=False))
    assert report.verdict == "REFUTED" and report.counterexample is not None, [d.message for d in report.diagnostics]
    text = script.read_text()
    assert [line for line in text.splitlines() if line.startswith(("import ", "from "))] == ["import torch"]
    done = subprocess.run([sys.executable, "-I", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "the parallel program differs from the reference on ranks" in done.stderr, done.stderr
    assert "elements differ" in done.stdout and "parallel" in done.stdout
    lines = counterexample_lines(report.counterexample, 80)
    assert lines and max(map(len, lines)) <= 80 or any(str(script) in line for line in lines)
    return report.counterexample, text


def is_integer(value: str) -> bool:
    return float(value) == int(float(value))


def test_few_small_integers_show_a_bias_that_counts_twice(tmp_path):
    told, text = minimised(SPECS / "doubled_bias.py", tmp_path / "difference.py")
    assert told.minimised and told.nonzero <= 3 and told.elements == 4 * 4 * 2 + 4 + 4 + 12
    assert all(is_integer(v) for _, v in told.inputs) and any(name.startswith("down.bias") for name, _ in told.inputs)
    assert not told.steps[-1].same and "doubled_bias.py" in text and "= torch.ops.aten." in text


def test_a_factor_is_shown_and_choices_stay(tmp_path):
    told, text = minimised(SPECS / "summed_gradients.py", tmp_path / "difference.py")
    assert told.minimised and told.nonzero < told.elements / 2
    wrong = told.steps[-1]
    for (_, right), (_, found) in zip(wrong.expected, wrong.found):
        assert [float(f) for f in found] == pytest.approx([2 * float(r) for r in right], rel=1e-6)


def test_the_reason_is_told_where_there_is_no_counterexample(tmp_path):
    spec = tmp_path / "right.py"
    spec.write_text((SPECS / "doubled_bias.py").read_text().replace("self.down.bias))", "self.down.bias / 2))"))
    report = verify_spec(spec, Options(counterexample=tmp_path / "x.py", steps=1))
    assert report.counterexample is None and not (tmp_path / "x.py").exists()
    assert [d.severity for d in report.diagnostics if d.code == "CEX001"] == ["warning"]


def test_minimising_is_bounded_and_ends_in_whole_numbers():
    asked = []

    def shows(v):
        asked.append(v)
        return bool(v[3] != 0 and v[17] < 0)
    start = torch.linspace(-0.9, 1.1, 30, dtype=torch.float64) + 0.013
    start[17] = -0.4
    work = Minimiser(start, [(0, 10), (10, 20)], shows, 200)
    end = work.run()
    assert torch.nonzero(end).reshape(-1).tolist() == [3, 17] and end[17] < 0 and torch.equal(end, end.round())
    assert work.tried == len(asked) < 60
    few = Minimiser(start, [(0, 10), (10, 20)], shows, 5)
    assert shows(few.run()) and few.tried <= 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["norm_grads_not_reduced", "gate_up_swapped", "microbatch_mean"])
def test_a_wrong_twin_is_reproduced_by_its_script(name, tmp_path):
    told, text = minimised(WRONG / f"{name}.py", tmp_path / "difference.py")
    assert told.minimised and told.nonzero < told.elements / 4 and told.trials > 8


# ---- decisions
def decision(kind: str, *operands) -> Decision:
    values = tuple(RealValue(torch.tensor(o, dtype=torch.float64)) for o in operands)
    return Decision(0, CALL, kind, {Trial.name: values}, None)


CALL = OpCall(0, "aten.topk.default", (), {}, None)


@pytest.mark.parametrize(("kind", "old", "new", "alike"), [
    ("topk", [[[0.1, 0.9, 0.5]]], [[[1.0, 3.0, 2.0]]], True),
    ("topk", [[[0.1, 0.9, 0.5]]], [[[1.0, 2.0, 3.0]]], False),
    ("topk", [[[0.1, 0.9, 0.5]]], [[[0.0, 0.0, 0.0]]], False),         # any of them might be taken
    ("topk", [[[0.0, 0.0, 0.5]]], [[[0.0, 0.0, 1.0]]], True),
    ("compare:gt", [0.2, 0.1], [3.0, 1.0], True),
    ("compare:ge", [0.2, 0.1], [1.0, 1.0], False),
    ("mask", [[0.0, 0.5]], [[0.0, 1.0]], True),
    ("mask", [[0.0, 0.5]], [[0.0, 0.0]], False),
    ("cast", [[1.2, -0.5]], [[1.0, 0.0]], True),
    ("cast", [[1.2]], [[2.0]], False),
    ("histc:4:0:1", [[0.2]], [[0.3]], False),                          # of a kind that is not looked into
    ("histc:4:0:1", [[0.2]], [[0.2]], True),
])
def test_decisions_fall_as_recorded_or_the_trial_does_not_count(kind, old, new, alike):
    assert _falls_alike(decision(kind, *old), decision(kind, *new)) is alike
