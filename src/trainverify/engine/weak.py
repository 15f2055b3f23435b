"""Weak-spec warnings: what this very input could not have revealed."""
from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from trainverify.diagnostics import Diagnostic
from trainverify.engine.analysis import Analysis
from trainverify.ir.trace import OpCall, Program


def _warn(code: str, message: str, fix: str) -> Diagnostic:
    return Diagnostic(code, message, "warning", fix=fix)


def weak_spec(analysis: Analysis, parallel: Program, groups: dict[tuple[int, ...], str], options) -> list[Diagnostic]:
    out: list[Diagnostic] = []
    out += _steps(analysis, options)
    out += _degrees(groups, parallel)
    return out


def _steps(analysis: Analysis, options) -> list[Diagnostic]:
    recs = analysis.first.reference.machines[0].outputs
    out = []
    zero = [r.name for r in recs if r.kind == "gradient" and (r.native is None or not bool(torch.as_tensor(r.native).any()))]
    if zero:
        names = ", ".join(dict.fromkeys(zero))
        out.append(_warn("WEAK006", f"no gradient reaches {names[:200]}", "use a batch that exercises every parameter"))
    if options.steps == 1 and any(r.kind == "state" for r in recs):
        out.append(_warn("WEAK005", "optimizer state is zero and one step is run: stale state and moments do not show", "run two steps (--steps 2)"))
    return out


def _degrees(groups: dict[tuple[int, ...], str], parallel: Program) -> list[Diagnostic]:
    out = []
    sizes = {axis: len(ranks) for ranks, axis in groups.items() if axis}
    same = [sorted(a for a in sizes if sizes[a] == n) for n, c in Counter(sizes.values()).items() if c > 1]
    for axes in same:
        out.append(_warn("WEAK007", f"mesh axes {' and '.join(axes)} have the same degree {sizes[axes[0]]}: 1/{axes[0]} and 1/{axes[1]} look alike",
                         "verify a case with distinct degrees"))
    return out
