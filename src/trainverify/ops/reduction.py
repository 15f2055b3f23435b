"""What a collective's reduction computes on real tensors, in group order, so that captures and replays agree bit for bit (trusted; torch only)."""
from __future__ import annotations

from collections.abc import Sequence

import torch

REDUCE_OPS = ("sum", "avg", "max", "min", "product", "premul_sum", "band", "bor", "bxor")


def reduce_tensors(tensors: Sequence[torch.Tensor], op: str, factor: float | None = None) -> torch.Tensor:
    """One tensor from the members' tensors of equal shape and dtype; `factor` belongs to premul_sum."""
    if op not in REDUCE_OPS:
        raise ValueError(f"no reduce op {op!r}")
    parts = [t * factor for t in tensors] if op == "premul_sum" else tensors
    total = parts[0]
    for t in parts[1:]:
        total = _PAIR[op](total, t)
    if op == "avg":
        total = total / len(parts) if total.is_floating_point() or total.is_complex() else total // len(parts)
    return total.to(tensors[0].dtype)


def _sum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a | b if a.dtype == torch.bool else a + b


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a & b if a.dtype == torch.bool else a * b


_PAIR = {"sum": _sum, "avg": _sum, "premul_sum": _sum, "max": torch.maximum, "min": torch.minimum, "product": _product,
         "band": torch.bitwise_and, "bor": torch.bitwise_or, "bxor": torch.bitwise_xor}
