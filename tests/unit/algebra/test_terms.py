"""The algebra terms: each micro-op and typical rows against float64, element by element; sides, constants and memory."""
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from trainverify.kernel.store import GARBAGE
from trainverify.ops.standard import standard_table

from kernel.numeric import mistakes, run

MASK = torch.tensor([[True, False, True], [False, True, True]])


def two(f):
    """On two values of shape [2, 3], both positive at some points."""
    return lambda m, x, y: f(m, m.reshape(x, (2, 3)), m.reshape(y, (2, 3)))


OPS = {
    "add": lambda m, x, y: m.add(x, y),
    "sub": lambda m, x, y: m.sub(x, y),
    "mul": lambda m, x, y: m.mul(x, y),
    "neg": lambda m, x, y: m.neg(x),
    "inv": lambda m, x, y: m.inv(x),
    "div": lambda m, x, y: m.div(x, y),
    "scale": lambda m, x, y: m.scale(x, Fraction(-2, 3)),
    "exp": lambda m, x, y: m.exp(x),
    "log": lambda m, x, y: m.log(x),
    "sqrt": lambda m, x, y: m.sqrt(x),
    "sin": lambda m, x, y: m.sin(x),
    "cos": lambda m, x, y: m.cos(x),
    "erf": lambda m, x, y: m.erf(x),
    "opaque": lambda m, x, y: m.opaque("atan2", x, y),
    "sum all": lambda m, x, y: m.sum(x),
    "abs": lambda m, x, y: m.abs(x),
    "sum rows": lambda m, x, y: m.sum(x, [1]),
    "sum columns, kept": lambda m, x, y: m.sum(x, [0], True),
    "cumsum 0": lambda m, x, y: m.cumsum(x, 0),
    "cumsum -1": lambda m, x, y: m.cumsum(x, -1),
    "matmul": lambda m, x, y: m.matmul(x, m.permute(y, (1, 0))),
    "sign": lambda m, x, y: m.sign(x),
    "batched matmul": lambda m, x, y: m.matmul(m.reshape(x, (2, 1, 3)), m.reshape(y, (1, 3, 2))),
    "outer": lambda m, x, y: m.matmul(m.reshape(x, (6, 1)), m.reshape(y, (1, 6))),
    "broadcast": lambda m, x, y: m.add(m.sum(x, [1], True), m.sum(y, [0])),
    "maximum": lambda m, x, y: m.maximum(x, y),
    "minimum": lambda m, x, y: m.minimum(x, y),
    "minimum with a number, of a positive value": lambda m, x, y: m.minimum(m.add(norm(m, x), m.const(0.25)), m.const(3)),
    "minimum with a number, of a value over a norm": lambda m, x, y: m.minimum(m.const(0.5), m.div(m.const(2), m.add(norm(m, y), m.const(1)))),
    "minimum with a number, of any sign": lambda m, x, y: m.minimum(m.sum(m.sub(x, y)), m.const(0.25)),
    "minimum with a number, of what may be zero": lambda m, x, y: m.minimum(norm(m, m.sub(x, x)), m.const(0.25)),
    "maximum of negative ones": lambda m, x, y: m.maximum(m.neg(m.add(norm(m, x), m.const(0.25))), m.const(-3)),
    "minimum with a negative number": lambda m, x, y: m.minimum(m.add(norm(m, x), m.const(1)), m.const(-2)),
    "amax": lambda m, x, y: m.amax(x, [1]),
    "amin, kept": lambda m, x, y: m.amin(x, [0], True),
    "amax all": lambda m, x, y: m.amax(x, []),
    "where a constant mask": lambda m, x, y: m.where(MASK, x, y),
    "where": lambda m, x, y: m.where(m.compare("gt", x, y), x, y),
    "reshape": lambda m, x, y: m.reshape(x, (3, 2)),
    "permute": lambda m, x, y: m.permute(m.reshape(x, (1, 2, 3)), (2, 0, 1)),
    "expand": lambda m, x, y: m.expand(m.reshape(x, (2, 1, 3)), (2, 4, 3)),
    "take": lambda m, x, y: m.take([x, y], torch.tensor([[0, 12, 7], [6, 1, 1]])),
    "take from one": lambda m, x, y: m.take([y], torch.tensor([6, 1, 3])),
    "scatter_sum": lambda m, x, y: m.scatter_sum(x, torch.tensor([[5, 0, 0], [0, 3, 5]]), y),
    "scatter into zeros": lambda m, x, y: m.scatter_sum(m.const(0, (4,)), torch.tensor([[1, 2, 2], [0, 1, 1]]), x),
    "stack": lambda m, x, y: m.stack([x, y, x]),
    "cast": lambda m, x, y: m.cast(x, "float32"),
    "a constant to a value": lambda m, x, y: m.power(m.const(2), x),
    "a value to a value": lambda m, x, y: m.power(x, y),
    "a value to a constant": lambda m, x, y: m.power(x, m.const(1.5)),
    "data": lambda m, x, y: m.mul(x, m.data(torch.tensor([0.1, 0.25, -3.0]))),
    "sum of a mask": lambda m, x, y: m.sum(m.where(MASK, x, m.const(0)), [1]),
    "matmul of a mask": lambda m, x, y: m.matmul(x, m.permute(m.where(MASK, y, m.const(0)), (1, 0))),
    **{f"compare {op}": lambda m, x, y, op=op: m.compare(op, x, y) for op in ("gt", "ge", "lt", "le", "eq", "ne")},
    **{f"compare {op} itself": lambda m, x, y, op=op: m.compare(op, x, x) for op in ("gt", "ge", "lt", "le", "eq", "ne")},
    **{f"pow {q}": lambda m, x, y, q=q: m.pow(x, q) for q in (0, 1, 2, 5, -1, -3, 0.5, 1.5, -0.5, -1.5, 0.3)},
}


