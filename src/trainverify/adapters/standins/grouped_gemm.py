"""grouped_gemm: products of consecutive rows with one matrix per group (trusted as an assumption of the report).

Source: grouped_gemm/ops.py of the package.
"""
from __future__ import annotations

from typing import Any

import torch

from trainverify.adapters.standins.calls import stands_for


@stands_for("grouped_gemm.ops.gmm", "a_i b_i for each group of batch_sizes[i] consecutive rows of a (b_i transposed where trans_b says so)")
def gmm(a, b, batch_sizes, trans_b=False):
    sizes = [int(n) for n in batch_sizes.tolist()]
    if sum(sizes) != a.shape[0]:
        raise ValueError(f"grouped_gemm.ops.gmm: batch_sizes sum to {sum(sizes)}, a has {a.shape[0]} rows")
    parts = [rows @ (matrix.t() if trans_b else matrix) for rows, matrix in zip(a.split(sizes), b.unbind(0), strict=True)]
    return torch.cat(parts)


def modules() -> dict[str, dict[str, Any]]:
    ops = {"gmm": gmm}
    return {"grouped_gemm": {}, "grouped_gemm.ops": ops}
