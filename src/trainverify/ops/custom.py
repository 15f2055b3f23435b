"""Rows for a spec's own ops (trusted as the spec is: both kinds are assumptions of the report).

A PyTorch function as meaning is run on the recorded inputs; every aten call that it makes is evaluated by its own row, so the
function means what those rows mean. An uninterpreted op is an unknown function of its inputs: equal results on equal inputs. On
the parallel side it must be applied to what the reference applies it to; any other result has no known meaning.
"""
from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainverify.algebra.base import Algebra, Complex
from trainverify.diagnostics import Diagnostic, Fault
from trainverify.ir.trace import Arg, Name, OpCall, ScalarRef, Sequence, TensorRef
from trainverify.ops.access import makes_garbage
from trainverify.ops.foreach import foreach_call
from trainverify.ops.lift import lift, refuse
from trainverify.ops.table import OpRow

KIND = "custom"
LEAVING = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.equal", "aten.item")


def op_name(name: str) -> str:
    """"mylib::op" or "mylib.op" as a row's name."""
    return name.replace("::", ".").removesuffix(".default")


def function_row(name: str, function: Callable) -> OpRow:
    """A row whose meaning is what `function`, written in PyTorch, computes from the op's arguments."""
    def meaning(m, *args, ctx, **kwargs):
        return _Run(m, ctx, name).results(function, args, kwargs)

    meaning.__doc__ = (inspect.getdoc(function) or "").split("\n")[0]
    code = getattr(function, "__code__", None)
    where = f" ({code.co_filename}:{code.co_firstlineno})" if code is not None else ""
    return OpRow(name, meaning, KIND, f"computes what {getattr(function, '__qualname__', repr(function))} computes{where}", ctx=True)


def uninterpreted_row(name: str, pointwise: bool) -> OpRow:
    """A row for an op of which nothing is known but that its results depend on its inputs only."""
    unknown = _Unknown(name, pointwise)

    def meaning(m, *args, ctx, **kwargs):
        """An unknown function of its inputs."""
        return unknown.results(m, args, kwargs, ctx)

    how = "element by element" if pointwise else "every result of all inputs"
    return OpRow(name, meaning, KIND, f"is an unknown function ({how})", ctx=True)


# ---- a function as meaning
@dataclass(slots=True)
class _Inner:
    """What replay hands to rows with ctx=True, for a call inside the function."""

    call: OpCall
    native: list[torch.Tensor]
    machine: Any
    arguments: tuple
    outer: Any

    def argument(self, place: int):
        return self.arguments[place]

    def decide(self, kind: str, operands, outcome) -> None:
        self.outer.decide(kind, operands, outcome)


