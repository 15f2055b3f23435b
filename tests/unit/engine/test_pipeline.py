"""The entry points of Python and of the command line on real, tiny programs: verdicts, files, accepted decisions, faults."""
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import trainverify as tv
from trainverify import cli
from trainverify.engine.options import Options
from trainverify.report.text import render
from trainverify.verify import capture_spec, verify_dir, verify_spec

SPECS = Path(__file__).parent / "specs"
sys.path.insert(0, str(SPECS))
ONE = Options(steps=1, timeout=60.0)


def reference():
    torch.manual_seed(0)
    model, x = torch.nn.Linear(4, 3), torch.randn(6, 4)
    return tv.Training(model, step_of(model, x), batch=x)


def step_of(model, x, factor=1.0):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        loss = model(x).square().mean() * factor
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss}
    return step


def parallel(ref, factor=1.0):
    model = torch.nn.Linear(4, 3)
    model.load_state_dict(ref.weights)
    return tv.Training(model, step_of(model, ref.batch, factor))


def equal(report):
    return bool(report.outputs) and report.verdict == "PROVED" and all(o.verdict == "PROVED" for o in report.outputs)


def test_two_functions():
    report = tv.verify(reference, parallel, ranks=6, steps=1)
    assert equal(report) and report.ranks == 6 and report.exit_code == 0
    assert report.versions["torch"].startswith(torch.__version__.split("+")[0]) and {"trainverify", "numpy", "python"} <= report.versions.keys()
    assert report.rerun == "" and report.peak_memory > 0 and report.seconds > 0
    assert report.data == "6 samples, each read once"


def test_a_weight_that_an_unknown_operation_writes_was_bound():
    def made(ref):
        model = torch.nn.Linear(4, 3)
        model.load_state_dict(ref.weights)
        step = step_of(model, ref.batch)

        def then():
            out = step()
            model.weight.data.copy_(model.weight.data + 0 * torch.linalg.svdvals(model.weight.data).sum())
            return out
        return tv.Training(model, then)
    report = tv.verify(reference, made, ranks=1, steps=2)
    assert report.verdict == "UNKNOWN" and [d.code for d in report.diagnostics if d.severity == "error"] == ["OPS001"]


def test_a_fault_of_the_reference_says_so():
    def broken():
        raise RuntimeError("no data")
    (fault,) = tv.verify(broken, parallel, ranks=1, steps=1).diagnostics
    assert fault.code == "RUN009" and fault.notes[0] == "it was the reference that ran"


@pytest.mark.slow
def test_two_functions_and_a_case():
    report = tv.verify(reference, parallel, ranks=2, steps=1, case={"factor": 2.0})
    assert report.verdict == "REFUTED" and report.case == {"factor": 2.0}


def test_a_spec_file_and_a_case():
    assert equal(tv.verify(SPECS / "swiglu.py", steps=1))
    report = tv.verify(str(SPECS / "swiglu.py"), steps=1, case={"swapped": True})
    assert report.verdict == "REFUTED"
    assert report.rerun == f"trainverify verify {SPECS / 'swiglu.py'} --case swapped=True --steps 1 --seed 0"


def test_a_spec_knows_which_routing_it_is(tmp_path):
    """For the seed of its batch; at import too."""
    def drawn(ref=None):
        torch.manual_seed(0)
        model, x = torch.nn.Linear(4, 3), torch.randn(6, 4, generator=torch.Generator().manual_seed(tv.routing()))
        (tmp_path / f"{tv.routing()}").touch()
        if ref is not None:
            model.load_state_dict(ref.weights)
        return tv.Training(model, step_of(model, x), batch=x if ref is None else None)
    spec = tmp_path / "spec.py"
    spec.write_text((SPECS / "swiglu.py").read_text() + f"\nimport pathlib, trainverify\npathlib.Path({str(tmp_path)!r}, f'imported-{{trainverify.routing()}}').touch()\n")
    assert tv.routing() == 0
    assert verify_spec(spec, replace(ONE, routing=3)).verdict == "PROVED" and (tmp_path / "imported-3").exists()
    assert tv.verify(drawn, drawn, ranks=2, steps=1).outputs and (tmp_path / "0").exists() and not (tmp_path / "3").exists()


