"""Reading and writing at indices, accumulating writes, and the choices that data makes (trusted).

Indices are concrete integers. Where they were computed from symbols (top-k, sort, a mask), the recorded outcome steers, and
the row logs a decision: it is proved only if the other side decides on equal operands. Writes that meet at one place with
different elements have no defined result in PyTorch and are refused; accumulating writes are sums and may meet.
"""
from __future__ import annotations

import math

import torch

from trainverify.algebra.base import Algebra, Complex
from trainverify.ops.lift import each, lift, number, refuse, scaled
from trainverify.ops.movement import Fill, attribute, collect, elements, move, mover, read_places, taken
from trainverify.ops.table import Rows

rows = Rows("move")
aten = torch.ops.aten


# ---- reading
for _name in ("gather", "index_select", "take", "_unsafe_index"):
    rows(f"aten.{_name}", source=f"torch.ops.aten.{_name}")(mover(f"aten.{_name}"))
for _name in ("repeat_interleave", "take_along_dim"):
    rows(f"aten.{_name}", source=f"torch.{_name}")(mover(f"aten.{_name}"))
rows("aten._unsafe_masked_index", source="torch.ops.aten._unsafe_masked_index")(mover("aten._unsafe_masked_index", fills=(3,)))


@rows("aten.embedding", source="torch.nn.functional.embedding")
def embedding(m, weight, indices, padding_idx=-1, scale_grad_by_freq=False, sparse=False):
    """The rows of weight at the indices."""
    return move(m, aten.embedding, [elements(m, weight), attribute("aten.embedding", indices)])


def _symbolic(x) -> bool:
    """Whether an index depends on symbols (a mask made by comparing them)."""
    return x is not None and not isinstance(x, (torch.Tensor, list, tuple)) and not number(x)


def _mask(m, ctx, place: int, given):
    """A concrete mask or list of indices; what depends on symbols is replaced by its recorded contents, as a decision."""
    listed = isinstance(given, (list, tuple))
    items = list(given) if listed else [given]
    if not any(_symbolic(x) for x in items):
        return given
    native = ctx.argument(place)
    natives = list(native) if listed else [native]
    for x, outcome in zip(items, natives, strict=True):
        if _symbolic(x):
            _log("mask", m, ctx, [x], outcome)
    return natives if listed else natives[0]


@rows("aten.index", source="torch.Tensor.__getitem__", ctx=True)
def index(m, x, indices, *, ctx):
    """x[indices]: integers and masks, None for a whole dimension."""
    return move(m, aten.index, [elements(m, x), _mask(m, ctx, 1, indices)])


@rows("aten.masked_select", source="torch.masked_select", ctx=True)
def masked_select(m, x, mask, *, ctx):
    """The elements where the mask holds, in order."""
    return move(m, aten.masked_select, [elements(m, x), _mask(m, ctx, 1, mask)])


@rows("aten.masked_scatter", source="torch.Tensor.masked_scatter", ctx=True)
def masked_scatter(m, x, mask, source, *, ctx):
    """x with the elements of source, in order, where the mask holds."""
    return move(m, aten.masked_scatter, [elements(m, x), _mask(m, ctx, 1, mask), elements(m, source)])


# ---- writing
def written(m: Algebra, name: str, x, where: torch.Tensor, source, place: torch.Tensor):
    """x with element place[i] of source at position where[i] (both from 1)."""
    n = math.prod(x.shape)
    where, place = where.reshape(-1), place.reshape(-1)
    index = torch.arange(0, n + 1)
    index[where] = place + n
    if not torch.equal(index[where], place + n):
        raise refuse(name, "two different elements are written to one place, and PyTorch does not define which one stays",
                     "make the indices distinct, or accumulate")
    return taken(m, [x, source], index[1:].reshape(tuple(x.shape)))


def accumulated(m: Algebra, x, where: torch.Tensor, source, place: torch.Tensor):
    """x with element place[i] of source added at position where[i] (both from 1; where 0: nowhere)."""
    where, place = where.reshape(-1), place.reshape(-1)
    kept = where > 0
    added = taken(m, [source], place[kept])
    if isinstance(x, Complex) != isinstance(added, Complex):
        raise refuse("aten.index_put", "complex and real elements are added in place", "convert both to one type first")
    spots = where[kept] - 1
    if isinstance(x, Complex):
        return Complex(m.scatter_sum(x.re, spots, added.re), m.scatter_sum(x.im, spots, added.im))
    return m.scatter_sum(x, spots, added)


def _positions(shape) -> torch.Tensor:
    return torch.arange(1, math.prod(shape) + 1).reshape(tuple(shape))


