"""Interpolation rows, forward and backward, against torch."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from harness import assert_covered, check_function
from trainverify.ops import resample

SIZES = {"linear": (5,), "bilinear": (4, 5), "trilinear": (3, 2, 4), "bicubic": (4, 5)}
TO = {"linear": [(8,), (3,), (1,)], "bilinear": [(7, 3), (4, 10), (1, 1)], "trilinear": [(5, 2, 3), (1, 4, 8)], "bicubic": [(7, 3), (4, 10), (1, 2)]}


def image(mode: str) -> torch.Tensor:
    return torch.randn(2, 3, *SIZES[mode], dtype=torch.float64, generator=torch.Generator().manual_seed(len(mode)))


@pytest.mark.parametrize("mode,size", [(mode, size) for mode, sizes in TO.items() for size in sizes])
@pytest.mark.parametrize("corners", [False, True])
def test_to_a_size(mode, size, corners):
    assert check_function(lambda x: F.interpolate(x, size, mode=mode, align_corners=corners), image(mode), rtol=1e-11)


@pytest.mark.parametrize("mode", SIZES)
@pytest.mark.parametrize("factor", [2, 0.5, 1.5, 2.3])
@pytest.mark.parametrize("recompute", [False, True])
def test_by_a_factor(mode, factor, recompute):
    """The factor itself is the step, unless it is computed anew from the sizes."""
    assert check_function(lambda x: F.interpolate(x, scale_factor=factor, mode=mode, recompute_scale_factor=recompute), image(mode), rtol=1e-9)


def test_one_factor_per_dimension():
    assert check_function(lambda x: F.interpolate(x, scale_factor=(0.7, 3), mode="bilinear"), image("bilinear"), rtol=1e-9)


def test_every_row_was_checked():
    assert_covered(resample.rows)
