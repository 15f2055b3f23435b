"""Floats that leave tensors for Python keep their origin (trusted: it decides which plain numbers in a trace are references).

`Tensor.item()` returns a `TrackedFloat`, whose arithmetic is recorded through a `Sink`, whose comparisons are decisions, and
whose return into tensors is told to the recorder as pending scalars. What strips the subclass is reported as an escape where
Python lets us see it; C code that reads a float subclass's value directly (numpy.array, math functions imported by name) is not
seen: capture's second run with other values finds what depends on those.
"""
from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from trainverify.capture.reentry import ReentrantMode
from trainverify.ir.trace import ScalarRef


class Sink(Protocol):
    """Where scalars are recorded. An argument is a ScalarRef or a plain number.

    `last_item` is set by the recorder at every aten._local_scalar_dense that it records; `reading` is true while it is asked for by
    the call being handled, else torch itself reads a tensor that was given in place of a number. During a torch call that was given
    tracked floats, these are in `pending_scalars`: a float argument of a recorded op that equals one bitwise is that one.
    """

    last_item: ScalarRef | None
    reading: bool
    pending_scalars: list[TrackedFloat]

    def scalar(self, op: str, args: tuple, value: float) -> ScalarRef: ...
    def value_of(self, ref: ScalarRef) -> float: ...
    def decision(self, op: str, args: tuple, outcome: bool) -> bool: ...
    def escape(self, how: str, what: ScalarRef | torch.Tensor) -> None: ...


class TrackedFloat(float):
    """A float that knows where it comes from."""

    __slots__ = ("ref", "sink")

    def __new__(cls, value: float, ref: ScalarRef, sink: Sink):
        self = float.__new__(cls, value)
        self.ref = ref
        self.sink = sink
        return self

    __hash__ = float.__hash__

    def plain(self, how: str) -> float:
        """The value without its origin; noted."""
        self.sink.escape(how, self.ref)
        return float.__pos__(self)

    def __pos__(self):
        return self

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self

    def __reduce_ex__(self, protocol):
        return float, (self.plain("pickle"),)

    def __float__(self):
        return self.plain("float")

    def __int__(self):
        return float.__int__(self.plain("int"))

    def __trunc__(self):
        return float.__trunc__(self.plain("trunc"))

    def __floor__(self):
        return float.__floor__(self.plain("floor"))

    def __ceil__(self):
        return float.__ceil__(self.plain("ceil"))

    def __round__(self, digits=None):
        return float.__round__(self.plain("round"), digits)

    def __divmod__(self, other):
        return self // other, self % other

    def __rdivmod__(self, other):
        return other // self, other % self

    def is_integer(self):
        return float.is_integer(self.plain("is_integer"))

    def as_integer_ratio(self):
        return float.as_integer_ratio(self.plain("as_integer_ratio"))

    def hex(self):
        return float.hex(self.plain("hex"))

    def __bool__(self):
        return self.sink.decision("bool", (self.ref,), float.__bool__(self))

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **kwargs):
        """numpy meets a tracked float: scalar arithmetic stays tracked, everything else strips it."""
        simple = method == "__call__" and not kwargs and out is None and all(isinstance(x, (int, float)) for x in inputs)
        if simple and ufunc.__name__ in _UFUNCS:
            return _UFUNCS[ufunc.__name__](*(_without_numpy(x) for x in inputs))
        plain = [x.plain(f"numpy.{ufunc.__name__}") if isinstance(x, TrackedFloat) else x for x in inputs]
        if out is not None:
            kwargs["out"] = out
        return getattr(ufunc, method)(*plain, **kwargs)


def _without_numpy(x: float) -> float:
    return x if isinstance(x, TrackedFloat) or type(x) in (int, float, bool) else x.item()


_UFUNCS: dict[str, Callable] = {
    "add": operator.add, "subtract": operator.sub, "multiply": operator.mul, "divide": operator.truediv,
    "floor_divide": operator.floordiv, "remainder": operator.mod, "power": operator.pow, "float_power": operator.pow,
    "negative": operator.neg, "positive": operator.pos, "absolute": abs, "less": operator.lt, "less_equal": operator.le,
    "greater": operator.gt, "greater_equal": operator.ge, "equal": operator.eq, "not_equal": operator.ne}


def _operand(x: Any) -> Any:
    """How an operand is recorded."""
    return x.ref if isinstance(x, TrackedFloat) else x if isinstance(x, int) else float(x)


def _record(op: str, operands: tuple, value: float) -> float:
    sink = next(x.sink for x in operands if isinstance(x, TrackedFloat))
    return TrackedFloat(value, sink.scalar(op, tuple(map(_operand, operands)), value), sink)


def _arithmetic(name: str, op: str, reflected: bool = False) -> Callable:
    base = getattr(float, name)

    def method(self, *others):
        value = base(self, *others)
        if value is NotImplemented:
            return value
        if isinstance(value, complex):
            self.plain(f"complex {op}")
            return value
        operands = (self, *others)
        return _record(op, operands[::-1] if reflected else operands, value)

    method.__name__ = name
    return method


