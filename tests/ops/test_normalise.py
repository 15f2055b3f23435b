"""Rows of softmax and of layer, RMS, group and batch normalisation against torch."""
from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import CHECKED, TABLE, Call, assert_covered, check_call, check_function, check_opinfo, check_row
from trainverify.algebra.real import Real
from trainverify.ops import normalise

aten = torch.ops.aten
INF = math.inf
QUICK = settings(max_examples=20, deadline=None, derandomize=True, database=None)


def rnd(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MASKED = torch.tensor([[0.5, -INF, 1.0], [-INF, -INF, -INF], [-INF, 2.0, -INF]], dtype=torch.float64)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "nn.functional.softmin", "nn.functional.layer_norm", "nn.functional.group_norm",
                                  "nn.functional.rms_norm", "native_layer_norm", "nn.functional.normalize"])
def test_samples(name):
    check_opinfo(name, limit=10)


@pytest.mark.parametrize("args,kwargs", [
    ([aten._softmax.default, MASKED, -1, False], {}), ([aten._softmax.default, MASKED, 0, False], {}), ([aten._softmax.default, torch.tensor(2.0).double(), 0, False], {}),
    ([aten._log_softmax.default, MASKED[::2], 1, False], {}), ([aten._safe_softmax.default, MASKED, -1], {}), ([aten._safe_softmax.default, rnd(2, 3), 0], {}),
    ([aten._safe_softmax.default, torch.full((2, 2), -INF).double(), -1], {"dtype": torch.float64}), ([aten._safe_softmax.default, torch.zeros(2, 3).double(), -1], {}),
    ([aten._softmax_backward_data.default, rnd(2, 3), torch.softmax(rnd(2, 3, seed=1), 0), 0, torch.float64], {}),
    ([aten._log_softmax_backward_data.default, rnd(2, 3), torch.log_softmax(rnd(2, 3, seed=1), 1), 1, torch.float64], {}),
    ([aten._fused_rms_norm.default, rnd(2, 4), [4], rnd(4), None], {}), ([aten._fused_rms_norm.default, rnd(2, 3, 4), [3, 4], None, 1e-5], {}),
    ([aten.native_layer_norm.default, rnd(2, 3, 4), [3, 4], rnd(3, 4), None, 1e-5], {}), ([aten.native_layer_norm.default, rnd(4), [4], None, rnd(4), 1e-5], {}),
])
def test_calls(args, kwargs):
    check_row(args[0], args[1:], kwargs)


@pytest.mark.parametrize("mask", [[True, True, True], [True, False, False], [False, True, True], [True, False, True], [False, False, True]])
def test_layer_norm_backward(mask):
    """With the mean and scale that are given, whatever they are; only what output_mask asks for is returned."""
    for x, n, w in ((rnd(3, 2, 4), [4], rnd(4, seed=1)), (rnd(3, 2, 4), [2, 4], rnd(2, 4, seed=1)), (rnd(3, 4), [4], None)):
        wanted = mask if w is not None else [mask[0], False, False]
        if not any(wanted):
            continue
        _, mean, rstd = aten.native_layer_norm(x, n, w, w, 1e-5)
        check_row(aten.native_layer_norm_backward.default, [rnd(*x.shape, seed=2), x, n, mean, rstd, w, w, wanted])


@pytest.mark.parametrize("mask", [[True, True], [True, False], [False, True]])
def test_rms_norm_backward(mask):
    """The op has no float64 kernel here: against the gradient of its formula, with a given scale."""
    x, w, g = rnd(3, 4).requires_grad_(), rnd(4, seed=1).requires_grad_(), rnd(3, 4, seed=2)
    rstd = (x * x).mean(-1, keepdim=True).add(1e-5).rsqrt()
    want = [t for t, asked in zip(torch.autograd.grad((x * rstd * w * g).sum(), [x, w]), mask) if asked]
    m = Real()
    row = TABLE().lookup("aten._fused_rms_norm_backward.default").row
    CHECKED.add(row.name)
    got = row.meaning(m, m.data(g), m.data(x), [4], m.data(rstd), m.data(w), mask)
    assert len(got) == len(want)
    for a, b in zip(got, want):
        torch.testing.assert_close(m.to_float(a), b)


@pytest.mark.parametrize("mask", [[True, True, True], [True, False, False], [False, True, False]])
def test_group_norm_backward(mask):
    x, w = rnd(2, 6, 5), rnd(6, seed=1)
    _, mean, rstd = aten.native_group_norm(x, w, w, 2, 6, 5, 3, 1e-5)
    check_row(aten.native_group_norm_backward.default, [rnd(2, 6, 5, seed=2), x, mean, rstd, w, 2, 6, 5, 3, mask])
    check_row(aten.native_group_norm_backward.default, [rnd(2, 6, 5, seed=2), x, mean, rstd, None, 2, 6, 5, 3, [True, False, False]])


