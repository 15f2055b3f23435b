"""Writes implicit counts out: what divides by how many elements there are divides, in a reduced program, by how many there were (trusted).

A reduced program has fewer terms in its sums, and all its literals at full size. `mean` is its sum times the literal 1/n, a mean loss a sum
over the targets that were not ignored, and attention has the scale of the full head size. So a mean and a division by a number that the
user computed from the same size remain the same function.
"""
from __future__ import annotations

import math
from collections.abc import Callable

from trainverify.ir.trace import Arg, Name, OpCall, Sequence, TensorRef
from trainverify.shrink.rules import base

Emit = Callable[[OpCall], None]


class Written:
    """One call in the reduced program, with its counts at full size. `before` is the recorded call, `after` the same with reduced references."""

    def __init__(self, temporary: Callable[[TensorRef], TensorRef], valid: int | None):
        self.temporary, self.valid = temporary, valid

    def calls(self, before: OpCall, after: OpCall) -> list[OpCall]:
        found = COUNTS.get(base(before.name))
        return [after] if found is None else found(self, before, after)


def _with(call: OpCall, **changes) -> OpCall:
    return OpCall(**{**{f: getattr(call, f) for f in call.__struct_fields__}, "digest_in": 0, "digest_out": 0, **changes})


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


COUNTS: dict[str, Callable[[Written, OpCall, OpCall], list[OpCall]]] = {
    "mean": _mean, "nll_loss_forward": _loss, "nll_loss_backward": _loss_backward,
    "_scaled_dot_product_flash_attention_for_cpu": _attention, "_scaled_dot_product_flash_attention_for_cpu_backward": _attention}

__all__ = ["COUNTS", "Name", "Sequence", "Written"]