def _where(op, x, *attributes) -> torch.Tensor:
    """The positions of x that the reading op would read; the writing op of the same name writes there."""
    return read_places(op, x.shape, attributes)


def _block(source, index: torch.Tensor) -> torch.Tensor:
    """The positions of source that scatter reads: its leading block of the index's shape."""
    at = _positions(source.shape)
    return at.reshape(index.shape) if at.dim() != index.dim() else at[tuple(slice(0, n) for n in index.shape)]


@rows("aten.scatter", source="torch.scatter")
def scatter(m, x, dim, index, src, *, reduce=None):
    """x with src[i] at the place that index[i] names along dim."""
    if reduce is not None:
        raise refuse("aten.scatter", f"reduce={reduce!r}", "use scatter_add, or scatter_reduce with reduce='sum'")
    x, index, src = elements(m, x), attribute("aten.scatter", index), lift(m, src)
    where = _where(aten.gather, x, dim, index)
    place = torch.ones_like(where) if tuple(src.shape) == () and index.dim() else _block(src, index)
    return written(m, "aten.scatter", x, where, src, place)


@rows("aten.scatter_add", source="torch.scatter_add")
def scatter_add(m, x, dim, index, src):
    """x with src[i] added at the place that index[i] names along dim."""
    x, index, src = elements(m, x), attribute("aten.scatter_add", index), elements(m, src)
    return accumulated(m, x, _where(aten.gather, x, dim, index), src, _block(src, index))


@rows("torchtitan.deterministic_scatter_add", source="torchtitan.ops.scatter_add")
def deterministic_scatter_add(m, out, index, src):
    """torch.scatter_add along dim 0, in a fixed order of additions."""
    return scatter_add(m, out, 0, index, src)


@rows("aten.scatter_reduce", source="torch.scatter_reduce")
def scatter_reduce(m, x, dim, index, src, reduce, *, include_self=True):
    """scatter_add; without include_self the places that are written start at 0."""
    if reduce != "sum":
        raise refuse("aten.scatter_reduce", f"reduce={reduce!r}", "only 'sum' has a meaning over the reals here")
    x, index = elements(m, x), attribute("aten.scatter_reduce", index)
    if not include_self:
        where = _where(aten.gather, x, dim, index)
        x = written(m, "aten.scatter_reduce", x, where, lift(m, 0), torch.ones_like(where))
    return scatter_add(m, x, dim, index, src)


def _along(x, dim, index) -> torch.Tensor:
    return _where(aten.index_select, x, dim, index)


@rows("aten.index_add", source="torch.index_add")
def index_add(m, x, dim, index, source, *, alpha=1):
    """x with alpha * source added at the slices that index names along dim."""
    x, source = elements(m, x), elements(m, source)
    where = _along(x, dim, attribute("aten.index_add", index))
    return accumulated(m, x, where, scaled(m, source, alpha), _positions(source.shape).reshape(where.shape))


@rows("aten.index_copy", source="torch.index_copy")
def index_copy(m, x, dim, index, source):
    """x with source at the slices that index names along dim."""
    x, source = elements(m, x), elements(m, source)
    where = _along(x, dim, attribute("aten.index_copy", index))
    return written(m, "aten.index_copy", x, where, source, _positions(source.shape).reshape(where.shape))


@rows("aten.index_fill", source="torch.index_fill")
def index_fill(m, x, dim, index, value):
    """x with one value at the slices that index names along dim."""
    x = elements(m, x)
    where = _along(x, dim, attribute("aten.index_fill", index))
    return written(m, "aten.index_fill", x, where, lift(m, value), torch.ones_like(where))


@rows("aten.put", source="torch.Tensor.put_")
def put(m, x, index, source, accumulate=False):
    """x with source at (or added to) flat positions."""
    x, source = elements(m, x), elements(m, source)
    where = _where(aten.take, x, attribute("aten.put", index))
    place = _positions(source.shape).reshape(where.shape)
    return accumulated(m, x, where, source, place) if accumulate else written(m, "aten.put", x, where, source, place)


@rows("aten.index_put", "aten._index_put_impl", "aten._unsafe_index_put", source="torch.Tensor.index_put_", ctx=True)
def index_put(m, x, indices, values, accumulate=False, unsafe=False, *, ctx):
    """x[indices] = values, or += values."""
    x, values = elements(m, x), lift(m, values)
    if _one_value_under_mask(x, indices, values):
        mask, rest = indices[0], len(x.shape) - len(indices[0].shape)
        mask = m.reshape(mask, (*mask.shape, *[1] * rest))
        new = m.expand(m.reshape(values, ()), tuple(x.shape))
        return m.where(mask, m.add(x, new) if accumulate else new, x)
    where = _where(aten.index, x, [attribute("aten.index_put", i) for i in _mask(m, ctx, 1, indices)])
    place = _positions(values.shape).expand(where.shape)
    return accumulated(m, x, where, values, place) if accumulate else written(m, "aten.index_put", x, where, values, place)


