"""Whole programs: every way of parallel training that torch offers is captured, and the traces replay bit for bit."""
import math
from pathlib import Path

import pytest
import torch

from capture.check import replayed
from trainverify.capture.options import CaptureOptions
from trainverify.capture.session import capture
from trainverify.capture.spec import load_spec

SPECS = Path(__file__).parent / "specs"
QUICK = ("ddp", "ddp_accumulate", "fsdp2", "tp_sp", "by_hand_tp", "pipeline_1f1b")
SLOW = ("fsdp2_half", "fsdp2_recompute", "fsdp1", "pipeline", "pipeline_interleaved", "context_parallel", "context_parallel_alltoall", "zero",
        "ddp_hook", "hybrid", "amp")


def outputs(world, kind):
    found = {}
    for machine in world.machines:
        for rec in machine.outputs:
            if rec.kind == kind:
                found.setdefault((rec.name, rec.step), []).append(rec.native)
    return found


@pytest.mark.parametrize("how", [*QUICK, *(pytest.param(h, marks=pytest.mark.slow) for h in SLOW)])
def test_program(how):
    torch.set_num_threads(1)
    done = capture(load_spec(SPECS / "programs.py"), CaptureOptions(case={"how": how}, timeout=120))
    assert done.diagnostics == []
    reference, parallel = replayed(done.reference), replayed(done.parallel)
    ours, theirs = outputs(reference, "scalar"), outputs(parallel, "scalar")
    tolerance = 5e-2 if how in ("fsdp2_half", "amp") else 1e-4
    for key, (value,) in ours.items():
        if key in theirs:
            mean = sum(map(float, theirs[key])) / len(theirs[key])
            assert math.isclose(float(value), mean, rel_tol=tolerance), key
    assert {k for k in theirs} <= {k for k in ours} and ("loss", 2) in theirs
    gradients = outputs(parallel, "gradient")
    elements = sum(v.numel() for values in gradients.values() for v in values if v is not None)
    full = sum(v.numel() for values in outputs(reference, "gradient").values() for v in values)
    assert elements >= full
