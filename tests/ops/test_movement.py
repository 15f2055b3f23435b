"""Rows of pure data movement reproduce torch bit for bit."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import torch.distributed.fsdp._fully_shard._fsdp_collectives  # noqa: F401  (registers the fsdp ops)
from harness import assert_covered, check_function, check_opinfo, check_row
from trainverify.algebra.base import Complex
from trainverify.algebra.real import Real
from trainverify.diagnostics import Fault
from trainverify.ops import movement
from trainverify.ops.movement import Fill, adjoint, move

aten = torch.ops.aten
QUICK = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape) + 1))


def exact(op, *args, **kwargs) -> None:
    check_row(op, args, kwargs, rtol=0, atol=0)


X, C, IMAGE = numbers(3, 4), numbers(3, 4) + 1j * numbers(4, 3).T, numbers(2, 4, 6, 6)

CALLS = [
    (aten.cat.default, [X, numbers(3, 2)], 1), (aten.cat.default, [C, C], 0), (aten.cat.default, [C, X], 0),
    (aten.cat.default, [X, torch.arange(4).reshape(1, 4)], 0), (aten.stack.default, [X, X + 1], -1),
    (aten.block_diag.default, [X, numbers(2, 2)]), (aten._chunk_cat.default, [numbers(5, 2), numbers(3, 4)], 0, 2),
    (aten.view.default, X, [4, 3]), (aten._unsafe_view.default, X, [2, 6]), (aten.view_copy.default, X, [-1]),
    (aten._reshape_copy.default, X, [6, 2]), (aten._reshape_alias.default, X, [4, 3], [3, 1]),
    (aten.expand.default, X, [2, 3, 4]), (aten.expand_copy.default, X, [2, -1, -1]), (aten.permute.default, C, [1, 0]),
    (aten.permute_copy.default, X, [1, 0]), (aten.transpose.int, X, 0, 1), (aten.transpose_copy.int, X, 0, -1), (aten.t.default, X),
    (aten.t_copy.default, X), (aten.squeeze.dim, X[:1], 0), (aten.squeeze.default, X[:1]), (aten.squeeze_copy.default, X[:, :1]),
    (aten.squeeze_copy.dims, X[:1, :1], [0, 1]), (aten.unsqueeze.default, X, 1), (aten.unsqueeze_copy.default, X, -1),
    (aten.select.int, X, 1, -1), (aten.select_copy.int, X, 0, 1), (aten.slice.Tensor, X, 1, 1, 4, 2),
    (aten.slice_copy.Tensor, X, 0, -2), (aten.narrow_copy.default, X, 1, 1, 2), (aten.diagonal.default, IMAGE, 1, 2, 3),
    (aten.diagonal_copy.default, X), (aten.unfold.default, IMAGE, 3, 3, 2), (aten.unfold_copy.default, X, 1, 2, 1),
    (aten.split.Tensor, X, 2), (aten.split_copy.Tensor, X, 3, 1), (aten.split_with_sizes.default, X, [1, 3], 1),
    (aten.split_with_sizes_copy.default, X, [2, 1]), (aten.unsafe_split.Tensor, X, 2), (aten.unsafe_split_with_sizes.default, X, [1, 2]),
    (aten.unbind.int, X), (aten.unbind_copy.int, C, 1), (aten.repeat.default, X, [2, 1, 3]), (aten.roll.default, X, [1, 2], [0, 1]),
    (aten.roll.default, X, [2]), (aten.flip.default, X, [0, 1]), (aten.rot90.default, X, 3, [0, 1]), (aten.tril.default, X, 1),
    (aten.triu.default, X, -1), (aten.triu.default, C), (aten.diag_embed.default, X, 1), (aten.pixel_shuffle.default, IMAGE, 2),
    (aten.pixel_unshuffle.default, IMAGE, 3), (aten.channel_shuffle.default, IMAGE, 2), (aten.slice_backward.default, X, [3, 9], 1, 1, 9, 2),
    (aten.select_backward.default, X, [3, 5, 4], 1, 2), (aten.diagonal_backward.default, numbers(3), [3, 4], 1, 0, 1),
    (aten.constant_pad_nd.default, X, [1, 2, 0, 1]), (aten.constant_pad_nd.default, X, [1, -1], 2.5), (aten.constant_pad_nd.default, C, [1, 0], 3),
    (aten.slice_scatter.default, X, numbers(3, 2), 1, 0, 4, 2), (aten.select_scatter.default, X, numbers(4), 0, 1),
    (aten.diagonal_scatter.default, X, numbers(3)), (aten.im2col.default, IMAGE, [3, 2], [1, 2], [1, 0], [2, 1]),
    (aten.reflection_pad1d.default, X, [2, 1]), (aten.reflection_pad2d.default, IMAGE, [1, 2, 0, 1]),
    (aten.reflection_pad3d.default, IMAGE[:1], [1, 0, 2, 1, 1, 1]), (aten.replication_pad1d.default, X, [2, 1]),
    (aten.replication_pad2d.default, IMAGE, [1, 2, 3, 1]), (aten.replication_pad3d.default, IMAGE[None], [1, 0, 2, 1, 1, 1]),
    (aten.upsample_nearest1d.default, IMAGE[0], [13]), (aten.upsample_nearest2d.default, IMAGE, [9, 12]),
    (aten.upsample_nearest3d.default, IMAGE[None], [8, 9, 6]), (aten._upsample_nearest_exact1d.default, IMAGE[0], [13]),
    (aten._upsample_nearest_exact2d.default, IMAGE, [9, 4]), (aten._upsample_nearest_exact3d.default, IMAGE[None], [8, 9, 6]),
    (aten.view_as_real_copy.default, C), (aten.view_as_real.default, C), (aten.view_as_complex_copy.default, numbers(3, 4, 2)),
    (aten.view_as_complex.default, numbers(5, 2)), (aten._foreach_copy_.default, [X, numbers(2, 3)], [X + 1, numbers(3)]),
    (torch.ops._c10d_functional._wrap_tensor_autograd.default, X),
    (torch.ops.fsdp.all_gather_copy_in.default, [numbers(12), numbers(5)], numbers(51), [12, 5], 17, 1),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda c: str(c[0]))
def test_a_move_gives_what_torch_gives_bit_for_bit(call):
    op, *args = call
    exact(op, *args)


def test_calls_with_out_lists():
    exact(aten.cat.out, [X, X], 1, out=torch.empty(3, 8, dtype=torch.float64))
    exact(aten.split_with_sizes_copy.out, X, [1, 3], 1, out=[numbers(3, 1), numbers(3, 3)])
    exact(aten._chunk_cat.out, [numbers(5, 2), X], 0, 3, out=numbers(3, 8))
    exact(torch.ops.fsdp.split_with_sizes_copy.default, X, [2, 2], 1, out=[numbers(3, 2), numbers(3, 2)])
    exact(torch.ops.fsdp.chunk_cat.default, [numbers(5, 2), X], 0, 2, out=numbers(2, 14))


@pytest.mark.parametrize("op, args", [
    (torch.nn.functional.pad, ((2, 1, 0, 1), "reflect")), (torch.nn.functional.pad, ((2, 1, 3, 1), "replicate")),
    (torch.nn.functional.pad, ((2, 1, 0, 1), "circular")), (torch.nn.functional.pad, ((2, 1, 0, 1), "constant", 1.5)),
    (torch.nn.functional.unfold, (2, 1, 1, 2)), (lambda x: torch.nn.functional.interpolate(x, scale_factor=2.5), ()),
    (lambda x: torch.nn.functional.interpolate(x, size=(3, 13), mode="nearest-exact"), ()), (lambda x: x.unfold(3, 3, 1).unfold(2, 2, 2), ()),
    (lambda x: torch.nn.functional.pad(x[0], (1, 2), "reflect"), ()), (lambda x: torch.nn.functional.pad(x[0], (1, 2), "replicate"), ()),
    (lambda x: torch.nn.functional.pad(x, (1, 1, 1, 1, 1, 1), "reflect"), ()), (lambda x: torch.nn.functional.pad(x, (1, 1, 1, 1, 1, 1), "replicate"), ()),
    (lambda x: torch.nn.functional.interpolate(x[0], size=13), ()), (lambda x: torch.nn.functional.interpolate(x[0], size=13, mode="nearest-exact"), ()),
    (lambda x: torch.nn.functional.interpolate(x[None], size=(5, 6, 13)), ()),
    (lambda x: torch.nn.functional.interpolate(x[None], size=(5, 6, 13), mode="nearest-exact"), ()),
])
def test_gradients_of_moves_that_read_an_element_twice(op, args):
    calls = check_function(op, IMAGE, *args, rtol=1e-14)
    assert calls


def test_unfold_backward_and_fold():
    exact(aten.unfold_backward.default, numbers(2, 5, 2), [2, 6], 1, 2, 1)
    columns = torch.nn.functional.unfold(IMAGE, (3, 2), 1, (1, 0), (2, 1))
    check_row(aten.col2im.default, (columns, [6, 6], [3, 2], [1, 1], [1, 0], [2, 1]), rtol=1e-14)
    check_row(aten.col2im.default, (columns[0], [6, 6], [3, 2], [1, 1], [1, 0], [2, 1]), rtol=1e-14)


@pytest.mark.parametrize("name", ["cat", "stack", "roll", "flip", "tril", "triu", "rot90", "diag_embed", "repeat", "nn.functional.unfold",
                                  "block_diag", "unfold_copy", "slice_scatter", "select_scatter", "diagonal_scatter",
                                  "split_with_sizes_copy", "expand_copy", "permute_copy", "nn.functional.pixel_shuffle"])
def test_opinfo_samples(name):
    check_opinfo(name, limit=8, numel=10_000, rtol=1e-14, atol=0)


@pytest.mark.parametrize("variant", ["constant", "reflect", "replicate", "circular"])
def test_opinfo_pad(variant):
    check_opinfo("nn.functional.pad", variant, limit=8, rtol=1e-14, atol=0)


# ---- laws
@QUICK
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_moves_compose_as_torch_composes_them(shape, data):
    x, m = numbers(*shape), Real()
    order = data.draw(st.permutations(range(len(shape))))
    dim = data.draw(st.integers(0, len(shape) - 1))
    value = move(m, aten.roll, [move(m, aten.permute, [m.data(x), order]), [1], [dim]])
    assert torch.equal(value.t, x.permute(order).roll(1, dim))


@QUICK
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
def test_the_adjoint_satisfies_its_defining_identity(n, size, step):
    """<move(x), g> = <x, adjoint(g)>."""
    x, m = numbers(2, n + size), Real()
    moved = move(m, aten.unfold_copy, [m.data(x), 1, size, step])
    g = numbers(*moved.shape)
    back = adjoint(m, aten.unfold_copy, x.shape, [1, size, step], m.data(g))
    torch.testing.assert_close((moved.t * g).sum(), (back.t * x).sum(), rtol=1e-12, atol=1e-12)


def test_a_fill_is_an_element_like_others():
    m = Real()
    got = move(m, aten.constant_pad_nd, [m.data(X), [1, 0], Fill(m.const(7))])
    assert torch.equal(got.t[:, 0], torch.full((3,), 7.0, dtype=torch.float64))


def test_plans_with_equal_shapes_and_other_indices_do_not_mix():
    m = Real()
    for index in ([0, 2], [2, 0], [1, 1]):
        got = move(m, aten.index_select, [m.data(X), 0, torch.tensor(index)])
        assert torch.equal(got.t, X[index])
    assert torch.equal(move(m, aten.index, [m.data(X), [torch.tensor([0, 1])]]).t, X[[0, 1]])
    assert torch.equal(move(m, aten.index, [m.data(numbers(2, 4)), [torch.tensor([False, True])]]).t, numbers(2, 4)[[1]])


def test_complex_moves_both_parts():
    m = Real()
    got = move(m, aten.flip, [Complex(m.data(C.real), m.data(C.imag)), [0]])
    assert torch.equal(torch.complex(got.re.t, got.im.t), C.flip(0))


def test_reinterpreted_bytes_are_refused():
    m = Real()
    row = next(r for r in movement.rows.items if r.name == "aten.view_copy")
    with pytest.raises(Fault, match="reinterpreted"):
        row.meaning(m, m.data(X), torch.int64)


def test_an_index_made_of_symbols_is_refused():
    m = Real()
    row = next(r for r in movement.rows.items if r.name == "aten.roll")
    with pytest.raises(Fault, match="computed from symbols"):
        row.meaning(m, m.data(X), m.const(1), [0])


def test_every_row_was_checked():
    assert_covered(movement.rows)
