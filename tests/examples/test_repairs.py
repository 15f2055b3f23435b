"""A wrong twin that one small change mends: the report names that change, verified (tests/unit/diagnose/test_repair.py has all kinds, small)."""
import pytest
from cases import FOLDER

from trainverify.engine.options import Options
from trainverify.verify import verify_spec


@pytest.mark.slow
def test_a_wrong_twin_is_repaired():
    report = verify_spec(FOLDER / "wrong" / "norm_grads_reduced_twice.py", Options(steps=1))
    (repair,) = [f.repair for f in report.findings if f.repair is not None]
    assert repair.verified and repair.text.startswith(f"remove the all_reduce at {FOLDER}/wrong/norm_grads_reduced_twice.py:22 "), repair
