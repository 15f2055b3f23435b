"""Specs of the tests: captured, and verified by reduction."""
from collections.abc import Callable

from trainverify.capture.session import capture
from trainverify.capture.spec import spec_of
from trainverify.engine.options import Options
from trainverify.ir.trace import Program
from trainverify.report.model import Report
from trainverify.verify import _verify


def quiet(*args, **kwargs) -> None:
    pass


def captured(reference: Callable, parallel: Callable, ranks: int) -> tuple[Program, Program]:
    found = capture(spec_of(reference, parallel, ranks, ()), Options(ranks=ranks, steps=1), quiet)
    assert found.reference is not None and found.parallel is not None, found.diagnostics
    return found.reference, found.parallel


def verified(reference: Callable, parallel: Callable, ranks: int, reduce: bool = True, cross_check: bool = False, full_size: bool = False) -> Report:
    options = Options(ranks=ranks, steps=1, jobs=1, repair=False, reduce=reduce, cross_check=cross_check, full_size=full_size)
    return _verify(lambda: spec_of(reference, parallel, ranks, ()), options, quiet, "")