@QUICK
@given(shape=st.lists(st.integers(1, 3), min_size=2, max_size=4), eps=st.sampled_from([1e-5, 1e-6, 0.1]), dim=st.integers(-2, 1), keep=st.integers(1, 2))
def test_gradients(shape, eps, dim, keep):
    """Forward and backward for any shapes."""
    shape = [*shape, 3]
    x, w, b = rnd(*shape), rnd(*shape[-keep:], seed=1), rnd(*shape[-keep:], seed=2)
    check_function(lambda x, w, b: F.layer_norm(x, shape[-keep:], w, b, eps), x, w, b, rtol=1e-7, atol=1e-7)
    check_function(lambda x, w: F.rms_norm(x, shape[-keep:], w, eps), x, w, rtol=1e-7, atol=1e-7)
    check_function(lambda x: (F.softmax(x, dim), F.log_softmax(x, dim)), x)


# ---- batch norm
def batch_norm_written(x, w, b, mean, var, training, momentum=0.1, eps=1e-5):
    """The op's results and the running statistics that it writes, which its schema does not tell."""
    args = [x, w, b, mean, var, training, momentum, eps]
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    targets = list(aten.native_batch_norm(*args)) + ([mean, var] if training and mean is not None else [])
    check_call(Call(aten.native_batch_norm.default, tuple(before), {}, targets))
    return targets


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 5), (3, 2, 2, 4), (2, 3, 2, 1, 2)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine,tracked", [(True, True), (False, True), (True, False)])
def test_batch_norm(shape, training, affine, tracked):
    """Forward, what it writes into the running statistics, and each gradient that is asked for."""
    c = shape[1]
    x, w, b = rnd(*shape), rnd(c, seed=1) if affine else None, rnd(c, seed=2) if affine else None
    mean, var = (rnd(c, seed=3), rnd(c, seed=4).exp()) if tracked or not training else (None, None)
    _, center, rstd, *written = batch_norm_written(x, w, b, mean, var, training, momentum=0.3, eps=1e-3)
    assert len(written) == (2 if training and tracked else 0)
    if mean is None:
        check_row(aten._native_batch_norm_legit.no_stats, [x, w, b, True, 0.3, 1e-3])
    else:
        check_row(aten._native_batch_norm_legit.default, [x, w, b, mean, var, training, 0.3, 1e-3])
    for mask in ([True, affine, affine], [False, True, True] if affine else [True, False, False], [True, False, False]):
        check_row(aten.native_batch_norm_backward.default, [rnd(*shape, seed=5), x, w, mean, var, center, rstd, training, 1e-3, mask])


def test_batch_norm_and_autograd():
    check_function(lambda x, w, b: F.batch_norm(x, None, None, w, b, True), rnd(3, 2, 4), rnd(2, seed=1), rnd(2, seed=2))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_weight_norm(dim):
    shape = [1, 1, 1]
    shape[dim] = (3, 2, 4)[dim]
    v, g = rnd(3, 2, 4), rnd(*shape, seed=1)
    if dim != 1:                              # torch has it for the first and the last dimension
        w, norms = aten._weight_norm_interface(v, g, dim)
        check_row(aten._weight_norm_interface.default, [v, g, dim])
        check_row(aten._weight_norm_interface_backward.default, [rnd(3, 2, 4, seed=2), v, g, norms, dim])


def test_every_row_was_checked():
    assert_covered(normalise.rows)


@pytest.mark.parametrize("shift", [-1e4, 1e4, torch.finfo(torch.float32).min])
def test_rows_far_from_zero_stay_finite(shift):
    """Masks made of large numbers, and large scores: over the reals their softmax is that of the differences."""
    m, x = Real(), rnd(3, 5)
    x[1] += shift
    for name, function in (("_softmax", torch.softmax), ("_log_softmax", torch.log_softmax)):
        got = TABLE().lookup(f"aten.{name}.default").row.meaning(m, m.data(x), -1, False).t
        torch.testing.assert_close(got, function(x, -1))
    for dims, keep in (([1], False), ([0, 1], True)):
        got = TABLE().lookup("aten.logsumexp.default").row.meaning(m, m.data(x), dims, keep).t
        torch.testing.assert_close(got, torch.logsumexp(x, dims, keep))
