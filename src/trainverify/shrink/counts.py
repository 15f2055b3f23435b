"""Writes implicit counts out: what divides by how many elements there are divides, in a reduced program, by how many there were (trusted).

A reduced program has fewer terms in its sums, and all its literals at full size. `mean` is its sum times the literal 1/n, a mean loss a sum
over the targets that were not ignored, and attention has the scale of the full head size. So a mean and a division by a number that the
user computed from the same size remain the same function.
"""
from __future__ import annotations

import math
from collections.abc import Callable

import torch

from trainverify.ir.trace import Arg, OpCall, Sequence, TensorRef
from trainverify.shrink.facts import base

Emit = Callable[[OpCall], None]


class Written:
    """One call in the reduced program, with its counts at full size. `before` is the recorded call, `after` the same with reduced references."""

    def __init__(self, temporary: Callable[[TensorRef], TensorRef], valid: int | None):
        self.temporary, self.valid = temporary, valid

    def calls(self, before: OpCall, after: OpCall) -> list[OpCall]:
        found = COUNTS.get(base(before.name))
        return [after] if found is None else found(self, before, after)


def _with(call: OpCall, **changes) -> OpCall:
    get = changes.get
    return OpCall(call.index, get("name", call.name), get("args", call.args), get("kwargs", call.kwargs), get("outs", call.outs), get("writes", call.writes),
                  call.span, get("collective", call.collective), 0, 0, call.rng)


def _divided(call: OpCall, ref: TensorRef, by: int) -> OpCall:
    return _with(call, name="aten.div_.Scalar", args=(ref, by), kwargs={}, outs=ref, writes=(ref,))


