"""A spec that cannot be used is a diagnostic with the user's own line; cases come in the right types."""
import json
import sys

import pytest
import torch

from trainverify.capture import userframes
from trainverify.capture.spec import load_spec, spec_of
from trainverify.capture.userframes import frame_text, is_user_file
from trainverify.diagnostics import Fault

GOOD = "RANKS = 2\ndef reference(): pass\ndef parallel(ref, tp: int = 2, lr=0.1, sp=False, mode='ring'): pass\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("my_spec", "neighbour_of_spec"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    def made(text, name="my_spec.py"):
        (tmp_path / name).write_text(text)
        return tmp_path / name
    return made


def fault(function, *args):
    with pytest.raises(Fault) as caught:
        function(*args)
    (diagnostic,) = caught.value.diagnostics
    return diagnostic


def test_good(write):
    spec = load_spec(write(GOOD + "CASES = [{'tp': 4}]\n"))
    assert spec.world_size(None, {}) == 2 and spec.world_size(6, {}) == 6 and spec.cases == ({"tp": 4},)
    assert spec.case({}) == {}
    assert spec.case({"tp": 4, "sp": True, "lr": 1}) == {"tp": 4, "sp": True, "lr": 1.0}
    assert spec.case({"mode": 5}) == {"mode": "5"}


def test_neighbours_are_importable(write):
    write("VALUE = 7\n", "neighbour_of_spec.py")
    assert load_spec(write("from neighbour_of_spec import VALUE\n" + GOOD + "RANKS = VALUE\n")).ranks == 7


def test_no_such_file(tmp_path):
    assert fault(load_spec, tmp_path / "none.py").code == "SPEC001"


def test_wrong_ranks_are_of_the_file_as_a_whole(write):
    for ranks in ("'two'", "0", "None"):
        spec = load_spec(write(GOOD + f"RANKS = {ranks}\n"))
        d = fault(spec.world_size, None, {})
        assert (d.code, d.span.line, d.span.file) == ("SPEC005", 0, spec.path), d


def test_whose_code_a_file_is():
    user = ("/home/u/train.py", "train.py", "/home/u/fast.pyx")
    assert [is_user_file(f) for f in user] == [True] * 3
    assert [is_user_file(f) for f in ("numpy/random/_generator.pyx", "<string>", torch.__file__, userframes.__file__, json.__file__)] == [False] * 5


def test_a_frame_without_source_says_no_more_than_its_place():
    assert frame_text(("a.py", 3, "f", "x = 1")) == "a.py:3 in f: x = 1" and frame_text(("a.py", 3, "f", "")) == "a.py:3 in f"


def test_import_error_shows_the_line(write):
    d = fault(load_spec, write("import torch\n\ndef f():\n    return 1 / 0\n\nf()\n"))
    assert d.code == "SPEC002" and "ZeroDivisionError" in d.message and d.span.line == 4 and d.span.stack[0][1] == 6


def test_syntax_error_shows_the_line(write):
    d = fault(load_spec, write("x = 1\ndef f(:\n"))
    assert d.code == "SPEC002" and d.span.line == 2


@pytest.mark.parametrize("text", ["def parallel(ref): pass\n", "reference = 3\ndef parallel(ref): pass\n", "def reference(): pass\n",
                                  "def reference(x): pass\ndef parallel(ref): pass\n", "def reference(): pass\ndef parallel(): pass\n"])
def test_functions_are_missing(write, text):
    assert fault(load_spec, write(text)).code == "SPEC003"


@pytest.mark.parametrize("more", ["CASES = 3\n", "CASES = [3]\n", "OPS = ['add']\n", "ACCEPT = 'x.py:3'\n", "ACCEPT = ['x.py']\n"])
def test_settings_are_wrong(write, more):
    assert fault(load_spec, write(GOOD + more)).code == "SPEC004"


@pytest.mark.parametrize("ranks", ["None", "0", "'two'", "True"])
def test_ranks_are_wrong(write, ranks):
    spec = load_spec(write(GOOD + f"RANKS = {ranks}\n"))
    assert fault(spec.world_size, None, {}).code == "SPEC005"


def test_ranks_may_depend_on_the_case(write):
    spec = load_spec(write(GOOD + "def RANKS(tp=2): return 3 * tp\n"))
    assert spec.world_size(None, {"tp": 4}) == 12


def test_unknown_and_missing_arguments(write):
    spec = load_spec(write(GOOD))
    d = fault(spec.case, {"pp": 2})
    assert d.code == "SPEC006" and "'pp'" in d.message and "tp, lr, sp, mode" in d.message and d.span.line == 3
    spec = load_spec(write("def reference(): pass\ndef parallel(ref, tp): pass\n"))
    assert fault(spec.case, {}).code == "SPEC006"


def test_first_case_fills_in(write):
    spec = load_spec(write("def reference(): pass\ndef parallel(ref, tp): pass\nCASES = [{'tp': 3}]\n"))
    assert spec.case({}) == {"tp": 3} and spec.case({"tp": 4}) == {"tp": 4}


@pytest.mark.parametrize("given", [{"tp": "four"}, {"tp": 2.5}, {"tp": True}, {"sp": "maybe"}, {"lr": "x"}])
def test_types(write, given):
    assert fault(load_spec(write(GOOD)).case, given).code == "SPEC007"


def test_from_functions():
    spec = spec_of(lambda: None, lambda ref: None, 3)
    assert spec.world_size(None, {}) == 3 and spec.op_rows() == ()
    assert fault(spec_of, None, lambda ref: None).code == "SPEC003"
