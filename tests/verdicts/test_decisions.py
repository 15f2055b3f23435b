"""Choices that float data makes: by the same values on both sides, or the verdict is withheld with the line."""
import math
import re

import pytest
import torch
import torch.nn.functional as F

from judge import assert_equal, assert_line, assert_not_equal, assert_not_refuted, assert_refuted, assert_unknown, codes, line_of, output, summary
from pairs import ROWS, WIDTH, compare, compare_forward, sgd, update


# -- comparisons inside tensors are no decisions: 0/1-valued, equal if their operands are

def positive(h):
    return torch.where(h > 0, h, 0 * h)


def test_same_threshold():
    def same(h):
        return torch.where(0 < h, h, h * 0)
    assert_equal(compare_forward(positive, same))


def test_threshold_of_where_that_no_recorded_element_meets():
    def shifted(h):
        return torch.where(h > 1e-4, h, 0 * h)
    report = compare_forward(positive, shifted)
    assert_not_refuted(report)
    assert_not_equal(report, "loss")
    assert_line(report, line_of(shifted, "where"))


def test_threshold_of_where_that_recorded_elements_meet():
    def shifted(h):
        return torch.where(h > 0.5, h, 0 * h)
    assert_refuted(compare_forward(positive, shifted), line_of(shifted, "where"))


def masked(h):
    return h * (h > 0).float()


def test_mask_made_float():
    def same(h):
        return torch.mul((h > 0).to(h.dtype), h)

    def shifted(h):
        return h * (h > -1e-4).float()

    assert_equal(compare_forward(masked, same))
    assert_not_equal(compare_forward(masked, shifted), "loss")


def test_sign():
    def sign(h):
        return h + h.sign()

    def shifted(h):
        return h + (h + 1e-5).sign()

    assert_equal(compare_forward(sign, sign))
    assert_not_equal(compare_forward(sign, shifted), "loss")


def test_mask_of_nonzero_elements():
    def plain(h):
        return h * 1

    def nonzero(h):
        return h * h.bool().float()

    assert_not_refuted(compare_forward(plain, nonzero))        # true of all numbers, but by a law of comparisons


def test_min_for_max():
    def largest(h):
        return torch.maximum(h, h * h)

    def swapped(h):
        return torch.maximum(h * h, h)

    def least(h):
        return torch.minimum(h, h * h)

    assert_equal(compare_forward(largest, swapped))
    assert_refuted(compare_forward(largest, least), line_of(least, "minimum"))


def test_clamp_that_does_not_bind():
    def plain(h):
        return h * 1

    def clamped(h):
        return h.clamp(max=1000.0)

    report = compare_forward(plain, clamped)   # it would for other weights, which take the same decisions
    assert_refuted(report, line_of(clamped, "h.clamp"))
    assert "at other inputs" in output(report, "loss").reason


# -- casts to integers

def truncated(h):
    return h * (h * 10).long().float()


def test_same_cast():
    def same(h):
        return (10 * h).long().float() * h
    assert_equal(compare_forward(truncated, same))


def test_cast_of_another_value():
    def shifted(h):
        return h * (h * 10 + 1e-5).long().float()
    assert_unknown(compare_forward(truncated, shifted), "REL008", line_of(shifted, "1e-5"))


def test_round_trip_through_integers():
    def through(h):
        return h + h.long().float()

    def scaled(h):
        return h + (h * 0.9999999).int().float()

    assert_unknown(compare_forward(through, scaled), "REL008", line_of(scaled, "int()"))


def test_accepted_cast_is_an_assumption():
    def shifted(h):
        return h * (h * 10 + 1e-5).long().float()
    line = line_of(shifted, "1e-5")
    report = compare_forward(truncated, shifted, accept=(f"test_decisions.py:{line}",))
    assert_equal(report)
    assert any(f"test_decisions.py:{line}" in place for a in report.assumptions for place in a.places), report.assumptions


def test_accepted_decision_that_is_not_proved_to_be_the_same_is_an_assumption(monkeypatch):
    def again(h):
        return h * (20 * h / 2).long().float()
    line = line_of(again, "20 * h")
    monkeypatch.setattr("trainverify.kernel.claims.LADDER", ())
    report = compare_forward(truncated, again)
    assert [d.code for d in report.diagnostics] == ["REL017"]
    place = f"test_decisions.py:{line}"
    report = compare_forward(truncated, again, accept=(place,))
    assert not report.diagnostics
    assert any(place in p for a in report.assumptions if "accepted" in a.text for p in a.places), report.assumptions


