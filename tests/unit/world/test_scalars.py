"""Floats that left a tensor keep their origin through Python and back; what strips it is told."""
import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trainverify.capture.scalars import ScalarMode, TrackedFloat
from trainverify.ir.trace import ScalarRef


class Ledger:
    """A sink that keeps what it is told, with the expression of each scalar."""

    def __init__(self):
        self.last_item, self.pending_scalars = None, []
        self.text, self.decisions, self.escapes, self.used = {}, [], [], []

    def name(self, x):
        return self.text[x.id] if isinstance(x, ScalarRef) else str(x)

    def new(self, text):
        ref = ScalarRef(len(self.text))
        self.text[ref.id] = text
        return ref

    def scalar(self, op, args, value):
        return self.new(f"{op}({', '.join(map(self.name, args))})")

    def decision(self, op, args, outcome):
        self.decisions.append((op, *map(self.name, args), outcome))
        return outcome

    def escape(self, how, what):
        self.escapes.append((how, self.name(what) if isinstance(what, ScalarRef) else "tensor"))


class Recorder(TorchDispatchMode):
    """The part of the recorder that scalars need."""

    def __init__(self, sink):
        super().__init__()
        self.sink = sink

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for x in torch.utils._pytree.tree_leaves((args, kwargs)):
            for pending in self.sink.pending_scalars:
                if isinstance(x, float) and float.__eq__(pending, x):
                    self.sink.used.append((func._opname, self.sink.name(pending.ref)))
        out = func(*args, **kwargs)
        if func._opname == "_local_scalar_dense":
            self.sink.last_item = self.sink.new("x")
        return out


@pytest.fixture
def ledger():
    sink = Ledger()
    with Recorder(sink), ScalarMode(sink):
        yield sink
    assert sink.pending_scalars == []


@pytest.fixture
def x(ledger):
    value = torch.tensor(2.5).item()
    assert type(value) is TrackedFloat and value == float.__pos__(value)
    ledger.decisions.clear()
    return value


