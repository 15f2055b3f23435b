"""Rows of matrix products against torch."""
from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import assert_covered, check_function, check_opinfo, check_row
from trainverify.algebra.real import Real
from trainverify.diagnostics import Fault
from trainverify.ops import matmul

aten = torch.ops.aten
QUICK = settings(max_examples=15, deadline=None, derandomize=True, database=None)


def rnd(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def crnd(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.view_as_complex(rnd(*shape, 2, seed=seed))


@pytest.mark.parametrize("name", ["mm", "bmm", "mv", "dot", "vdot", "outer", "addmm", "baddbmm", "addbmm", "addmv", "addr", "matmul",
                                  "__rmatmul__", "einsum", "nn.functional.linear", "inner", "tensordot", "linalg.multi_dot"])
def test_samples(name):
    check_opinfo(name, limit=10, numel=1000)


@pytest.mark.parametrize("args,kwargs", [
    ([aten.addmm.default, rnd(4), rnd(2, 3), rnd(3, 4)], {"beta": 0.5, "alpha": -2}),
    ([aten.addmm.default, torch.full((4,), math.nan).double(), rnd(2, 3), rnd(3, 4)], {"beta": 0}),
    ([aten.baddbmm.default, rnd(2, 1, 4), rnd(2, 2, 3), rnd(2, 3, 4)], {"alpha": 0.25}), ([aten.vdot.default, rnd(3), rnd(3, seed=1)], {}),
    ([aten.outer.default, rnd(3), rnd(2, seed=1)], {}), ([aten.ger.default, rnd(3), rnd(2, seed=1)], {}),
    ([aten.mm.default, crnd(2, 3), crnd(3, 2, seed=1)], {}), ([aten.vdot.default, crnd(3), crnd(3, seed=1)], {}), ([aten.mm.default, rnd(2, 0), rnd(0, 3)], {}),
    ([aten._addmm_activation.default, rnd(4), rnd(2, 3), rnd(3, 4)], {}), ([aten._addmm_activation.default, rnd(4), rnd(2, 3), rnd(3, 4)], {"use_gelu": True}),
    *[([aten.matmul.default, rnd(*a), rnd(*b, seed=1)], {}) for a, b in [((3,), (3,)), ((2, 3), (3,)), ((3,), (3, 4)), ((5, 2, 3), (3, 4)),
                                                                        ((2, 3), (5, 3, 4)), ((3,), (5, 3, 4)), ((5, 2, 3), (3,)), ((5, 1, 2, 3), (4, 3, 2))]],
    ([aten.linear.default, rnd(2, 3, 4), rnd(5, 4), rnd(5)], {}), ([aten.linear.default, rnd(4), rnd(5, 4)], {}),
    *[([aten.einsum.default, eq, [rnd(*a), rnd(*b, seed=1)]], {}) for eq, a, b in [
        ("bi,ij->bj", (2, 3), (3, 4)), ("bhqd,bhkd->bhqk", (2, 2, 3, 4), (2, 2, 5, 4)), ("ab,ab->", (2, 3), (2, 3)), ("i,j->ji", (2,), (3,)), ("ab,bc->ca", (2, 3), (3, 4))]],
])
def test_calls(args, kwargs):
    check_row(args[0], args[1:], kwargs)


@pytest.mark.parametrize("equation,shapes", [("bij,bjk->bik", ((2, 3, 4), (2, 4, 5))), ("ij,ij->ij", ((2, 3), (2, 3))), ("bshd,bthd->bhst", ((2, 3, 2, 4), (2, 5, 2, 4))),
                                             ("i,i->", ((3,), (3,))), ("ij->ji", ((2, 3),)), ("ii->i", ((3, 3),)), ("bi,ij,bj->b", ((2, 3), (3, 4), (2, 4)))])
def test_einsum_as_recorded(equation, shapes):
    check_function(lambda *ts: torch.einsum(equation, *ts), *[rnd(*s, seed=i) for i, s in enumerate(shapes)])


def test_undecomposed_einsum_is_refused():
    with pytest.raises(Fault, match="OPS002"):
        check_row(aten.einsum.default, ["ii->i", [rnd(3, 3)]])


@pytest.mark.parametrize("a,b,offs", [((5, 4), (3, 4, 8), [2, 2, 5]), ((4, 8), (8, 4), [4, 4, 8]), ((3, 4, 4), (4, 8), [4, 4, 8]), ((3, 4, 4), (3, 4, 8), None)])
def test_grouped_products(a, b, offs):
    """torch has it in float32 only."""
    offs = None if offs is None else torch.tensor(offs, dtype=torch.int32)
    check_row(aten._grouped_mm.default, [rnd(*a).float(), rnd(*b, seed=1).float(), offs], rtol=1e-5, atol=1e-5)


def test_rows_of_no_group_are_undefined():
    """torch leaves rows after the last group uninitialised; the row leaves them undefined."""
    m = Real()
    got = m.to_float(matmul.grouped_mm(m, m.data(rnd(5, 4)), m.data(rnd(2, 4, 8)), torch.tensor([1, 3], dtype=torch.int32)))
    assert got[:3].isfinite().all() and got[3:].isnan().all()


@pytest.mark.parametrize("name", ["nn.functional.conv1d", "nn.functional.conv2d", "nn.functional.conv3d"])
def test_convolutions(name):
    check_opinfo(name, limit=12, numel=2000)


def test_transposed_convolution_is_refused():
    with pytest.raises(Fault, match="OPS002"):
        check_row(aten.convolution.default, [rnd(1, 2, 3), rnd(2, 2, 2), None, [1], [0], [1], True, [0], 1])


@QUICK
@given(n=st.integers(0, 3), k=st.integers(0, 3), p=st.integers(1, 3), b=st.integers(1, 2))
def test_sizes(n, k, p, b):
    """Forward and backward for any sizes, empty ones included."""
    check_function(lambda x, w, c: F.linear(x, w, c), rnd(b, n, k), rnd(p, k), rnd(p))
    check_function(torch.bmm, rnd(b, n, k), rnd(b, k, p))


def test_every_row_was_checked():
    assert_covered(matmul.rows)
