"""Rows that integers put in an order: they are named by where they come from, and so kept together on all ranks."""
from pathlib import Path

import numpy as np
import pytest
import torch

from shrink.kit import verified
from shrink.wrong import PAIRS, Pair, exchanged, experts, spec
from trainverify.engine.options import Options
from trainverify.shrink.spaces import PICK, Conflict, Kept, Spaces
from trainverify.verify import verify_spec

FRAMEWORKS = Path(__file__).resolve().parents[3] / "examples" / "frameworks"


def picked(order) -> tuple[Spaces, int, int]:
    """12 tokens in this order."""
    s = Spaces()
    tokens, rows = s.new(12), s.new(len(order))
    s.pick(rows, tokens, np.array(order))
    return s, tokens, rows


ORDER = [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]


def test_rows_are_kept_with_what_they_come_from():
    s, tokens, rows = picked(ORDER)
    kept = Kept(s, {tokens: np.array([0, 1, 5])})
    assert kept.indices(rows).tolist() == [0, 4, 9] and kept.count(rows) == 3 and kept.before(rows, 5) == 2
    group = s.segment(rows, 4, 8)
    assert kept.indices(group).tolist() == [0]


def test_an_order_and_back_is_the_same():
    s, tokens, rows = picked(ORDER)
    back = s.new(12)
    s.pick(back, rows, np.argsort(ORDER))
    assert s.find(back) == s.find(tokens)


def test_two_names_of_the_same_rows_make_one_of_their_origins():
    s, tokens, rows = picked(ORDER)
    others = s.new(12)
    s.pick(rows, others, np.array(ORDER))
    assert s.find(others) == s.find(tokens)


def test_parts_of_rows_are_named_one_by_one():
    s = Spaces()
    tokens, rows, first, second = s.new(12), s.new(12), s.new(4), s.new(8)
    s.cat(rows, (first, second))
    s.pick(rows, tokens, np.array(ORDER))
    assert s.form(first).kind == s.form(second).kind == PICK and s.picks(rows)
    assert Kept(s, {tokens: np.array([3, 4])}).indices(rows).tolist() == [1, 5]


def test_rows_in_two_orders_are_no_space():
    s, tokens, rows = picked(ORDER)
    with pytest.raises(Conflict):
        s.pick(rows, tokens, np.arange(12)[::-1].copy())


@pytest.mark.parametrize("name", ["experts_take_the_next_weights", "tokens_of_slots_by_remainder"])
def test_right_twin_is_proved_with_fewer_tokens(name):
    report = verified(*spec(PAIRS[name], wrong=False), 1)
    assert report.verdict == "PROVED" and any(c.size == 12 and c.reduced < 12 for c in report.reduction.classes)


@pytest.mark.slow
def test_rows_that_ranks_exchange():
    report = verified(*spec(Pair(experts, exchanged, w=(4, 6, 6), x=(12, 6), ranks=2)), 2)
    assert report.verdict == "PROVED" and any(c.reduced < c.size for c in report.reduction.classes)


def test_a_choice_that_nobody_uses_decides_nothing():
    """A router's, where a balanced one takes its place: among numbers that are -inf for most, which no proof has."""
    def value(w, x):
        chosen = x.masked_fill(torch.arange(12) > 5, -torch.inf).topk(2).indices
        x.gather(0, chosen)                   # nobody uses this either
        return experts(w, x.view(12, 1) * torch.ones(6))

    report = verified(*spec(Pair(value, value, w=(4, 6, 6), x=(12,))), 1, reduce=False)
    assert report.verdict == "PROVED", report.diagnostics


@pytest.mark.frameworks
def test_deepseek_v3_with_experts_on_eight_ranks():
    pytest.importorskip("torchtitan")
    report = verify_spec(FRAMEWORKS / "torchtitan_deepseek_v3_671b.py", Options(case={"layers": 2, "dense": 1}, steps=1, reduce=True, repair=False))
    assert report.verdict == "PROVED" and len(report.outputs) == 64
    assert any(c.reduced < c.size for c in report.reduction.classes)
