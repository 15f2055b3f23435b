"""Pooling rows, forward and backward, against torch."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from harness import assert_covered, check_function, check_opinfo
from trainverify.ops import pooling


def image(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("pool, x", [
    (lambda x: F.max_pool2d(x, 3, 2, 1), image(2, 3, 7, 8)), (lambda x: F.max_pool2d(x, (3, 2), 2, 1, 2, ceil_mode=True), image(3, 9, 8)),
    (lambda x: F.max_pool2d(x, 2), -image(1, 1, 4, 5).abs() - 1), (lambda x: F.max_pool1d(x, 2), image(2, 3, 8)),
    (lambda x: F.max_pool3d(x, 2, 1, 1), image(2, 1, 3, 4, 4)), (lambda x: F.avg_pool2d(x, 3, 2, 1), image(2, 3, 7, 8)),
    (lambda x: F.avg_pool2d(x, (3, 2), 2, 1, ceil_mode=True, count_include_pad=False), image(2, 3, 8, 9)),
    (lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True), image(2, 3, 8, 9)), (lambda x: F.avg_pool3d(x, 2, divisor_override=3), image(2, 3, 4, 4, 4)),
    (lambda x: F.avg_pool1d(x, 2), image(2, 3, 8)), (lambda x: F.adaptive_avg_pool2d(x, 1), image(2, 3, 4, 4)),
    (lambda x: F.adaptive_avg_pool2d(x, (2, 3)), image(2, 3, 5, 7)), (lambda x: F.adaptive_avg_pool2d(x, (4, 1)), image(3, 3, 5)),
    (lambda x: F.adaptive_avg_pool1d(x, 4), image(2, 3, 6)), (lambda x: F.adaptive_avg_pool3d(x, (2, 3, 1)), image(1, 2, 3, 4, 2)),
    (lambda x: F.adaptive_max_pool2d(x, (2, 3)), image(2, 3, 5, 7)), (lambda x: F.adaptive_max_pool1d(x, 4), image(2, 3, 6)),
    (lambda x: F.adaptive_max_pool3d(x, (2, 3, 1)), image(1, 2, 3, 4, 2)), (lambda x: F.adaptive_max_pool2d(x, 3), -image(2, 4, 4).abs() - 1),
])
def test_forward_and_backward(pool, x):
    assert check_function(pool, x, rtol=1e-12)


@pytest.mark.parametrize("name", ["max_pool2d", "max_pool3d", "avg_pool2d", "avg_pool3d"])
def test_opinfo_samples(name):
    check_opinfo(f"nn.functional.{name}", limit=6, rtol=1e-12)


def test_every_row_was_checked():
    assert_covered(pooling.rows)
