"""Rows of elementwise ops, activations and constant tensors against torch."""
from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import assert_covered, check_call, check_function, check_opinfo, check_row, record, leaf
from trainverify.diagnostics import Fault
from trainverify.ops import activation, creation, pointwise

aten = torch.ops.aten
INF = math.inf
QUICK = settings(max_examples=25, deadline=None, derandomize=True, database=None)

UNARY = ["neg", "reciprocal", "square", "sqrt", "rsqrt", "exp", "exp2", "expm1", "log", "log1p", "log2", "log10", "sin", "cos", "tan",
         "sinh", "cosh", "tanh", "sigmoid", "erf", "erfc", "atan", "asin", "acos", "erfinv", "lgamma", "digamma", "floor", "ceil",
         "trunc", "frac", "abs", "sign", "sgn", "logit", "isnan", "isinf", "isfinite", "logical_not", "positive", "asinh", "acosh", "atanh"]
BINARY = ["add", "sub", "rsub", "mul", "true_divide", "floor_divide", "remainder", "fmod", "atan2", "maximum", "minimum", "fmax", "fmin",
          "eq", "ne", "lt", "le", "gt", "ge", "logaddexp", "xlogy", "float_power", "logical_and", "logical_or", "logical_xor", "pow", "hypot"]
OTHERS = ["addcmul", "addcdiv", "lerp", "clamp", "where", "masked_fill", "nan_to_num", "clone", "fill", "round", "clamp_min", "clamp_max"]
NN = ["nn.functional.relu", "nn.functional.silu", "nn.functional.leaky_relu", "nn.functional.hardtanh", "nn.functional.softplus",
      "nn.functional.elu", "nn.functional.mish", "nn.functional.logsigmoid", "nn.functional.gelu", "nn.functional.hardswish",
      "nn.functional.hardsigmoid", "nn.functional.glu", "nn.functional.threshold", "nn.functional.relu6", "nn.functional.selu",
      "nn.functional.celu", "nn.functional.softsign", "nn.functional.tanhshrink", "nn.functional.prelu", "nn.functional.softshrink", "nn.functional.hardshrink"]
PREDICATES = {"isnan", "isinf", "isfinite", "logical_not", "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor",
              "floor_divide"}


