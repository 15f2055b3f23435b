"""One rank's state and the execution of one local call: natively, then in every algebra (trusted).

A call's meaning is its row (ops/table.py). Integers, concrete masks and the outcomes of decisions come from native memory.
What has no row leaves garbage in its targets, with a diagnostic: it can never be equal to anything.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from trainverify.algebra.base import Algebra, Complex, V
from trainverify.diagnostics import Diagnostic, Fault, Span
from trainverify.ir.trace import Arg, Name, OpCall, ScalarRef, Sequence, TensorRef, Trace, inputs, tensors
from trainverify.ops.access import reads
from trainverify.ops.foreach import foreach_call
from trainverify.ops.table import OpTable
from trainverify.replay.errors import ReplayError
from trainverify.replay.lifetimes import last_uses
from trainverify.replay.memory import AlgebraMemory, is_float
from trainverify.replay.native import NativeMemory, dtype_of

EMPTY = ("aten.empty", "aten.new_empty", "aten.empty_like", "aten.empty_strided", "aten.new_empty_strided", "aten.empty_permuted")
DECIDED = {"aten._local_scalar_dense", "aten.is_nonzero", "aten.equal"}


@dataclass(frozen=True, slots=True)
class Decision:
    """A choice that float data made: `operands` (per algebra) decided `outcome`. kind: topk, cast, mask, compare:gt, ..."""

    rank: int
    call: OpCall
    kind: str
    operands: dict[str, tuple[V, ...]]
    outcome: Any


@dataclass(slots=True)
class Recorded:
    """The value of one tv.output when it was named, per algebra; value None: absent; a number: plain."""

    kind: str
    name: str
    step: int
    rank: int
    call: OpCall
    ref: TensorRef | None
    values: dict[str, V]
    native: Any
    declare: str | None = None
    group: tuple[int, ...] = ()


@dataclass(slots=True)
class Ctx:
    """What a row with ctx=True may see: the call, its native results, and where to log a decision."""

    call: OpCall
    native: list[torch.Tensor | None]
    machine: Machine
    m: Algebra

    def decide(self, kind: str, operands, outcome) -> None:
        self.machine.decide(self.call, kind, self.m, tuple(operands), outcome)

    def argument(self, k: int):
        """Argument k as torch took it (a mask whose recorded contents steer a movement)."""
        written = {w.storage for w in self.call.writes}
        if any(t.storage in written for t in tensors(self.call.args[k])):
            raise ReplayError(f"{self.call.name} overwrites argument {k}, which decides what it does")
        return self.machine.native.decode(self.call.args[k])


@dataclass(slots=True)
class Hooks:
    """What an engine wants to see while a program is replayed; every field may be None.

    symbol(machine, kind, name, ref) -> {algebra: flat V} | None, for symbols and for tensors of the batch (kind "data"); bind(machine, algebra, storage, dtype) -> V | None;
    before: several of f(machine, call), for collectives too; after: several of f(machine, call, native results);
    waited: several of f(machine, tv.wait call); value(machine, algebra, call, k, V) for each computed target.
    """

    symbol: Any = None
    bind: Any = None
    before: tuple = ()
    after: tuple = ()
    waited: tuple = ()
    value: Any = None


class Machine:
    def __init__(self, trace: Trace, blobs: dict, algebras: list[Algebra], table: OpTable, hooks: Hooks):
        self.trace, self.rank, self.table, self.hooks = trace, trace.rank, table, hooks
        self.native = NativeMemory(trace, blobs)
        self.algebras = algebras
        self.memory = {m.name: AlgebraMemory(m, self.native, f"{trace.side}.{trace.rank}", self._binder(m)) for m in algebras}
        self.scalars: dict[str, dict[int, V]] = {m.name: {} for m in algebras}
        self.outputs: list[Recorded] = []
        self.params: list[tuple[str, str, TensorRef, dict[str, V]]] = []
        self.decisions: list[Decision] = []
        self._decision_key: dict[tuple, int] = {}
        self.diagnostics: list[Diagnostic] = []
        self.pending: dict[int, OpCall] = {}
        self.pc = self.step = self.ops = self.elements = 0
        self.unknown_ops: set[str] = set()
        self._last_uses = last_uses(trace)

    def _binder(self, m: Algebra):
        return (lambda sid, dtype: self.hooks.bind(self, m, sid, dtype)) if self.hooks.bind else (lambda sid, dtype: None)

    # ---- places
    def span(self, call: OpCall) -> Span | None:
        return self.trace.spans[call.span] if 0 <= call.span < len(self.trace.spans) else None

    def place(self, m: Algebra, call: OpCall) -> None:
        """Tell an algebra that keeps places where the replay is."""
        where = getattr(m, "at", None)
        if where is not None:
            span = self.span(call)
            where(self.rank, call.index, call.span, "" if span is None else span.phase)

    def diagnose(self, code: str, message: str, call: OpCall, severity: str = "error", **kw) -> None:
        self.diagnostics.append(Diagnostic(code, message, severity, self.span(call), (self.rank,), **kw))

    def decide(self, call: OpCall, kind: str, m: Algebra, operands: tuple, outcome) -> None:
        """Log a decision; the same one seen by several algebras is one decision with operands in each."""
        key = (call.index, kind, sum(1 for d in self.decisions if d.call is call and d.kind == kind and m.name in d.operands))
        at = self._decision_key.get(key)
        if at is None:
            self._decision_key[key] = len(self.decisions)
            self.decisions.append(Decision(self.rank, call, kind, {m.name: operands}, outcome))
        else:
            self.decisions[at].operands[m.name] = operands

    # ---- values
    def value(self, m: Algebra, a: Arg) -> Any:
        """An argument as a row takes it."""
        if isinstance(a, TensorRef):
            mem = self.memory[m.name]
            if is_float(a.dtype) or (a.dtype == "bool" and mem.has(a)):
                return mem.load(a)
            return self.native.tensor(a).clone()          # integers, and masks as they were decided
        if isinstance(a, ScalarRef):
            return self.scalars[m.name][a.id]
        if isinstance(a, Sequence):
            return [self.value(m, x) for x in a.items]
        if isinstance(a, Name):
            return self.native.decode(a)
        return a

    def involves(self, call: OpCall) -> bool:
        """Whether the call touches anything that an algebra must know: floats, tracked scalars, masks that depend on symbols."""
        if any(is_float(t.dtype) for t in call.targets()) or isinstance(call.outs, ScalarRef):
            return True
        mems = list(self.memory.values())
        for t in inputs(call):
            if is_float(t.dtype) or (t.dtype == "bool" and any(mem.has(t) for mem in mems)):
                return True
        return _has_scalar(call.args) or _has_scalar(tuple(call.kwargs.values()))

    # ---- execution of a local (not communicating) call
    def execute(self, call: OpCall) -> None:
        base = ".".join(call.name.split(".")[:2])
        if self.pending:
            self._check_pending(call)
        for hook in self.hooks.before:
            hook(self, call)
        self.native.provide(call)
        involved = self.involves(call)
        self.look_at_bytes(call, reads(call))
        values = [self._arguments(m, call, base) for m in self.algebras] if involved and base not in EMPTY else []
        results = self.native.run(call)
        if base in EMPTY and call.rng:
            for m in self.algebras:
                self._untracked(m, call)
        elif base in EMPTY:
            self._empty(call)
        elif involved:
            for m, (args, kwargs) in zip(self.algebras, values):
                self._evaluate(m, call, base, args, kwargs, results)
        else:
            self.overwritten(call.targets(), results)
        for hook in self.hooks.after:
            hook(self, call, results)

    def _arguments(self, m: Algebra, call: OpCall, base: str):
        """Row arguments, loaded before the native run overwrites what in-place calls read."""
        args = [self.value(m, a) for a in call.args]
        recorded = ("value",) if base == "tv.scalar" else ("out",)
        kwargs = {k: self.value(m, a) for k, a in call.kwargs.items() if k not in recorded}
        return args, kwargs

    def _empty(self, call: OpCall) -> None:
        for ref in call.targets():
            if is_float(ref.dtype):
                for mem in self.memory.values():
                    mem.forget(mem._real_ref(ref) if ref.dtype.startswith("complex") else ref)

    def overwritten(self, refs, results) -> None:
        """Plain data was written: integers, concrete masks."""
        for ref, data in zip(refs, results):
            if data is not None and not is_float(ref.dtype):
                for mem in self.memory.values():
                    mem.overwrite(ref, data)

    def look_at_bytes(self, call: OpCall, refs) -> None:
        """Floats that are read as another type: integers that depend on symbols, and nothing says how."""
        for ref in refs:
            for m in self.algebras:
                mem = self.memory[m.name]
                if not mem.reinterpreted(ref):
                    continue
                have = mem.dtypes[ref.storage]
                if have == "bool" and dtype_of(ref.dtype).itemsize == 1:      # the mask as numbers: as if it were cast
                    mask = TensorRef(ref.storage, ref.offset, ref.size, ref.stride, have)
                    self.decide(call, "cast", m, (mem.load(mask),), self.native.tensor(ref).clone())
                elif not any(d.code == "OPS006" and d.span == self.span(call) for d in self.diagnostics):
                    self.diagnose("OPS006", f"{call.name} reads as {ref.dtype} what is {have}: bytes have no meaning over the real numbers", call,
                                  fix="convert with .to(dtype), and communicate tensors in the type that they have")

    def _evaluate(self, m: Algebra, call: OpCall, base: str, args, kwargs, results) -> None:
        self.place(m, call)
        if base in DECIDED:
            return self._leave(m, call, args, results)
        if call.rng:
            return self._random(m, call, results)
        if call.name == "tv.scalar.unknown":
            return self._untracked(m, call)
        found = self.table.lookup(call.name)
        if found is None:
            self._no_row(m, call, base)
            return
        kw = dict(kwargs)
        if found.row.ctx:
            kw["ctx"] = Ctx(call, results, self, m)
        try:
            got = foreach_call(m, found.row, args, kw) if found.foreach else found.row.meaning(m, *args, **kw)
        except Fault as fault:
            self.diagnostics += [_at(d, self.span(call), self.rank) for d in fault.diagnostics]
            self._poison(m, call)
            return
        self._assign(m, call, got, results)

    def _leave(self, m: Algebra, call: OpCall, args, results) -> None:
        """A value leaves the tensor world: a float becomes a tracked scalar, a mask or comparison becomes a decision."""
        if isinstance(call.outs, ScalarRef):
            self.scalars[m.name][call.outs.id] = m.reshape(args[0], ())
            return
        operands = tuple(a for a in args if not isinstance(a, torch.Tensor) and hasattr(a, "shape"))
        if operands and not all(m.is_const(a) for a in operands if not isinstance(a, Complex)):
            self.decide(call, "mask", m, operands, call.outs)

    def _assign(self, m: Algebra, call: OpCall, got, results) -> None:
        values = got if isinstance(got, (list, tuple)) else [got]
        targets = call.targets()
        if isinstance(call.outs, ScalarRef):
            self.scalars[m.name][call.outs.id] = values[0]
            return
        if len(values) != len(targets):
            raise ReplayError(f"{call.name}: its row gives {len(values)} results for {len(targets)} targets")
        mem = self.memory[m.name]
        for k, (ref, v) in enumerate(zip(targets, values)):
            if is_float(ref.dtype):
                if v is None:
                    raise ReplayError(f"{call.name}: its row gives no value for the float result {k}")
                mem.store(ref, m.data(v) if isinstance(v, torch.Tensor) else v)
                self.elements += ref.numel
                if self.hooks.value:
                    self.hooks.value(self, m, call, k, ref)
            elif ref.dtype == "bool" and v is not None and not isinstance(v, torch.Tensor) and not m.is_const(v) and m.name != "real":
                mem.store(ref, v)
            else:
                mem.overwrite(ref, results[k])
                self._cast_decision(m, call, ref, v, results[k])

    def _cast_decision(self, m: Algebra, call: OpCall, ref: TensorRef, v, native) -> None:
        """A symbolic value that lands in an integer tensor has been decided by its recorded outcome."""
        if v is not None and ref.dtype != "bool" and not isinstance(v, (torch.Tensor, Complex)) and not m.is_const(v):
            self.decide(call, "cast", m, (v,), native)

    def _random(self, m: Algebra, call: OpCall, results) -> None:
        """What construction draws is data. What a step draws (dropout), or symbols steer, is another number on the other side."""
        steered = any(not m.is_const(self.value(m, t)) for t in reads(call) if is_float(t.dtype))
        if self.step or steered:
            name = call.name.split(".")[1]
            if m is self.algebras[0]:
                self.diagnose("OPS003", f"live dropout, or other random numbers in a step ({name}): two programs cannot be compared", call,
                              fix="set dropout to 0 in the spec; draw random inputs in reference() and hand them over in the batch")
            return self._poison(m, call)
        for ref, drawn in zip(call.targets(), results):
            if is_float(ref.dtype):
                drawn = Complex(m.data(drawn.real), m.data(drawn.imag)) if drawn.is_complex() else m.data(drawn)
                self.memory[m.name].store(ref, drawn)

    def _untracked(self, m: Algebra, call: OpCall) -> None:
        """A value that capture found to change with the symbols, by a way that it could not follow."""
        if m is self.algebras[0]:
            self.diagnose("CAP006", "a value changes with the weights, by a way that is not tracked: what depends on it is UNKNOWN", call,
                          fix="compute it with tensors, or with item() and Python's arithmetic, which keep its origin")
        self._poison(m, call)

    def _no_row(self, m: Algebra, call: OpCall, base: str) -> None:
        if base not in self.unknown_ops:
            self.unknown_ops.add(base)
            self.diagnose("OPS001", f"no row in the op table for {base}: everything that depends on it is UNKNOWN", call,
                          fix="give it a meaning with OPS = [...] in the spec: a PyTorch function, or uninterpreted")
        self._poison(m, call)

    def _poison(self, m: Algebra, call: OpCall) -> None:
        if isinstance(call.outs, ScalarRef):
            self.scalars[m.name][call.outs.id] = m.reshape(m.garbage(f"scalar.{self.rank}.{call.outs.id}", 1), ())
            return
        mem = self.memory[m.name]
        for k, ref in enumerate(call.targets()):
            if is_float(ref.dtype):
                one = mem._real_ref(ref) if ref.dtype.startswith("complex") else ref
                mem.store(one, m.reshape(m.garbage(f"unknown.{self.rank}.{call.index}.{k}", one.numel), one.size))

    def release(self) -> None:
        """Let go of what the present call was the last to use."""
        for sid in self._last_uses.get(self.pc, ()):
            self.native.storages.pop(sid, None)
            for mem in self.memory.values():
                mem.drop(sid)

    # ---- asynchronous work
    def _check_pending(self, call: OpCall, who: str = "") -> None:
        """Between issue and wait of a collective its outputs are garbage and its inputs are frozen. who: in words, what reads."""
        reads, writes = list(inputs(call)), list(call.writes)
        for work, op in list(self.pending.items()):
            c = op.collective
            if any(overlap(r, o) for r in reads for o in c.outputs):
                self.diagnose("REL007", f"{who or call.name} reads the result of an asynchronous {c.kind} before its wait", call,
                              notes=(f"issued at {self.span(op)}",), fix="call wait() on the returned work before the result is used")
            elif any(overlap(w, i) for w in writes for i in c.inputs):
                self.diagnose("REL007", f"{call.name} overwrites an input of an asynchronous {c.kind} before its wait", call,
                              notes=(f"issued at {self.span(op)}",), fix="call wait() on the returned work before its input is reused")
            else:
                continue
            del self.pending[work]


def overlap(a: TensorRef, b: TensorRef) -> bool:
    """Whether two references may share bytes (by their extent within the storage)."""
    if a.storage != b.storage or 0 in a.size or 0 in b.size:
        return False
    (a0, a1), (b0, b1) = _interval(a), _interval(b)
    return a0 < b1 and b0 < a1


def _interval(r: TensorRef) -> tuple[int, int]:
    item = dtype_of(r.dtype).itemsize
    return r.offset * item, (r.offset + 1 + sum((s - 1) * d for s, d in zip(r.size, r.stride))) * item


def _has_scalar(args) -> bool:
    return any(isinstance(a, ScalarRef) or (isinstance(a, Sequence) and _has_scalar(a.items)) for a in args)


def _at(d: Diagnostic, span: Span | None, rank: int) -> Diagnostic:
    return Diagnostic(d.code, d.message, d.severity, d.span or span, d.ranks or (rank,), d.notes, d.fix)
