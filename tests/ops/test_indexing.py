"""Rows that read and write at indices, accumulating writes, and choices that data makes, against torch."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import assert_covered, check_function, check_opinfo, check_row
from trainverify.algebra.real import Real, RealValue
from trainverify.diagnostics import Fault
from trainverify.ir.trace import OpCall
from trainverify.ops import indexing

aten = torch.ops.aten
QUICK = settings(max_examples=40, deadline=None, derandomize=True, database=None)
ROWS = {r.name: r for r in indexing.rows.items}


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape) + 1))


X, C = numbers(5, 4), numbers(5, 4) + 1j * numbers(4, 5).T
I, MASK = torch.tensor([3, 0, 4]), numbers(5, 4) > 0.2
AT = torch.tensor([[0, 3, 1, 4], [2, 0, 0, 1]])
REPEATED = torch.tensor([1, 0, 1, 1, 0])

EXACT = [
    (aten.gather.default, X, 0, AT), (aten.gather.default, C, 1, torch.tensor([[0], [1], [3]])), (aten.index_select.default, X, 0, REPEATED),
    (aten.index_select.default, X, 1, torch.tensor(2)), (aten.take.default, X, torch.tensor([[0, 19], [-1, 7]])),
    (aten.take_along_dim.default, X, torch.tensor([[0], [1], [2], [3], [0]]), 1), (aten._unsafe_index.Tensor, X, [I]),
    (aten._unsafe_masked_index.default, X[:, 0], torch.tensor([True, False, True]), [I], 1.5), (aten.repeat_interleave.self_int, X, 2, 0),
    (aten.repeat_interleave.self_Tensor, X, torch.tensor([1, 0, 2, 3]), 1), (aten.embedding.default, X, torch.tensor([[1, 1], [4, 0]]), 1),
    (aten.index.Tensor, X, [I]), (aten.index.Tensor, X, [None, torch.tensor([1, 1])]), (aten.index.Tensor, X, [MASK]),
    (aten.index.Tensor, X, [I, torch.tensor([[1], [3]])]), (aten.index.Tensor, numbers(3, 4, 5), [torch.tensor([2, 0]), None, torch.tensor([1, 1])]),
    (aten.index.Tensor, C, [torch.tensor([True, False, True, False, False])]), (aten.masked_select.default, X, MASK),
    (aten.masked_select.default, X, MASK[:1]), (aten.masked_scatter.default, X, MASK, numbers(20)),
    (aten.masked_scatter_backward.default, X, MASK, [4, 5]),
    (aten.scatter.src, X, 0, torch.tensor([[0, 3, 1, 4], [2, 0, 0, 1]]), numbers(3, 4)), (aten.scatter.value, X, 1, torch.tensor([[0, 0], [1, 3]]), 2.5),
    (aten.scatter_.src, X, 1, torch.tensor([[2, 0]]), numbers(2, 5)), (aten.index_copy.default, X, 0, I, numbers(3, 4)),
    (aten.index_copy.default, X, 1, torch.tensor([2]), numbers(5, 1)), (aten.index_fill.int_Scalar, X, 0, REPEATED, 3),
    (aten.index_fill.int_Tensor, X, 1, torch.tensor([1]), torch.tensor(2.5, dtype=torch.float64)), (aten.put.default, X, torch.tensor([3, -1]), numbers(2)),
    (aten.index_put.default, X, [I], numbers(3, 4)), (aten.index_put.default, X, [I], numbers(4)), (aten.index_put.default, X, [None, I[:2]], numbers(2)),
    (aten.index_put_.default, X, [MASK], torch.tensor(1.5, dtype=torch.float64)), (aten.index_put.default, X, [MASK], numbers(int(MASK.sum()))),
    (aten._index_put_impl_.default, X, [I, torch.tensor([1, 1, 3])], numbers(3)), (aten._unsafe_index_put.default, X, [I], numbers(1, 4)),
    (aten.index_put.default, X, [REPEATED], torch.tensor([2.0], dtype=torch.float64)),
    (aten.topk.default, X, 2), (aten.topk.default, X, 3, 0, False), (aten.sort.default, X, 0, True),
    (aten.kthvalue.default, X, 2, 0), (aten.kthvalue.default, X, 2, 1, True), (aten.median.dim, X, 1), (aten.median.dim, X, 0, True), (aten.mode.default, X.round(), 1), (aten.cummax.default, X, 0), (aten.cummin.default, X, 1),
    (aten.argsort.default, X, 0), (aten.argmax.default, X), (aten.argmax.default, X, 1), (aten.argmin.default, X, 0, True), (aten.nonzero.default, X),
    (aten.bucketize.Tensor, X, torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)), (aten._unique2.default, X.round(), True, True, True),
    (aten.searchsorted.Tensor, torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64), X), (aten.multinomial.default, X.abs(), 2),
    (aten.sort.default, torch.tensor(1.5, dtype=torch.float64)),
]


@pytest.mark.parametrize("call", EXACT, ids=lambda c: str(c[0]))
def test_elements_come_from_where_torch_takes_them(call):
    op, *args = call
    check_row(op, args, rtol=0, atol=0)


ACCUMULATING = [
    (aten.embedding_dense_backward.default, numbers(2, 3, 4), torch.tensor([[1, 1, 2], [0, 1, 6]]), 7, -1, False),
    (aten.embedding_dense_backward.default, numbers(2, 3, 4), torch.tensor([[1, 1, 2], [0, 1, 6]]), 7, 1, False),
    (aten.index_add.default, X, 0, REPEATED, numbers(5, 4)), (aten.index_add.default, C, 0, REPEATED, C), (aten.index_add.default, X, 1, torch.tensor(2), numbers(5, 1)),
    (aten.scatter_add.default, X, 0, torch.zeros(3, 4, dtype=torch.int64), numbers(4, 4)), (aten.scatter_add_.default, X, 1, AT[:, :2].clamp(max=3), numbers(2, 2)),
    (aten.scatter_reduce.two, X, 0, torch.zeros(3, 4, dtype=torch.int64), numbers(4, 4), "sum"),
    (aten.index_put.default, X, [REPEATED], numbers(5, 4), True), (aten.index_put_.default, X, [MASK], torch.tensor(1.5, dtype=torch.float64), True),
    (aten._unsafe_index_put.default, X, [REPEATED, torch.tensor([1, 2, 1, 1, 2])], numbers(5), True), (aten.put.default, X, torch.tensor([3, 3, 0]), numbers(3), True),
    (aten._unsafe_masked_index_put_accumulate.default, X[:, 0], torch.tensor([True, False, True]), [torch.tensor([1, 2, 1])], numbers(3)),
    (aten.bincount.default, torch.tensor([1, 4, 1]), numbers(3), 7), (aten.bincount.default, torch.tensor([1, 4, 1]), numbers(3)),
]


def test_torchtitan_scatter_add():
    library = torch.library.Library("torchtitan", "FRAGMENT")     # the op of that framework, which need not be installed
    if not hasattr(torch.ops.torchtitan, "deterministic_scatter_add"):
        library.define("deterministic_scatter_add(Tensor out, Tensor index, Tensor src) -> Tensor")
        library.impl("deterministic_scatter_add", lambda out, index, src: out.scatter_add(0, index, src), "CPU")
    call = (X, torch.tensor([2, 0, 2, 1, 2])[:, None].expand(-1, 4), numbers(5, 4))
    check_row(torch.ops.torchtitan.deterministic_scatter_add.default, call, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("call", ACCUMULATING, ids=lambda c: str(c[0]))
def test_repeated_places_accumulate(call):
    op, *args = call
    check_row(op, args, rtol=1e-14, atol=1e-14)


def test_keyword_variants():
    check_row(aten.index_add.default, (X, 0, REPEATED, numbers(5, 4)), {"alpha": 2.5}, rtol=1e-14)
    check_row(aten.scatter_reduce.two, (X, 0, AT, numbers(3, 4), "sum"), {"include_self": False}, rtol=1e-14, atol=1e-14)
    check_row(aten.sort.stable, (X,), {"stable": True, "dim": 1}, rtol=0, atol=0)
    check_row(aten.searchsorted.Tensor, (torch.tensor([1.0, -1.0]).double(), X), {"sorter": torch.tensor([1, 0]), "right": True})
    check_row(aten.bucketize.Tensor, (X, torch.tensor([-1.0, 1.0], dtype=torch.float64)), {"right": True})


@QUICK
@given(st.integers(1, 5), st.integers(1, 4), st.lists(st.integers(0, 4), min_size=1, max_size=8))
def test_index_add_and_its_kin_agree_on_any_indices(extra, width, index):
    index = torch.tensor(index)
    x, source = numbers(5 + extra, width), numbers(len(index), width)
    check_row(aten.index_add.default, (x, 0, index, source), rtol=1e-13, atol=1e-13)
    check_row(aten.index_put.default, (x, [index], source, True), rtol=1e-13, atol=1e-13)
    check_row(aten.scatter_add.default, (x, 0, index[:, None].expand(-1, width), source), rtol=1e-13, atol=1e-13)
    check_row(aten.embedding_dense_backward.default, (source, index, 5 + extra, 2, False), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ["gather", "scatter", "scatter_add", "index_select", "index_add", "index_copy", "index_fill", "index_put", "take", "put",
                                  "masked_select", "masked_scatter", "topk", "sort", "argsort", "kthvalue", "mode", "nn.functional.embedding",
                                  "take_along_dim", "repeat_interleave", "__getitem__", "argmax", "argmin", "cummax", "cummin", "nonzero"])
def test_opinfo_samples(name):
    def defined(sample):
        args = (*sample.args, *sample.kwargs.values())
        return "reduce" not in sample.kwargs and not any(a in ("add", "multiply") for a in args if isinstance(a, str)) \
            and not sample.kwargs.get("max_norm") and not sample.kwargs.get("scale_grad_by_freq")
    check_opinfo(name, limit=10, rtol=1e-13, atol=1e-13, keep=defined)


def test_opinfo_scatter_reduce():
    check_opinfo("scatter_reduce", "sum", limit=10, rtol=1e-13, atol=1e-13)


def test_forward_and_backward_of_a_top_k_router():
    def route(x, w, bias):
        gate, chosen = (x @ w).topk(2, dim=-1)
        return bias[chosen] * gate, gate.sort(0).values, x[chosen[:, 0]]
    assert check_function(route, numbers(6, 4), numbers(4, 5), numbers(5))


# ---- decisions
class Logged:
    """A replay context whose argument `place` is a mask that depends on symbols."""

    def __init__(self, native=(), argument=None):
        self.native, self.logged, self._argument = list(native), [], argument
        self.call = OpCall(0, "aten.test", (), {}, None)

    def decide(self, kind, operands, outcome):
        self.logged.append((kind, operands, outcome))

    def argument(self, k):
        return self._argument


def test_a_choice_is_logged_by_rows_of_its_last_dimension():
    m, values = Real(), X.topk(2, dim=0)
    ctx = Logged(values)
    got = ROWS["aten.topk"].meaning(m, m.data(X), 2, 0, ctx=ctx)
    assert torch.equal(got[0].t, values[0]) and got[1] is None
    (kind, (operand,), outcome), = ctx.logged
    assert kind == "topk:2:largest" and torch.equal(operand.t, X.T) and torch.equal(outcome, values[1].T)


@pytest.mark.parametrize("name, args, given", [
    ("aten.index", lambda v, mask: (v, [mask]), [MASK]), ("aten.masked_select", lambda v, mask: (v, mask), MASK)])
def test_a_symbolic_mask_steers_by_its_recorded_contents_and_is_a_decision(name, args, given):
    m, ctx = Real(), Logged(argument=given)
    mask = m.data(MASK)
    got = ROWS[name].meaning(m, *args(m.data(X), mask), ctx=ctx)
    assert torch.equal(got.t, X[MASK])
    assert ctx.logged[0][0] == "mask" and ctx.logged[0][1] == [mask] and torch.equal(ctx.logged[0][2], MASK)


def test_one_value_under_a_symbolic_mask_is_a_selection():
    m, ctx = Real(), Logged()
    got = ROWS["aten.index_put"].meaning(m, m.data(X), [m.data(MASK)], m.const(2), ctx=ctx)
    assert torch.equal(got.t, X.masked_fill(MASK, 2)) and not ctx.logged
    got = ROWS["aten.index_put"].meaning(m, m.data(X), [m.data(MASK[:, 0])], m.const(2), True, ctx=ctx)
    assert torch.equal(got.t, X + 2 * MASK[:, :1]) and not ctx.logged


def test_nonzero_is_the_same_decision_as_a_mask():
    m, ctx = Real(), Logged([MASK.nonzero()])
    assert ROWS["aten.nonzero"].meaning(m, m.data(MASK), ctx=ctx) is None
    assert ctx.logged[0][0] == "mask" and torch.equal(ctx.logged[0][2], MASK)


def test_constants_decide_nothing():
    class Constants(Real):
        def is_const(self, a):
            return True
    ctx = Logged(X.topk(2))
    ROWS["aten.topk"].meaning(Constants(), RealValue(X), 2, ctx=ctx)
    assert not ctx.logged


def test_draws_are_decided_by_their_weights():
    m, ctx = Real(), Logged([torch.tensor([1, 0])])
    ROWS["aten.multinomial"].meaning(m, m.data(X[0].abs()), 2, ctx=ctx)
    assert ctx.logged[0][0] == "multinomial:2:False"
    assert ROWS["aten.multinomial"].kind == "decision"


# ---- refused
@pytest.mark.parametrize("name, args, says", [
    ("aten.scatter", (X, 0, torch.zeros(2, 4, dtype=torch.int64), numbers(3, 4)), "one place"),
    ("aten.index_copy", (X, 0, REPEATED, numbers(5, 4)), "one place"),
    ("aten.put", (X, torch.tensor([1, 1]), numbers(2)), "one place"),
    ("aten.scatter_reduce", (X, 0, AT, numbers(3, 4), "prod"), "prod"),
    ("aten.embedding_dense_backward", (X, REPEATED, 5, -1, True), "scale_grad_by_freq"),
])
def test_what_has_no_defined_meaning_is_refused(name, args, says):
    m = Real()
    with pytest.raises(Fault, match=says) as caught:
        ROWS[name].meaning(m, *(m.data(a) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args))
    assert caught.value.diagnostics[0].code == "OPS002" and caught.value.diagnostics[0].fix


def test_repeated_index_put_of_one_source_element_is_fine_and_of_two_is_refused():
    m = Real()
    got = ROWS["aten.index_put"].meaning(m, m.data(X), [REPEATED], m.data(numbers(4)), ctx=Logged())
    assert torch.equal(got.t, torch.cat([numbers(4).expand(2, 4), X[2:]]))
    with pytest.raises(Fault, match="one place"):
        ROWS["aten.index_put"].meaning(m, m.data(X), [REPEATED], m.data(numbers(5, 4)), ctx=Logged())


def test_every_row_was_checked():
    assert_covered(indexing.rows)
