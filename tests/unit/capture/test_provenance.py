"""What changes with the symbols without a recorded reason is found by a second capture and made unknown."""
from pathlib import Path

import numpy as np
import pytest

from capture.check import replayed
from trainverify.capture.options import CaptureOptions
from trainverify.capture.provenance import SCALARS, mark_changes
from trainverify.capture.session import capture
from trainverify.capture.spec import load_spec
from trainverify.capture.tags import TagTable
from trainverify.ir.trace import OpCall, Program, ScalarRef, TensorRef, Trace, inputs

SPEC = Path(__file__).parent / "specs" / "leaving.py"


def captured(how, **more):
    done = capture(load_spec(SPEC), CaptureOptions(case={"how": how}, steps=1, timeout=60, **more))
    assert done.diagnostics == [] and done.reference.traces[0].notes[:-1] == []
    return done


def names(trace):
    return [c.name for c in trace.ops]


def codes(trace):
    return [n.code for n in trace.notes if n.code in ("CAP006", "CAP007")]


def again(done):
    return any(p.name == "capture again" for p in done.phases)


def test_no_second_run_where_nothing_leaves():
    done = captured("nothing")
    assert not again(done) and codes(done.parallel.traces[0]) == []


@pytest.mark.parametrize("how", ["tracked", "harmless", "routed", "copied"])
def test_nothing_is_lost(how):
    done = captured(how)
    trace = done.parallel.traces[0]
    assert again(done) and codes(trace) == [] and "tv.scalar.unknown" not in names(trace)
    if how == "tracked":
        (scaled,) = [c for c in trace.ops if c.name == "aten.mul_.Tensor" and c.span >= 0 and trace.spans[c.span].function == "tracked"]
        assert isinstance(scaled.args[1], ScalarRef)


def test_a_number_that_equals_a_tracked_one():
    trace = captured("stripped_to_the_same").parallel.traces[0]
    assert codes(trace) == ["CAP007"] and "tv.scalar.unknown" not in names(trace)


@pytest.mark.parametrize(("value", "kind", "taken"), [(3.9443554878234863, "weight", True), (0.5, "weight", False), (1.0, "weight", False),
                                                      (0.9990000000000001, "", False)])
def test_a_number_that_rounds_to_the_same_in_both_captures(value, kind, taken):
    """Weights differ so little between the captures that a sum of them may be the same in both; what comes from no symbol (beta ** step of an
    optimizer) equals many a constant."""
    def program(reported):
        ref = TensorRef(0, 0, (), (), "float32")
        ops = [OpCall(0, "tv.symbol" if kind else "aten.ones.default", (kind, "w", ref) if kind else (), {}, None if kind else ref),
               OpCall(1, "aten._local_scalar_dense", (ref,), {}, ScalarRef(0)), OpCall(2, "tv.output", ("scalar", "loss", 1, reported), {}, None)]
        return Program([Trace("reference", 0, 1, ops=ops)], [{SCALARS: np.array([value])}])

    first, table = program(value), TagTable([])
    assert mark_changes(first, program(value), table, table) == int(taken)
    assert first.traces[0].ops[2].args[3] == (ScalarRef(0) if taken else value)
    other = program(7.25)
    assert mark_changes(other, program(7.25), table, table) == 0 and other.traces[0].ops[2].args[3] == 7.25


@pytest.mark.parametrize("how", ["stripped", "eight_bits"])
def test_a_number_from_nowhere(how):
    trace = captured(how).parallel.traces[0]
    (note,) = [n for n in trace.notes if n.code == "CAP006"]
    assert trace.spans[note.span].function == how and "aten.mul" in note.text
    at = names(trace).index("tv.scalar.unknown")
    assert trace.ops[at].outs == trace.ops[at + 1].args[1] and [c.index for c in trace.ops] == list(range(len(trace.ops)))


def test_data_from_nowhere():
    done = captured("data")
    trace = done.parallel.traces[0]
    assert codes(trace) == ["CAP006"]
    (call,) = [c for c in trace.ops if c.name == "aten.empty.memory_format" and c.rng]
    assert f"rng.{call.index}.0" in done.parallel.blobs[0] and call.outs.storage in [r.storage for r in inputs(trace.ops[call.index + 1])]
    replayed(done.parallel)                    # the bytes are still what they were


def test_a_branch_on_nothing_known():
    trace = captured("branch").parallel.traces[0]
    assert codes(trace) in (["CAP006"], [])    # both captures may take the same branch
    if codes(trace):
        (decision,) = [c for c in trace.ops if c.name == "tv.decision"]
        assert decision.args[0] == "unknown" and trace.spans[decision.span].function == "branch"


def test_it_can_be_switched_off():
    assert not again(captured("stripped", second_run=False))