class _Run(TorchDispatchMode):
    """One application: torch computes on the recorded inputs, and beside each storage lies what it holds in the algebra."""

    def __init__(self, m: Algebra, ctx: Any, name: str):
        super().__init__()
        self.m, self.ctx, self.name = m, ctx, name
        self.cells: dict[int, Any] = {}
        self.alive: list[torch.Tensor] = []    # so that no storage's address is used twice

    def results(self, function: Callable, args: tuple, kwargs: dict) -> list:
        call = self.ctx.call
        given = [self._given(a, v) for a, v in zip(call.args, args)]
        named = {k: self._given(call.kwargs[k], v) for k, v in kwargs.items()}
        try:
            with torch.no_grad(), self:
                returned = function(*given, **named)
        except Fault:
            raise
        except Exception as error:             # the user's function: whatever it raises is theirs
            raise Fault(Diagnostic("OPS004", f"the meaning of {self.name} raised {type(error).__name__}: {error}",
                                   fix="the function in OPS must take what the op takes, and compute with tensors only")) from error
        tensors = [t for t in tree_leaves(returned) if isinstance(t, torch.Tensor)]
        tensors += self._written(given, named)
        if len(tensors) != len(call.targets()):
            raise Fault(Diagnostic("OPS004", f"the meaning of {self.name} gives {len(tensors)} results, the op {len(call.targets())}",
                                   fix="return what the op returns, in its order; change in place what it changes"))
        for t, ref in zip(tensors, call.targets()):
            if tuple(t.shape) != ref.size:
                raise Fault(Diagnostic("OPS004", f"the meaning of {self.name} gives a result of shape {list(t.shape)}, the op one of {list(ref.size)}",
                                       fix="return what the op returns"))
        return [self._read(t) if t.is_floating_point() or t.is_complex() or self._held(t) else None for t in tensors]

    def _written(self, given: list, named: dict) -> list[torch.Tensor]:
        """The arguments that the op writes and does not return."""
        call = self.ctx.call
        places = [(a, t) for a, t in (*zip(call.args, given), *((call.kwargs[k], t) for k, t in named.items())) if isinstance(a, TensorRef)]
        outs = len(call.targets()) - sum(w not in _refs(call.outs) for w in call.writes)
        return [next(t for a, t in places if a == w) for w in call.targets()[outs:]]

    def _given(self, a: Arg, v):
        """An argument for the function: a fresh tensor beside which v lies."""
        if isinstance(a, Sequence):
            return [self._given(x, y) for x, y in zip(a.items, v)]
        if isinstance(a, ScalarRef):
            t = torch.tensor(self.ctx.machine.native.scalars[a.id], dtype=torch.float64)
        elif isinstance(a, TensorRef):
            t = self.ctx.machine.native.tensor(a).clone()
        else:
            return v
        if not isinstance(v, torch.Tensor):
            self._write(t, v)
        return t

    # ---- memory
    def _key(self, t: torch.Tensor) -> int:
        self.alive.append(t)
        return t.untyped_storage()._cdata

    def _held(self, t: torch.Tensor) -> bool:
        return t.untyped_storage()._cdata in self.cells

    def _write(self, t: torch.Tensor, v) -> None:
        key, step = self._key(t), 2 if t.is_complex() else 1
        if key not in self.cells:
            n = t.untyped_storage().nbytes() // t.element_size() * step
            self.cells[key] = self.m.cell(self.m.const(0, (n,)))
        for part, x in enumerate((v.re, v.im) if isinstance(v, Complex) else (v,)):
            x = x if tuple(x.shape) == tuple(t.shape) else self.m.expand(x, tuple(t.shape))
            self.cells[key] = self.m.store(self.cells[key], t.storage_offset() * step + part, tuple(t.shape), tuple(s * step for s in t.stride()), x)

    def _read(self, t: torch.Tensor):
        key, step = self._key(t), 2 if t.is_complex() else 1
        if key not in self.cells:
            return Complex(self.m.data(t.real), self.m.data(t.imag)) if t.is_complex() else self.m.data(t)
        parts = [self.m.load(self.cells[key], t.storage_offset() * step + k, tuple(t.shape), tuple(s * step for s in t.stride())) for k in range(step)]
        v = Complex(parts[0], self.m.neg(parts[1]) if t.is_conj() else parts[1]) if t.is_complex() else parts[0]
        return self.m.neg(v) if t.is_neg() else v

    def _value(self, x):
        if isinstance(x, torch.Tensor):
            return self._read(x) if x.is_floating_point() or x.is_complex() or self._held(x) else x.clone()
        return [self._value(i) for i in x] if isinstance(x, (list, tuple)) else x

    # ---- calls
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "aten" and func._can_decompose():
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        name = ".".join(str(func).split(".")[:2])
        touched = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if name in LEAVING and any(self._held(t) for t in touched):
            raise refuse(self.name, "its meaning reads a value of a tensor in Python", "write the meaning with tensor operations only")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise refuse(self.name, f"its meaning draws random numbers ({name})", "write it without randomness")
        if _is_view(func):
            return func(*args, **kwargs)
        values = [self._value(a) for a in args], {k: self._value(a) for k, a in kwargs.items() if k != "out"}
        made = func(*args, **kwargs)
        targets = _targets(func, made, args, kwargs)
        if any(t.is_floating_point() or t.is_complex() or self._held(t) for t in (*touched, *targets)):
            self._evaluate(func, name, args, kwargs, values, targets)
        return made

    def _evaluate(self, func, name: str, args, kwargs, values, targets: list[torch.Tensor]) -> None:
        if makes_garbage(name):
            for t in targets:
                self._write(t, self.m.reshape(self.m.garbage(f"{self.name}.{len(self.alive)}", t.numel()), tuple(t.shape)))
            return
        found = self.ctx.machine.table.lookup(str(func))
        if found is None or name == self.name:
            raise Fault(Diagnostic("OPS001", f"no row in the op table for {name}, by which the spec explains {self.name}",
                                   fix="explain it with other operations"))
        row_args, row_kwargs = values
        if found.row.ctx:
            call = OpCall(0, str(func), tuple(map(_encoded, args)), {k: _encoded(v) for k, v in kwargs.items()}, Sequence(tuple(map(_encoded, targets))))
            row_kwargs["ctx"] = _Inner(call, targets, self.ctx.machine, args, self.ctx)
        got = foreach_call(self.m, found.row, row_args, row_kwargs) if found.foreach else found.row.meaning(self.m, *row_args, **row_kwargs)
        got = list(got) if isinstance(got, (list, tuple)) else [got]
        for t, v in zip(targets, got, strict=True):
            self._assign(t, v)

    def _assign(self, t: torch.Tensor, v) -> None:
        symbolic = v is not None and not isinstance(v, torch.Tensor)
        if t.is_floating_point() or t.is_complex():
            self._write(t, v if symbolic else lift(self.m, v))
        elif symbolic and t.dtype == torch.bool:
            self._write(t, v)
        else:
            self.cells.pop(t.untyped_storage()._cdata, None)
            if symbolic and not isinstance(v, Complex) and not self.m.is_const(v):
                self.ctx.decide("cast", (v,), t)


def _is_view(func) -> bool:
    returns = func._schema.returns
    return func._opname in ("_unsafe_view", "lift_fresh") or (bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns))