@pytest.mark.parametrize("name", OPS)
def test_micro_operations_mean_what_they_mean_in_floats(name):
    """As the reference, as the parallel side, and beside other operations of the same operands."""
    f = two(OPS[name])
    r = run(f, lambda m, x, y: (m.exp(y), f(m, x, y), f(m, y, x)), (6, 6))
    assert mistakes(r) == []
    assert r.terms.claims.store.n > 12 and (r.ids[0][-1] != GARBAGE).all()
    assert f_agrees(r) and r.defined().any()


def f_agrees(r) -> bool:
    """The same operation of the same operands has the same identifiers on both sides."""
    return any(len(ids) == len(r.ids[0][-1]) and (ids == r.ids[0][-1]).all() for ids in r.ids[1])


def twice_an_exponential(m, x):
    """Positive, as a difference of which no sign is known."""
    e = m.exp(m.sum(x))
    return m.sub(m.mul(e, m.add(e, m.const(2))), m.mul(e, e))


@pytest.mark.parametrize("unsigned_first", [True, False])
def test_a_negative_value_whose_opposite_has_no_known_sign(unsigned_first):
    """maximum and minimum turn to each other: not for ever."""
    def program(m, x):
        def negative():
            return m.scale(m.exp(m.sum(x)), -2)
        made = [f() for f in ((lambda: twice_an_exponential(m, x), negative) if unsigned_first else (negative, lambda: twice_an_exponential(m, x)))]
        return (*made, m.maximum(negative(), m.const(-3)), m.minimum(twice_an_exponential(m, x), m.const(3)))
    r = run(program, program, (3,))
    assert mistakes(r) == [] and r.proved().all()


# ---- rows
TABLE = standard_table(())


def op(m, name: str, *args, **kwargs):
    """An op by its row; its (first) result is checked, and every identifier that it made."""
    out = TABLE.rows[f"aten.{name}"].meaning(m.plain, *args, **kwargs)
    return m.cast(out[0] if isinstance(out, (tuple, list)) else out, "float64")


