"""The text of several runs: one table, what the good ones rest on, and the full report of every run that is not."""
from pathlib import Path

import pytest
from trainverify.report import table
from trainverify.report.model import Suite

from . import reports


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[3])


def suite(*names, **more) -> Suite:
    made = Suite([reports.ALL[n]() for n in names], 61.5, "trainverify verify spec.py --all-cases", {"trainverify": "0.1.0", "torch": "2.13.0"})
    for i, report in enumerate(made.reports):
        report.case = {"tp": i + 1}
        report.rerun = ""
        for key, value in more.items():
            setattr(report, key, value)
    return made


def test_suite_reads_as_before(snapshot):
    assert table.render(suite("proved", "refuted", "refuted", "equal_in_field", "cannot_run"), saved=".trainverify/last.json") == snapshot


@pytest.mark.parametrize("spec", ["spec.py", "a/folder/with/a/rather/long/name/spec.py"])
def test_it_fits_80_ascii_columns(spec):
    made = suite(*reports.ALL)
    for i, report in enumerate(made.reports):
        report.spec, report.case = (spec if i else "other.py"), {"schedule": "interleaved_1f1b", "tensor_parallel": i}
    rendered = table.render(made)
    wide = [line for line in rendered.split("\n") if len(line) > 80]
    assert rendered.isascii() and [line for line in wide if max(map(len, line.split())) < 60] == []


def test_the_verdict_and_the_table_stand_on_the_first_screen():
    lines = table.render(suite("proved", "refuted", "internal")).split("\n")
    assert lines[2] == "REFUTED: 3 runs: 1 refuted, 1 error, 1 proved" and lines[5].startswith("  tp=1 ") and lines[7].strip() == "REL002 at norm.py:13"


def test_runs_that_are_proved_are_told_in_the_table_alone():
    rendered = table.render(suite("proved", "proved"))
    assert "---- " not in rendered and rendered.count(" PROVED ") == 2
    assert rendered.count("A1 casts are the identity") == 1 and "in each run, its token ids" in rendered and "over the real numbers\n" in rendered


def test_a_run_that_is_only_equal_is_told_with_the_reason_that_it_is_not_proved():
    rendered = table.render(suite("proved", "equal_in_field"))
    assert "all 100 outputs equal at 2 field points; not proved" in rendered and "over the real numbers, where PROVED\n" in rendered
    assert "no proof that aten.mul.Tensor on rank 0" in " ".join(rendered.partition("---- spec.py[tp=2]")[2].split())


@pytest.mark.parametrize("name", ["equal_in_field", "mixed_unknown", "dry_run", "captured"])
def test_what_is_not_proved_is_shown_in_full(name):
    assert f"---- spec.py[tp=1] {'-' * 61}\n\ntrainverify 0.1.0" in table.render(suite(name))


def test_steps_that_were_not_begun_are_not_counted():
    assert "steps" not in table.render(suite("cannot_run", steps=0)).split("\n")[0] and "| 2 steps |" in table.render(suite("cannot_run", "proved"))


def test_nothing_was_run():
    assert "\nUNKNOWN: nothing was run\n" in table.render(Suite())