@pytest.mark.parametrize(("compute", "text"), [
    (lambda x: x + 1, "add(x, 1)"), (lambda x: 1 + x, "add(1, x)"), (lambda x: x - 0.5, "sub(x, 0.5)"),
    (lambda x: 0.5 - x, "sub(0.5, x)"), (lambda x: 3.0 * x, "mul(3.0, x)"), (lambda x: 1 / x, "truediv(1, x)"),
    (lambda x: x // 2, "floordiv(x, 2)"), (lambda x: 7 % x, "mod(7, x)"), (lambda x: x ** 2, "pow(x, 2)"),
    (lambda x: 0.9 ** x, "pow(0.9, x)"), (lambda x: -x, "neg(x)"), (lambda x: abs(x), "abs(x)"), (lambda x: +x, "x"),
    (lambda x: sum([x, x]), "add(add(0, x), x)"), (lambda x: math.sqrt(x), "sqrt(x)"), (lambda x: math.exp(x), "exp(x)"),
    (lambda x: math.log(x), "log(x)"), (lambda x: math.pow(x, 3), "pow(x, 3)"), (lambda x: math.prod([x, 2.0]), "mul(x, 2.0)"),
    (lambda x: np.float64(2) * x, "mul(2.0, x)"), (lambda x: x * np.float64(2), "mul(x, 2.0)"),
    (lambda x: divmod(x, 2)[1], "mod(x, 2)"), (copy.copy, "x"), (copy.deepcopy, "x"), (lambda x: max(x, 1.0), "x")])
def test_arithmetic_keeps_the_origin(ledger, x, compute, text):
    plain = compute(2.5)
    result = compute(x)
    assert type(result) is TrackedFloat and ledger.text[result.ref.id] == text
    assert float.__eq__(result, plain)
    assert not ledger.escapes


@pytest.mark.parametrize(("compare", "decision"), [
    (lambda x: x < 1.0, ("lt", "x", "1.0", False)), (lambda x: 1.0 < x, ("gt", "x", "1.0", True)),
    (lambda x: x >= 2, ("ge", "x", "2", True)), (lambda x: x == 2.5, ("eq", "x", "2.5", True)),
    (lambda x: x != 2.5, ("ne", "x", "2.5", False)), (lambda x: bool(x), ("bool", "x", True)),
    (lambda x: math.isnan(x), ("isnan", "x", False)), (lambda x: x in [2.5], ("eq", "x", "2.5", True)),
    (lambda x: min(x, 1.0) == 0, ("gt", "x", "1.0", True))])
def test_comparisons_are_decisions(ledger, x, compare, decision):
    compare(x)
    assert decision in ledger.decisions


@pytest.mark.parametrize(("strip", "how"), [
    (float, "float"), (int, "int"), (round, "round"), (math.floor, "floor"), (math.ceil, "ceil"), (lambda x: math.gamma(x), "math.gamma"),
    (pickle.dumps, "pickle"), (lambda x: x.hex(), "hex"), (lambda x: np.ones(2) * x, "numpy.multiply"),
    (lambda x: x * np.ones(2), "numpy.multiply"), (np.sqrt, "numpy.sqrt"), (lambda x: (-x) ** 0.5, "complex pow"),
    (lambda x: math.isclose(0.0, 1.0, abs_tol=x), "math.isclose")])
def test_what_strips_the_origin_is_told(ledger, x, strip, how):
    expected = strip(2.5)
    assert np.all(strip(x) == expected) or isinstance(expected, bytes)
    assert [e[0] for e in ledger.escapes] == [how]


def test_formatting_and_dictionaries_are_harmless(ledger, x):
    assert f"{x:.2f} {x!r} {x}" == "2.50 2.5 2.5" and {x: 1}[x] == 1
    assert not ledger.escapes


@pytest.mark.parametrize("make", [
    lambda x: torch.tensor(x), lambda x: torch.tensor([x, 1]), lambda x: torch.as_tensor([[x], [2.0]]), lambda x: torch.full((2,), x),
    lambda x: torch.ones(2).new_tensor([x]), lambda x: torch.ones(2).fill_(x), lambda x: torch.ones(2) * x, lambda x: x / torch.ones(2),
    lambda x: torch.ones(2).clamp(max=x), lambda x: torch._foreach_mul([torch.ones(2)], [x])[0],
    lambda x: torch.ones(2).addcdiv_(torch.ones(2), torch.ones(2), value=x)])
def test_back_in_a_tensor_it_is_a_reference(ledger, x, make):
    plain = make(2.5)
    ledger.used.clear()
    made = make(x)
    assert made.dtype == plain.dtype and made.shape == plain.shape and torch.equal(made, plain)
    assert {text for _, text in ledger.used} == {"x"}


def test_setitem(ledger, x):
    t = torch.zeros(3)
    t[1] = x
    assert t.tolist() == [0, 2.5, 0] and ("full", "x") in ledger.used


def test_tensors_inside_a_list_stay_seen(ledger):
    ops = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ops.append(func._opname)
            return func(*args, **(kwargs or {}))
    t = torch.tensor(1.5)
    with Names():
        made = torch.tensor([t, 2.0], dtype=torch.float64)
    assert made.dtype == torch.float64 and made.tolist() == [1.5, 2.0]
    assert "stack" in ops or "cat" in ops


def test_deepcopy_of_a_buffer_is_seen(ledger):
    ops = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ops.append(func._opname)
            return func(*args, **(kwargs or {}))
    source = torch.ones(2)
    with Names():
        first, second = copy.deepcopy([source, source])
    assert first is second and "clone" in ops and "set_" not in ops
    assert first.data_ptr() != source.data_ptr()


@pytest.mark.parametrize(("read", "how"), [
    (lambda t: t.tolist(), "tolist"), (lambda t: t.numpy(), "numpy"), (lambda t: np.asarray(t), "array"),
    (lambda t: int(t.sum()), "int"), (lambda t: torch.equal(t, t), "equal"), (lambda t: torch.allclose(t, t), "allclose")])
def test_reads_of_tensors_are_told(ledger, read, how):
    read(torch.ones(2))
    assert how in [e[0] for e in ledger.escapes]


def test_float_of_a_tensor_names_the_item(ledger):
    assert type(float(torch.ones(2).sum())) is float
    assert ledger.escapes == [("float", "x")]


def test_a_branch_on_a_tensor_is_a_decision(ledger):
    assert torch.ones(2).sum() > 0
    assert ledger.decisions == [("bool", "x", True)]


def test_integers_are_not_tracked(ledger):
    assert type(torch.tensor(3).item()) is int


def test_megatron_style_clip(ledger):
    grad = torch.full((4,), 2.0)
    norm = grad.norm().item()
    coefficient = 1.0 / (norm + 1.0e-6)
    if coefficient < 1.0:
        grad.mul_(coefficient)
    assert ("lt", "truediv(1.0, add(x, 1e-06))", "1.0", True) in ledger.decisions
    assert ledger.used == [("mul_", "truediv(1.0, add(x, 1e-06))")]


@pytest.mark.parametrize("foreach", [False, True])
def test_adamw_bias_corrections(ledger, foreach):
    p = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.AdamW([p], lr=0.1, foreach=foreach)
    for _ in range(2):
        p.grad = torch.ones(3)
        ledger.used.clear()
        optimizer.step()
    texts = " ".join(text for _, text in ledger.used)
    assert "sub(1, pow(0.9, x))" in texts and "pow(sub(1, pow(0.999, x)), 0.5)" in texts
    assert not ledger.escapes


def test_sgd_and_clip_grad_norm_need_no_scalars(ledger):
    p = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    p.grad = torch.ones(3)
    torch.nn.utils.clip_grad_norm_([p], 0.5)
    optimizer.step()
    assert not ledger.decisions and not ledger.escapes and not ledger.used


def test_the_mode_is_active_inside_backward(ledger):
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * grad.sum().item()

    leaf = torch.ones(2, requires_grad=True)
    for backward in (lambda t: t.backward(), torch.autograd.backward, lambda t: torch.autograd.grad(t, leaf)):
        ledger.used.clear()
        backward(Double.apply(leaf).sum())
        assert ledger.used == [("mul", "x")]


def test_everything_is_restored():
    before = (math.sqrt, torch.autograd._engine_run_backward)
    with ScalarMode(Ledger()):
        assert math.sqrt is not before[0] and math.sqrt(4.0) == 2.0
    assert (math.sqrt, torch.autograd._engine_run_backward) == before
