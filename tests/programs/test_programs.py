"""Correct programs of many kinds are equal to their reference; each one's wrong variant (one changed line) is refuted.

Every function of a spec here is one program, run as the case how=NAME, with wrong=True for its wrong variant.
"""
from __future__ import annotations

from pathlib import Path

import pytest

from trainverify.engine.options import Options
from trainverify.report.model import Report
from trainverify.verify import verify_spec

FOLDER = Path(__file__).parent

QUICK = {
    "tensor_parallel": ("by_dtensor",),
    "sequences": ("ulysses",),
    "losses": ("rows",),
    "steps": ("data_parallel",),
    "sharding": ("uneven",),
}
SLOW = {
    "data_parallel": ("hsdp", "bf16_hook", "checkpointed_reentrant", "zero", "fsdp1_flat", "fsdp2_accumulate", "static_graph", "find_unused", "bucket_view", "own_hook", "checkpointed", "fsdp1_original", "fsdp2_keep", "fsdp2_mixed"),
    "tensor_parallel": ("parallel_loss", "by_hand", "no_sequence"),
    "pipelines": ("zero_bubble", "gpipe", "looped_bfs", "zbv", "dual_pipe_v"),
    "sequences": ("ring_alltoall", "ring_allgather"),
    "losses": ("vocabulary", "by_hand", "chunked"),
    "optimizers": ("fused", "foreach", "sharded"),
    "checkpoints": ("distributed", "numpy", "pickled", "double", "round_trip", "text", "safetensors", "broadcast", "half"),
    "gradients": ("norms",),
    "variants": ("math_kernel", "einsum", "baddbmm", "autocast", "compiled"),
    "sharding": ("fsdp1_mixed", "zero1", "fsdp1_grad_op", "fsdp1_no_shard", "fsdp1_hybrid", "fsdp1_accumulate", "fsdp1_flat_accumulate", "other_dim", "offload",
                 "prefetch", "recompute"),
    "other_models": ("convolutions", "recurrent", "tables", "scan", "window", "penalty", "expert_choice"),
}


# Whose proof is known to be whole. The others have to be equal in the field.
PROVED = {"by_dtensor", "ulysses", "rows", "hsdp", "bf16_hook", "zero_bubble", "gpipe", "convolutions", "recurrent", "tables", "scan", "window",
          "penalty", "expert_choice"}


MINUTES = {"baddbmm"}                         # whose proof gives up after minutes


def programs() -> list:
    """The quick ones; of the rest every sixth one runs with every change, all of them with `make test-bugs`."""
    quick = [pytest.param(spec, how, id=f"{spec}-{how}") for spec, hows in QUICK.items() for how in hows]
    rest = [(spec, how) for spec, hows in SLOW.items() for how in hows]
    marks = [pytest.mark.corpus if i % 6 or how in MINUTES else pytest.mark.slow for i, (_, how) in enumerate(rest)]
    return quick + [pytest.param(spec, how, id=f"{spec}-{how}", marks=mark) for (spec, how), mark in zip(rest, marks)]


def run(spec: str, how: str, wrong: bool = False) -> Report:
    return verify_spec(FOLDER / f"{spec}.py", Options(case={"how": how, **({"wrong": True} if wrong else {})}, repair=False))


def not_equal(report: Report) -> list:
    return [(o.kind, o.name, o.step, o.verdict, o.reason) for o in report.outputs if o.verdict != "PROVED" and not o.reason.startswith("equal at")]


@pytest.mark.parametrize(("spec", "how"), programs())
def test_a_correct_program_equals_its_reference(spec: str, how: str):
    report = run(spec, how)
    assert not [d for d in report.diagnostics if d.severity in ("error", "internal")]
    assert report.verdict == "PROVED" if how in PROVED else report.verdict in ("PROVED", "UNKNOWN")
    assert report.outputs and not_equal(report) == []
    assert report.bound[0] == report.bound[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "how"), programs())
def test_its_wrong_variant_is_refuted(spec: str, how: str):
    report = run(spec, how, wrong=True)
    assert report.verdict == "REFUTED", (report.diagnostics, not_equal(report))
    assert report.findings
