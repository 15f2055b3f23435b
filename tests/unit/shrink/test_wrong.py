"""What is right at two elements and wrong at the recorded sizes is never proved by reduction; its right twin is."""
import pytest

from shrink.kit import verified
from shrink.wrong import PAIRS, spec

QUICK = ("power_sums_3", "heads_and_their_size_swapped", "ones_hidden_in_a_sum")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in PAIRS])
def test_wrong_program(name):
    report = verified(*spec(PAIRS[name]), PAIRS[name].ranks)
    codes = {d.code for d in report.diagnostics}
    refused = (report.verdict == "ERROR" and codes & {"SHAPE002", "SHAPE003"}) or (report.verdict == "UNKNOWN" and "SHAPE004" in codes)
    assert report.verdict == "REFUTED" or refused, (report.verdict, report.diagnostics)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["power_sums_3", "softmax_over_the_ends", "heads_and_their_size_swapped", "causal_or_the_first", "ring_the_other_way",
                                  "ranks_average_uneven_means", "groups_of_heads_expanded", "mean_over_the_other_size"])
def test_right_program(name):
    report = verified(*spec(PAIRS[name], wrong=False), PAIRS[name].ranks)
    assert report.verdict == "PROVED", (report.outputs, report.diagnostics)
    assert any(c.reduced < c.size for c in report.reduction.classes)


@pytest.mark.slow
def test_more_indices_are_kept_where_the_proof_needs_them():
    """Sums of four satisfy an identity that sums of five do not: the first reduction proves it, and the criterion asks for another."""
    report = verified(*spec(PAIRS["power_sums_5"]), 1)
    assert report.verdict == "REFUTED"
    assert [c.reduced for c in report.reduction.classes if c.size == 12] == [6]
