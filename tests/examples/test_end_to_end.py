"""Every example through the whole tool, and every wrong twin: verdict and named line."""
from __future__ import annotations

from pathlib import Path

import pytest
from cases import EXAMPLES, TWINS, Example, Twin

from trainverify.engine.options import Options
from trainverify.report.model import Report
from trainverify.verify import verify_spec

ROOT = Path(__file__).resolve().parents[2]
LONG = {"llama_405b"}                          # half a minute: eight ranks


def run(path: Path, case: dict, seed: int = 0) -> Report:
    return verify_spec(path, Options(case=case, seed=seed, repair=False))


def not_proved(report: Report) -> list:
    return [(o.kind, o.name, o.step, o.verdict, o.reason) for o in report.outputs if o.verdict != "PROVED"]


@pytest.mark.parametrize("example", [pytest.param(e, marks=pytest.mark.slow if e.name in LONG else (), id=e.name) for e in EXAMPLES])
def test_a_correct_example_is_proved(example: Example):
    report = run(example.path, example.case or {})
    assert report.verdict == "PROVED", not_proved(report) or report.diagnostics
    assert report.outputs and not_proved(report) == [] and report.exit_code == 0
    assert report.bound[0] == report.bound[1] > 0
    assert not [d for d in report.diagnostics if d.severity in ("error", "internal")]


# Two more seeds with every change, the others with `make test-bugs`.
@pytest.mark.parametrize("seed", [pytest.param(s, marks=pytest.mark.slow if s < 3 else pytest.mark.corpus) for s in range(1, 5)])
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.name)
def test_every_seed_proves_a_correct_example(example: Example, seed: int):
    assert not_proved(run(example.path, example.case or {}, seed)) == []


def places(report: Report) -> set[tuple[str, int]]:
    """Lines that the report names: of findings, where their values are used, and of diagnostics."""
    spans = [f.diagnostic.span for f in report.findings] + [s for f in report.findings for s in f.used_at] + [d.span for d in report.diagnostics]
    return {(str(Path(s.file)), s.line) for s in spans if s is not None}


QUICK = {"norm_grads_not_reduced", "microbatch_mean", "read_before_wait"}


@pytest.mark.parametrize("twin", [pytest.param(t, marks=() if t.path.stem in QUICK else pytest.mark.slow, id=t.path.stem) for t in TWINS])
def test_a_wrong_twin_is_caught_at_its_line(twin: Twin):
    report = run(twin.path, {})
    assert report.verdict in twin.verdicts
    expected = {(str(ROOT / "examples" / p.file), n) for p in (twin.place, *twin.also) for n in p.numbers()}
    assert places(report) & expected, (sorted(expected), sorted(places(report)))
    assert report.verdict != "PROVED" and "PROVED" not in {o.verdict for o in report.outputs if o.finding >= 0}