# -- the largest of a window

def pooled(h):
    image = (h @ h.T)[None, None]
    return h + F.max_pool2d(torch.cat([image, -image]), 2, stride=1, padding=1).sum((0, 1)).mean()


def test_the_same_element_is_the_largest_of_a_window():
    def other_order(h):
        image = ((2 * h) @ h.T)[None, None] / 2
        return h + F.max_pool2d(torch.cat([image, -image]), 2, stride=1, padding=1).sum((0, 1)).mean()
    assert_equal(compare_forward(pooled, other_order))


def test_another_element_is_the_largest_of_a_window():
    def shifted(h):
        image = (h @ h.T)[None, None]
        both = torch.cat([image, -image]) * 1.0000001
        return h + F.max_pool2d(both, 2, stride=1, padding=1).sum((0, 1)).mean()
    assert_not_equal(compare_forward(pooled, shifted))


# -- routing

def routed(h):
    scores = h.softmax(-1)
    chosen = scores.topk(2).indices
    return h + torch.zeros_like(h).scatter(1, chosen, scores.gather(1, chosen))


def test_same_routing_in_other_words():
    def by_mask(h):
        scores = h.softmax(-1)
        chosen = scores.topk(2).indices
        return h + scores * torch.zeros_like(h).scatter(1, chosen, 1.0)
    assert_equal(compare_forward(routed, by_mask))


def test_the_report_says_which_routing_was_covered():
    report = compare_forward(routed, routed)
    (told,) = [a.text for a in report.assumptions if a.code == "A4"]
    found = re.fullmatch(rf"routing and .* as recorded: top 2 of 6 at test_decisions.py:{line_of(routed, 'topk')} took these ([\d, ]+) times; checksum \w{{8}}", told)
    counts = [int(n) for n in found[1].split(", ")]
    assert len(counts) == 6 and sum(counts) == 2 * ROWS      # of each row of the only step


def test_routing_on_other_scores():
    def rescored(h):
        scores = h.softmax(-1)
        chosen = (scores * (1 + 1e-6 * h)).topk(2).indices
        return h + torch.zeros_like(h).scatter(1, chosen, scores.gather(1, chosen))
    assert_unknown(compare_forward(routed, rescored), "REL008", line_of(rescored, "topk"))


def test_routing_to_other_experts():
    def least(h):
        scores = h.softmax(-1)
        chosen = scores.topk(2, largest=False).indices
        return h + torch.zeros_like(h).scatter(1, chosen, scores.gather(1, chosen))
    assert_refuted(compare_forward(routed, least))


def test_integers_of_a_decision_make_no_new_one():
    def dense(h):
        chosen = h.softmax(-1).topk(1).indices
        return h * (chosen + 1).float()

    def by_expert(h):
        chosen = h.softmax(-1).topk(1).indices.view(-1)
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=6).tolist()
        parts = [part * (e + 1) for e, part in enumerate(h[order].split(counts))]
        return torch.cat(parts)[order.argsort()]

    assert_equal(compare_forward(dense, by_expert))


def test_sort():
    def by_sort(h):
        return h.sort(-1).values

    def by_index(h):
        return h.gather(-1, h.sort(-1).indices)

    def other_keys(h):
        return h.gather(-1, (h * (1 + 1e-6 * torch.arange(6))).argsort(-1))

    assert_equal(compare_forward(by_sort, by_index))
    assert_unknown(compare_forward(by_sort, other_keys), "REL008", line_of(other_keys, "argsort"))


def test_boolean_index():
    def kept(h):
        return h[h > 0].square().sum()

    def same(h):
        return (h * h)[h > 0].sum()

    def shifted(h):
        return h[h > -1e-5].square().sum()

    assert_equal(compare_forward(kept, same))
    assert_unknown(compare_forward(kept, shifted), "REL008", line_of(shifted, "h["))


# -- Python

def test_branch_on_item():
    def plain(h):
        return h.square().mean()

    def branching(h):
        loss = h.square().mean()
        return loss * 2 if loss.item() > 1000 else loss

    report = compare_forward(plain, branching)
    assert_unknown(report, "REL008", line_of(branching, "1000"))


def test_same_branch_on_both_sides():
    def branching(h):
        loss = h.square().mean()
        return loss * 2 if loss.item() > 1e-3 else loss

    def on_tensor(h):
        loss = (h * h).sum() / h.numel()
        return loss + loss if loss.item() > 1e-3 else loss

    assert_equal(compare_forward(branching, on_tensor))