@pytest.mark.parametrize("given", [{"seed": -1}, {"seed": "1"}, {"steps": 0}, {"ranks": 0}, {"ranks": True}, {"timeout": 0}, {"timeout": float("nan")},
                                   {"timeout": float("inf")}, {"accept": "model.py:12"}, {"accept": ["model.py"]}])
def test_a_value_that_no_run_can_have(given):
    def never(*arguments):
        raise AssertionError("it ran")
    (name,) = given
    report = tv.verify(never, never, **given)
    (fault,) = report.diagnostics
    assert report.verdict == "ERROR" and report.outputs == [] and fault.code == "OPT001" and fault.message.startswith(f"{name}=")


def test_dry_run_from_python():
    report = tv.verify(reference, parallel, ranks=1, steps=1, dry_run=True)
    assert report.mode == "dry-run" and report.outputs == [] and report.bound == (2, 2)


def test_assert_equivalent():
    assert equal(tv.assert_equivalent(reference, parallel, ranks=1, steps=1))
    with pytest.raises(AssertionError, match="(?s)REFUTED.*counterexample"):
        tv.assert_equivalent(reference, parallel, ranks=1, steps=1, case={"factor": 2.0})


def test_assert_equivalent_does_not_pass_what_is_undecided():
    def branching(ref):
        model = torch.nn.Linear(4, 3)
        model.load_state_dict(ref.weights)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step():
            loss = model(ref.batch).square().mean()
            if loss.item() > 0:
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return {"loss": loss}
        return tv.Training(model, step)
    with pytest.raises(AssertionError, match="REL008"):
        tv.assert_equivalent(reference, branching, ranks=1, steps=1)


def test_misuse():
    with pytest.raises(TypeError, match="both functions"):
        tv.verify(reference, ranks=1)
    with pytest.raises(TypeError, match="its own OPS"):
        tv.verify("spec.py", ops=[tv.op("a::b", uninterpreted=True)])


def test_accepted_decisions_and_places_that_accept_nothing():
    def cut(ref):
        model = torch.nn.Linear(4, 3)
        model.load_state_dict(ref.weights)
        make = step_of(model, ref.batch)

        def step():
            got = make()
            model.weight.sum().item() > 100   # an unmatched decision
            return got
        return tv.Training(model, step)
    line = next(i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "an unmatched decision" in text)
    places = (f"{__file__}:{line}", "elsewhere.py:7")
    report = tv.verify(reference, cut, ranks=1, steps=1, accept=places)
    assert equal(report)
    (a,) = [a for a in report.assumptions if "accepted" in a.text]
    assert a.places == (f"{__file__}:{line}",)
    (d,) = [d for d in report.diagnostics if d.code == "ACC001"]
    assert d.severity == "warning" and "elsewhere.py:7" in d.message
    assert not equal(tv.verify(reference, cut, ranks=1, steps=1))


CUTTING = """
import torch
import trainverify as tv

ACCEPT = ["cutting.py:16"]

def training(weights=None, cut=False):
    model, x = torch.nn.Linear(4, 3), torch.ones(6, 4)
    if weights:
        model.load_state_dict(weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        model(x).sum().backward()
        if cut:
            model.weight.sum().item() > 100   # an unmatched decision
        optimizer.step()
    return tv.Training(model, step, batch=tv.fixed(x))

def reference():
    return training()

def parallel(ref):
    return training(ref.weights, cut=True)
"""


def test_a_spec_says_which_decisions_it_accepts(tmp_path):
    spec = tmp_path / "cutting.py"
    spec.write_text(CUTTING)
    one_rank = Options(ranks=1, steps=1, timeout=60.0)
    report = verify_spec(spec, one_rank)
    assert equal(report), report
    assert [a.places for a in report.assumptions if "accepted" in a.text] == [(f"{spec}:16",)]
    capture_spec(spec, tmp_path / "traces", one_rank)
    assert equal(verify_dir(tmp_path / "traces"))
    spec.write_text(CUTTING.replace(":16", ":15"))
    assert {"REL008", "ACC001"} <= {d.code for d in verify_spec(spec, one_rank).diagnostics}


