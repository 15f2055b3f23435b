"""The wrong twins that one small change mends: the report names that change, verified."""
import pytest
from cases import FOLDER

from trainverify.engine.options import Options
from trainverify.verify import verify_spec

REPAIRS = {
    "norm_grads_not_reduced": "insert all_reduce(SUM) over all ranks before",
    "norm_grads_reduced_twice": "remove the all_reduce at {here}/wrong/norm_grads_reduced_twice.py:22",
    "expert_grads_not_averaged": "scale by 1/3 before",
    "wrong_group": "all_reduce over dp instead of tp at {here}/wrong/wrong_group.py:22",
    "ring_direction": "send to the rank that is received from, and receive from the one that is sent to, at {here}/wrong/ring_direction.py:32",
    "rope_offset": "add 3 x this rank's place in all ranks to the positions made at {here}/wrong/rope_offset.py:21",
}


@pytest.mark.slow
@pytest.mark.parametrize("twin", REPAIRS)
def test_a_wrong_twin_is_repaired(twin: str):
    report = verify_spec(FOLDER / "wrong" / f"{twin}.py", Options())
    (repair,) = [f.repair for f in report.findings if f.repair is not None]
    assert repair.verified and repair.text.startswith(REPAIRS[twin].format(here=FOLDER)), repair
