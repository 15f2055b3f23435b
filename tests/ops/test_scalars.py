"""Rows of tracked floats against Python's own arithmetic."""
from __future__ import annotations

import math
import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainverify.algebra.real import Real
from trainverify.ops import scalars
from trainverify.ops.table import OpTable

TABLE = OpTable(scalars.rows.items)
FLOATS = st.floats(-50, 50, allow_nan=False).map(lambda x: round(x, 3))
BINARY = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "truediv": operator.truediv, "floordiv": operator.floordiv,
          "mod": operator.mod, "pow": operator.pow, "min": min, "max": max}
UNARY = {"neg": operator.neg, "pos": operator.pos, "abs": abs, "float": float, "round": round}
FUNCTIONS = {"sqrt": math.sqrt, "exp": math.exp, "log": math.log, "sin": math.sin, "cos": math.cos, "tanh": math.tanh}
QUICK = settings(max_examples=30, deadline=None, derandomize=True, database=None)


def run(name: str, *args):
    m = Real()
    got = TABLE.lookup(f"tv.scalar.{name}").row.meaning(m, *args)
    assert got.shape == ()
    return got.t.item()


@pytest.mark.parametrize("name", sorted(BINARY))
@QUICK
@given(a=FLOATS, b=FLOATS, tracked=st.sampled_from(["both", "left", "right"]))
def test_binary_operators(name, a, b, tracked):
    if name in ("truediv", "floordiv", "mod") and abs(b) < 0.01 or name == "pow" and (a <= 0 or abs(b) > 5):
        return
    m = Real()
    args = (m.const(a) if tracked != "right" else a, m.const(b) if tracked != "left" else b)
    want = BINARY[name](a, b)
    if name in ("floordiv", "mod") and abs(a / b - round(a / b)) < 1e-9:
        return                                  # Python's floor division is exact, a / b is rounded
    assert math.isclose(run(name, *args), want, rel_tol=1e-9, abs_tol=1e-9)


@pytest.mark.parametrize("name", sorted(UNARY))
@QUICK
@given(a=FLOATS)
def test_unary_operators(name, a):
    assert run(name, Real().const(a)) == UNARY[name](a)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
@QUICK
@given(a=st.floats(0.01, 50))
def test_functions_of_the_math_module(name, a):
    assert math.isclose(run(name, Real().const(a)), FUNCTIONS[name](a), rel_tol=1e-9, abs_tol=1e-9)


def test_rounding_to_digits():
    assert math.isclose(run("round", Real().const(2.34567), 3), 2.346) and math.isclose(run("round", Real().const(1234.0), -2), 1200)


def test_extremes_of_many_values():
    m = Real()
    assert run("max", m.const(1), 3, m.const(2)) == 3 and run("min", 5, m.const(1), m.const(2)) == 1


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_item_takes_the_only_element(shape):
    assert run("item", Real().data(torch.full(shape, 2.5))) == 2.5


def test_item_of_an_integer_tensor():
    assert run("item", torch.tensor([7])) == 7


def test_names_have_no_overload():
    assert TABLE.lookup("tv.scalar.add").row.name == "tv.scalar.add" and TABLE.lookup("tv.scalar.unknown") is None
    assert {r.name.rsplit(".", 1)[1] for r in scalars.rows.items} == {*BINARY, *UNARY, *FUNCTIONS, "item"}
