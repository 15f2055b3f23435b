"""Several runs in one command: every case of a spec, the project's table in pyproject.toml, the summary, the exit code; with an engine that answers as told."""
import json
import os
import signal
import sys
import types
from pathlib import Path

import pytest
from trainverify import cases, cli
from trainverify.diagnostics import Diagnostic, Fault, Span
from trainverify.engine.options import Options
from trainverify.report.model import Assumption, Finding, OutputResult, Report

SPEC = """
print("imported")
CASES = [{"tp": 2}, {"tp": 3, "sp": True}]
def reference(): pass
def parallel(ref, tp=2, sp=False): pass
"""


def answer(path, options, progress):
    """tp says how the run ends."""
    tp = options.case.get("tp", 0)
    progress("capture parallel")
    print("said by the run")
    if tp == 3:
        finding = Finding(Diagnostic("REL002", "partial", span=Span("train.py", 7, "step")))
        return Report(verdict="REFUTED", spec=str(path), case=options.case, outputs=[OutputResult("scalar", "loss", 1, (0,), "REFUTED", finding=0)], findings=[finding])
    if tp == 4:
        raise ZeroDivisionError("oops")
    if tp == 5:
        raise Fault(Diagnostic("SPEC006", "no such argument"))
    if tp == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    if tp == 7:
        raise KeyboardInterrupt
    output = OutputResult("scalar", "loss", options.steps, (0,), "PROVED")
    assumed = [Assumption("A4", f"routing {options.routing} as recorded")] if tp == 8 else []
    return Report(verdict="PROVED", spec=str(path), case=options.case, ranks=options.ranks or 2, steps=options.steps, seed=options.seed, outputs=[output],
                  routing=options.routing, assumptions=assumed)


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("spec.py").write_text(SPEC)
    fake = types.ModuleType("trainverify.verify")
    fake.verify_spec = fake.verify_scripts = answer
    monkeypatch.setitem(sys.modules, "trainverify.verify", fake)
    monkeypatch.setattr(cases, "preload", lambda: None)
    return tmp_path


def table(text):
    Path("pyproject.toml").write_text("[project]\nname = 'x'\n\n[tool.trainverify]\n" + text)


def reports():
    return json.loads(Path(".trainverify/last.json").read_text())["reports"]


def with_cases(*tps):
    Path("spec.py").write_text(SPEC + f"CASES = {[{'tp': tp} for tp in tps]}\n")


def test_every_case_is_run_and_the_table_says_how(project, capfd):
    assert cli.main(["verify", "spec.py", "--all-cases", "--ranks", "8", "--seed", "4"]) == 1
    out, err = capfd.readouterr()
    assert [(r["case"], r["verdict"]) for r in reports()] == [({"tp": 2}, "PROVED"), ({"tp": 3, "sp": True}, "REFUTED")]
    assert reports()[0]["ranks"] == 8 and reports()[0]["seed"] == 4
    assert "\nREFUTED: 2 runs: 1 refuted, 1 proved\n" in out and "REL002 at train.py:7" in out and "---- spec.py[tp=3,sp=True] ---" in out
    assert "\n  tp=2                       8  PROVED       1       0       0    0.0\n" in out
    assert out.endswith("rerun: trainverify verify spec.py --all-cases --ranks 8 --seed 4\n")
    assert "run 2 of 2: spec.py[tp=3,sp=True]" in err and err.count("said by the run") == 2 and "said" not in out and "imported" not in out
    assert [line for line in out.split("\n") if len(line) > 80] == []


@pytest.mark.parametrize(("tps", "code"), [((2,), 0), ((2, 3, 4), 1), ((2, 5, 4), 1), ((2, 4), 4), ((2, 6), 4)])
def test_the_exit_code_is_the_worst(project, tps, code):
    with_cases(*tps)
    assert cli.main(["verify", "spec.py", "--all-cases", "-q"]) == code
    assert [r["case"]["tp"] for r in reports()] == list(tps)


def test_an_error_of_our_own_costs_one_run_and_keeps_its_traceback(project, capfd):
    with_cases(4, 2)
    cli.main(["verify", "spec.py", "--all-cases", "-q"])
    own, good = reports()
    assert good["verdict"] == "PROVED" and "ZeroDivisionError: oops" in own["diagnostics"][0]["message"] and own["diagnostics"][0]["severity"] == "internal"
    assert "in answer" in Path(".trainverify/internal-error.txt").read_text() and "Traceback" not in "".join(capfd.readouterr())


