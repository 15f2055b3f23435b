"""Rows of loss functions against torch."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import assert_covered, check_function, check_opinfo, check_row
from trainverify.ops import loss

aten = torch.ops.aten
QUICK = settings(max_examples=30, deadline=None, derandomize=True, database=None)
REDUCTIONS = ["none", "mean", "sum"]


def rnd(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", ["nn.functional.nll_loss", "nn.functional.cross_entropy", "nn.functional.mse_loss", "nn.functional.smooth_l1_loss",
                                  "nn.functional.huber_loss", "nn.functional.binary_cross_entropy", "nn.functional.binary_cross_entropy_with_logits",
                                  "nn.functional.kl_div", "nn.functional.l1_loss", "nn.functional.margin_ranking_loss",
                                  "nn.functional.cosine_embedding_loss", "nn.functional.poisson_nll_loss", "nn.functional.gaussian_nll_loss",
                                  "nn.functional.soft_margin_loss"])
def test_samples(name):
    check_opinfo(name, limit=16)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy(reduction, smoothing, weighted):
    weight = rnd(5, seed=1).abs() if weighted else None
    target = torch.tensor([1, -100, 4, 0])
    check_function(lambda x: F.cross_entropy(x, target, weight, reduction=reduction, label_smoothing=smoothing), rnd(4, 5))
    check_function(lambda x: F.cross_entropy(x, target.reshape(2, 2), weight, reduction=reduction, label_smoothing=smoothing), rnd(2, 5, 2))
    check_function(lambda x: F.cross_entropy(x, torch.tensor([[[1, 0], [3, -100]]]), weight, reduction=reduction), rnd(1, 5, 2, 2))
    check_function(lambda x, p: F.cross_entropy(x, p.softmax(-1), weight, reduction=reduction, label_smoothing=smoothing), rnd(4, 5), rnd(4, 5, seed=2))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_took_part(reduction):
    """All targets ignored: 0, and 0/0 for the mean; the gradient is 0."""
    check_function(lambda x: F.nll_loss(x, torch.tensor([7, 7]), ignore_index=7, reduction=reduction), rnd(2, 3))


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_backward_on_any_gradient(reduction, weighted):
    x, target = rnd(4, 3), torch.tensor([2, 0, 9, 1])
    w = rnd(3, seed=1).abs() if weighted else None
    _, total = aten.nll_loss_forward(x, target, w, reduction, 9)
    g = rnd(4, seed=2) if reduction == 0 else rnd(1, seed=2)[0]
    check_row(aten.nll_loss_backward.default, [g, x, target, w, reduction, 9, total])
    y = rnd(4, 3, seed=3)
    g = rnd(4, 3, seed=2) if reduction == 0 else g
    for beta in (1.0, 0.3, 0.0):
        check_row(aten.smooth_l1_loss_backward.default, [g, x, y, reduction, beta])
    check_row(aten.huber_loss_backward.default, [g, x, y, reduction, 0.7])
    check_row(aten.mse_loss_backward.default, [g, x, y, reduction])
    p = x.sigmoid()
    check_row(aten.binary_cross_entropy_backward.default, [g, p, y.sigmoid(), y.abs() if weighted else None, reduction])


def test_one_vector():
    check_row(aten.nll_loss_forward.default, [rnd(5), torch.tensor(2), None, 1, -100])
    check_row(aten.nll_loss_backward.default, [rnd(1)[0], rnd(5), torch.tensor(2), None, 1, -100, torch.tensor(1.0).double()])


def test_saturated_probabilities():
    """Probabilities 0 and 1: logarithms stop at -100."""
    p, t = torch.tensor([0.0, 1.0, 0.0, 1.0]).double(), torch.tensor([0.0, 1.0, 1.0, 0.0]).double()
    check_row(aten.binary_cross_entropy.default, [p, t])
    check_row(aten.binary_cross_entropy_backward.default, [rnd(1)[0], p, t, None, 2], rtol=1e-8)    # torch's 1e-12 is a float32


@QUICK
@given(n=st.integers(1, 4), c=st.integers(1, 4), data=st.data())
def test_any_targets(n, c, data):
    target = torch.tensor(data.draw(st.lists(st.sampled_from([-1, *range(c)]), min_size=n, max_size=n)))
    reduction = data.draw(st.sampled_from(REDUCTIONS))
    check_function(lambda x: F.cross_entropy(x, target, ignore_index=-1, reduction=reduction), rnd(n, c))


def test_every_row_was_checked():
    assert_covered(loss.rows)