def adamw(m, x, y):
    """Two steps from nothing, as torch composes them, with y and x as gradients."""
    first, second, parameter = m.const(0, (2, 3)), m.const(0, (2, 3)), x
    for step, gradient in ((1, y), (2, op(m, "mul", x, y))):
        parameter = op(m, "mul", parameter, 1 - 0.01 * 0.1)
        first = op(m, "lerp", first, gradient, 1 - 0.9)
        second = op(m, "addcmul", op(m, "mul", second, 0.99), gradient, gradient, value=1 - 0.99)
        size = m.add(op(m, "div", op(m, "sqrt", second), math.sqrt(1 - 0.99**step)), m.const(1e-3))
        parameter = op(m, "addcdiv", parameter, first, size, value=-0.01 / (1 - 0.9**step))
    return parameter


ROWS = {
    "softmax": lambda m, x, y: op(m, "_softmax", x, -1, False),
    "log_softmax": lambda m, x, y: op(m, "_log_softmax", x, 0, False),
    "softmax backward": lambda m, x, y: op(m, "_softmax_backward_data", y, op(m, "_softmax", x, -1, False), -1, torch.float64),
    "layer_norm": lambda m, x, y: op(m, "native_layer_norm", x, (3,), m.sum(y, [0]), m.sum(m.mul(y, y), [0]), 0.01),
    "silu": lambda m, x, y: op(m, "silu", x),
    "silu backward": lambda m, x, y: op(m, "silu_backward", y, x),
    "gelu": lambda m, x, y: op(m, "gelu", x),
    "gelu tanh": lambda m, x, y: op(m, "gelu", x, approximate="tanh"),
    "gelu backward": lambda m, x, y: op(m, "gelu_backward", y, x, approximate="tanh"),
    "relu": lambda m, x, y: op(m, "relu", x),
    "threshold": lambda m, x, y: op(m, "threshold_backward", y, x, 0),
    "sigmoid": lambda m, x, y: op(m, "sigmoid", x),
    "clamp": lambda m, x, y: op(m, "clamp", x, -0.5, 0.75),
    "var": lambda m, x, y: op(m, "var", x, [1], correction=1),
    "mean": lambda m, x, y: op(m, "mean", x, [0]),
    "norm": lambda m, x, y: op(m, "linalg_vector_norm", x, 2),
    "mm": lambda m, x, y: op(m, "mm", x, m.permute(y, (1, 0))),
    "AdamW": adamw,
    "logsumexp": lambda m, x, y: op(m, "logsumexp", x, [1]),
    "masked": lambda m, x, y: op(m, "_softmax", op(m, "masked_fill", x, ~MASK, -math.inf), -1, False),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_mean_what_they_mean_in_floats(name):
    """The parallel side sees the operands scaled by two and halved again, in other order of elements."""
    f = two(ROWS[name])

    def other(m, x, y):
        x, y = (m.scale(m.add(v, v), Fraction(1, 2)) for v in (x, y))
        return f(m, x, y)
    r = run(f, other, (6, 6), points=6)
    assert mistakes(r) == []
    assert r.defined().sum() >= 2 and r.proved().all()


# ---- identities and their wrong twins
def halves(m, x):
    return [m.take([x], torch.tensor(i)) for i in ([1, 2], [3, 4])]


def softmax(m, x):
    e = m.exp(m.sub(x, m.amax(x, [0], True)))
    return m.div(e, m.sum(e, [0], True))


def online_softmax(m, x, forget: bool = False):
    """By halves, each with a maximum of its own."""
    parts = [(m.amax(h, [0], True), h) for h in halves(m, x)]
    top = m.maximum(parts[0][0], parts[1][0])
    sums = [m.sum(m.exp(m.sub(h, own)), [0], True) for own, h in parts]
    scaled = [s if forget and k else m.mul(s, m.exp(m.sub(own, top))) for k, (s, (own, _)) in enumerate(zip(sums, parts))]
    return m.div(m.exp(m.sub(x, top)), m.add(*scaled))


def norm(m, x):
    return m.sqrt(m.sum(m.mul(x, x)))


def norm_of_norms(m, x, power: int = 2):
    return m.sqrt(m.add(*(m.pow(norm(m, h), power) for h in halves(m, x))))


def clipped(m, x, epsilon=0.25):
    return m.minimum(m.div(m.const(0.5), m.add(norm(m, x), m.const(epsilon))), m.const(1))


def clipped_by_divisor(m, x, epsilon=0.25):
    return m.inv(m.maximum(m.div(m.add(norm_of_norms(m, x), m.const(epsilon)), m.const(0.5)), m.const(1)))


def test_a_minimum_is_turned_over_where_it_is_positive_only():
    for reference, parallel in ((clipped, clipped_by_divisor), (clipped_by_divisor, clipped)):
        r = run(reference, parallel, (4,))
        assert r.proved().all() and mistakes(r) == []
        r = run(reference, lambda m, x: parallel(m, x, -0.25), (4,))      # which may be negative
        assert not r.proved().any() and mistakes(r) == []
        r = run(lambda m, x: reference(m, x, -0.25), lambda m, x: parallel(m, x, -0.25), (4,))
        assert not r.proved().any() and mistakes(r) == []


def test_identities_are_proved_and_wrong_twins_are_not():
    cases = [(softmax, online_softmax, lambda m, x: online_softmax(m, x, forget=True)), (norm, norm_of_norms, lambda m, x: norm_of_norms(m, x, 3)),
             (lambda m, x: m.exp(m.sum(x)), lambda m, x: m.mul(*(m.exp(m.sum(h)) for h in halves(m, x))),
              lambda m, x: m.add(*(m.exp(m.sum(h)) for h in halves(m, x)))),
             (lambda m, x: m.log(m.sum(m.exp(x))), lambda m, x: m.neg(m.log(m.inv(m.add(*(m.sum(m.exp(h)) for h in halves(m, x)))))),
              lambda m, x: m.neg(m.log(m.inv(m.mul(*(m.sum(m.exp(h)) for h in halves(m, x)))))))]
    for reference, right, wrong in cases:
        r = run(reference, right, (4,))
        assert r.proved().all() and mistakes(r) == []
        r = run(reference, wrong, (4,))
        assert not r.proved().any() and mistakes(r) == []


# ---- sides, constants, memory
def test_equal_is_for_what_is_defined():
    r = run(lambda m, x: m.garbage("a", 2), lambda m, x: m.garbage("a", 2), (2,))
    assert (r.ids[0][-1] == r.ids[1][-1]).all() and not r.proved().any()
    r = run(lambda m, x: x, lambda m, x: x, (2,))
    assert r.proved().all()


def test_constants():
    values = [0.0, -0.0, 1.0, -1.0, 0.1, 1 / 3, math.inf, -math.inf, math.nan, math.sqrt(2), -math.sqrt(2), 1e300]
    r = run(lambda m, x: m.const(0.5), lambda m, x: m.data(torch.tensor(values, dtype=torch.float64)), (1,))
    ids, store = r.ids[1][-1], r.claims.store
    assert ids[0] == ids[1] and len(set(ids.tolist())) == len(values) - 1
    assert [store.constants.get(int(i)) for i in ids[2:6]] == [1, -1, Fraction(1, 10), Fraction(1, 3)]
    assert ids[8] == GARBAGE and not store.clean[ids[6:9]].any() and mistakes(r) == []
    square = run(lambda m, x: m.mul(m.const(2), x), lambda m, x: m.mul(m.mul(m.const(math.sqrt(2)), x), m.const(math.sqrt(2))), (2,))
    assert mistakes(square) == []


def test_memory_keeps_what_was_read():
    def f(m, x, y):
        cell = m.cell(x)
        before = m.load(cell, 0, (4,), (1,))
        cell = m.store(cell, 1, (2,), (2,), m.take([y], torch.tensor([1, 2])))
        after = m.load(cell, 0, (2, 2), (1, 2))
        cell = m.store(cell, 0, (4,), (1,), y)
        return m.add(m.sub(m.reshape(before, (2, 2)), after), m.load(cell, 2, (1, 2), (0, 1)))
    r = run(f, f, (4, 4))
    assert r.proved().all() and mistakes(r) == []
    assert np.isfinite(r.floats[0][-1]).all()
