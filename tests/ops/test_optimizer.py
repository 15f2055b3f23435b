"""Optimizer rows against torch's fused, foreach and single-tensor implementations, over three steps."""
from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import Recorder, TABLE, assert_covered, check_call, check_row, evaluate, evaluated
from trainverify.algebra.real import Real
from trainverify.ops import foreach, optimizer
from trainverify.ops.table import OpRow

aten = torch.ops.aten
F64 = torch.float64
QUICK = settings(max_examples=20, deadline=None, derandomize=True, database=None)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(sum(shape) + 1))


def scalar(x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=F64)


def steps(make, count: int = 3, clip=None) -> list:
    """The calls of `count` optimizer steps that replay evaluates, on two parameters with changing gradients."""
    params = [torch.nn.Parameter(numbers(3, 2)), torch.nn.Parameter(numbers(4))]
    optim = make(params)
    calls = []
    for step in range(count):
        for p in params:
            p.grad = numbers(*p.shape) * (step + 1) + step
        with Recorder() as rec:
            if clip:
                clip(params)
            optim.step()
        calls += [c for c in rec.calls if evaluated(c)]
    return calls


ADAM = [dict(), dict(weight_decay=0.1), dict(amsgrad=True, weight_decay=0.1), dict(maximize=True, lr=0.02, betas=(0.8, 0.95), eps=1e-3)]
SGD = [dict(lr=0.1), dict(lr=0.1, momentum=0.9), dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
       dict(lr=0.1, momentum=0.5, dampening=0.25, maximize=True)]
ADAGRAD = [dict(lr=0.1), dict(lr=0.1, lr_decay=0.5, weight_decay=0.1), dict(lr=0.1, maximize=True, eps=1e-2, initial_accumulator_value=0.3)]
CASES = ([(torch.optim.AdamW, c) for c in ADAM] + [(torch.optim.Adam, c) for c in ADAM] + [(torch.optim.SGD, c) for c in SGD]
         + [(torch.optim.Adagrad, c) for c in ADAGRAD])
NAMES = {torch.optim.AdamW: "aten._fused_adamw_", torch.optim.Adam: "aten._fused_adam_", torch.optim.SGD: "aten._fused_sgd_",
         torch.optim.Adagrad: "aten._fused_adagrad_"}


@pytest.mark.parametrize("kind, options", CASES, ids=lambda x: x.__name__ if isinstance(x, type) else ",".join(x))
def test_fused_steps(kind, options):
    calls = steps(lambda ps: kind(ps, fused=True, **options))
    assert sum(c.name.startswith(NAMES[kind]) for c in calls) == 3
    for call in calls:
        check_call(call, rtol=1e-12, atol=1e-14)


FOREACH = CASES + [(torch.optim.RMSprop, c) for c in (dict(), dict(momentum=0.9, centered=True, weight_decay=0.1), dict(maximize=True))] \
    + [(torch.optim.RAdam, dict()), (torch.optim.Adamax, dict()), (torch.optim.Adadelta, dict(weight_decay=0.1))]


@pytest.mark.parametrize("kind, options", FOREACH, ids=lambda x: x.__name__ if isinstance(x, type) else ",".join(x))
def test_foreach_steps(kind, options):
    calls = steps(lambda ps: kind(ps, foreach=True, **options))
    assert any("_foreach_" in c.name for c in calls)
    for call in calls:
        check_call(call, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind, options", [*FOREACH, (torch.optim.AdamW, dict(lr=scalar(0.01)))],
                         ids=lambda x: x.__name__ if isinstance(x, type) else ",".join(x))
