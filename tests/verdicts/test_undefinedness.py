"""Where a program is undefined (0/0, inf - inf, a logarithm of a negative) it equals nothing; uninitialised memory neither."""
import pytest
import torch
import torch.nn.functional as F

from judge import assert_equal, assert_not_equal, assert_not_refuted, assert_refuted, assert_unknown, line_of
from pairs import compare_forward

HIDDEN = torch.zeros(5, 6, dtype=torch.bool)
HIDDEN[2] = True


def plain(h):
    return h * 1


def zero(h):
    return h * 0 + 1


# -- uninitialised memory

def test_uninitialised_small_block():
    def other(h):
        return h + torch.empty(5, 6)
    assert_unknown(compare_forward(plain, other), "REL009", line_of(other, "empty"))


def test_uninitialised_large_block():
    """Pages fresh from the system hold zeros: float64 sees no difference."""
    def other(h):
        return h + torch.empty(1 << 18)[:30].view(5, 6)
    assert_unknown(compare_forward(plain, other), "REL009", line_of(other, "empty"))


def test_zero_times_uninitialised():
    def other(h):
        return h + 0 * torch.empty(5, 6)
    assert_unknown(compare_forward(plain, other), "REL009", line_of(other, "empty"))


def test_buffer_that_is_not_wholly_written():
    def other(h):
        out = h.new_empty(6, 6)
        out[:5] = h
        return out[1:] * 1
    assert_not_equal(compare_forward(plain, other), "loss")


def test_buffer_that_is_wholly_written_before_use():
    def other(h):
        out = h.new_empty(7, 6)
        out[1:6] = h
        return out[1:6]
    assert_equal(compare_forward(plain, other))


# -- 0/0

def test_mean_over_no_token():
    counted = torch.zeros(5)
    targets = torch.arange(5)

    def total(h):
        return F.cross_entropy(h, targets, reduction="sum")

    def with_empty_microbatch(h):
        losses = F.cross_entropy(h, targets, reduction="none")
        return losses.sum() + (losses * counted).sum() / counted.sum()

    def with_guarded_microbatch(h):
        losses = F.cross_entropy(h, targets, reduction="none")
        return losses.sum() + (losses * counted).sum() / counted.sum().clamp(min=1)

    assert_refuted(compare_forward(total, with_empty_microbatch), line_of(with_empty_microbatch, "counted.sum()"), code="REL010")
    assert_equal(compare_forward(total, with_guarded_microbatch))


@pytest.mark.slow
def test_quotient_of_equals():
    """Equal where it is defined; it is not defined for all weights."""
    def reciprocal(h):
        return h * h.reciprocal()

    def through_sum(h):
        return h * h.sum() / h.sum()

    for right, other in ((zero, reciprocal), (plain, through_sum)):
        report = compare_forward(right, other)
        assert_not_refuted(report)
        assert report.verdict != "PROVED"


# -- infinities

def test_fully_masked_softmax_row():
    def ones(h):
        return h[2] * 0 + 1

    def shifted(h):
        s = h.masked_fill(HIDDEN, float("-inf"))
        return (s - s.amax(-1, keepdim=True))[2].exp()

    def summed(f):
        return lambda h: f(h).sum() + h.sum()

    assert_refuted(compare_forward(summed(ones), summed(shifted)), line_of(shifted, "amax"), code="REL010")


def test_softmax_with_a_masked_row_against_one_that_guards_it():
    def guarded(h):
        s = h.masked_fill(HIDDEN, -50.0)
        return h + s.softmax(-1).masked_fill(HIDDEN, 0.0)

    def unguarded(h):
        return h + h.masked_fill(HIDDEN, float("-inf")).softmax(-1)

    assert_refuted(compare_forward(guarded, unguarded), line_of(unguarded, "softmax"), code="REL010")


def test_infinity_minus_itself():
    def other(h):
        s = h.masked_fill(HIDDEN, float("-inf"))
        return s - s + 1
    assert_refuted(compare_forward(zero, other), line_of(other, "return s - s"), code="REL010")


def test_infinity_times_zero():
    def other(h):
        return h.masked_fill(HIDDEN, float("-inf")) * 0 + 1
    assert_refuted(compare_forward(zero, other), line_of(other, "* 0"), code="REL010")


def test_masked_softmax_fused_and_composed():
    mask = torch.ones(5, 6).tril().bool()

    def fused(h):
        return h + h.masked_fill(~mask, float("-inf")).softmax(-1)

    def composed(h):
        s = h.masked_fill(~mask, float("-inf"))
        e = (s - s.detach().amax(-1, keepdim=True)).exp()
        return h + e / e.sum(-1, keepdim=True)

    def through_the_maximum(h):
        s = h.masked_fill(~mask, float("-inf"))
        e = (s - s.amax(-1, keepdim=True)).exp()
        return h + e / e.sum(-1, keepdim=True)

    assert_equal(compare_forward(fused, composed), proved=False)      # rows of which a part is masked: unfolding takes a wrong turn
    assert_not_refuted(compare_forward(fused, through_the_maximum))   # its backward counts ties, a choice that the reference does not make


def test_row_that_is_masked_by_a_large_number():
    def large(h):
        return h + h.masked_fill(HIDDEN, -1e4).softmax(-1)

    def other(h):
        s = torch.where(HIDDEN, torch.tensor(-1e4), h)
        return h + (s - s.detach().amax(-1, keepdim=True)).softmax(-1)

    assert_equal(compare_forward(large, other))


# -- logarithms and roots

def test_logarithm_of_a_negative():
    def other(h):
        return -((-h).log().exp())
    assert_refuted(compare_forward(plain, other), line_of(other, "log"), code="REL010")


def test_exponential_of_a_logarithm():
    def other(h):
        return h.log().exp()
    assert_refuted(compare_forward(plain, other), line_of(other, "log"), code="REL010")


def test_square_of_a_root():
    def other(h):
        return h.sqrt().pow(2)
    assert_refuted(compare_forward(plain, other), line_of(other, "sqrt"), code="REL010")


def test_root_of_a_square():
    def other(h):
        return h.pow(2).sqrt()

    def magnitude(h):
        return h.abs()

    assert_refuted(compare_forward(plain, other), line_of(other, "sqrt"))
    assert_not_refuted(compare_forward(magnitude, other))


def test_magnitude_by_selection():
    def magnitude(h):
        return h.abs()

    def selected(h):
        return torch.where(h > 0, h, -h)

    def shifted(h):
        return torch.where(h > -1e-6, h, -h)

    assert_not_refuted(compare_forward(magnitude, selected))
    report = compare_forward(magnitude, shifted)
    assert_not_refuted(report)
    assert_not_equal(report, "loss")


def test_logarithm_of_an_exponential():
    def other(h):
        return h.exp().log()
    assert_equal(compare_forward(plain, other))
