"""`trainverify shapes`, and what a report says of a reduction."""
import json
import textwrap

import pytest

from trainverify import cli
from trainverify.engine import analysis
from trainverify.report.model import DimClass, OutputResult, Reduction, Report
from trainverify.report.shapes import render, sentence
from trainverify.report.text import headline
from trainverify.report.text import render as render_report
from trainverify.shrink import verdict

SPEC = """
    import torch
    from torch import nn
    import trainverify as tv

    RANKS = 2

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(20, 12))

    def reference():
        model, batch = Model(), {"x": torch.randn(9, 12)}
        return tv.Training(model, lambda: {"value": (batch["x"] @ model.w.t()).sum()}, batch)

    def parallel(ref):
        model = Model()
        model.load_state_dict(ref.weights)
        return tv.Training(model, lambda: {"value": (ref.batch["x"] @ model.w.t()).sum()}, ref.batch)
"""


@pytest.fixture
def spec(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spec.py").write_text(textwrap.dedent(SPEC))
    return "spec.py"


def test_classes_are_listed(spec, capsys):
    assert cli.main(["shapes", spec, "-q"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("3 classes of dimensions; sizes as recorded and reduced\n")
    assert "20 -> " in out and "-: w[0]" in out
    assert "sequence: w[1], batch['x'][1]" in out and "samples: batch['x'][0]" in out
    cli.main(["shapes", spec, "-q", "--format", "json"])
    found = json.loads(capsys.readouterr().out)
    assert {c["size"]: c["many"] for c in found["classes"]} == {20: 1, 12: 1, 9: 1}
    assert all(4 <= c["reduced"] < c["size"] for c in found["classes"])
    assert len({c["reduced"] for c in found["classes"]}) == 3


def test_a_cross_check_needs_a_reduction(spec, capsys):
    assert cli.main(["verify", spec, "--cross-check"]) == 2
    assert "--cross-check is for --reduce" in capsys.readouterr().err


REDUCED = Reduction([DimClass("hidden", 16384, 6, ("wq[1]",)), DimClass("", 64, 64, (), "sort chooses among it")], ["sizes 64: sort chooses among it (model.py:3)"])


def test_the_verdict_names_the_sizes():
    report = Report(verdict="PROVED", outputs=[OutputResult("scalar", "loss", 1, (0,), "PROVED")], reduction=REDUCED)
    assert headline(report) == "PROVED: all 1 outputs equal the reference for the recorded sizes, by reduction (hidden 16,384 to 6)"
    assert "reduction   keeps its size: sizes 64: sort chooses among it (model.py:3)" in render_report(report)


def test_text_of_the_classes():
    assert render(REDUCED) == textwrap.dedent("""\
        2 classes of dimensions; sizes as recorded and reduced
           16,384 -> 6      hidden: wq[1]
               64 -> 64     -: inner dimensions only
                            pinned: sort chooses among it
        pinned at full size
          sizes 64: sort chooses among it (model.py:3)
    """)
    assert sentence(Reduction([])) == "the sizes as recorded: none could be smaller"


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_deep_programs_are_looked_at_in_float64_at_other_sizes(spec, monkeypatch, capsys, jobs):
    """What contracts prove needs no field, at no size; a difference at other sizes withdraws it all the same. A process beside the proof does that."""
    monkeypatch.setattr(analysis, "DEEP", 0)
    seeds, plain = [], verdict.replay_both
    monkeypatch.setattr(verdict, "replay_both", lambda *a: seeds.append(a[4]) or plain(*a))
    assert cli.main(["verify", spec, "--reduce", "-q", "--jobs", jobs, "--no-cache"]) == 0 and seeds == ([None] if jobs == "1" else [])
    capsys.readouterr()
    monkeypatch.setattr(verdict, "agrees", lambda piece: False)
    assert cli.main(["verify", spec, "--reduce", "-q", "--jobs", jobs, "--no-cache"]) == 3
    assert "proved at one choice of sizes, and different at another" in " ".join(capsys.readouterr().out.split())