def rnd(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", UNARY)
def test_unary(name):
    check_opinfo(name, limit=3, grad=name not in PREDICATES | {"digamma"})


@pytest.mark.parametrize("name", BINARY)
def test_binary(name):
    check_opinfo(name, limit=8, grad=name not in PREDICATES)


@pytest.mark.parametrize("name", OTHERS)
def test_more_operands(name):
    check_opinfo(name, limit=10)


@pytest.mark.parametrize("scale,zero,low,high", [(0.1, 0, -8, 7), (0.3, 2, 0, 15)])
def test_fake_quantisation(scale, zero, low, high):
    """Also where it clamps, and with gradients."""
    assert check_function(lambda x: torch.fake_quantize_per_tensor_affine(x.float(), scale, zero, low, high).double(), rnd(20), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NN)
def test_activations(name):
    check_opinfo(name, limit=6)


@pytest.mark.parametrize("variant", ["no_rounding_mode", "trunc_rounding", "floor_rounding"])
def test_division(variant):
    check_opinfo("div", variant, limit=8, grad=variant == "no_rounding_mode")


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_forms(approximate):
    check_function(lambda x: F.gelu(x, approximate=approximate), rnd(40) * 3)


SPECIAL = torch.tensor([0.0, -0.0, 1.0, -2.5, INF, -INF, math.nan, 1e-3], dtype=torch.float64)


@pytest.mark.parametrize("op", [aten.isnan, aten.isinf, aten.isfinite, aten.abs, aten.sign, aten.relu, aten.exp, aten.nan_to_num, aten.neg,
                                aten.logical_not, aten.sigmoid, aten.floor])
def test_special_values(op):
    check_row(op.default, [SPECIAL])


@pytest.mark.parametrize("op,scalar", [(op, s) for op in (aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge) for s in (0, 1.0, INF)])
def test_comparisons_with_numbers(op, scalar):
    check_row(op.Scalar, [SPECIAL, scalar])


@pytest.mark.parametrize("args,kwargs", [
    ([aten.add.Tensor, rnd(3, 4), rnd(4, seed=1)], {"alpha": -0.3}), ([aten.add.Scalar, rnd(3), 2], {}), ([aten.sub.Scalar, rnd(3), 0.1, 3], {}),
    ([aten.add.Tensor, rnd(3), torch.tensor([1, 2, 3])], {}), ([aten.mul.Tensor, rnd(3), torch.tensor([True, False, True])], {}),
    ([aten.rsub.Scalar, rnd(3), 1], {}), ([aten.sub.Tensor, rnd(3), rnd(3, seed=1)], {"alpha": 2}), ([aten.mul.Scalar, rnd(3), -0.25], {}),
    ([aten.div.Tensor_mode, rnd(5) * 3, rnd(5, seed=1)], {"rounding_mode": "floor"}), ([aten.div.Scalar, rnd(5), 3], {}),
    ([aten.pow.Tensor_Scalar, rnd(5).abs(), 0.5], {}), ([aten.pow.Tensor_Scalar, rnd(5), 3], {}), ([aten.pow.Tensor_Scalar, rnd(5), -2], {}),
    ([aten.pow.Tensor_Scalar, rnd(5).abs(), 0.3], {}), ([aten.pow.Scalar, 10000.0, rnd(5)], {}), ([aten.pow.Scalar, 2, torch.arange(4.0).double()], {}),
    ([aten.pow.Tensor_Tensor, rnd(5).abs(), rnd(5, seed=1)], {}), ([aten.pow.Tensor_Tensor, rnd(5), torch.tensor(2)], {}),
    ([aten.clamp.default, rnd(9), -0.5], {}), ([aten.clamp.default, rnd(9)], {"max": 0.5}), ([aten.clamp.Tensor, rnd(9), rnd(9, seed=1)], {}),
    ([aten.clamp_min.Tensor, rnd(9), rnd(9, seed=1)], {}), ([aten.clamp_max.default, rnd(9), 0], {}),
    ([aten.round.decimals, rnd(9) * 10], {"decimals": 1}), ([aten.true_divide.Tensor, rnd(4), rnd(4, seed=1)], {}),
    ([aten.lerp.Scalar, rnd(4), rnd(4, seed=1), 0.1], {}), ([aten.lerp.Tensor, rnd(4), rnd(4, seed=1), rnd(4, seed=2)], {}),
    ([aten.addcmul.default, rnd(4), rnd(4, seed=1), rnd(4, seed=2)], {"value": 0.1}),
    ([aten.addcdiv.default, rnd(4), rnd(4, seed=1), rnd(4, seed=2)], {"value": -1}), ([aten.logit.default, torch.rand(9).double()], {"eps": 0.3}),
    ([aten.masked_fill.Scalar, rnd(3), torch.tensor([True, False, True]), -INF], {}),
    ([aten.masked_fill.Tensor, rnd(3), torch.tensor([True, False, True]), torch.tensor(2.0).double()], {}),
    ([aten.where.self, torch.tensor([True, False]), rnd(2), torch.tensor(0.0).double()], {}),
    ([aten.softplus.default, rnd(9) * 20, 2, 20], {}), ([aten.softplus.default, rnd(9), 1, 0.5], {}),
    ([aten.softplus_backward.default, rnd(9), rnd(9, seed=1), 1, 0.5], {}),
    ([aten.elu_backward.default, rnd(9), 1.5, 1.1, 1, True, F.elu(rnd(9, seed=1), 1.5) * 1.1], {}),
    ([aten.leaky_relu_backward.default, rnd(9), rnd(9, seed=1), 0.1, True], {}),
    ([aten.threshold_backward.default, rnd(9), rnd(9, seed=1), 0.2], {}), ([aten.nan_to_num.default, SPECIAL, 3.0, 4.0, 5.0], {}),
    ([aten.native_dropout.default, rnd(4), 0.0, True], {}), ([aten.native_dropout.default, rnd(4), 0.5, False], {}),
    ([aten.native_dropout_backward.default, rnd(4), torch.tensor([True, False, True, True]), 2.0], {}),
    ([aten.copy.default, rnd(2, 3), rnd(3, seed=1)], {}), ([aten.copy.default, rnd(2), torch.tensor([1, 2])], {}),
    ([aten._to_copy.default, rnd(3)], {"dtype": torch.float64}), ([aten._to_copy.default, torch.tensor([1, 2])], {"dtype": torch.float64}),
    ([aten.zero.default, rnd(2, 3)], {}), ([aten.fill.Scalar, rnd(2), 3], {}), ([aten.fill.Tensor, rnd(2), torch.tensor(4.0).double()], {}),
    ([aten.lift_fresh.default, rnd(2)], {}), ([aten.lift.default, rnd(2)], {}), ([aten.alias.default, rnd(2)], {}), ([aten.detach.default, rnd(2)], {}),
    ([aten.lift_fresh_copy.default, rnd(2)], {}), ([aten.alias_copy.default, rnd(2)], {}), ([aten.detach_copy.default, rnd(2)], {}),
])
def test_calls(args, kwargs):
    check_row(args[0], args[1:], kwargs)


@pytest.mark.parametrize("op", [aten.add_.Tensor, aten.mul_.Tensor, aten.div_.Tensor, aten.sub_.Tensor, aten.pow_.Tensor, aten.copy_.default])
def test_in_place_forms_use_the_same_row(op):
    check_row(op, [rnd(3, 4).abs(), rnd(4, seed=1)])


@pytest.mark.parametrize("op", ["and", "or", "xor"])
def test_mask_arithmetic(op):
    a, b = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    x, y = a.double(), b.double()
    check_function(lambda: getattr(torch, f"logical_{op}")(x, y), grad=False)
    check_function(lambda: getattr(torch, f"bitwise_{op}")(x > 0, y > 0) | (x > 2), grad=False)
    for name in ("bitwise", "logical"):
        for order in ((x > 0, b), (a, y > 0)):
            check_mask_row(getattr(aten, f"{name}_{op}"), *order)
    check_mask_row(aten.bitwise_not, x > 0)
    check_mask_row(aten.add, x > 0, y > 0)
    check_row(aten._to_copy.default, [torch.tensor([0.0, 2.5, -1.0]).double()], {"dtype": torch.bool})


def check_mask_row(op, *masks):
    """Masks that depend on symbols arrive as values: give them as such."""
    from harness import TABLE, evaluate, execute
    from trainverify.algebra.real import Real
    overload = op.Tensor if "Tensor" in op.overloads() else op.default
    _, call = execute(overload, masks, {})
    m = Real()
    (got,) = evaluate(m, TABLE(), call, [m.data(k) for k in masks], {})
    assert torch.equal(m.to_float(got), call.targets[0].double())


@pytest.mark.parametrize("args,kwargs", [
    ([aten.zeros.default, [2, 3]], {}), ([aten.ones.default, [2]], {}), ([aten.full.default, [2, 1], 0.1], {}), ([aten.full.default, [], 3.5], {}),
    ([aten.scalar_tensor.default, 0.3], {}), ([aten.scalar_tensor.default, -INF], {}), ([aten.eye.default, 3], {}), ([aten.eye.m, 2, 3], {}),
    ([aten.arange.default, 5], {}), ([aten.arange.start, 2, 5], {}), ([aten.arange.start_step, 0, 6, 2], {}), ([aten.arange.start_step, 1.0, 0.0, -0.3], {}),
    ([aten.linspace.default, 0, 1, 5], {}), ([aten.linspace.default, 2, -1, 1], {}), ([aten.logspace.default, 0, 1, 4, 3.0], {}),
])
def test_made_tensors(args, kwargs):
    check_row(args[0], args[1:], {**kwargs, "dtype": torch.float64})


@pytest.mark.parametrize("op,args", [(aten.zeros_like, []), (aten.ones_like, []), (aten.full_like, [0.25]), (aten.new_zeros, [[3]]),
                                     (aten.new_ones, [[3, 1]]), (aten.new_full, [[2], 7.0])])
def test_made_like_others(op, args):
    check_row(op.default, [rnd(2, 2), *args])


def test_rope_table():
    def table(theta):
        freqs = 1.0 / (theta ** (torch.arange(0, 8, 2, dtype=torch.float64) / 8))
        angles = torch.outer(torch.arange(6, dtype=torch.float64), freqs)
        return angles.cos(), torch.polar(torch.ones_like(angles), angles)
    check_function(table, 10000.0, grad=False)


def test_complex_arithmetic():
    def rotate(x, f):
        z = torch.view_as_complex(x) * torch.polar(torch.ones_like(f), f)
        w = (z + 2.0) * z - z / (z + 3.0) + 1j * z.conj() - (-z)
        return torch.view_as_real(w), w.abs(), torch.complex(f, f * 2)
    check_function(rotate, rnd(4, 3, 2), rnd(3, seed=1))
    z = torch.view_as_complex(rnd(3, 2))
    for op in (aten.neg.default, aten.reciprocal.default, aten.exp.default, aten.abs.default, aten._conj_physical.default, aten._conj.default,
               aten.conj_physical.default, aten.clone.default, aten.zeros_like.default):
        check_row(op, [z])
    check_row(aten.where.self, [torch.tensor([True, False, True]), z, torch.zeros((), dtype=torch.complex128)])
    check_row(aten.pow.Tensor_Scalar, [z, 2])
    check_row(aten._to_copy.default, [rnd(3)], {"dtype": torch.complex128})


def test_live_dropout_is_refused():
    with pytest.raises(Fault, match="OPS003"):
        check_row(aten.native_dropout.default, [rnd(4), 0.5, True])


def test_unsupported_meanings_are_refused():
    with pytest.raises(Fault, match="OPS002"):
        check_row(aten.pow.Tensor_Scalar, [torch.view_as_complex(rnd(3, 2)), 0.5])


shapes = st.sampled_from([((3, 4), (4,)), ((3, 1), (1, 4)), ((), (2, 3)), ((0, 3), (3,)), ((2, 1, 3), (4, 1)), ((5,), ())])
numbers = st.floats(-4, 4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)
ops = st.sampled_from([aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.maximum.default, aten.minimum.default, aten.le.Tensor,
                       aten.ne.Tensor, aten.logaddexp.default, aten.div.Tensor])


@QUICK
@given(op=ops, shape=shapes, data=st.data())
def test_broadcasting(op, shape, data):
    """Every binary row broadcasts as torch does, on any values."""
    tensors = [torch.tensor(data.draw(st.lists(numbers, min_size=math.prod(s), max_size=math.prod(s))), dtype=torch.float64).reshape(s)
               for s in shape]
    check_row(op, tensors)


@QUICK
@given(values=st.lists(st.floats(-30, 30), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_activation_gradients(values, seed):
    """Forward and backward of every smooth activation on any values."""
    x = torch.tensor(values, dtype=torch.float64)
    fn = [F.silu, F.gelu, torch.tanh, torch.sigmoid, F.softplus, F.mish, F.logsigmoid, F.elu][seed % 8]
    check_function(fn, x, rtol=1e-7, atol=1e-7)


def test_conjugated_reads_are_seen_as_clones():
    """The dispatcher materialises a lazy conjugate by clone: its row must be given the conjugated value."""
    z = torch.view_as_complex(rnd(3, 2))
    calls = record(lambda x: (x.conj() * z.conj()).abs(), [leaf(z)])
    for call in calls:
        check_call(call)


@pytest.mark.parametrize("module", [pointwise, activation, creation], ids=lambda mod: mod.__name__)
def test_every_row_was_checked(module):
    assert_covered(module.rows)