def _one_value_under_mask(x, indices, values) -> bool:
    """x[mask] = value is a selection, not a choice of places: it needs no decision when the mask depends on symbols."""
    plain = not isinstance(x, Complex) and not isinstance(values, Complex)
    return plain and len(indices) == 1 and _symbolic(indices[0]) and math.prod(values.shape) == 1


@rows("aten._unsafe_masked_index_put_accumulate", source="torch.ops.aten._unsafe_masked_index_put_accumulate")
def masked_index_put(m, x, mask, indices, values):
    """x with values added at the indices where the mask holds."""
    x, values = elements(m, x), elements(m, values)
    name = "aten._unsafe_masked_index_put_accumulate"
    where = _where(aten._unsafe_masked_index, x, attribute(name, mask), attribute(name, indices), 0)
    return accumulated(m, x, where, values, _positions(values.shape).expand(where.shape))


@rows("aten.embedding_dense_backward", source="torch.nn.functional.embedding")
def embedding_dense_backward(m, grad, indices, num_weights, padding_idx, scale_grad_by_freq):
    """Sums the gradient into the rows that were looked up; the padding row gets none."""
    if scale_grad_by_freq:
        raise refuse("aten.embedding_dense_backward", "scale_grad_by_freq=True", "use scale_grad_by_freq=False")
    grad, indices = elements(m, grad), attribute("aten.embedding_dense_backward", indices)
    shape = (num_weights, grad.shape[-1])
    at = read_places(aten.embedding, shape, [indices])
    return collect(m, shape, at * (indices != padding_idx).unsqueeze(-1), grad)


@rows("aten.bincount", source="torch.bincount")
def bincount(m, x, weights, minlength=0):
    """Sums the weights of equal integers."""
    x, weights = attribute("aten.bincount", x), elements(m, weights)
    n = max(int(x.max()) + 1 if x.numel() else 0, minlength)
    return collect(m, (n,), x + 1, weights)


@rows("aten.masked_scatter_backward", source="torch.Tensor.masked_scatter", ctx=True)
def masked_scatter_backward(m, grad, mask, sizes, *, ctx):
    """The gradient under the mask, in order, padded with zeros to the source's sizes."""
    chosen = move(m, aten.masked_select, [elements(m, grad), _mask(m, ctx, 1, mask)])
    rest = math.prod(sizes) - math.prod(chosen.shape)
    return each(m, lambda v: m.reshape(v, tuple(sizes)), move(m, aten.constant_pad_nd, [chosen, [0, rest], Fill(lift(m, 0))]))


# ---- choices that data makes: a decision's operand holds one choice per row of its last dimension
def _decision(*names: str, source: str):
    return rows(*names, source=source, ctx=True, kind="decision")


def _log(kind: str, m, ctx, operands, outcome) -> None:
    """Log a decision, unless its operands are constants."""
    parts = [p for v in operands for p in ((v.re, v.im) if isinstance(v, Complex) else (v,))]
    if not all(m.is_const(p) for p in parts):
        ctx.decide(kind, parts, outcome)


def _last(m, x, dim: int | None):
    """x with dimension dim moved last; flattened for None."""
    if dim is None or not x.shape:
        return each(m, lambda v: m.reshape(v, (-1,)), x)
    n = len(x.shape)
    order = [d for d in range(n) if d != dim % n] + [dim % n]
    return each(m, lambda v: m.permute(v, order), x)


def _chosen_along(m, ctx, kind: str, x, dim: int, keep: bool = True):
    """Values at the recorded indices along dim (the second result); keep: they have that dimension."""
    x, indices = elements(m, x), ctx.native[1]
    at = indices if keep or not x.shape else indices.unsqueeze(dim)
    _log(kind, m, ctx, [_last(m, x, dim)], at.movedim(dim, -1) if x.shape else at)
    if not x.shape:
        return [x, None]
    values = move(m, aten.gather, [x, dim, at])
    return [each(m, lambda v: m.reshape(v, tuple(indices.shape)), values), None]


@_decision("aten.topk", source="torch.topk")
def topk(m, x, k, dim=-1, largest=True, sorted=True, *, ctx):
    """The k largest or smallest along dim, at the recorded indices"""
    return _chosen_along(m, ctx, f"topk:{k}:{'largest' if largest else 'smallest'}", x, dim)


def _sorting(descending: bool) -> str:
    return "sort:descending" if descending else "sort:ascending"