def test_a_run_that_is_killed_says_so(project):
    with_cases(6)
    cli.main(["verify", "spec.py", "--all-cases", "-q"])
    assert "killed by SIGKILL (often: out of memory)" in reports()[0]["diagnostics"][0]["message"]


def test_an_interrupted_run_ends_them_all(project, capfd):
    with_cases(7, 2)
    assert cli.main(["verify", "spec.py", "--all-cases", "-q"]) == 130
    assert capfd.readouterr().err.endswith("trainverify: interrupted\n")


def test_runs_with_the_same_causes_are_explained_once(project, capfd):
    with_cases(3, 3)
    cli.main(["verify", "spec.py", "--all-cases", "-q"])
    out = capfd.readouterr().out
    assert out.count("error[REL002]") == 1 and "REFUTED, with the same causes as spec.py[tp=3]: REL002 at train.py:7" in out


def test_a_spec_without_cases_runs_once(project):
    Path("spec.py").write_text(SPEC.replace("CASES", "OTHERS"))
    assert cli.main(["verify", "spec.py", "--all-cases", "-q"]) == 0
    assert [r["case"] for r in reports()] == [{}]


@pytest.mark.parametrize(("change", "code"), [("CASES = 3", "SPEC004"), ("CASES = [{'x': object}]", "SPEC004"), ("1/0", "SPEC002"), ("import os; os._exit(3)", "CASE001")])
def test_a_spec_that_cannot_be_asked_for_its_cases(project, change, code):
    Path("spec.py").write_text(SPEC + change + "\n")
    assert cli.main(["verify", "spec.py", "--all-cases", "-q"]) == (4 if code == "CASE001" else 1)
    assert [d["code"] for d in reports()[0]["diagnostics"]] == [code]


@pytest.mark.parametrize("form", ["json", "junit", "github", "sarif"])
def test_every_format_holds_every_run(project, capfd, form):
    cli.main(["verify", "spec.py", "--all-cases", "-q", "--format", form, "-o", "report"])
    assert "tp" in Path("report").read_text() and "REL002" in Path("report").read_text()
    assert "REFUTED: 2 runs" in capfd.readouterr().out


