"""Re-validates the op table on the user's own program: each distinct call's row, evaluated in float64 on the recorded inputs, must
agree with what torch computed within rounding; and every call must read what recorded calls last wrote."""
from __future__ import annotations

from dataclasses import dataclass

import torch

from trainverify.algebra.base import Complex
from trainverify.algebra.real import Real, RealValue
from trainverify.diagnostics import Diagnostic, Fault
from trainverify.ir.trace import Arg, Name, OpCall, ScalarRef, Sequence, TensorRef
from trainverify.ops.foreach import foreach_call
from trainverify.ops.table import OpTable
from trainverify.replay.machine import EMPTY, DECIDED, Machine
from trainverify.replay.memory import is_float

ROUNDING = {"float64": 1e-9, "float32": 2e-4, "bfloat16": 5e-2, "float16": 1e-2, "complex64": 2e-4, "complex128": 1e-9,
            "float8_e4m3fn": 0.125, "float8_e4m3fnuz": 0.125, "float8_e5m2": 0.25, "float8_e5m2fnuz": 0.25, "float8_e8m0fnu": 1.0}


@dataclass(slots=True)
class _Ctx:
    """What rows with ctx=True see; their decisions are of no interest here."""

    call: OpCall
    native: list
    machine: Machine

    def argument(self, place: int):
        return self.machine.native.decode(self.call.args[place])

    def decide(self, kind, operands, outcome) -> None:
        return None


class Conformance:
    """Hooks `before` and `after`. Checks the first occurrence of each distinct call (name, shapes, dtypes, attributes)."""

    def __init__(self, table: OpTable):
        self.table, self.m = table, Real()
        self.seen: set = set()
        self.pending: dict[int, tuple] = {}
        self.diagnostics: list[Diagnostic] = []
        self.checked = 0

    def before(self, machine: Machine, call: OpCall) -> None:
        base = ".".join(call.name.split(".")[:2])
        if call.rng or call.name.startswith("tv.") or base in EMPTY or base in DECIDED or not machine.involves(call):
            return
        key = _signature(call)
        if key in self.seen:
            return
        self.seen.add(key)
        found = self.table.lookup(call.name)
        if found is None:
            return
        args = [self._value(machine, a) for a in call.args]
        kwargs = {k: self._value(machine, a) for k, a in call.kwargs.items() if k != "out"}
        self.pending[machine.rank] = (call, found, args, kwargs)

    def after(self, machine: Machine, call: OpCall, results: list) -> None:
        held = self.pending.get(machine.rank)
        if held is None or held[0] is not call:
            return
        del self.pending[machine.rank]
        _, found, args, kwargs = held
        if found.row.ctx:
            kwargs["ctx"] = _Ctx(call, results, machine)
        try:
            got = foreach_call(self.m, found.row, args, kwargs) if found.foreach else found.row.meaning(self.m, *args, **kwargs)
        except Fault:
            return                            # the replay itself reports it
        self.checked += 1
        scale = max([_size(a) for a in (*args, *kwargs.values())] + [0.0])
        values = got if isinstance(got, (list, tuple)) else [got]
        for k, (ref, v, native) in enumerate(zip(call.targets(), values, results)):
            worst = self._disagreement(ref, v, native, scale)
            if worst:
                self._report(machine, call, found.row.kind == "custom", worst, k)
                return

    @staticmethod
    def _report(machine: Machine, call: OpCall, custom: bool, worst: float, k: int) -> None:
        notes = (f"shapes {[t.size for t in call.targets()]}",)
        if custom:
            machine.diagnose("CONF001", f"{call.name}: the meaning that the spec gives to this op disagrees with what it computed by {worst:.3g} "
                             f"(result {k})", call, notes=notes, fix="mend its meaning in OPS")
        else:
            machine.diagnose("CONF001", f"{call.name}: our meaning of this op disagrees with torch by {worst:.3g} (result {k})", call,
                             severity="internal", notes=notes, fix="this is a bug in TrainVerify's op table: please report it with the saved traces")

    def _disagreement(self, ref: TensorRef, v, native: torch.Tensor, scale: float) -> float:
        if v is None or not is_float(ref.dtype) or ref.numel == 0:
            return 0.0
        mine = torch.complex(v.re.t, v.im.t) if isinstance(v, Complex) else v.t
        mine = mine.expand(native.shape) if mine.shape != native.shape else mine
        theirs = native.to(mine.dtype)
        if native.dtype.itemsize == 1:            # what is too large for eight bits becomes their largest number
            mine = mine.clamp(torch.finfo(native.dtype).min, torch.finfo(native.dtype).max)
        both = torch.isfinite(mine.abs()) & torch.isfinite(theirs.abs())
        bad = both & ((mine - theirs).abs() > ROUNDING[ref.dtype] * max(scale, float(theirs[both].abs().max()) if both.any() else 0.0, 1e-30))
        bad |= torch.isnan(mine.abs()) & torch.isfinite(theirs.abs())
        return float((mine - theirs).abs()[bad].nan_to_num(float("inf")).max()) if bad.any() else 0.0

    def _value(self, machine: Machine, a: Arg):
        if isinstance(a, TensorRef):
            t = machine.native.tensor(a)
            if a.dtype.startswith("complex"):
                return Complex(self.m.data(t.real), self.m.data(t.imag))
            return self.m.data(t) if is_float(a.dtype) else t.clone()
        if isinstance(a, Sequence):
            return [self._value(machine, x) for x in a.items]
        if isinstance(a, ScalarRef):
            return self.m.const(machine.native.scalars[a.id])
        return machine.native.decode(a)


def _size(a) -> float:
    """Largest finite magnitude among an argument's elements."""
    if isinstance(a, (list, tuple)):
        return max([_size(x) for x in a] + [0.0])
    if isinstance(a, Complex):
        return max(_size(a.re), _size(a.im))
    if isinstance(a, RealValue) and a.t.numel():
        finite = a.t[torch.isfinite(a.t)]
        return float(finite.abs().max()) if finite.numel() else 0.0
    return 0.0


def _signature(call: OpCall) -> tuple:
    return (call.name, tuple(_shape(a) for a in call.args), tuple((k, _shape(a)) for k, a in call.kwargs.items()))


def _shape(a: Arg):
    if isinstance(a, TensorRef):
        return (a.size, a.dtype)
    if isinstance(a, Sequence):
        return tuple(_shape(x) for x in a.items)
    if isinstance(a, ScalarRef):
        return "scalar"
    if isinstance(a, Name):
        return (a.kind, a.value)
    return repr(a)
