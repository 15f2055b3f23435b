"""Real bugs of training frameworks, each as a small spec: the broken program is caught at its line, the fixed one equals its reference.

A spec's BUG says what to expect. diagnosis: the class of what is wrong; line, also: parts of the source lines of which the report
must name one; unknown: the reason, where UNKNOWN is expected in place of REFUTED; control: True where no program over the real
numbers can differ, so that the "broken" one must not alarm either; missed: what the report does not get right yet ("line",
"diagnosis"), which is then not asserted.
"""
from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

import trainverify as tv
from trainverify.report.model import Report

FOLDER = Path(__file__).parent
DIAGNOSES = {"multiple", "partial sum", "permutation", "other tensor", "reweighted", "additive term", "stale", "never updated",
             "uninitialised", "decision", "other"}
QUICK = {"a1_norm_grad_not_reduced_under_sp", "b30_loss_times_ranks_under_ddp", "b22_row_bias_before_all_reduce"}


@dataclass(frozen=True)
class Bug:
    path: Path
    id: str
    link: str
    diagnosis: str = "other"
    line: str = ""
    also: tuple[str, ...] = ()
    unknown: str = ""
    control: bool = False
    missed: tuple[str, ...] = ()


def bug(path: Path) -> Bug:
    """Read from the file without running it."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "BUG":
            fields = ast.literal_eval(node.value)
            return Bug(path, **{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    raise ValueError(f"{path} has no BUG")


BUGS = [bug(path) for path in sorted(FOLDER.glob("[a-z]*[0-9]_*.py"))]


def params(bugs: list[Bug]) -> list:
    """A few run in the quick suite, every eighth in the slow one, all others with `make test-bugs`."""
    sample = {b.path.stem for b in BUGS[::10]}
    marks = {b: () if b.path.stem in QUICK else pytest.mark.slow if b.path.stem in sample else pytest.mark.corpus for b in bugs}
    return [pytest.param(b, id=b.path.stem, marks=marks[b]) for b in bugs]


def run(b: Bug, fixed: bool) -> Report:
    return tv.verify(b.path, case={"fixed": True} if fixed else {}, repair=False)


def named_lines(report: Report) -> list[str]:
    """Source lines that the report names: of findings, where their values are used, and of diagnostics."""
    spans = [s for f in report.findings for s in (f.diagnostic.span, *f.used_at)] + [d.span for d in report.diagnostics]
    return sorted({source_line(s.file, s.line) for s in spans if s is not None and s.file})


def source_line(file: str, line: int) -> str:
    lines = Path(file).read_text().splitlines()
    return lines[line - 1].strip() if 0 < line <= len(lines) else ""


def not_equal(report: Report) -> list:
    """Outputs that are neither proved nor equal in the field."""
    return [(o.kind, o.name, o.step, o.verdict, o.reason) for o in report.outputs if o.verdict != "PROVED" and not o.reason.startswith("equal at")]


def faults(report: Report) -> list:
    return [d for d in report.diagnostics if d.severity in ("error", "internal")]


def assert_proved(report: Report) -> None:
    assert report.outputs and not_equal(report) == [] and faults(report) == []
    assert report.verdict == "PROVED", {o.reason for o in report.outputs if o.verdict != "PROVED"}


@pytest.mark.parametrize("b", params([b for b in BUGS if not b.control]))
def test_a_broken_program_is_caught_at_its_line(b: Bug):
    report = run(b, fixed=False)
    if b.unknown:
        reasons = [o.reason for o in report.outputs] + [f"{d.code} {d.message}" for d in (*report.diagnostics, *(f.diagnostic for f in report.findings))]
        assert report.verdict == "UNKNOWN" and any(b.unknown in r for r in reasons), (report.verdict, sorted(set(reasons)))
    else:
        assert report.verdict == "REFUTED", (report.verdict, faults(report), not_equal(report))
    named = named_lines(report)
    assert "line" in b.missed or any(text in line for text in (b.line, *b.also) for line in named), named
    diagnosed = {getattr(f, "diagnosis", "") for f in report.findings} - {""}
    assert "diagnosis" in b.missed or not diagnosed or b.diagnosis in diagnosed, diagnosed


@pytest.mark.parametrize("b", params([b for b in BUGS if b.control]))
def test_a_negative_control_is_proved(b: Bug):
    assert_proved(run(b, fixed=False))


@pytest.mark.parametrize("b", params(BUGS))
def test_the_fixed_program_is_proved(b: Bug):
    assert_proved(run(b, fixed=True))


@pytest.mark.parametrize("b", [pytest.param(b, id=b.path.stem) for b in BUGS])
def test_a_spec_says_what_is_expected_of_it(b: Bug):
    assert b.path.stem.startswith(b.id.lower() + "_") and b.link.startswith("https://")
    assert b.diagnosis in DIAGNOSES and (b.control or b.line) and set(b.missed) <= {"line", "diagnosis"}
    assert ast.get_docstring(ast.parse(b.path.read_text()))


def test_every_bug_has_one_spec():
    assert len({b.id for b in BUGS}) == len(BUGS)
