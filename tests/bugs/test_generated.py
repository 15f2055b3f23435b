"""Correct programs made at random do not alarm: every output equals the reference, and nothing is at fault."""
from __future__ import annotations

import pytest

import trainverify as tv

QUICK, ALL = (5, 11), range(20)
PROVED = {10, 11, 12, 13, 14, 15, 16, 17, 18, 19}     # one of each form of parallelism


@pytest.mark.parametrize("seed", [pytest.param(s, marks=() if s in QUICK else pytest.mark.slow) for s in ALL])
def test_a_generated_correct_program_does_not_alarm(seed: int):
    from generated import program                # torch is loaded when a test runs, not when tests are collected

    reference, parallel, ranks, words = program(seed)
    report = tv.verify(reference, parallel, ranks=ranks)
    wrong = [(o.kind, o.name, o.step, o.verdict, o.reason) for o in report.outputs if o.verdict != "PROVED" and not o.reason.startswith("equal at")]
    assert report.outputs and wrong == [], words
    assert report.verdict == "PROVED" or seed not in PROVED and report.verdict == "UNKNOWN", words
    assert not [d for d in report.diagnostics if d.severity in ("error", "internal")], words
