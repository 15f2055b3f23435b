"""The recorder: one dispatch mode per rank that appends every executed call to its trace (trusted).

It sees each aten, c10d and custom op below autograd, on plain tensors: wrapper subclasses (DTensor, AsyncCollectiveTensor) are
unwrapped by torch first. Pure views are not recorded, since a trace refers to storages. Communication is done by `Collectives`.
"""
from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from trainverify.capture import meta, opinfo
from trainverify.capture.collectives import Collectives
from trainverify.capture.digest import contents, crc
from trainverify.capture.encode import Encoder, LazyBits, NotStrided
from trainverify.capture.opinfo import OpInfo
from trainverify.capture.patches import Patches
from trainverify.capture.quiet import unseen
from trainverify.capture.scalars import TrackedFloat
from trainverify.capture.spans import Spans
from trainverify.capture.unused import without_unused
from trainverify.capture.userframes import is_user_file
from trainverify.diagnostics import Diagnostic, Fault, names_place
from trainverify.ir.trace import Arg, Name, Note, OpCall, ScalarRef, Sequence, TensorRef, Trace, tensors

_FAKE = torch._C._TorchDispatchModeKey.FAKE
_active_mode = torch._C._get_dispatch_mode
_no_functions = torch._C.DisableTorchFunction
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter
_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
# Draws that make up data; those that look at what they are given (bernoulli, dropout) do not.
_DRAWS = frozenset({"randn", "rand", "normal", "normal_", "uniform", "uniform_", "exponential_", "log_normal_"})
# Accesses to memory that torch's own code makes all the time and that give no value to Python.
_REDUCES, _PICKLE_DEPTH = torch.Tensor._reduce_ex_internal.__code__, 12
_MEMORY_ACCESS = frozenset({"data_ptr", "untyped_storage", "storage", "typed_storage"})