def _mean(w: Written, before: OpCall, after: OpCall) -> list[OpCall]:
    if not before.targets() or not isinstance(before.args[0], TensorRef):
        return [after]
    n, small = (c.args[0].numel // max(1, c.targets()[0].numel) for c in (before, after))
    if n == small:
        return [after]
    name = "aten.sum.default" if len(after.args) == 1 else "aten.sum.dim_IntList"
    return [_with(after, name=name), _divided(after, after.targets()[0], n)]


def _loss(w: Written, before: OpCall, after: OpCall) -> list[OpCall]:
    if before.args[3] != 1 or before.args[1].numel == after.args[1].numel:
        return [after]
    loss, total = after.targets()
    args = (*after.args[:3], 2, *after.args[4:])
    return [_with(after, args=args), _divided(after, loss, w.valid),
            _with(after, name="aten.fill_.Scalar", args=(total, float(w.valid)), kwargs={}, outs=total, writes=(total,))]


def _loss_backward(w: Written, before: OpCall, after: OpCall) -> list[OpCall]:
    if before.args[4] != 1 or before.args[2].numel == after.args[2].numel:
        return [after]
    grad = w.temporary(after.args[0])
    made = _with(after, name="aten.div.Scalar", args=(after.args[0], w.valid), kwargs={}, outs=grad, writes=())
    return [made, _with(after, args=(grad, *after.args[1:4], 2, *after.args[5:]))]


def _attention(w: Written, before: OpCall, after: OpCall) -> list[OpCall]:
    given: Arg = before.kwargs.get("scale")
    q = before.args[1 if "backward" in before.name else 0]
    if given is not None or q.size == after.args[1 if "backward" in before.name else 0].size:
        return [after]
    return [_with(after, kwargs={**after.kwargs, "scale": 1 / math.sqrt(q.size[-1])})]


class _Steps:
    """Elementary calls in place of one: each result has a place of its own or a temporary one."""

    def __init__(self, w: Written, call: OpCall):
        self.w, self.call, self.made = w, call, []

    def temporary(self, like: TensorRef) -> TensorRef:
        return self.w.temporary(like)

    def to(self, out: TensorRef, name: str, *args: Arg) -> TensorRef:
        self.made.append(_with(self.call, name=name, args=args, kwargs={}, outs=out, writes=()))
        return out

    def inplace(self, ref: TensorRef, name: str, *args: Arg) -> TensorRef:
        self.made.append(_with(self.call, name=name, args=(ref, *args), kwargs={}, outs=ref, writes=(ref,)))
        return ref

    def mean(self, out: TensorRef, x: TensorRef, dims: Sequence, n: int) -> TensorRef:
        self.to(out, "aten.sum.dim_IntList", x, dims, True)
        return self.inplace(out, "aten.div_.Scalar", n)


def _inner(before: OpCall, after: OpCall, at: int) -> tuple[int, int, Sequence, Sequence]:
    """How many elements are normalised, as recorded and now; their dimensions, and the others."""
    x, n = after.args[at - 1], len(before.args[at].items)
    rank = len(x.size)
    small = math.prod(x.size[rank - n:])
    return math.prod(before.args[at].items), small, Sequence(tuple(range(rank - n, rank))), Sequence(tuple(range(rank - n)))


def _norm(w: Written, before: OpCall, after: OpCall) -> list[OpCall]:
    """layer_norm (x, shape, weight, bias, eps) -> y, mean, rstd; rms_norm (x, shape, weight, eps) -> y, rstd."""
    n, small, dims, _ = _inner(before, after, 1)
    if n == small:
        return [after]
    centered, x, weight = "layer_norm" in before.name, after.args[0], after.args[2]
    y, rstd, steps = after.targets()[0], after.targets()[-1], _Steps(w, after)
    eps = after.args[4 if centered else 3] if len(after.args) > (4 if centered else 3) else None
    d = x
    if centered:
        center = steps.mean(after.targets()[1], x, dims, n)
        d = steps.to(steps.temporary(x), "aten.sub.Tensor", x, center)
    square = steps.to(steps.temporary(x), "aten.mul.Tensor", d, d)
    steps.mean(rstd, square, dims, n)
    steps.inplace(rstd, "aten.add_.Scalar", torch.finfo(getattr(torch, rstd.dtype)).eps if eps is None else eps)
    steps.inplace(rstd, "aten.rsqrt_.default")
    steps.to(y, "aten.mul.Tensor", d, rstd)
    if weight is not None:
        steps.inplace(y, "aten.mul_.Tensor", weight)
    if centered and after.args[3] is not None:
        steps.inplace(y, "aten.add_.Tensor", after.args[3])
    return steps.made


def _norm_backward(w: Written, before: OpCall, after: OpCall) -> list[OpCall]:
    """layer_norm (grad, x, shape, mean, rstd, weight, bias, mask), rms_norm (grad, x, shape, rstd, weight, mask)."""
    n, small, dims, outer = _inner(before, after, 2)
    if n == small:
        return [after]
    centered, grad, x = "layer_norm" in before.name, after.args[0], after.args[1]
    rstd, weight, wanted = (after.args[4], after.args[5], after.args[7]) if centered else (after.args[3], after.args[4], after.args[5])
    steps, outs = _Steps(w, after), list(after.targets())
    unit = steps.to(steps.temporary(x), "aten.sub.Tensor", x, after.args[3]) if centered else steps.to(steps.temporary(x), "aten.clone.default", x)
    steps.inplace(unit, "aten.mul_.Tensor", rstd)
    if wanted.items[0]:
        dx = outs.pop(0)
        scaled = grad if weight is None else steps.to(steps.temporary(x), "aten.mul.Tensor", grad, weight)
        along = steps.mean(steps.temporary(rstd), steps.to(steps.temporary(x), "aten.mul.Tensor", scaled, unit), dims, n)
        steps.to(dx, "aten.sub.Tensor", scaled, steps.to(steps.temporary(x), "aten.mul.Tensor", unit, along))
        if centered:
            steps.inplace(dx, "aten.sub_.Tensor", steps.mean(steps.temporary(rstd), scaled, dims, n))
        steps.inplace(dx, "aten.mul_.Tensor", rstd)
    if wanted.items[1]:
        steps.to(outs.pop(0), "aten.sum.dim_IntList", steps.to(steps.temporary(x), "aten.mul.Tensor", grad, unit), outer, False)
    if centered and wanted.items[2]:
        steps.to(outs.pop(0), "aten.sum.dim_IntList", grad, outer, False)
    return steps.made


COUNTS: dict[str, Callable[[Written, OpCall, OpCall], list[OpCall]]] = {
    "native_layer_norm": _norm, "_fused_rms_norm": _norm, "native_layer_norm_backward": _norm_backward, "_fused_rms_norm_backward": _norm_backward,
    "mean": _mean, "nll_loss_forward": _loss, "nll_loss_backward": _loss_backward,
    "_scaled_dot_product_flash_attention_for_cpu": _attention, "_scaled_dot_product_flash_attention_for_cpu_backward": _attention}

__all__ = ["COUNTS", "Written"]
