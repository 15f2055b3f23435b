"""Rows of embedding bags and packed sequences: moves and sums whose places are given by integers (trusted)."""
from __future__ import annotations

import torch

from trainverify.ops import lift as L
from trainverify.ops.lift import lift, refuse
from trainverify.ops.movement import collect, read_places
from trainverify.ops.pooling import reciprocals
from trainverify.ops.table import Rows

rows = Rows("move")
aten = torch.ops.aten
SUM, MEAN = 0, 1


# ---- embedding bags
def _bags(op: str, indices: torch.Tensor, offsets: torch.Tensor, bags: int, mode: int, padding_idx: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """The bag of every index, which indices count, and how many of them each bag has."""
    if mode not in (SUM, MEAN):
        raise refuse(op, "mode='max'", "use mode='sum' or 'mean', or an embedding and amax")
    bag = torch.searchsorted(offsets[:bags].contiguous().long(), torch.arange(indices.numel()), right=True) - 1
    kept = indices != padding_idx
    return bag, kept, torch.bincount(bag[kept], minlength=bags).tolist()


def _rows_of(shape, index: torch.Tensor) -> torch.Tensor:
    """[n, width]: positions of these rows."""
    return L.flat_index(shape).index_select(0, index.long())


@rows("aten._embedding_bag", "aten._embedding_bag_forward_only", source="torch.nn.functional.embedding_bag", ctx=True)
def embedding_bag(m, weight, indices, offsets, scale_grad_by_freq=False, mode=SUM, sparse=False, per_sample_weights=None, include_last_offset=False,
                  padding_idx=-1, *, ctx):
    """The sum or mean of the rows of weight that each bag's indices name; the padding row counts for nothing"""
    w, shape = lift(m, weight), tuple(ctx.native[0].shape)
    bag, kept, counts = _bags("aten._embedding_bag", indices, offsets, shape[0], mode, padding_idx)
    found = m.take([w], _rows_of(w.shape, indices))
    if per_sample_weights is not None:
        found = m.mul(found, m.reshape(lift(m, per_sample_weights), (-1, 1)))
    out = collect(m, shape, _rows_of(shape, bag) * kept.unsqueeze(-1), found)
    if mode == MEAN:
        out = m.mul(out, m.reshape(reciprocals(m, [max(n, 1) for n in counts]), (shape[0], 1)))
    return [out, None, None, None]


@rows("aten._embedding_bag_backward", source="torch.nn.functional.embedding_bag")
def embedding_bag_backward(m, grad, indices, offsets, offset2bag, bag_size, maximum_indices, num_weights, scale_grad_by_freq, mode, sparse,
                           per_sample_weights, padding_idx=-1):
    """Each bag's gradient is added to the rows that it named"""
    if scale_grad_by_freq or sparse:
        raise refuse("aten._embedding_bag_backward", "scale_grad_by_freq=True" if scale_grad_by_freq else "sparse=True", "leave it out")
    g = lift(m, grad)
    bag, kept, counts = _bags("aten._embedding_bag_backward", indices, offsets, g.shape[0], mode, padding_idx)
    if mode == MEAN:
        g = m.mul(g, m.reshape(reciprocals(m, [max(n, 1) for n in counts]), (g.shape[0], 1)))
    share = m.take([g], _rows_of(g.shape, bag))
    if per_sample_weights is not None:
        share = m.mul(share, m.reshape(lift(m, per_sample_weights), (-1, 1)))
    shape = (num_weights, g.shape[1])
    return collect(m, shape, _rows_of(shape, indices) * kept.unsqueeze(-1), share)


@rows("aten._embedding_bag_per_sample_weights_backward", source="torch.nn.functional.embedding_bag")
def per_sample_weights_backward(m, grad, weight, indices, offsets, offset2bag, mode, padding_idx=-1):
    """The bag's gradient times the row that the index names"""
    g, w = lift(m, grad), lift(m, weight)
    bag, kept, _ = _bags("aten._embedding_bag_per_sample_weights_backward", indices, offsets, g.shape[0], mode, padding_idx)
    product = m.mul(m.take([g], _rows_of(g.shape, bag)), m.take([w], _rows_of(w.shape, indices) * kept.unsqueeze(-1)))
    return m.sum(product, [1])


# ---- packed sequences
def _packed(x: torch.Tensor, lengths: torch.Tensor, batch_first: bool) -> torch.Tensor:
    return aten._pack_padded_sequence(x, lengths, batch_first)[0]


@rows("aten._pack_padded_sequence", source="torch.nn.utils.rnn.pack_padded_sequence")
def pack_padded_sequence(m, input, lengths, batch_first):
    """The elements of all sequences, time step by time step, without padding"""
    x = lift(m, input)
    return [m.take([x], read_places(_packed, x.shape, [lengths, batch_first], torch.float64)), None]
