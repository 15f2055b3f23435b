"""Rows of reductions against torch."""
from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import TABLE, assert_covered, check_function, check_opinfo, check_row, evaluate, execute
from trainverify.algebra.real import Real
from trainverify.ops import reduce

aten = torch.ops.aten
QUICK = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def rnd(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", ["sum", "mean", "nansum", "cumsum", "logsumexp", "var", "std", "var_mean", "std_mean", "amax", "amin", "prod",
                                  "cumprod", "norm", "linalg.vector_norm", "dist", "trace", "aminmax"])
def test_samples(name):
    check_opinfo(name, limit=14, keep=lambda s: not s.input.numel() or float(s.input.abs().max()) < 700)   # beyond, exp overflows


@pytest.mark.parametrize("name,variant", [("max", "reduction_no_dim"), ("max", "reduction_with_dim"), ("max", "binary"), ("min", "reduction_no_dim"),
                                          ("min", "reduction_with_dim"), ("min", "binary"), ("var", "unbiased"), ("std", "unbiased"), ("norm", "inf")])
def test_variants(name, variant):
    check_opinfo(name, variant, limit=8)


@pytest.mark.parametrize("name", ["any", "all", "count_nonzero"])
def test_counts(name):
    check_opinfo(name, limit=10, grad=False)


@pytest.mark.parametrize("args,kwargs", [
    ([aten.sum.dim_IntList, rnd(2, 3), None], {}), ([aten.sum.dim_IntList, rnd(2, 3), []], {}), ([aten.sum.dim_IntList, rnd(2, 3), [-1, 0], True], {}),
    ([aten.sum.default, torch.tensor([True, False, True])], {"dtype": torch.float64}), ([aten.sum.default, torch.arange(4)], {"dtype": torch.float64}),
    ([aten.mean.dim, rnd(2, 3), [1]], {"dtype": torch.float64}), ([aten.mean.default, rnd(0)], {}), ([aten.mean.dim, rnd(0, 3), [0]], {}),
    ([aten.std.correction, rnd(2, 5), [1]], {"correction": 0}), ([aten.var.correction, rnd(4)], {"correction": 3}),
    ([aten.var.correction, rnd(4), [0]], {"correction": 4}), ([aten.var_mean.correction, rnd(2, 5), [1]], {"keepdim": True}),
    ([aten.norm.Scalar, rnd(2, 5)], {}), ([aten.norm.ScalarOpt_dim, rnd(2, 5), None, [1], True], {}), ([aten.norm.ScalarOpt_dtype, rnd(3), 2], {"dtype": torch.float64}),
    *[([aten.linalg_vector_norm.default, rnd(2, 5), p, [1]], {}) for p in (0, 1, 2, 3, 2.5, 0.5, math.inf, -math.inf)],
    ([aten.linalg_vector_norm.default, torch.view_as_complex(rnd(3, 2))], {}), ([aten.max.default, rnd(2, 3)], {}), ([aten.amax.default, rnd(2, 3)], {}),
    ([aten.prod.dim_int, rnd(2, 5), 1, True], {}), ([aten.prod.default, rnd(0)], {}), ([aten.cumsum.default, rnd(2, 3), -1], {"dtype": torch.float64}),
    ([aten.logsumexp.default, torch.tensor([[0.0, -math.inf], [1.0, 2.0]]).double(), [1], True], {}),
    ([aten.sum.default, torch.view_as_complex(rnd(3, 2))], {}), ([aten.mean.default, torch.view_as_complex(rnd(3, 2))], {}),
])
def test_calls(args, kwargs):
    check_row(args[0], args[1:], kwargs)


@pytest.mark.parametrize("op", [aten.any.dim, aten.all.dim])
def test_masks_that_depend_on_symbols(op):
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    _, call = execute(op, [mask, 1], {})
    m = Real()
    (got,) = evaluate(m, TABLE(), call, [m.data(mask), 1], {})
    assert torch.equal(m.to_float(got), call.targets[0].double())


@pytest.mark.parametrize("op", [aten.any, aten.all])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,)])
def test_truth_of_nothing(op, shape):
    mask = torch.zeros(shape, dtype=torch.bool)
    for overload, more in [(op.default, ()), *[(op.dim, (d, keep)) for d in range(len(shape)) for keep in (False, True)]]:
        _, call = execute(overload, [mask, *more], {})
        m = Real()
        (got,) = evaluate(m, TABLE(), call, [m.data(mask), *more], {})
        assert torch.equal(m.to_float(got), call.targets[0].double())


@pytest.mark.parametrize("name,kind", [("max", "argmax"), ("min", "argmin")])
def test_positions_are_decisions(name, kind):
    """One choice per row of the operand's last dimension; the values do not depend on it."""
    row = TABLE().lookup(f"aten.{name}.dim").row
    seen = []

    class Context:
        native = list(getattr(torch, name)(rnd(3, 4), 0))

        def decide(self, kind, operands, outcome):
            seen.append((kind, operands[0].shape, tuple(outcome.shape)))

    m = Real()
    values, indices = row.meaning(m, m.data(rnd(3, 4)), 0, ctx=Context())
    assert indices is None and torch.equal(m.to_float(values), Context.native[0]) and seen == [(kind, (4, 3), (4,))]


def test_histogram_is_a_decision():
    call = check_row(aten.histc.default, [torch.tensor([0.0, 2.0, 2.0, 1.0, 5.0]).double(), 4, 0, 4])
    assert call.targets[0].tolist() == [1, 1, 2, 0]


@QUICK
@given(shape=st.lists(st.integers(1, 3), min_size=1, max_size=4), data=st.data())
def test_dims(shape, data):
    """Any set of dimensions, positive or negative, kept or not."""
    dims = data.draw(st.lists(st.integers(-len(shape), len(shape) - 1), unique_by=lambda d: d % len(shape)))
    keep = data.draw(st.booleans())
    x = rnd(*shape)
    for op in (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default):
        check_row(op, [x, dims, keep])
    check_row(aten.logsumexp.default, [x, dims or [0], keep])      # torch itself fails on no dimension
    check_row(aten.linalg_vector_norm.default, [x, 2, dims, keep])
    check_row(aten.var.correction, [x, dims], {"correction": 0, "keepdim": keep})


def test_gradient_norm_and_clipping():
    def clip(*grads):
        total = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
        scale = torch.clamp(1.0 / (total + 1e-6), max=1.0)
        return [g * scale for g in grads]
    check_function(clip, rnd(3, 2), rnd(4, seed=1))


def test_every_row_was_checked():
    assert_covered(reduce.rows)
