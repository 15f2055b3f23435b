"""Which outputs a capture names, what it makes symbols, and what it tells of a spec that is wrong."""
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from capture.check import replayed
from trainverify.capture.options import CaptureOptions
from trainverify.capture.provenance import tag_table
from trainverify.capture.session import capture, capture_parallel, capture_reference
from trainverify.capture.spec import load_spec
from trainverify.ir.trace import Name, ScalarRef, Sequence, TensorRef

SPEC = Path(__file__).parent / "specs" / "outputs.py"


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """Captures the parallel program in one way; the reference once for all."""
    spec, folder = load_spec(SPEC), tmp_path_factory.mktemp("outputs")
    reference = capture_reference(spec, CaptureOptions(steps=1, timeout=60), folder)
    assert reference.program is not None, reference.diagnostics

    def run(how, steps=2):
        return capture_parallel(spec, reference, {"how": how}, CaptureOptions(steps=steps, timeout=60), folder)
    return run


@pytest.fixture(scope="module")
def plain():
    done = capture(load_spec(SPEC), CaptureOptions(case={"how": "plain"}, timeout=60, second_run=False))
    assert done.diagnostics == [] and done.ranks == 2 and done.case == {"how": "plain"} and done.peak_memory > 0
    return done


def calls(trace, name):
    return [c for c in trace.ops if c.name == name]


def outputs(trace, kind=None, step=None):
    return {c.args[1]: c for c in calls(trace, "tv.output") if kind in (None, c.args[0]) and step in (None, c.args[2])}


def test_symbols(plain):
    trace, blobs = plain.reference.traces[0], plain.reference.blobs[0]
    kinds = {c.args[1]: c.args[0] for c in calls(trace, "tv.symbol")}
    assert kinds == {"embed.weight": "weight", "norm.weight": "weight", "norm.bias": "weight", "unused": "weight",
                     "norm.running_mean": "buffer", "norm.running_var": "buffer", "batch['x']": "batch"}
    for c in calls(trace, "tv.symbol"):
        values = blobs[f"symbol.{c.args[1]}"].view(np.float32)
        assert c.writes == (c.args[2],) and len(values) == c.args[2].numel and np.unique(values).size == values.size
    assert (blobs["symbol.norm.running_var"].view(np.float32) > 0).all()


def test_parallel_side_is_bound_by_identity(plain):
    for trace, blobs in zip(plain.parallel.traces, plain.parallel.blobs):
        given = {c.args[1]: c.args[2] for c in calls(trace, "tv.symbol")}
        assert set(given) == {c.args[1] for c in calls(plain.reference.traces[0], "tv.symbol")}
        for name, ref in given.items():
            assert blobs[f"init.{ref.storage}"].tobytes() == plain.reference.blobs[0][f"symbol.{name}"].tobytes()


def test_parameters_and_what_is_stepped(plain):
    trace = plain.parallel.traces[1]
    assert [c.args[0] for c in calls(trace, "tv.param")] == ["unused", "embed.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"]
    assert {c.args[0] for c in calls(trace, "tv.stepped")} == {"unused", "embed.weight", "norm.weight", "norm.bias"}


def test_outputs(plain):
    trace = plain.reference.traces[0]
    for step in (1, 2):
        assert set(outputs(trace, "gradient", step)) == {"unused", "embed.weight", "norm.weight", "norm.bias"}
        assert set(outputs(trace, "parameter", step)) == {"unused", "embed.weight", "norm.weight", "norm.bias"}
        assert set(outputs(trace, "buffer", step)) == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "count"}
        assert set(outputs(trace, "state", step)) == {f"{p}::{k}" for p in ("embed.weight", "norm.weight", "norm.bias") for k in ("step", "exp_avg", "exp_avg_sq")}
        assert outputs(trace, "gradient", step)["unused"].args[3] is None
        assert isinstance(outputs(trace, "gradient", step)["norm.bias"].args[3], TensorRef)
    scalars = outputs(trace, "scalar", 1)
    assert set(scalars) == {"loss", "double", "lr"} and isinstance(scalars["double"].args[3], ScalarRef) and scalars["lr"].args[3] == 0.1
    assert scalars["loss"].args[3].size == ()
    assert max(Counter((c.args[0], c.args[1], c.args[2]) for c in calls(trace, "tv.output")).values()) == 1


def test_declared_shares(plain):
    scalars = outputs(plain.parallel.traces[0], "scalar", 1)
    assert scalars["loss"].kwargs == {"declare": "sum", "group": Sequence((0, 1))}
    assert scalars["double"].kwargs == {"declare": "mean"} and scalars["one"].args[3].size == ()


