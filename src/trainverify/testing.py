"""`assert_equivalent`, for a project's own tests: the text report is the message of the failure (no torch at import, not trusted).

A spec file is verified in a forked process, so that specs which import different modules of one name can stand in one test session.
"""
from __future__ import annotations

import os
from pathlib import Path

from trainverify.report.model import Report

KEPT = Path(".trainverify") / "internal-error.txt"


class NotEquivalent(AssertionError):
    """The programs are not known to be equal. The message is the text report; `report` holds it as data."""

    def __init__(self, report: Report):
        from trainverify.report.text import render

        super().__init__("\n" + render(report).rstrip("\n"))
        self.report = report


def assert_equivalent(reference, parallel=None, **options) -> Report:
    """For tests: raises an AssertionError, whose message is the text report, unless every output is PROVED.

    Takes what `verify` takes.
    """
    __tracebackhide__ = True                  # pytest: the failure is in the caller's line
    from trainverify.verify import verify

    if parallel is None and isinstance(reference, (str, os.PathLike)) and "ops" not in options:
        report = _in_a_process(Path(reference), **options)
    else:
        report = verify(reference, parallel, **options)
    if report.verdict != "PROVED":
        raise NotEquivalent(report)
    return report


def _in_a_process(spec: Path, *, ranks=None, case=None, steps=2, seed=0, timeout=300.0, accept=(), dry_run=False, repair=True) -> Report:
    from trainverify.cases import Run, run_all
    from trainverify.engine.options import Options

    options = Options(ranks, dict(case or {}), steps, seed, timeout, tuple(accept), dry_run, repair=repair)
    (report,) = run_all([Run(spec, options)], True, _keep)
    return report


def _keep(text: str) -> str:
    try:
        KEPT.parent.mkdir(exist_ok=True)
        KEPT.write_text(text)
    except OSError:
        return ""
    return str(KEPT)
