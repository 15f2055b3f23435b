"""The pytest plugin in sessions of its own: cases become tests, a failure is the report, a spec that cannot be used is a collection error."""
import subprocess
import sys

import pytest

SPEC = """
import torch, torch.distributed as dist
import trainverify as tv
from model import make, NAME

CASES = [{"factor": 1.0}, {"factor": 2.0}]
RANKS = 1

def step_of(model, x, factor=1.0):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    def step():
        loss = model(x).square().sum() * factor
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step

def reference():
    model, x = make(), torch.randn(3, 4)
    return tv.Training(model, step_of(model, x), batch=x)

def parallel(ref, factor=1.0):
    assert NAME == EXPECTED, NAME
    model = make()
    model.load_state_dict(ref.weights)
    return tv.Training(model, step_of(model, ref.batch, factor))
"""
MODEL = """
import torch
def make():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 2)
"""
TEST = """
import pytest, sys, trainverify as tv

@pytest.mark.trainverify_cases("a/spec.py")
def test_equal(case):
    tv.assert_equivalent("a/spec.py", case=case, steps=1, timeout=60)

@pytest.mark.trainverify_cases("b/spec.py")
def test_modules_of_the_same_name(case):
    if case["factor"] == 1:
        tv.assert_equivalent("b/spec.py", case=case, steps=1, timeout=60)

def test_the_report_is_there():
    with pytest.raises(AssertionError) as caught:
        tv.assert_equivalent("a/spec.py", case={"factor": 2.0}, steps=1, timeout=60)
    assert caught.value.report.verdict == "REFUTED" and caught.value.report.case == {"factor": 2.0}

def test_an_ordinary_failure_keeps_its_traceback():
    wrong = 1
    assert wrong == 2
"""


def pytest_in(folder, *arguments):
    command = [sys.executable, "-m", "pytest", "-p", "trainverify.pytest_plugin", "-p", "no:cacheprovider", "--color=no", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, env=_environment())


def _environment():
    import os
    return {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "", "COLUMNS": "80"}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    for name in "ab":
        (folder / name).mkdir()
        (folder / name / "spec.py").write_text(SPEC + f"\nEXPECTED = {name!r}\n")
        (folder / name / "model.py").write_text(MODEL + f"\nNAME = {name!r}\n")
    (folder / "test_it.py").write_text(TEST)
    return folder


def test_cases_become_tests_and_a_failure_is_the_report(project):
    done = pytest_in(project, "-v", "--strict-markers", "-W", "error")
    out = done.stdout
    assert done.returncode == 1, out + done.stderr
    for name, result in (("test_equal[factor=1.0]", "PASSED"), ("test_equal[factor=2.0]", "FAILED"), ("test_modules_of_the_same_name[factor=1.0]", "PASSED"),
                         ("test_the_report_is_there", "PASSED"), ("test_an_ordinary_failure_keeps_its_traceback", "FAILED")):
        assert f"test_it.py::{name} {result}" in out, out
    report = out.split("_ test_equal[factor=2.0] _")[1].split("_ test_an_ordinary_failure")[0].split("\n", 1)[1]
    assert report.lstrip("_\n").startswith("trainverify "), report
    assert "\nREFUTED: " in report and "-->" in report and "counterexample" in report and "rerun: trainverify verify a/spec.py --case factor=2.0" in report
    assert "Traceback" not in report and "assert_equivalent" not in report and "\nE " not in report
    assert "FAILED test_it.py::test_equal[factor=2.0] - REFUTED: " in out
    assert "wrong == 2" in out


def test_a_spec_that_cannot_be_used_is_a_collection_error_without_a_traceback(tmp_path):
    (tmp_path / "spec.py").write_text("def reference(): pass\n")
    (tmp_path / "test_it.py").write_text(
        "import pytest\n@pytest.mark.trainverify_cases('spec.py')\ndef test_a(case): pass\n")
    done = pytest_in(tmp_path)
    assert done.returncode == 2 and "error[SPEC003]" in done.stdout and "cases_of" not in done.stdout, done.stdout


@pytest.mark.parametrize(("test", "said"), [
    ("@pytest.mark.trainverify_cases('spec.py')\ndef test_a(): pass\n", "which the test does not take"),
    ("@pytest.mark.trainverify_cases\ndef test_a(case): pass\n", "with one path"),
])
def test_misuse_of_the_marker_is_said(tmp_path, test, said):
    (tmp_path / "test_it.py").write_text("import pytest\n" + test)
    done = pytest_in(tmp_path)
    assert done.returncode == 2 and said in done.stdout.replace("\n", " "), done.stdout


def test_the_plugin_does_not_import_torch(tmp_path):
    (tmp_path / "test_it.py").write_text("import sys\ndef test_a(): assert 'torch' not in sys.modules and 'trainverify.pytest_plugin' in sys.modules\n")
    done = pytest_in(tmp_path)
    assert done.returncode == 0, done.stdout