def _targets(func, made, args, kwargs) -> list[torch.Tensor]:
    """Returned tensors, then written ones, as in OpCall.targets()."""
    found = [t for t in tree_leaves(made) if isinstance(t, torch.Tensor)]
    for i, a in enumerate(func._schema.arguments):
        if a.alias_info is not None and a.alias_info.is_write:
            given = args[i] if i < len(args) else kwargs.get(a.name)
            found += [t for t in tree_leaves(given) if isinstance(t, torch.Tensor) and all(t is not f for f in found)]
    return found


def _encoded(x) -> Arg:
    if isinstance(x, torch.Tensor):
        return TensorRef(-1, x.storage_offset(), tuple(x.shape), tuple(x.stride()), str(x.dtype).removeprefix("torch."))
    if isinstance(x, (list, tuple)):
        return Sequence(tuple(map(_encoded, x)))
    return x if x is None or isinstance(x, (bool, int, float, str)) else Name("opaque", str(x))


def _refs(a: Arg) -> list[TensorRef]:
    if isinstance(a, TensorRef):
        return [a]
    return [t for x in a.items for t in _refs(x)] if isinstance(a, Sequence) else []


# ---- an op of which nothing is known
class _Unknown:
    """An unknown function in one run: what the reference gets from it, and the calls that get something else."""

    def __init__(self, name: str, pointwise: bool):
        self.name, self.pointwise = name, pointwise
        self.reference: set[int] = set()      # fingerprints of its results
        self.strange: set[tuple[int, int]] = set()   # (rank, call)

    def results(self, m, args, kwargs, ctx) -> list:
        if any(t is not None and t.is_complex() for t in ctx.native):
            raise refuse(self.name, "an uninterpreted op with complex results", "give it a meaning")
        results = self._recorded(m, ctx) if m.name == "real" else self._applied(m, args, kwargs, ctx)
        if (ctx.machine.rank, ctx.call.index) in self.strange:
            raise Fault(Diagnostic(
                "OPS005", f"{self.name} is uninterpreted, and is applied to values to which the reference does not apply it: its results have no known meaning",
                fix="apply it to the same values on both sides, declare it pointwise if it is, or give it a meaning"))
        return results

    def _recorded(self, m, ctx) -> list:
        """In float64 it has no values but the recorded ones, which are rounded."""
        ctx.machine.memory["real"].rounded = True
        return [m.data(t) if t is not None and t.is_floating_point() else None for t in ctx.native]

    def _applied(self, m, args, kwargs, ctx) -> list:
        attributes: list[str] = []
        values: list = []
        for key, x in (*enumerate(args), *sorted(kwargs.items())):
            _sort_out(m, str(key), x, values, attributes)
        tag = f"{self.name}({'; '.join(attributes)})"
        results = [_application(m, f"{tag}#{k}", self.pointwise, values, tuple(t.shape)) for k, t in enumerate(ctx.native)]
        prints = {p for v in results for p in m.fingerprint(v).reshape(-1).tolist()}
        if ctx.machine.trace.side == "reference":
            self.reference |= prints
        elif not prints <= self.reference:
            self.strange.add((ctx.machine.rank, ctx.call.index))
        return results


def _sort_out(m, key: str, x, values: list, attributes: list[str]) -> None:
    """Tensors and tracked scalars become values; everything else, and their shapes, belong to the function's name."""
    if isinstance(x, (list, tuple)):
        attributes.append(f"{key}=[{len(x)}]")
        for i, y in enumerate(x):
            _sort_out(m, f"{key}.{i}", y, values, attributes)
    elif isinstance(x, torch.Tensor) or hasattr(x, "shape"):
        attributes.append(f"{key}:{len(x.shape)}")
        v = lift(m, x)
        values += [v.re, v.im] if isinstance(v, Complex) else [v]
    else:
        attributes.append(f"{key}={x!r}")


def _application(m, tag: str, pointwise: bool, values: list, shape: tuple[int, ...]):
    if pointwise:
        return m.opaque(tag, *[m.expand(v, shape) for v in values]) if values else m.opaque(tag, m.const(0, shape))
    n = sum(math.prod(v.shape) for v in values)
    sizes = ",".join(str(tuple(v.shape)) for v in values)
    # All inputs in one number: an unknown function of pairs, applied as a tree. Its leaves are padded with zeros to a power of two.
    width = 1 << max(n - 1, 0).bit_length()
    index = torch.zeros(width, dtype=torch.int64)
    index[:n] = torch.arange(1, n + 1)
    tree = m.take(values or [m.const(0)], index)
    while width > 1:
        width //= 2
        tree = m.opaque("pair", m.take([tree], torch.arange(1, 2 * width, 2)), m.take([tree], torch.arange(2, 2 * width + 1, 2)))
    count = math.prod(shape)
    everything = m.expand(m.reshape(tree, (1,)), (count,))
    return m.reshape(m.opaque(f"{tag}|{sizes}", everything, m.data(torch.arange(count))), shape)