def test_an_accept_of_a_spec_with_cases_is_for_all_of_them(tmp_path):
    spec = tmp_path / "cutting.py"
    cases = 'CASES = [{"cut": True}, {"cut": False}]\n'
    spec.write_text(CUTTING.replace("ACCEPT", cases + "ACCEPT").replace(":16", ":17")
                    .replace("parallel(ref)", "parallel(ref, cut)").replace("weights, cut=True", "weights, cut=cut"))
    one_rank = Options(ranks=1, steps=1, timeout=60.0)
    for cut in (True, False):
        report = verify_spec(spec, replace(one_rank, case={"cut": cut}))
        assert equal(report), report
        assert bool([a for a in report.assumptions if "accepted" in a.text]) is cut
        assert "ACC001" not in {d.code for d in report.diagnostics}
    capture_spec(spec, tmp_path / "traces", replace(one_rank, case={"cut": False}))
    assert "ACC001" not in {d.code for d in verify_dir(tmp_path / "traces").diagnostics}
    asked = verify_spec(spec, replace(one_rank, case={"cut": False}, accept=("cutting.py:17",)))
    assert "ACC001" in {d.code for d in asked.diagnostics}       # the user names it for this very run


# ---- traces on disk

def test_capture_then_verify_the_folder_with_custom_ops(tmp_path):
    spec = tmp_path / "swiglu_elsewhere.py"
    spec.write_text((SPECS / "swiglu.py").read_text().replace("tvtest::", "tvelse::"))
    out = tmp_path / "traces"
    report = capture_spec(spec, out, ONE)
    assert (report.mode, report.exit_code) == ("capture", 0) and report.ops > 0
    again = verify_dir(out)
    assert equal(again), again
    assert again.steps == 1 and again.ranks == 2 and again.case == {}
    assert any("tvelse.fused_swiglu computes what plain computes" in a.text for a in again.assumptions)
    assert verify_dir(out, Options(dry_run=True)).mode == "dry-run"

    spec.write_text(spec.read_text() + "\n# changed\n")
    assert [d.code for d in verify_dir(out).diagnostics] == ["FILE005"]
    spec.unlink()
    gone = verify_dir(out)
    assert (gone.verdict, gone.exit_code) == ("ERROR", 1) and [d.code for d in gone.diagnostics] == ["FILE004"]


def test_capture_and_verify_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(SPECS / "swiglu.py", "swiglu.py")
    assert cli.main(["capture", "swiglu.py", "-o", "out", "--steps", "1", "--case", "swapped=true", "-q"]) == 0
    assert "CAPTURED: " in capsys.readouterr().out
    assert cli.main(["verify", "out", "-q", "--format", "json"]) == 1
    plain = json.loads(capsys.readouterr().out)
    assert plain["verdict"] == "REFUTED" and plain["case"] == {"swapped": True} and plain["rerun"] == "trainverify verify out"


@pytest.mark.slow
def test_debug_keeps_the_traces(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert equal(verify_spec(SPECS / "swiglu.py", Options(steps=1, keep=True)))
    assert equal(verify_dir(".trainverify/traces"))


# ---- what goes wrong

def test_our_own_exception_keeps_the_traces(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trainverify.engine.build.fill", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        tv.verify(reference, parallel, ranks=1, steps=1)
    assert caught.value.__notes__ == ["the traces are kept in .trainverify/traces"]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert equal(verify_dir(".trainverify/traces"))


def test_a_program_that_cannot_run():
    def stuck(ref):
        dist.init_process_group("gloo")
        made = parallel(ref)

        def step():
            if dist.get_rank() == 2:
                dist.all_reduce(torch.ones(5))    # the odd one out
            else:
                dist.all_reduce(torch.ones(4))
            return made.step()
        return tv.Training(made.model, step)
    report = tv.verify(reference, stuck, ranks=3, steps=1, timeout=60.0)
    assert (report.verdict, report.exit_code) == ("ERROR", 1)
    text = render(report)
    assert "ERROR: the program cannot run" in text
    assert "the odd one out" in text and "all_reduce" in text and "[5]" in text and "[4]" in text and "test_pipeline.py:" in text
    for rank in range(3):
        assert f"rank {rank}" in text or "ranks 0-1" in text or "ranks 0, 1" in text


def test_a_spec_that_cannot_be_used(tmp_path):
    spec = tmp_path / "broken.py"
    spec.write_text("def reference(): pass\n")
    report = verify_spec(spec, ONE)
    assert (report.verdict, report.exit_code) == ("ERROR", 1) and "the spec cannot be used" in render(report)
    assert report.versions