class Recorder(TorchDispatchMode):
    """Records one rank. It is also the sink of tracked scalars (capture/scalars.py)."""

    def __init__(self, side: str, rank: int, world_size: int, channel: Any, floats: meta.MetaFloats | None = None, accept: tuple[str, ...] = ()):
        super().__init__()
        self.floats, self.accept = floats, accept      # floats: where they have no values (capture/meta.py)
        self.side, self.rank, self.world_size = side, rank, world_size
        self.ops: list[OpCall] = []
        self.watch: Callable[[OpCall, list[torch.Tensor]], None] | None = None   # sees every call of a kernel and its targets
        self.drawn_is_data: Callable[[], bool] | None = None    # whether random floats that a call draws now are the program's data
        self.notes: list[Note] = []
        self.pending_scalars: list = []
        self.last_item: ScalarRef | None = None
        self.reading = False
        self._given: list[TrackedFloat] = []   # tensors that torch has read as numbers for the call that is to come
        self.encoder = Encoder(self.pending_scalars, sampled=floats is not None)
        self.spans = Spans()
        self.blobs = self.encoder.blobs
        self.collectives = Collectives(self, channel)
        self._infos: dict[int, tuple[OpInfo, Any]] = {}    # by the op's id: its hash is a Python function. The op itself, so that the id stays its own
        self.scalar_values: list[float] = []
        self._valued: set[int] = set()         # scalars that have a value; all, unless floats have none
        self._noted: set[tuple[str, int, str]] = set()

    # ---- life
    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what runs in this block. (Entering the mode itself only switches dispatch, as is done to decompose an op.)"""
        patches, hooks = Patches(), self.spans.module_hooks()
        resize = torch.UntypedStorage.resize_

        def resize_(storage, nbytes):
            result = resize(storage, nbytes)
            self.resized(storage)
            return result

        patches.set(torch.UntypedStorage, "resize_", resize_)
        try:
            with self:
                yield
        finally:
            patches.restore()
            for hook in hooks:
                hook.remove()

    def trace(self, **more: Any) -> Trace:
        """Everything recorded so far."""
        ops, storages = without_unused(self.ops, self.encoder.storages())
        return Trace(self.side, self.rank, self.world_size, ops, storages, self.spans.items, self.notes, **more)

    # ---- calls that torch dispatches
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False                           # a wrapper around every call; nothing is compiled while we record

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if types:
            for t in types:
                if t not in _PLAIN and (_active_mode(_FAKE) is None or not any(issubclass(t, FakeTensor) for t in types)):
                    return NotImplemented
        if _active_mode(_FAKE) is not None:    # shape propagation of DTensor: these ops are not the program's
            with _no_functions():
                return func(*args, **(kwargs or {}))
        known = self._infos.get(id(func))
        info = self._info(func) if known is None else known[0]
        # Function modes see the program's calls, not ours.
        with _no_functions():
            try:
                return self._record(info, func, args, kwargs) if info.route == opinfo.RECORD else self._special(info, func, args, kwargs or {})
            except NotStrided as e:
                raise Fault(Diagnostic("CAP003", f"{func} works on a {e} tensor", span=self.spans.span(), ranks=(self.rank,),
                                       fix="Use dense tensors (Embedding(sparse=False)).")) from e
            except meta.NeedsValues as e:
                raise Fault(meta.refusal(str(func), str(e), self.spans.span(), self.rank)) from e

    def _info(self, func) -> OpInfo:
        known = self._infos.get(id(func))
        if known is None:
            known = self._infos[id(func)] = opinfo.describe(func), func
        return known[0]

    def _special(self, info: OpInfo, func, args, kwargs):
        route = info.route
        if route == opinfo.VIEW:
            self.spans.notice()
            return func(*args, **kwargs) if self.floats is None else self._viewed(func(*args, **kwargs))
        if route == opinfo.COLLECTIVE:
            return self.collectives.call(func, args, kwargs)
        if self.floats is not None and func._opname == "_wrap_tensor_autograd":
            return AsyncCollectiveTensor(args[0])                  # its kernel for meta makes new memory
        if route == opinfo.ITEM:
            return self._item(info, func, args)
        if route == opinfo.DECOMPOSE:
            with self:
                result = func.decompose(*args, **kwargs)
            return self._record(info, func, args, kwargs) if result is NotImplemented else result
        if route == opinfo.RESIZE:
            storage = args[0].untyped_storage()
            if storage.nbytes():
                self.encoder.storage(storage, False)           # what it holds by now is its contents; what it gains is not
            result = func(*args, **kwargs)
            self.resized(storage)
            return result
        if route == opinfo.ZERO:               # it has no memory; plain zeros mean the same
            kwargs.pop("pin_memory", None)
            zeros = torch.ops.aten.zeros.default
            return self._record(self._info(zeros), zeros, args, kwargs)
        if route == opinfo.UNSUPPORTED:
            raise Fault(Diagnostic("CAP001", f"{info.name} cannot be recorded", span=self.spans.span(), ranks=(self.rank,),
                                   fix="Use the ordinary operators instead of this one (no compiled or symmetric-memory path)."))
        return func(*args, **kwargs)

    def _record(self, info: OpInfo, func, args, kwargs):
        encoder = self.encoder
        read: list[torch.Tensor] = []
        try:
            encoded = self._arguments(info, args, read)
            keywords = self._keywords(info, kwargs, read) if kwargs else {}
        except LazyBits:
            return self._record(info, func, *self._without_lazy_bits(info, args, kwargs or {}))
        if info.random and func._opname in _DRAWS and self.drawn_is_data is not None and self.drawn_is_data():
            return self._drawn(info, func, args, kwargs)
        digest_in = crc(read) if self.floats is None and not info.reads_nothing else 0
        if self._given:
            self._take_given()
        span = self.spans.here()
        if self.floats is not None:
            result = self.floats.run(info, func, args, kwargs or {}, bool(self.scalar_values) and not self._has_value((*encoded, *keywords.values())))
            if info.random and self._draws(info, args, kwargs) and self._unknown_draw(info, args, kwargs, result, span):
                return result
        else:
            result = func(*args, **kwargs) if kwargs else func(*args)
            if isinstance(result, torch.Tensor) and result.is_meta:
                return result
        outs = encoder.fresh(result) if info.garbage else encoder.result(result)
        written, writes = [], ()
        if info.writes or info.hidden_writes:
            written = self._written(info, args, kwargs)
            grown = [self.resized(t.untyped_storage()) for t in written]
            writes = (outs,) if len(written) == 1 and written[0] is result and not grown[0] else tuple([encoder.tensor(t, True) for t in written])
        call = OpCall(len(self.ops), info.name, encoded, keywords, outs, writes, span, None, digest_in)
        targets = _targets(result, outs, written, writes)
        if not info.garbage and self.floats is None:
            call.digest_out = crc(targets)
        if info.random and self._draws(info, args, kwargs):
            call.rng = True
            for k, t in enumerate(targets):
                self.blobs[f"rng.{call.index}.{k}"] = contents(t)
        self.ops.append(call)
        if self.watch is not None:
            self.watch(call, targets)
        return result

    def _arguments(self, info: OpInfo, args, read: list[torch.Tensor]) -> tuple[Arg, ...]:
        """The positional arguments; those tensors that the op reads are added to `read`."""
        tensor, handlers, other, unread = self.encoder.tensor, self.encoder.handlers, self.encoder.other, info.unread
        encoded, i = [], 0
        for a in args:
            kind = type(a)
            if kind is _Tensor or kind is _Parameter:
                encoded.append(tensor(a, False))
                if not unread or i not in unread:
                    read.append(a)
            else:
                handler = handlers.get(kind)
                encoded.append(other(a) if handler is None else handler(a))
                if kind is list or kind is tuple or isinstance(a, _Tensor):
                    if i not in unread:
                        _collect((a,), read)
            i += 1
        return tuple(encoded)

    def _keywords(self, info: OpInfo, kwargs: dict, read: list[torch.Tensor]) -> dict[str, Arg]:
        for k, a in kwargs.items():
            if k not in info.unread_keys:
                _collect((a,), read)
        arg = self.encoder.arg
        return {k: arg(a) for k, a in kwargs.items()}

    @staticmethod
    def _written(info: OpInfo, args, kwargs) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for position, name in info.writes:
            if position < len(args):
                _collect((args[position],), found)
            elif kwargs:
                _collect((kwargs.get(name),), found)
        if info.hidden_writes and (info.hidden_if is None or args[info.hidden_if]):
            _collect([args[k] for k in info.hidden_writes], found)
        return found

    def _drawn(self, info: OpInfo, func, args, kwargs):
        """Random numbers that are data: a new tensor comes with its bytes, an old one is overwritten by a copy of them."""
        result = func(*args, **(kwargs or {}))
        for t in self._written(info, args, kwargs):
            with unseen():
                drawn = t.detach().clone()
            self._record(self._info(torch.ops.aten.copy_.default), torch.ops.aten.copy_.default, (t, drawn), None)
        return result

    def _viewed(self, t):
        """At full size: numbers that Python put into a tensor go to meta, and their bytes into the trace."""
        if not isinstance(t, torch.Tensor) or t.is_meta or not (t.is_floating_point() or t.is_complex()) or self.encoder.known(t.untyped_storage()):
            return t
        moved, data = self.floats.data(t)
        self.encoder.given(moved.untyped_storage(), data)
        return moved

    def _unknown_draw(self, info: OpInfo, args, kwargs, result, span: int) -> bool:
        """At full size, what is drawn is unknown: whether the targets are floats, which then are recorded as uninitialised memory."""
        written = self._written(info, args, kwargs)
        targets = written or [t for t in ((result,) if isinstance(result, torch.Tensor) else result) if isinstance(t, torch.Tensor)]
        if not any(t.is_meta for t in targets):
            return False
        if self.spans.step:
            raise meta.NeedsValues("it draws random numbers in a step")
        for t in targets:
            made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=meta.META) if written else t
            ref = self.encoder.tensor(made, True)
            self.ops.append(OpCall(len(self.ops), "aten.empty.memory_format", (Sequence(tuple(t.shape)),), {}, ref, (), span))
            if written:
                ref, source = self.encoder.tensor(t, True), ref
                self.ops.append(OpCall(len(self.ops), "aten.copy_.default", (ref, source), {}, ref, (ref,), span))
        return True

    def _without_lazy_bits(self, info: OpInfo, args, kwargs) -> tuple:
        """The arguments with lazily conjugated or negated tensors made real, by recorded calls."""
        if any(t.is_conj() or t.is_neg() for t in self._written(info, args, kwargs)):
            raise Fault(Diagnostic("CAP001", f"{info.name} writes through a lazily conjugated or negated view", span=self.spans.span(), ranks=(self.rank,),
                                   fix="Write into the tensor itself, or call resolve_conj() first."))
        return tree_map_only(torch.Tensor, self._plain, (args, kwargs))

    def _plain(self, t: torch.Tensor) -> torch.Tensor:
        aten = torch.ops.aten
        if t.is_conj():
            t = self._record(self._info(aten.conj_physical.default), aten.conj_physical.default, (torch.conj(t),), None)
        if t.is_neg():
            t = self._record(self._info(aten.neg.default), aten.neg.default, (torch._neg_view(t),), None)
        return t

    @staticmethod
    def _draws(info: OpInfo, args, kwargs) -> bool:
        if info.dropout is None:
            return True
        position, name = info.dropout
        return bool(args[position] if position < len(args) else (kwargs or {}).get(name, 0.0))

    def _item(self, info: OpInfo, func, args):
        """A value leaves for Python: a float keeps a reference."""
        args = (self._plain(args[0]),)
        known = args[0] if self.floats is None or self.floats.has_memory(args[0]) else self.floats.value(args[0])
        value = func(*args) if known is args[0] else known.item() if known is not None else self._valueless(info, args[0])
        outs: Arg = value
        if isinstance(value, float):
            outs = self.last_item = self._new_scalar(value)
            if known is not None:
                self._valued.add(outs.id)
            if not self.reading:
                self._given.append(TrackedFloat(value, outs, self))
                self.pending_scalars.append(self._given[-1])
        elif isinstance(value, complex):
            outs = Name("complex", repr(value))
        self.append(info.name, (self.encoder.arg(args[0]),), outs=outs, reads=args)
        return value

    def _valueless(self, info: OpInfo, t: torch.Tensor) -> float:
        """A float without a value leaves: a number that only shows where it comes back."""
        if not t.is_floating_point():
            raise meta.NeedsValues(meta.DECIDED)
        return self.floats.placeholder()

    def _has_value(self, args: tuple) -> bool:
        """At full size: whether all tracked floats among the arguments come from integers and numbers alone."""
        for a in args:
            if type(a) is ScalarRef and a.id not in self._valued or type(a) is Sequence and not self._has_value(a.items):
                return False
        return True

    def _take_given(self) -> None:
        """The call that they were given to has been encoded."""
        given = {id(x) for x in self._given}
        self.pending_scalars[:] = [x for x in self.pending_scalars if id(x) not in given]
        self._given.clear()

    # ---- calls of our own
    def append(self, name: str, args: tuple[Arg, ...], *, outs: Arg = None, writes: tuple[TensorRef, ...] = (), kwargs: dict | None = None,
               reads=(), written=(), collective=None) -> OpCall:
        """Append a call; `reads` and `written` are the tensors to digest."""
        call = OpCall(len(self.ops), name, args, kwargs or {}, outs, writes, self.spans.here(), collective, crc(reads), crc(written))
        self.ops.append(call)
        return call

    def emit(self, name: str, *args: Any, outs: Arg = None, writes: tuple[torch.Tensor, ...] = (), **kwargs: Any) -> OpCall:
        """Append a tv.* call of the session; tensors among the arguments are encoded and digested."""
        with unseen():
            args = tuple([self._plain(a) if isinstance(a, torch.Tensor) else a for a in args])
            refs = tuple([self.encoder.arg(a) for a in args])
            read = [a for a in args if isinstance(a, torch.Tensor)]
            written = tuple([self.encoder.tensor(t, True) for t in writes])
            return self.append(name, refs, outs=outs, writes=written, kwargs=kwargs, reads=read, written=writes)

    def resized(self, storage: torch.UntypedStorage) -> bool:
        """Whether a storage has another size now, which then is recorded."""
        sid = self.encoder.resized(storage)
        if sid is None:
            return False
        if self.floats is not None:
            self.floats.forget(storage)
        self.append("tv.resize", (Name("storage", str(sid)), storage.nbytes()))
        return True

    def note(self, code: str, text: str) -> None:
        """Something that the report must say; once for each place."""
        span = self.spans.here()
        if (code, span, text) not in self._noted:
            self._noted.add((code, span, text))
            self.notes.append(Note(code, span, text))

    # ---- the sink of tracked scalars
    def _new_scalar(self, value: float) -> ScalarRef:
        self.scalar_values.append(float.__pos__(value))
        return ScalarRef(len(self.scalar_values) - 1)

    def scalar(self, op: str, args: tuple, value: float) -> ScalarRef:
        ref = self._new_scalar(value)
        if self._has_value(args):
            self._valued.add(ref.id)
        self.append(f"tv.scalar.{op}", tuple(args), outs=ref, kwargs={"value": float.__pos__(value)})
        return ref

    def value_of(self, ref: ScalarRef) -> float:
        return self.scalar_values[ref.id]

    def decision(self, op: str, args: tuple, outcome: bool) -> bool:
        """Python branches on tracked floats; the outcome, which at full size is false where the user accepts the place (a real number is finite)."""
        if self.floats is not None and not self._has_value(args):
            span = self.spans.span()
            if span is None or not any(names_place(a, str(span)) for a in self.accept):
                raise Fault(meta.branch(op, span, self.rank))
            outcome = op == "isfinite"
            self.note("ASSUME", f"a branch on a float ({op}) counts as {str(outcome).lower()}: it has no value at full size, and the place is accepted")
        self.append("tv.decision", (op, *args), outs=bool(outcome))
        return outcome

    def escape(self, how: str, what: ScalarRef | torch.Tensor) -> None:
        if isinstance(what, torch.Tensor):
            if type(what) not in _PLAIN or (how in _MEMORY_ACCESS and not (_called_by_user() or _pickled())):
                return
            with unseen():
                plain = self._plain(what)
                floats = plain.is_floating_point() or plain.is_complex()
                if self.floats is not None and not floats and not self.floats.has_memory(plain):
                    raise Fault(meta.refusal(how, meta.DECIDED, self.spans.span(), self.rank))
                self.append("tv.escape", (how, self.encoder.arg(plain)), reads=() if floats else (plain,))
        else:
            if self.floats is not None:
                self.note("ASSUME", meta.ESCAPED)
            self.append("tv.escape", (how, what))


def _called_by_user() -> bool:
    """Whether the call that our function mode is handling was written by the user."""
    frame = sys._getframe(2)
    while frame is not None and "/trainverify/capture/" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None and is_user_file(frame.f_code.co_filename)


def _pickled() -> bool:
    """Whether the memory is asked for to be pickled: by torch.save, a checkpoint, an object collective. Its bytes may come back as another tensor."""
    frame, depth = sys._getframe(2), 0
    while frame is not None and depth < _PICKLE_DEPTH:
        if frame.f_code is _REDUCES:
            return True
        frame, depth = frame.f_back, depth + 1
    return False


def _collect(a, found: list[torch.Tensor]) -> None:
    for x in a:
        if isinstance(x, torch.Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)):
            _collect(x, found)


def _targets(result, outs: Arg, written: list[torch.Tensor], writes: tuple[TensorRef, ...]) -> list[torch.Tensor]:
    """The tensors of `OpCall.targets()`, in its order."""
    found: list[torch.Tensor] = []
    if isinstance(result, torch.Tensor):
        found.append(result)
        if not written or (len(written) == 1 and written[0] is result):
            return found
    else:
        _collect((result,), found)
    if written:
        returned = (outs,) if type(outs) is TensorRef else tuple(tensors(outs))
        found += [t for t, ref in zip(written, writes) if ref not in returned]
    return found
