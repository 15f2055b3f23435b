"""The pytest plugin: tests per case of a spec, and failures that are the report and nothing else (no torch, not trusted).

    @pytest.mark.trainverify_cases("spec.py")
    def test_equal(case):
        tv.assert_equivalent("spec.py", case=case)
"""
from __future__ import annotations

import os
from typing import Any

import pytest

from trainverify.diagnostics import Fault
from trainverify.testing import NotEquivalent

MARKER = "trainverify_cases"
_KNOWN = pytest.StashKey[dict[str, list[dict[str, Any]]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{MARKER}(spec): run the test once for each entry of the spec's CASES, which is its argument `case`")
    config.stash[_KNOWN] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker(MARKER)
    if marker is None:
        return
    spec = marker.args[0] if len(marker.args) == 1 and not marker.kwargs else None
    if not isinstance(spec, (str, os.PathLike)):
        raise pytest.Collector.CollectError(f'{metafunc.definition.nodeid}: write @pytest.mark.{MARKER}("spec.py"), with one path')
    if "case" not in metafunc.fixturenames:
        raise pytest.Collector.CollectError(f"{metafunc.definition.nodeid}: {MARKER} gives the argument `case`, which the test does not take")
    cases = _cases(os.path.abspath(spec), metafunc.config.stash[_KNOWN])
    metafunc.parametrize("case", cases, ids=[",".join(f"{k}={v}" for k, v in c.items()) or "defaults" for c in cases])


def _cases(spec: str, known: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The cases of a spec, which is asked once in a session."""
    if spec not in known:
        from trainverify.cases import cases_of
        from trainverify.report.text import diagnostic_lines

        try:
            known[spec] = cases_of(spec)
        except Fault as fault:
            raise pytest.Collector.CollectError("\n".join(line for d in fault.diagnostics for line in diagnostic_lines(d))) from None
    return known[spec]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """A difference between the programs is shown as its report: the test's own stack says nothing about it."""
    report = yield
    if call.excinfo is not None and call.excinfo.errisinstance(NotEquivalent):
        from trainverify.report.text import headline

        report.longrepr = call.excinfo.getrepr(style="value", chain=False)
        if report.longrepr.reprcrash is not None:   # the line of pytest's summary, and the message of its own JUnit file
            report.longrepr.reprcrash.message = headline(call.excinfo.value.report)
    return report
