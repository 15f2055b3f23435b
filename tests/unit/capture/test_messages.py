"""Communication: every call gives what torch promises, and its record replays to the same bytes."""
from pathlib import Path

import pytest

from capture.check import replayed
from trainverify.capture.options import CaptureOptions
from trainverify.capture.session import capture
from trainverify.capture.spec import load_spec

SPEC = Path(__file__).parent / "specs" / "messages.py"
KINDS = ("all_reduce", "groups", "rooted", "gathers", "reduce_scatters", "all_to_alls", "point_to_point", "asynchronous", "functional", "objects")


def captured(kind, path=SPEC, **more):
    return capture(load_spec(path), CaptureOptions(case={"kind": kind}, steps=1, timeout=60, **more))


@pytest.mark.parametrize("kind", ["every", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS)])
def test_kind(kind):
    done = captured(kind)
    assert done.diagnostics == [], [d.notes for d in done.diagnostics]
    replayed(done.parallel)


def test_ranks_may_issue_in_different_orders():
    assert captured("orders").diagnostics == []
