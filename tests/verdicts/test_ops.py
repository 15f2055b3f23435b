"""Operations that the table does not have, or that are random: no result rather than a guess."""
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from judge import assert_equal, assert_not_equal, assert_refuted, assert_unknown, codes, line_of, summary
from pairs import compare_forward
from trainverify.engine.options import Options
from trainverify.verify import verify_spec

SPECS = Path(__file__).parent / "specs"


@torch.library.custom_op("verdicts::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


doubled.register_autograd(lambda ctx, grad: grad * 2)


def twice(h):
    return h * 2


def test_op_without_a_row():
    def custom(h):
        return doubled(h)
    report = compare_forward(twice, custom)
    assert_unknown(report, "OPS001", line_of(custom, "doubled"))
    assert_not_equal(report, "loss", "w")


def test_op_without_a_row_on_both_sides():
    def custom(h):
        return doubled(h)
    assert_not_equal(compare_forward(custom, custom), "loss")


def test_op_without_a_row_that_reaches_no_output():
    def custom(h):
        doubled(h.detach())
        return h * 2
    report = compare_forward(twice, custom)
    assert report.verdict == "UNKNOWN" and "OPS001" in codes(report), summary(report)


def test_row_of_the_spec():
    assert_equal(verify_spec(SPECS / "custom_op.py", Options(steps=1, timeout=60)))


def test_row_of_the_spec_shows_a_difference():
    assert_refuted(verify_spec(SPECS / "custom_op.py", Options(steps=1, timeout=60, case={"factor": 3})))


def test_row_of_the_spec_that_is_wrong_is_noticed():
    report = verify_spec(SPECS / "custom_op_misdeclared.py", Options(steps=1, timeout=60))
    assert report.verdict == "ERROR" and "CONF001" in codes(report), summary(report)


def test_live_dropout():
    def dropped(h):
        return F.dropout(h, 0.5)
    report = compare_forward(dropped, dropped)
    assert_not_equal(report)
    assert "OPS003" in codes(report), summary(report)
    assert any(d.code == "OPS003" and d.span is not None and d.span.line == line_of(dropped, "F.dropout") for d in report.diagnostics), summary(report)


def test_dropout_that_drops_nothing():
    def kept(h):
        return F.dropout(h * 2, 0.0)
    assert_equal(compare_forward(twice, kept))


def test_dropout_outside_training():
    def kept(h):
        return F.dropout(h * 2, 0.5, training=False)
    assert_equal(compare_forward(twice, kept))


# -- 8 bits

def scaled_cast(h, dtype=torch.float8_e4m3fn, back=1.0):
    """Through 8 bits and back, straight through for gradients."""
    amax = h.detach().abs().max()
    narrow = (h.detach() / amax * 448).to(dtype)
    return h + (narrow.to(h.dtype) * amax / 448 * back - h).detach()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_cast_to_8_bits_is_the_identity(dtype):
    """As every cast between floats is: an assumption of the report."""
    def narrow(h):
        return scaled_cast(h, dtype)
    report = compare_forward(narrow, narrow)
    assert_equal(report)
    assert any("casts between float types" in a.text for a in report.assumptions), report.assumptions


def test_what_follows_a_cast_to_8_bits_is_compared():
    def other(h):
        return scaled_cast(h, back=1.5)
    assert_refuted(compare_forward(scaled_cast, other))