@pytest.mark.parametrize("argv", [["spec.py", "--all-cases", "--case", "tp=2"], [".", "--all-cases"]])
def test_what_all_cases_does_not_go_with(project, capfd, argv):
    assert cli.main(["verify", *argv]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("trainverify verify: error: ")


# ---- pyproject.toml

def test_routings_repeat_what_data_routes_and_nothing_else(project, capsys):
    assert cli.main(["verify", "spec.py", "--case", "tp=8", "--routings", "3"]) == 0
    assert [r["routing"] for r in reports()] == [0, 1, 2] and {r["seed"] for r in reports()} == {0}
    shown = capsys.readouterr()
    assert "run 3 of 3: spec.py[tp=8] routing 3" in shown.err and "tp=8 routing 2" in shown.out and "rerun: trainverify verify spec.py --case tp=8 --routings 3" in shown.out
    assert all(f"routing {n} as recorded" in shown.out for n in range(3))
    assert cli.main(["verify", "spec.py", "--case", "tp=2", "--routings", "3", "-q"]) == 0
    assert [r["routing"] for r in reports()] == [0]
    assert cli.main(["verify", "spec.py", "--case", "tp=8", "--routings", "2", "--debug", "-q"]) == 0


def test_routings_of_scripts(project, capsys):
    def verified(scripts, options, progress):
        assert str(scripts.parallel) == "spec.py --seed '{routing}'" and str(scripts.reference) == str(scripts.parallel)
        return answer(scripts, Options(case={"tp": 8}, routing=options.routing, ranks=options.ranks), progress)
    sys.modules["trainverify.verify"].verify_scripts = verified
    line = "spec.py --seed {routing}"
    assert cli.main(["verify", "--routings", "3", "--ranks", "2", "--reference", line, "--", *line.split()]) == 0
    assert [r["routing"] for r in reports()] == [0, 1, 2] and "run 3 of 3" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--full-size"], ["--self-test"], ["--self-test", "--ranks", "2", "--reference", "spec.py", "--", "spec.py"]])
def test_routings_are_for_values_and_for_verdicts(project, capsys, more):
    assert cli.main(["verify", *([] if "--reference" in more else ["spec.py"]), "--routings", "2", *more]) == 2
    assert "--routings" in capsys.readouterr().err or "--self-test" in more


def test_the_projects_table_is_used_without_a_spec(project, monkeypatch):
    Path("more").mkdir()
    Path("more/b.py").write_text(SPEC)
    Path("sub").mkdir()
    table('specs = ["spec.py", "more/*.py"]\ncases = [{tp = 2}]\nsteps = 3\ntimeout = 60\n')
    monkeypatch.chdir("sub")
    assert cli.main(["verify", "-q"]) == 0
    assert [(Path(r["spec"]).name, r["case"], r["steps"]) for r in reports()] == [("spec.py", {"tp": 2}, 3), ("b.py", {"tp": 2}, 3)]


def test_without_cases_it_is_all_of_them_and_the_command_line_wins(project, monkeypatch):
    table('specs = ["spec.py"]\nsteps = 3\ntimeout = 60\n')
    seen = []
    monkeypatch.setattr(cases, "run_all", lambda runs, quiet, keep, routings: seen.append(runs) or [])
    cli.main(["verify", "--steps", "5"])
    cli.main(["verify", "--case", "tp=9"])
    assert [r.options for r in seen[0]] == [Options(case={"tp": 2}, steps=5, timeout=60.0, cache=True), Options(case={"tp": 3, "sp": True}, steps=5, timeout=60.0, cache=True)]
    assert [(r.spec, r.options) for r in seen[1]] == [(Path("spec.py"), Options(case={"tp": 9}, steps=3, timeout=60.0, cache=True))]


@pytest.mark.parametrize(("text", "code", "said"), [
    ('specs = ["spec.py"]\nstep = 2\n', "CFG001", ["unknown key: step", "pyproject.toml:6", "specs, cases, steps, timeout"]),
    ("steps = 2\n", "CFG003", ["names none"]), ("specs = []\n", "CFG003", ["names none"]),
    ('specs = "spec.py"\n', "CFG002", ["'spec.py' is no list of paths", 'specs = ["tests/spec.py"']),
    ('specs = ["gone.py"]\n', "CFG002", ["'gone.py' names no spec"]), ('specs = ["gone/*.py"]\n', "CFG002", ["'gone/*.py'"]),
    ('specs = ["pyproject.toml"]\n', "CFG002", ["names no spec"]),
    ('specs = ["spec.py"]\nsteps = 0\n', "CFG002", ["steps of", "0 is no positive integer", "pyproject.toml:6"]),
    ('specs = ["spec.py"]\nsteps = true\n', "CFG002", ["True is no positive integer"]),
    ('specs = ["spec.py"]\ntimeout = "9"\n', "CFG002", ["'9' is no positive number"]), ('specs = ["spec.py"]\ntimeout = inf\n', "CFG002", ["inf is no"]),
    ('specs = ["spec.py"]\ncases = "some"\n', "CFG002", ["'some' is neither 'all'"]), ('specs = ["spec.py"]\ncases = []\n', "CFG002", ["[] is neither"]),
    ('specs = ["spec.py"]\ncases = [{tp = [1]}]\n', "CFG002", ["[1] is no string"]), ("specs = [\n", "CFG003", ["cannot be read"]),
])
def test_what_is_wrong_with_the_table_is_a_usage_diagnostic(project, capfd, text, code, said):
    table(text)
    assert cli.main(["verify"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith(f"error[{code}]: ") and all(s in err.replace("\n  ", " ") for s in said), err
    assert [line for line in err.split("\n") if len(line) > 80 and str(project) not in line] == []


def test_no_spec_and_no_table(project, capfd):
    for text in (None, "[project]\nname = 'x'\n"):
        if text:
            Path("pyproject.toml").write_text(text)
        assert cli.main(["verify"]) == 2
        assert "error[CFG003]: no spec was named" in capfd.readouterr().err