@_decision("aten.sort", source="torch.sort")
def sort(m, x, dim=-1, descending=False, *, stable=False, ctx):
    """Sorted along dim by the recorded permutation"""
    return _chosen_along(m, ctx, _sorting(descending), x, dim)


@_decision("aten.argsort", source="torch.argsort")
def argsort(m, x, dim=-1, descending=False, *, stable=False, ctx):
    """The recorded permutation"""
    _log(_sorting(descending), m, ctx, [_last(m, elements(m, x), dim)], ctx.native[0].movedim(dim, -1) if x.shape else ctx.native[0])


@_decision("aten.kthvalue", source="torch.kthvalue")
def kthvalue(m, x, k, dim=-1, keepdim=False, *, ctx):
    """The k-th smallest along dim, at the recorded index"""
    return _chosen_along(m, ctx, f"kthvalue:{k}", x, dim, keepdim)


@_decision("aten.mode", source="torch.mode")
def mode(m, x, dim=-1, keepdim=False, *, ctx):
    """The most frequent value along dim, at the recorded index"""
    return _chosen_along(m, ctx, "mode", x, dim, keepdim)


@_decision("aten.median", source="torch.median")
def median(m, x, dim=None, keepdim=False, *, ctx):
    """The median along dim, at the recorded index"""
    if dim is None:
        raise refuse("aten.median", "the median of all elements does not say which element it is", "use x.flatten().median(dim=0)")
    return _chosen_along(m, ctx, "median", x, dim, keepdim)


@_decision("aten.cummax", source="torch.cummax")
def cummax(m, x, dim, *, ctx):
    """Running maximum along dim, at the recorded indices"""
    return _chosen_along(m, ctx, "cummax", x, dim)


@_decision("aten.cummin", source="torch.cummin")
def cummin(m, x, dim, *, ctx):
    """Running minimum along dim, at the recorded indices"""
    return _chosen_along(m, ctx, "cummin", x, dim)


def _argument_of_extreme(kind: str):
    def meaning(m, x, dim=None, keepdim=False, *, ctx):
        """The recorded index of the extreme element"""
        outcome = ctx.native[0]
        _log(kind, m, ctx, [_last(m, elements(m, x), dim)], outcome.movedim(dim, -1) if keepdim and dim is not None and x.shape else outcome)

    return meaning


for _name in ("argmax", "argmin"):
    _decision(f"aten.{_name}", source=f"torch.{_name}")(_argument_of_extreme(_name))


@_decision("aten.nonzero", source="torch.nonzero")
def nonzero(m, x, *, ctx):
    """The recorded places of elements that are not 0: the same choice as indexing with a mask"""
    x = elements(m, x)
    found = ctx.native[0]
    mask = torch.zeros(tuple(x.shape), dtype=torch.bool)
    mask[tuple(found.unbind(1)) if x.shape else ...] = len(found) > 0
    _log("mask", m, ctx, [x], mask)


def _count_below(m, ctx, x, boundaries, right: bool) -> None:
    _log(f"bucket:{'right' if right else 'left'}", m, ctx, [lift(m, x), lift(m, boundaries)], ctx.native[0])


@_decision("aten.bucketize", source="torch.bucketize")
def bucketize(m, x, boundaries, *, out_int32=False, right=False, ctx):
    """The recorded buckets"""
    _count_below(m, ctx, x, boundaries, right)


@_decision("aten.searchsorted", source="torch.searchsorted")
def searchsorted(m, boundaries, x, *, out_int32=False, right=False, side=None, sorter=None, ctx):
    """The recorded places of x in the sorted boundaries"""
    if sorter is not None:
        boundaries = move(m, aten.gather, [elements(m, boundaries), -1, attribute("aten.searchsorted", sorter)])
    _count_below(m, ctx, x, boundaries, right or side == "right")


@_decision("aten.multinomial", source="torch.multinomial")
def multinomial(m, x, num_samples, replacement=False, *, generator=None, ctx):
    """The recorded draws"""
    _log(f"multinomial:{num_samples}:{bool(replacement)}", m, ctx, [elements(m, x)], ctx.native[0])


@_decision("aten._unique2", source="torch.unique")
def unique(m, x, sorted=True, return_inverse=False, return_counts=False, *, ctx):
    """The distinct elements, each taken where it first occurs in the recorded values"""
    if not return_inverse:
        raise refuse("aten._unique2", "distinct values of symbols without their places", "use return_inverse=True")
    x, inverse = elements(m, x), ctx.native[1].reshape(-1)
    _log("unique", m, ctx, [_last(m, x, None)], inverse)
    n = inverse.numel()
    first = torch.full((ctx.native[0].numel(),), n + 1).scatter_reduce(0, inverse, torch.arange(1, n + 1), "amin")
    return [taken(m, [x], first), None, None]
