"""Wherever a program takes the weights from, its parameters hold the reference's tagged values when it begins."""
from pathlib import Path

import numpy as np
import pytest

from trainverify.capture.options import CaptureOptions
from trainverify.capture.provenance import tag_table
from trainverify.capture.session import capture
from trainverify.capture.spec import load_spec
from trainverify.ops.standard import standard_table
from trainverify.replay.machine import Hooks
from trainverify.replay.run import World

SPECS = Path(__file__).parent / "specs"


def decoded(program, table, kind):
    """rank -> name -> symbol numbers of the tensors that calls of one kind name, at that place."""
    world = World(program, [], standard_table(), Hooks())
    found = {}
    for machine in world.machines:
        machine.trace.ops[:] = machine.trace.ops[:1 + max(c.index for c in machine.trace.ops if c.name == kind)]
    world.run()
    for machine in world.machines:
        named = {c.args[0]: c.args[1] for c in machine.trace.ops if c.name == kind}
        found[machine.rank] = {n: table.decode(machine.native.tensor(r).float().numpy()) for n, r in named.items()}
    return found


def captured(spec, case):
    done = capture(load_spec(SPECS / spec), CaptureOptions(case=case, steps=1, timeout=60, second_run=False))
    assert done.diagnostics == [], done.diagnostics
    return done, tag_table(done.reference)


@pytest.mark.parametrize(("spec", "case"), [
    *(("loading.py", {"how": h}) for h in ("whole", "mmap", "numpy", "distributed_checkpoint")), ("default_save.py", {}), ("default_save.py", {"opened": True})])
def test_whole_weights(spec, case):
    done, table = captured(spec, case)
    reference = decoded(done.reference, table, "tv.param")[0]
    for rank, parameters in decoded(done.parallel, table, "tv.param").items():
        for name, numbers in parameters.items():
            assert (numbers == reference[name]).all() and (numbers >= 0).all(), (rank, name)


def test_slices():
    done, table = captured("loading.py", {"how": "sliced"})
    reference, parallel = (decoded(p, table, "tv.param") for p in (done.reference, done.parallel))
    for rank in (0, 1):
        assert (parallel[rank]["0.weight"] == np.split(reference[0]["0.weight"], 2)[rank]).all()
        assert (parallel[rank]["1.weight"] == np.split(reference[0]["1.weight"], 2, 1)[rank]).all()


def test_optimizer_state_that_exists_is_symbols():
    done, table = captured("loading.py", {"how": "whole"})
    symbols = {c.args[1]: c for c in done.reference.traces[0].ops if c.name == "tv.symbol"}
    assert {n for n, c in symbols.items() if c.args[0] == "state"} == {f"{p}::{k}" for p in ("0.weight", "0.bias", "1.weight") for k in ("exp_avg", "exp_avg_sq")}
    assert (done.reference.blobs[0]["symbol.0.bias::exp_avg_sq"].view(np.float32) > 0).all()
    trace, blobs = done.parallel.traces[0], done.parallel.blobs[0]
    (adam,) = [c for c in trace.ops if c.name == "aten.lerp_.Scalar" and c.args[0].size == (6,)]
    held = blobs[f"init.{adam.args[0].storage}"] if trace.storages[adam.args[0].storage].initial else None
    if held is not None:
        assert {table.name(n)[0] for n in table.decode(held.view(np.float32))} == {"0.bias::exp_avg"}


def test_half_precision_copies_come_from_recorded_casts():
    done, _ = captured("loading.py", {"how": "half"})
    trace = done.parallel.traces[0]
    params = {c.args[0]: c.args[1] for c in trace.ops if c.name == "tv.param"}
    made = {c.outs.storage for c in trace.ops if c.name == "aten._to_copy.default"}
    assert {r.dtype for r in params.values()} == {"bfloat16"} and {r.storage for r in params.values()} <= made
