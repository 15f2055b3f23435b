"""Rows of embedding bags and packed sequences against torch."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from harness import assert_covered, check_function, check_row
from trainverify.diagnostics import Fault
from trainverify.ops import sequences

INDICES = torch.tensor([0, 1, 1, 4, 3, 1])


def rnd(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding", [None, 1])
@pytest.mark.parametrize("offsets,last", [([0, 2, 2, 5], False), ([0, 4, 6], True), ([0], False)])
def test_bags(mode, padding, offsets, last):
    """Also empty ones, and one of padding only."""
    def bag(w):
        return F.embedding_bag(INDICES, w, torch.tensor(offsets), mode=mode, padding_idx=padding, include_last_offset=last)
    assert check_function(bag, rnd(5, 3))


def test_bags_without_gradients():
    check_row(torch.ops.aten._embedding_bag_forward_only.default, [rnd(5, 3), INDICES, torch.tensor([0, 4]), False, 1])


def test_bags_in_rows():
    assert check_function(lambda w: F.embedding_bag(INDICES.view(2, 3), w, mode="mean"), rnd(5, 3))


@pytest.mark.parametrize("padding", [None, 4])
def test_weighted_bags(padding):
    def bag(w, s):
        return F.embedding_bag(INDICES, w, torch.tensor([0, 2]), mode="sum", per_sample_weights=s, padding_idx=padding)
    assert check_function(bag, rnd(5, 3), rnd(6, seed=1))


@pytest.mark.parametrize("options", [{"mode": "max"}, {"mode": "sum", "scale_grad_by_freq": True}, {"mode": "sum", "sparse": True}])
def test_what_has_no_meaning_is_refused(options):
    with pytest.raises(Fault, match="OPS002"):
        check_function(lambda w: F.embedding_bag(INDICES, w, torch.tensor([0, 2]), **options), rnd(5, 3))


@pytest.mark.parametrize("batch_first", [False, True])
def test_packed_sequences(batch_first):
    lengths = torch.tensor([2, 4, 1])

    def f(x):
        packed = pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=False)
        return packed.data * 2, pad_packed_sequence(packed, batch_first=batch_first)[0]
    assert check_function(f, rnd(3, 4, 2) if batch_first else rnd(4, 3, 2))


def test_every_row_was_checked():
    assert_covered(sequences.rows)