def _comparison(name: str, op: str) -> Callable:
    base = getattr(float, name)

    def method(self, other):
        outcome = base(self, other)
        return outcome if outcome is NotImplemented else self.sink.decision(op, (self.ref, _operand(other)), outcome)

    method.__name__ = name
    return method


def _define_operators() -> None:
    for op in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
        setattr(TrackedFloat, f"__{op}__", _arithmetic(f"__{op}__", op))
        setattr(TrackedFloat, f"__r{op}__", _arithmetic(f"__r{op}__", op, reflected=True))
    for op in ("neg", "abs"):
        setattr(TrackedFloat, f"__{op}__", _arithmetic(f"__{op}__", op))
    for op in ("lt", "le", "gt", "ge", "eq", "ne"):
        setattr(TrackedFloat, f"__{op}__", _comparison(f"__{op}__", op))


_define_operators()


# -- the math module

_MATH_OPS = {"sqrt": "sqrt", "exp": "exp", "log": "log", "sin": "sin", "cos": "cos", "tanh": "tanh", "pow": "pow", "fabs": "abs"}
_MATH_DECISIONS = ("isnan", "isinf", "isfinite")
_PLAIN_NUMBERS = frozenset({int, float, bool, torch.Size})


def _math_function(name: str, function: Callable) -> Callable:
    """math.<name>, which keeps or reports tracked arguments."""
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        for a in (*args, *kwargs.values()) if kwargs else args:
            if type(a) not in _PLAIN_NUMBERS:
                break
        else:
            return function(*args, **kwargs)
        tracked = list(_tracked((args, kwargs)))
        if not tracked:
            return function(*args, **kwargs)
        if name == "prod" and not kwargs:
            return functools.reduce(operator.mul, *args)
        if name in _MATH_OPS and not kwargs and (len(args) == 1 or name == "pow"):
            return _record(_MATH_OPS[name], args, function(*args))
        if name in _MATH_DECISIONS:
            return tracked[0].sink.decision(name, (tracked[0].ref,), function(*args))
        if name not in ("floor", "ceil", "trunc"):     # those call our methods
            for x in tracked:
                x.plain(f"math.{name}")
        return function(*args, **kwargs)
    return wrapper


def _tracked(value: Any) -> Iterator[TrackedFloat]:
    """All tracked floats in nested lists, tuples and dicts."""
    if type(value) is TrackedFloat:
        yield value
    elif isinstance(value, (list, tuple)):
        for x in value:
            yield from _tracked(x)
    elif isinstance(value, dict):
        for x in value.values():
            yield from _tracked(x)


# -- the mode

_ESCAPES = ("tolist", "numpy", "__array__", "__int__", "__index__", "__complex__", "__dlpack__", "data_ptr", "untyped_storage",
            "storage", "_typed_storage", "__contains__")