def test_phases_and_places(plain):
    trace = plain.parallel.traces[0]

    def span(name, **fields):
        found = [trace.spans[c.span] for c in trace.ops if c.name.startswith(name)]
        return [s for s in found if all(getattr(s, k) == v for k, v in fields.items())]

    forward = span("aten._native_batch_norm", phase="forward", step=2)
    assert forward and {(s.function, s.module) for s in forward} == {("forward", "norm")}
    backward = span("aten.native_batch_norm_backward", step=1)
    assert {(s.phase, s.function, s.module, s.line) for s in backward} == {("backward", "forward", "norm", forward[0].line)}
    assert {s.function for s in span("aten.addcdiv_")} == {"step"} and {s.phase for s in span("aten.addcdiv_")} == {"optimizer"}
    assert {s.phase for s in span("aten.normal_")} == {"setup"} and {s.step for s in span("aten.normal_")} == {0}
    loss = span("aten.nll_loss_forward", step=1)[0]
    assert loss.function == "loss_of" and loss.stack[0][2] == "step" and loss.file.endswith("outputs.py")


def test_replays(plain):
    replayed(plain.reference)
    replayed(plain.parallel)


def test_finish_comes_before_the_last_parameters(captured):
    trace = captured("late").program.traces[0]
    added = [c.index for c in trace.ops if c.name == "aten.add_.Tensor" and c.args[1] == 1 and trace.spans[c.span].function == "<lambda>"]
    assert len(added) == 1 and added[0] < outputs(trace, "parameter", 2)["unused"].index
    assert len([c for c in calls(trace, "tv.output") if c.args[:3] == ("parameter", "unused", 2)]) == 1


def test_with_finish_a_steps_parameters_are_those_that_the_next_optimizer_meets(captured):
    trace = captured("gathered_in_the_forward").program.traces[0]
    completed = [c.index for c in trace.ops if c.name == "aten.add_.Tensor" and c.args[1] == 3]
    stepped = [c.index for c in calls(trace, "tv.output") if c.args[:3] == ("gradient", "embed.weight", 2)]
    assert completed[0] < outputs(trace, "parameter", 1)["unused"].index < stepped[0] < completed[1] < outputs(trace, "parameter", 2)["unused"].index
    assert set(outputs(trace, "parameter", 1)) == set(outputs(trace, "parameter", 2))
    means = [outputs(trace, "buffer", step)["norm.running_mean"].index for step in (1, 2)]
    assert means[0] < completed[0]             # the next forward changes it
    assert means[1] > stepped[0]


def test_gradients_are_read_after_the_optimizers_own_hooks(captured):
    trace = captured("changed_by_a_hook").program.traces[0]
    for step in (1, 2):
        doubled = [c.index for c in trace.ops if c.name == "aten.mul_.Tensor" and c.args[1] == 2 and trace.spans[c.span].step == step]
        assert max(doubled) < min(c.index for c in outputs(trace, "gradient", step).values())


def test_two_optimizer_steps_in_one(captured):
    trace = captured("twice", steps=1).program.traces[0]
    assert {"norm.bias", "norm.bias#2"} <= set(outputs(trace, "gradient", 1)) and "norm.bias#2" not in outputs(trace, "parameter", 1)


def test_no_optimizer_is_noted(captured):
    trace = captured("by_hand", steps=1).program.traces[0]
    assert "CAP004" in {n.code for n in trace.notes} and not outputs(trace, "gradient")


def test_chunks_have_unique_names(captured):
    trace = captured("chunks", steps=1).program.traces[0]
    names = [c.args[0] for c in calls(trace, "tv.param")]
    assert len(set(names)) == len(names) and {"chunk0.norm.bias", "chunk1.norm.bias", "weight"} <= set(names)


def test_group_names_in_traces(plain):
    groups = {g.ranks for g in plain.parallel.traces[0].groups}
    assert groups == {(0, 1)} and plain.parallel.traces[0].meta["case"] == "{'how': 'plain'}"


def test_tags_decode(plain):
    table = tag_table(plain.reference)
    raw = plain.reference.blobs[0]["symbol.norm.bias"].view(np.float32)
    assert [table.name(n) for n in table.decode(raw)] == [("norm.bias", i) for i in range(4)]


@pytest.mark.parametrize(("how", "code", "text"), [
    ("not_a_training", "SPEC008", "returned a Net"), ("no_model", "SPEC008", "model is a str"), ("wrong_report", "SPEC011", "shape [2]"),
    ("wrong_value", "SPEC011", "as a str"), ("wrong_return", "SPEC011", "returned a float"), ("sparse", "CAP003", "sparse_coo"),
    ("raises", "RUN009", "tp must divide heads")])
def test_wrong_specs(captured, how, code, text):
    done = captured(how, steps=1)
    assert done.program is None
    found = done.diagnostics[0]
    assert found.code == code and text in found.message and found.severity == "error", found


def test_what_the_ranks_printed_is_kept_with_the_traces(tmp_path):
    done = capture(load_spec(SPEC), CaptureOptions(case={"how": "raises"}, steps=1, timeout=60, workdir=tmp_path))
    assert "tp must divide heads" in (tmp_path / "parallel.output" / "rank1.log").read_text()
    assert "calls" in done.phases[0].detail and done.phases[1].detail == ""


def test_opaque_is_never_recorded(plain):
    for trace in plain.parallel.traces:
        for c in trace.ops:
            assert not any(isinstance(a, Name) and a.kind == "opaque" for a in (*c.args, *c.kwargs.values())), c
