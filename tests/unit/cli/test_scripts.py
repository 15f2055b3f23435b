"""Scripts on the command line, with an engine that answers as told: what it is asked for, one table of several, and what is wrong with a line."""
import sys
import types
from pathlib import Path

import pytest
from trainverify import cases, cli
from trainverify.report.model import OutputResult, Report


@pytest.fixture
def asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train.py", "spec.py"):
        Path(name).write_text("")
    fake = types.ModuleType("trainverify.verify")
    fake.asked = []

    def verify_scripts(scripts, options, progress):
        fake.asked.append((scripts, options))
        verdict = "REFUTED" if "--wrong" in scripts.parallel.arguments else "PROVED"
        return Report(verdict=verdict, spec=str(scripts), ranks=scripts.ranks, steps=options.steps, outputs=[OutputResult("scalar", "loss", 1, (0,), verdict)])

    fake.verify_scripts = verify_scripts
    monkeypatch.setitem(sys.modules, "trainverify.verify", fake)
    monkeypatch.setattr(cases, "preload", lambda: None)
    return fake.asked


def test_a_script_after_two_dashes(asked, capsys):
    argv = ["verify", "-q", "--ranks", "4", "--reference", "train.py --tp 1", "--local", "loss=mean", "--skip", "norm", "--steps", "1", "--", "train.py", "--tp", "2", "-q", "a b"]
    assert cli.main(argv) == 0
    ((scripts, options),) = asked
    assert (str(scripts.reference), scripts.parallel.arguments, scripts.ranks, scripts.local, scripts.skip, options.steps) == (
        "train.py --tp 1", ("--tp", "2", "-q", "a b"), 4, {"loss": "mean"}, ("norm",), 1)
    out = capsys.readouterr().out
    assert "train.py --tp 2 -q 'a b'" in out and "-- train.py --tp 2 -q 'a b'" in out.split("rerun: ")[1]


def test_several_make_a_table(asked, capsys):
    code = cli.main(["verify", "-q", "--ranks", "2", "--reference", "train.py", "--run", "train.py --tp 2", "--run", "ranks=8 train.py --wrong"])
    out = capsys.readouterr().out
    assert code == 1 and "REFUTED: 2 runs: 1 refuted, 1 proved" in out and "train.py --tp 2" in out


@pytest.mark.parametrize(("argv", "text"), [
    ("--reference train.py", "need a parallel command line"), ("--ranks 2 -- train.py", "need --reference"), ("--reference train.py -- train.py", "need --ranks N"),
    ("spec.py --ranks 2 --reference train.py -- train.py", "spec.py is a spec, and --reference a script"),
    ("--ranks 2 --case a=1 --reference train.py -- train.py", "are for specs"), ("spec.py --skip loss", "--local and --skip are for scripts"),
    ("--ranks 2 --certificate c --reference train.py --run train.py -- train.py", "--certificate is for one parallel command line"),
    ("--ranks 2 --reference gone.py -- train.py", "SCRIPT001"), ("--ranks 2 --reference train.py -- train.py {x}", "SCRIPT002"),
    ("--ranks 2 --reference train.py --local loss -- train.py", "SCRIPT002")])
def test_usage(asked, capsys, argv, text):
    assert cli.main(["verify", *argv.split()]) == 2
    assert text in " ".join(capsys.readouterr().err.split()) and asked == []