class ScalarMode(ReentrantMode):
    """Makes item() return tracked floats, keeps their origin on the way back into tensors, and reports escapes and decisions."""

    def __init__(self, sink: Sink, on_read: Callable[[TrackedFloat], None] | None = None):
        super().__init__()
        self.sink, self.on_read = sink, on_read
        self._math: dict[str, Callable] = {}
        tensor = torch.Tensor
        self._handlers: dict[Any, Callable] = {
            tensor.item: self._item, tensor.__float__: self._float, tensor.__format__: self._format, tensor.__bool__: self._bool,
            tensor.is_nonzero: self._bool, torch.is_nonzero: self._bool, torch.tensor: self._make, torch.as_tensor: self._make, torch.asarray: self._make,
            tensor.new_tensor: self._new, tensor.__setitem__: self._setitem, tensor.__deepcopy__: self._deepcopy,
            torch.equal: self._equal, torch.allclose: self._equal, tensor.equal: self._equal, tensor.allclose: self._equal}
        self._handlers.update({getattr(tensor, name): self._escape for name in _ESCAPES})

    def __enter__(self):
        self._math = {n: f for n, f in vars(math).items() if callable(f) and not n.startswith("_")}
        for name, function in self._math.items():
            setattr(math, name, _math_function(name, function))
        return super().__enter__()

    def __exit__(self, *exc):
        for name, function in self._math.items():
            setattr(math, name, function)
        return super().__exit__(*exc)

    def handle(self, func, args: tuple, kwargs: dict):
        handler = self._handlers.get(func)
        if handler is not None:
            return handler(func, args, kwargs)
        return self._with_pending(func, args, kwargs)

    def _with_pending(self, func, args: tuple, kwargs: dict):
        pending = _pending(args, kwargs)
        if not pending:
            return self.call(func, args, kwargs)
        before = list(self.sink.pending_scalars)
        self.sink.pending_scalars.extend(pending)
        try:
            return self.call(func, args, kwargs)
        finally:
            self.sink.pending_scalars[:] = before

    # -- out of tensors

    def _read(self, func, args, kwargs):
        """A call that reads one element: its result and the reference that the recorder gave it."""
        self.sink.last_item, self.sink.reading = None, True
        try:
            return self.call(func, args, kwargs), self.sink.last_item
        finally:
            self.sink.reading = False

    def _item(self, func, args, kwargs):
        value, ref = self._read(func, args, kwargs)
        return self._tell(value, ref) if type(value) is float and ref is not None else value

    def _tell(self, value: float, ref: ScalarRef) -> TrackedFloat:
        """The tracked float, of which whoever lists what is read is told."""
        tracked = TrackedFloat(value, ref, self.sink)
        if self.on_read is not None:
            self.on_read(tracked)
        return tracked

    def _float(self, func, args, kwargs):
        # Python makes an exact float of whatever __float__ returns, so the origin cannot be kept.
        value, ref = self._read(func, args, kwargs)
        if ref is not None:
            self._tell(value, ref)
        self.sink.escape("float", args[0] if ref is None else ref)
        return value

    def _format(self, func, args, kwargs):
        if self.on_read is None or type(args[0]) is not torch.Tensor or args[0].dim():
            return self._with_pending(func, args, kwargs)
        text, ref = self._read(func, args, kwargs)
        if ref is not None:
            self._tell(self.sink.value_of(ref), ref)
        return text

    def _bool(self, func, args, kwargs):
        outcome, ref = self._read(func, args, kwargs)
        if ref is None:
            self.sink.escape("bool", args[0])
            return outcome
        return self.sink.decision("bool", (ref,), outcome)

    def _escape(self, func, args, kwargs):
        self.sink.escape(func.__name__.strip("_"), args[0])
        return self._with_pending(func, args, kwargs)

    def _equal(self, func, args, kwargs):
        self.sink.escape(func.__name__, args[0])
        return self._with_pending(func, args, kwargs)

    # -- into tensors

    def _make(self, func, args, kwargs):
        """torch.tensor and its like copy numbers unseen by dispatch: build the tensor from parts that are seen."""
        return self._build(func, args, kwargs, args[0] if args else kwargs.get("data", kwargs.get("obj")))

    def _new(self, func, args, kwargs):
        return self._build(func, args, kwargs, args[1] if len(args) > 1 else kwargs.get("data"))

    def _build(self, func, args, kwargs, data):
        leaves = list(_leaves(data))
        inside = isinstance(data, (list, tuple)) and any(isinstance(x, torch.Tensor) for x in leaves)
        if not inside and not any(type(x) is TrackedFloat for x in leaves):
            return self.call(func, args, kwargs)
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            made = self.call(func, args, kwargs)      # for its dtype and size only
        if not made.dtype.is_floating_point:
            for x in _tracked(leaves):
                x.plain(func.__name__)
            return self.call(func, args, kwargs)
        parts = [self._part(x, made.dtype) for x in leaves]
        whole = torch.stack(parts).reshape(made.shape) if isinstance(data, (list, tuple)) else parts[0]
        return whole.detach().requires_grad_(made.requires_grad)

    def _part(self, x, dtype: torch.dtype) -> torch.Tensor:
        if isinstance(x, torch.Tensor):
            return x.detach().to(device="cpu", dtype=dtype).reshape(())
        return self._with_pending(torch.full, ((), x), {"dtype": dtype, "device": "cpu"})

    def _setitem(self, func, args, kwargs):
        target, index, value = args
        if type(value) is TrackedFloat:
            if target.dtype.is_floating_point:
                value = self._part(value, target.dtype)
            else:
                value = value.plain("setitem")
        return self._with_pending(func, (target, index, value), kwargs)

    def _deepcopy(self, func, args, kwargs):
        """torch copies the storage of a plain tensor behind the dispatcher's back; clone is seen."""
        source, memo = args
        if type(source) is not torch.Tensor or not source.is_leaf or id(source) in memo or source.layout != torch.strided:
            return self.call(func, args, kwargs)
        with torch.no_grad():
            copied = source.detach().clone().requires_grad_(source.requires_grad)
            if source.grad is not None:
                copied.grad = source.grad.detach().clone()
        copied.__dict__.update(source.__dict__)
        memo[id(source)] = copied
        return copied


def _pending(args: tuple, kwargs: dict) -> list[TrackedFloat]:
    """Tracked floats among the arguments. Lists are searched (foreach ops take lists of scalars), but not lists of tensors."""
    found = []
    for x in (*args, *kwargs.values()) if kwargs else args:
        if type(x) is TrackedFloat:
            found.append(x)
        elif type(x) in (list, tuple) and x and not isinstance(x[0], torch.Tensor):
            found.extend(_tracked(x))
    return found


def _leaves(data: Any) -> Iterator[Any]:
    if isinstance(data, (list, tuple)):
        for x in data:
            yield from _leaves(x)
    else:
        yield data
