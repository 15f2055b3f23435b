"""Wherever a program takes the weights from, its parameters hold the reference's tagged values when it begins."""
from pathlib import Path

import msgspec
import numpy as np
import pytest

from trainverify.capture.options import CaptureOptions
from trainverify.capture.provenance import tag_table
from trainverify.capture.session import capture_parallel, capture_reference
from trainverify.capture.spec import load_spec
from trainverify.ir.trace import Program
from trainverify.ops.standard import standard_table
from trainverify.replay.machine import Hooks
from trainverify.replay.run import World

SPECS = Path(__file__).parent / "specs"


def decoded(program, table, kind):
    """rank -> name -> symbol numbers of the tensors that calls of one kind name, at that place."""
    cut = [msgspec.structs.replace(t, ops=t.ops[:1 + max(c.index for c in t.ops if c.name == kind)]) for t in program.traces]
    world = World(Program(cut, program.blobs), [], standard_table(), Hooks())
    found = {}
    for machine in world.machines:
        machine.release = lambda: None        # the contents are looked at after the run
    world.run()
    for machine in world.machines:
        named = {c.args[0]: c.args[1] for c in machine.trace.ops if c.name == kind}
        found[machine.rank] = {n: table.decode(machine.native.tensor(r).float().numpy()) for n, r in named.items()}
    return found


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """(reference, parallel, table of tags) of a spec in a case; each reference is captured once."""
    references = {}

    def run(name, case):
        options = CaptureOptions(steps=1, timeout=60)
        spec, folder, reference = references.get(name) or (load_spec(SPECS / name), tmp_path_factory.mktemp("loading"), None)
        if reference is None:
            reference = capture_reference(spec, options, folder)
            assert reference.diagnostics == (), reference.diagnostics
            references[name] = spec, folder, reference
        parallel = capture_parallel(spec, reference, case, options, folder)
        assert parallel.diagnostics == (), parallel.diagnostics
        return reference.program, parallel.program, tag_table(reference.program)
    return run


@pytest.mark.parametrize(("spec", "case"), [
    *(("loading.py", {"how": h}) for h in ("whole", "mmap", "numpy", "distributed_checkpoint")), ("default_save.py", {}), ("default_save.py", {"opened": True})])
def test_whole_weights(captured, spec, case):
    ours, theirs, table = captured(spec, case)
    reference = decoded(ours, table, "tv.param")[0]
    for rank, parameters in decoded(theirs, table, "tv.param").items():
        for name, numbers in parameters.items():
            assert (numbers == reference[name]).all() and (numbers >= 0).all(), (rank, name)


def test_slices(captured):
    ours, theirs, table = captured("loading.py", {"how": "sliced"})
    reference, parallel = (decoded(p, table, "tv.param") for p in (ours, theirs))
    for rank in (0, 1):
        assert (parallel[rank]["0.weight"] == np.split(reference[0]["0.weight"], 2)[rank]).all()
        assert (parallel[rank]["1.weight"] == np.split(reference[0]["1.weight"], 2, 1)[rank]).all()


def test_optimizer_state_that_exists_is_symbols(captured):
    ours, theirs, table = captured("loading.py", {"how": "whole"})
    symbols = {c.args[1]: c for c in ours.traces[0].ops if c.name == "tv.symbol"}
    assert {n for n, c in symbols.items() if c.args[0] == "state"} == {f"{p}::{k}" for p in ("0.weight", "0.bias", "1.weight") for k in ("exp_avg", "exp_avg_sq")}
    assert (ours.blobs[0]["symbol.0.bias::exp_avg_sq"].view(np.float32) > 0).all()
    trace, blobs = theirs.traces[0], theirs.blobs[0]
    (adam,) = [c for c in trace.ops if c.name == "aten.lerp_.Scalar" and c.args[0].size == (6,)]
    held = blobs[f"init.{adam.args[0].storage}"] if trace.storages[adam.args[0].storage].initial else None
    if held is not None:
        assert {table.name(n)[0] for n in table.decode(held.view(np.float32))} == {"0.bias::exp_avg"}


def test_half_precision_copies_come_from_recorded_casts(captured):
    trace = captured("loading.py", {"how": "half"})[1].traces[0]
    params = {c.args[0]: c.args[1] for c in trace.ops if c.name == "tv.param"}
    made = {c.outs.storage for c in trace.ops if c.name == "aten._to_copy.default"}
    assert {r.dtype for r in params.values()} == {"bfloat16"} and {r.storage for r in params.values()} <= made
