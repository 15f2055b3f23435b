"""The algebra `real`: movement, cells and selection; its arithmetic is torch's own."""
from fractions import Fraction

import pytest
import torch

from trainverify.algebra.real import Real


def values(m, *xs):
    return m.data(torch.tensor(xs, dtype=torch.float32))


def test_constants():
    m = Real()
    assert m.const(Fraction(1, 4), (2,)).t.tolist() == [0.25, 0.25]
    assert m.const(float("-inf")).t.item() == float("-inf")
    assert m.data(torch.tensor([True, False])).t.tolist() == [1.0, 0.0]


def test_take_counts_from_one_through_the_sources_and_zero_is_zero():
    m = Real()
    got = m.take([values(m, 5, 6), values(m, 7)], torch.tensor([[3, 0], [1, 2]]))
    assert got.t.tolist() == [[7, 0], [5, 6]] and got.shape == (2, 2)


def test_scatter_sum_accumulates_and_leaves_its_base():
    m = Real()
    base = values(m, 1, 1, 1)
    assert m.scatter_sum(base, torch.tensor([0, 0, 2]), values(m, 2, 3, 4)).t.tolist() == [6, 1, 5]
    assert base.t.tolist() == [1, 1, 1]


def test_where_takes_masks_of_both_kinds():
    m = Real()
    a, b = values(m, 1, 2), values(m, float("nan"), 4)
    assert m.where(torch.tensor([True, False]), a, b).t.tolist() == [1, 4]
    assert m.where(values(m, 1, 0), a, b).t.tolist() == [1, 4]


def test_loads_do_not_see_later_stores():
    m = Real()
    cell = m.cell(values(m, 1, 2, 3, 4))
    seen = m.load(cell, 0, (2, 2), (1, 2))
    cell = m.store(cell, 1, (2,), (2,), values(m, 8, 9))
    assert seen.t.tolist() == [[1, 3], [2, 4]]
    assert m.load(cell, 0, (4,), (1,)).t.tolist() == [1, 8, 3, 9]


def test_symbols_come_from_a_table_or_a_function():
    table = torch.arange(10, dtype=torch.float64)
    assert Real(table).symbols("w", 3, 2).t.tolist() == [3, 4]
    assert Real(lambda i: 2.0 * i).symbols("w", 3, 2).t.tolist() == [6, 8]
    with pytest.raises(LookupError):
        Real().symbols("w", 0, 1)


def test_sum_over_no_dims_is_over_all():
    m = Real()
    a = m.reshape(values(m, 1, 2, 3, 4), (2, 2))
    assert m.sum(a).t.item() == 10 and m.sum(a, []).t.item() == 10 and m.sum(a, [-1], True).t.tolist() == [[3], [7]]
    assert m.sum(m.const(2)).t.item() == 2


def test_unknown_tag_is_refused():
    m = Real()
    assert m.opaque("floor", values(m, 1.5)).t.item() == 1
    with pytest.raises(LookupError):
        m.opaque("mystery", values(m, 1))


def test_equality_counts_nan_as_itself():
    m = Real()
    assert m.equal(values(m, 1, float("nan")), values(m, 1, float("nan"))).all()