def test_single_tensor_steps(kind, options):
    for call in steps(lambda ps: kind(ps, foreach=False, **options)):
        assert "_foreach_" not in call.name
        check_call(call, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("clip", [lambda ps: torch.nn.utils.clip_grad_norm_(ps, 0.5), lambda ps: torch.nn.utils.clip_grad_norm_(ps, 1.5, math.inf),
                                  lambda ps: torch.nn.utils.clip_grad_norm_(ps, 0.5, 1.0), lambda ps: torch.nn.utils.clip_grad_value_(ps, 0.4)])
def test_clipping(clip):
    calls = steps(lambda ps: torch.optim.SGD(ps, lr=0.1), clip=clip)
    assert any("_foreach_" in c.name for c in calls)
    for call in calls:
        check_call(call, rtol=1e-12, atol=1e-14)


# ---- the three implementations are one function
def run_rows(make, table) -> list[torch.Tensor]:
    """All results of the rows that three steps evaluate."""
    calls, m = steps(make), Real()
    return [v.t for call in calls for v in evaluate(m, table, call, _values(m, call.args), {k: _values(m, x) for k, x in call.kwargs.items()})]


def _values(m, x):
    if isinstance(x, torch.Tensor):
        return m.data(x) if x.is_floating_point() else x
    return [_values(m, i) for i in x] if isinstance(x, (list, tuple)) else x


@pytest.mark.parametrize("kind, options", CASES, ids=lambda x: x.__name__ if isinstance(x, type) else ",".join(x))
def test_fused_rows_end_where_the_single_tensor_implementation_ends(kind, options):
    fused = run_rows(lambda ps: kind(ps, fused=True, **options), TABLE())
    params = [torch.nn.Parameter(numbers(3, 2)), torch.nn.Parameter(numbers(4))]
    optim = kind(params, foreach=False, **options)
    for step in range(3):
        for p in params:
            p.grad = numbers(*p.shape) * (step + 1) + step
        optim.step()
    for p in params:
        assert any(t.shape == p.shape and torch.allclose(t, p.detach(), rtol=1e-12, atol=1e-14) for t in fused)


# ---- overloads and rare arguments
P, G, S = [numbers(3, 2), numbers(4)], [numbers(2, 3).T.contiguous(), numbers(4) + 1], [numbers(3, 2) ** 2, numbers(4) ** 2]
ADAM_ARGS = dict(beta1=0.9, beta2=0.99, weight_decay=0.1, eps=1e-8, maximize=False)


def _adam_args(amsgrad: bool):
    return (P, G, S, [s + 1 for s in S], [s + 2 for s in S] if amsgrad else [], [scalar(3), scalar(4)])


@pytest.mark.parametrize("op", [aten._fused_adamw_, aten._fused_adam_])
def test_adam_overloads(op):
    check_row(op.tensor_lr, _adam_args(True), dict(ADAM_ARGS, lr=scalar(0.1), amsgrad=True), rtol=1e-12)
    for found in (0.0, 1.0):
        check_row(op.default, _adam_args(False), dict(ADAM_ARGS, lr=0.1, amsgrad=False, grad_scale=torch.tensor(4.0), found_inf=torch.tensor(found)), rtol=1e-12)


def test_sgd_and_adagrad_overloads():
    sgd = dict(weight_decay=0.1, momentum=0.9, dampening=0.1, nesterov=False, maximize=False)
    for found, first in ((0.0, True), (1.0, False), (0.0, False)):
        check_row(aten._fused_sgd_.tensor_lr, (P, G, S), dict(sgd, lr=scalar(0.1), is_first_step=first, grad_scale=torch.tensor(4.0), found_inf=torch.tensor(found)),
                  rtol=1e-12)
    check_row(aten._fused_sgd_.default, (P, G, []), dict(sgd, momentum=0.0, dampening=0.0, lr=0.1, is_first_step=True), rtol=1e-12)
    adagrad = dict(lr_decay=0.5, weight_decay=0.1, eps=1e-8, maximize=True)
    check_row(aten._fused_adagrad_.default, (P, G, S, [scalar(2), scalar(3)]), dict(adagrad, lr=0.1), rtol=1e-12)
    check_row(aten._fused_adagrad_.tensor_lr, (P, G, S, [scalar(2), scalar(3)]), dict(adagrad, lr=scalar(0.1)), rtol=1e-12)


FOREACH_CALLS = [
    (aten._foreach_addcmul_.Tensor, P, G, S, torch.tensor([2.0, 3.0], dtype=F64)), (aten._foreach_addcdiv.Tensor, P, G, S, torch.tensor([2.0, 3.0], dtype=F64)),
    (aten._foreach_addcmul.ScalarList, P, G, S, [2.0, -1.5]), (aten._foreach_addcdiv_.ScalarList, P, G, S, [2.0, -1.5]),
    (aten._foreach_addcmul.Scalar, P, G, S), (aten._foreach_addcdiv.Scalar, P, G, S, 0.5), (aten._foreach_lerp.List, P, G, S),
    (aten._foreach_lerp_.Scalar, P, G, 0.25), (aten._foreach_lerp.ScalarList, P, G, [0.25, 0.5]), (aten._foreach_pow.ScalarAndTensor, 0.9, P),
    (aten._foreach_pow.Scalar, S, 0.5), (aten._foreach_pow.ScalarList, P, [2, 3]), (aten._foreach_pow.List, S, P), (aten._foreach_max.default, P),
    (aten._foreach_max.default, [scalar(2.0)]), (aten._foreach_norm.Scalar, P), (aten._foreach_norm.Scalar, P, 1), (aten._foreach_norm.Scalar, P, math.inf),
    (aten._foreach_powsum.Scalar, P), (aten._foreach_powsum.Scalar, P, 3), (aten._foreach_powsum.Scalar, P, 1), (aten._foreach_copy_.default, P, G),
    (aten._foreach_zero_.default, P), (aten._foreach_neg.default, P), (aten._foreach_sqrt_.default, S), (aten._foreach_reciprocal.default, S),
    (aten._foreach_abs.default, P), (aten._foreach_sign.default, P), (aten._foreach_exp.default, P), (aten._foreach_log.default, S),
    (aten._foreach_mul_.Scalar, P, 2.0), (aten._foreach_mul_.Tensor, P, scalar(0.5)), (aten._foreach_mul.List, P, G), (aten._foreach_mul.ScalarList, P, [2.0, 3.0]),
    (aten._foreach_div_.Tensor, P, scalar(0.5)), (aten._foreach_div.ScalarList, P, [2.0, 3.0]), (aten._foreach_div.List, P, S),
    (aten._foreach_add_.Tensor, P, scalar(1.0)), (aten._foreach_add.Scalar, P, 1), (aten._foreach_sub_.List, P, G), (aten._foreach_sub.Scalar, P, 1.5),
    (aten._foreach_clamp_min_.Scalar, P, -0.3), (aten._foreach_clamp_max.List, P, G), (aten._foreach_clamp_min.ScalarList, P, [0.0, 0.1]),
    (aten._foreach_maximum_.List, P, G), (aten._foreach_minimum.Scalar, P, 0.2), (aten._foreach_maximum.ScalarList, P, [0.2, 0.1]),
]


@pytest.mark.parametrize("call", FOREACH_CALLS, ids=lambda c: str(c[0]))
def test_foreach_overloads(call):
    op, *args = call
    check_row(op, args, rtol=1e-12)


def test_foreach_keywords_are_shared():
    check_row(aten._foreach_add.List, (P, G), {"alpha": 2.5}, rtol=1e-12)
    check_row(aten._foreach_sub_.List, (P, G), {"alpha": 2}, rtol=1e-12)
    check_row(aten._foreach_add_.Tensor, (P, scalar(1.0)), {"alpha": 0.5}, rtol=1e-12)


@QUICK
@given(st.lists(st.integers(0, 3), min_size=1, max_size=5), st.floats(-3, 3, allow_nan=False))
def test_foreach_is_the_row_applied_to_each_entry(sizes, alpha):
    tensors = [numbers(n) for n in sizes]
    check_row(aten._foreach_add.List, (tensors, [t + 1 for t in tensors]), {"alpha": alpha}, rtol=1e-12)
    check_row(aten._foreach_mul.ScalarList, (tensors, [alpha + i for i in range(len(sizes))]), rtol=1e-12)


def test_foreach_needs_lists_of_one_length_and_one_result_per_entry():
    m, row = Real(), TABLE().lookup("aten.add.Tensor").row
    with pytest.raises(ValueError, match="one length"):
        foreach.foreach_call(m, row, [[m.const(1)], [m.const(1), m.const(2)]], {})
    with pytest.raises(ValueError, match="one length"):
        foreach.foreach_call(m, row, [m.const(1), 2], {})
    with pytest.raises(ValueError, match="no foreach form"):
        foreach.foreach_call(m, OpRow("aten.two", lambda m, x: [x, x], "move", ""), [[m.const(1)]], {})


# ---- gradient scaling
@pytest.mark.parametrize("found", [0.0, 1.0])
def test_update_of_the_gradient_scale(found):
    for tracker in (0, 4):
        check_row(aten._amp_update_scale_.default, (torch.tensor(8.0), torch.tensor(tracker, dtype=torch.int32), torch.tensor(found), 2.0, 0.5, 5), rtol=0)


def test_unscaling_finite_gradients_needs_no_decision():
    grads = [numbers(3), numbers(2, 2)]
    check_row(aten._amp_foreach_non_finite_check_and_unscale_.default, (grads, torch.tensor([0.0]), torch.tensor(0.25)), rtol=1e-12)


def test_an_infinite_gradient_is_a_decision():
    class Ctx:
        native, logged = [torch.tensor([math.inf]), torch.tensor([1.0])], []

        def decide(self, *what):
            self.logged.append(what)
    m, ctx = Real(), Ctx()
    row = TABLE().lookup("aten._amp_foreach_non_finite_check_and_unscale_.default").row
    got = row.meaning(m, [m.data(torch.tensor([math.inf]))], m.const(0, (1,)), m.const(0.5), ctx=ctx)
    assert got[1].t.item() == 1 and ctx.logged[0][0] == "nonfinite"


def test_every_row_was_checked():
    assert_covered(optimizer.rows)