def test_branch_on_a_tensor():
    def plain(h):
        return h.square().mean()

    def guarded(h):
        if h.isnan().any():
            raise ValueError("not a number")
        return h.square().mean()

    assert_equal(compare_forward(plain, guarded))


def test_constant_that_was_a_value():
    def of_all(h):
        return h.square().sum() * h.max().item()

    def of_some(h):
        return h.square().sum() * h[h > -99].max().item()

    def as_tensor(h):
        return h.square().sum() * h.detach().max()

    assert_equal(compare_forward(of_all, as_tensor))
    assert_equal(compare_forward(as_tensor, of_all))
    assert_unknown(compare_forward(of_all, of_some), "REL008", line_of(of_some, "item"))


# ---- what is decided by nature

def scaled(limit):
    """Gradients are divided by their norm, unless it is invalid: then they are doubled, or the step is left out."""
    def before(parameters):
        gradient = parameters[0].grad
        norm = torch.linalg.vector_norm(gradient)
        norm.masked_fill_(norm.isinf().logical_or(norm.isnan()), -1.0)
        stacked = torch.stack([norm])
        invalid = (~torch.isfinite(stacked) | (stacked < limit)).any()
        norm = torch.where(invalid, torch.full_like(norm, math.inf), torch.linalg.vector_norm(stacked))
        overflow = torch.ByteTensor([0])
        overflow[0] = (~torch.isfinite(norm)).any()
        if bool((~torch.isfinite(norm) | (norm < limit)).any()) or overflow.item():
            return
        gradient.mul_(1 / (norm + 1e-6))
    return update(sgd, before)


def normalised(parameters):
    gradient = parameters[0].grad
    gradient.mul_(1 / (torch.linalg.vector_norm(gradient) + 1e-6))


def test_a_norm_is_finite_and_not_negative():
    assert_equal(compare(update(sgd, normalised), scaled(0)))


def test_a_norm_may_be_small():
    report = compare(update(sgd, normalised), scaled(0.001))
    assert_not_equal(report, "w")
    assert "REL008" in codes(report)


# -- how many elements there are, which Python sees

@pytest.mark.parametrize("count", [lambda i: (i == 0).nonzero().shape[0], lambda i: i[i == 0].shape[0], lambda i: len(i.reshape(-1).bincount()),
                                   lambda i: i.unique().numel(), lambda i: i.masked_select(i == 0).numel()], ids=["nonzero", "index", "bincount", "unique", "masked_select"])
def test_a_choice_of_which_only_the_number_of_its_elements_is_used(count):
    """Nothing in the trace takes them, but Python has seen the size."""
    def counted(h, scores):
        return h.square().sum() * count(scores.topk(1, -1).indices)

    assert_equal(compare_forward(lambda h: counted(h, h), lambda h: counted(h, h)))
    assert_unknown(compare_forward(lambda h: counted(h, h), lambda h: counted(h, h + 0.001 * h.flip(-1))), "REL008")


# -- constants that stand among symbols

def with_counts(threshold=1.0, count=3.0):
    """The mean of groups that have rows, their sums and counts in one tensor, as programs gather them."""
    def mean(h):
        table = torch.cat([h.sum(0, keepdim=True), torch.full((1, WIDTH), count)])[:, :4]
        groups = torch.cat([table, torch.cat([table[:1] * 0, table[1:] * 0])], 1)
        counts = groups[1]
        kept = counts >= threshold
        return groups[0][kept].mul(10.0).sum() / counts[kept].to(torch.int32).sum()
    return mean


def test_counts_among_symbols_decide_nothing():
    def plain(h):
        return h.sum(0)[:4].mul(10.0).sum() / 12.0
    assert_equal(compare_forward(plain, with_counts()))
    assert_refuted(compare_forward(plain, with_counts(count=4.0)))


def test_symbols_among_counts_decide():
    def plain(h):
        return h.sum(0)[:4].mul(10.0).sum() / 12.0

    def by_symbols(h):
        table = torch.cat([h.sum(0, keepdim=True), torch.full((1, WIDTH), 3.0)])[:, :4]
        kept = table[1] + table[0].detach() > -100.0
        return table[0][kept].mul(10.0).sum() / 12.0
    report = compare_forward(plain, by_symbols)
    assert_unknown(report, "REL008", line_of(by_symbols, "[kept]"))
