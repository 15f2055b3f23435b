"""Full-size capture: floats have sizes and no memory, integers and masks are what they are (trusted: a float gets no value here, an integer no wrong one).

Every call whose result is a float runs on torch's meta device, whatever device the program asked for; calls on integers alone run for real. Data
that the program makes in Python (a list of numbers) keep their bytes. What random generators would fill is garbage, which equals nothing. A call
that needs the value of a float is refused with its line; a float that leaves for Python is a placeholder which only carries its origin.
"""
from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from trainverify.api import Reference
from trainverify.capture.digest import contents
from trainverify.capture.opinfo import OpInfo
from trainverify.capture.patches import Patches
from trainverify.diagnostics import Diagnostic, Fault

META = torch.device("meta")
CPU = torch.device("cpu")
KEY, VALUE = "floats", "meta"                  # in Trace.meta: the trace holds no value of a float
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
DECIDED = "Python asks for a value that floats decide, and a full-size capture has no floats"
_DATA_DEPENDENT = "it needs the values of floats, and a full-size capture has none"
SMALL = 1 << 17                                # elements of a float tensor that is computed for real too, where it comes from integers alone
_RANGES = ("arange", "range")                  # of which numbers say the size
_INDEXED = ("index", "index_put", "index_put_", "_unsafe_index")
_BY_VALUE = (*_INDEXED, "masked_select", "repeat_interleave", "resize_", "set_")     # what they give is not a matter of sizes alone
Kind = tuple[Any, ...]


class NeedsValues(Exception):
    """A call cannot be run without the values of floats."""


class MetaFloats:
    """Runs the calls of one rank. `items`: how many floats have left for Python."""

    def __init__(self) -> None:
        self._floats: dict[Kind, bool] = {}    # whether calls of this kind, on integers alone or on nothing, give floats
        self._factories: dict[Any, bool] = {}  # whether a call takes a device and no tensor: without the argument, it makes its result on the default device
        self._results: dict[Kind, _Result] = {}
        self._known: dict[int, torch.Tensor] = {}      # by storage: floats that come from integers and numbers alone
        self._decided: set[int] = set()        # storages of integers into which something was written that floats decide
        self.items = 0

    # ---- running a call
    def run(self, info: OpInfo, func: Callable, args: tuple, kwargs: dict, placeholders: bool = False) -> Any:
        """The call's result: floats, and all that is computed from them, on meta. placeholders: numbers among the arguments stand for floats that
        have no value."""
        tensors = _tensors(args, kwargs)
        if placeholders:
            return self._of_placeholders(info, func, args, kwargs)
        if info.reads_nothing:                 # zeros_like and its like: a tensor among the arguments gives sizes only
            return self._made(info, func, args, kwargs)
        if any(not self.has_memory(t) for t in tensors):
            return self._from_known(info, func, args, kwargs, tensors)
        if info.writes:                        # integers, or data that came from outside
            return func(*args, **kwargs)
        kind = (func, tuple([(t.dtype, t.dim()) for t in tensors]), tuple([type(a) for a in args]), kwargs.get("dtype"), torch.get_default_dtype())
        floats = self._floats.get(kind)
        if floats is None:
            floats = self._floats[kind] = self._gives_floats(func, args, kwargs)
        if floats:
            result = func(*[_shadow(a) for a in args], **self._elsewhere(func, kwargs, META))
            if not info.garbage and not info.random and _is_small(result):
                self._remember(result, func(*args, **self._elsewhere(func, kwargs, CPU)))
            return result
        return func(*args, **self._elsewhere(func, kwargs, CPU))

    def _of_placeholders(self, info: OpInfo, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Nothing that comes of such a number has a value."""
        if func._opname in _RANGES:
            raise NeedsValues("a number that floats decide says how many elements there are, and a full-size capture has no floats")
        self._forget_written(info, args, kwargs)
        return self._on_meta(info, func, args, {**kwargs, "device": META} if info.reads_nothing else kwargs)

    def _made(self, info: OpInfo, func: Callable, args: tuple, kwargs: dict) -> Any:
        result = func(*[_shadow(a) for a in args], **{**kwargs, "device": META})
        floats = _is_float(result)
        if floats and (info.garbage or info.random or not _is_small(result)):
            return result
        values = func(*args, **{**kwargs, "device": CPU})
        if floats:
            self._remember(result, values)
        return result if floats else values

    # ---- small floats that come from integers and numbers alone
    def value(self, t: torch.Tensor) -> torch.Tensor | None:
        """The values of a tensor on meta, where they are known."""
        data = self._known.get(t.untyped_storage()._cdata)
        return None if data is None or data.dtype != t.dtype else data.as_strided(t.shape, t.stride(), t.storage_offset())

    def forget(self, t: torch.Tensor | torch.UntypedStorage) -> None:
        """The memory is written or resized, or holds a symbol from now on."""
        self._known.pop((t.untyped_storage() if isinstance(t, torch.Tensor) else t)._cdata, None)

    def _remember(self, made: Any, values: Any) -> None:
        for t, v in zip(_tensors((made,), {}), _tensors((values,), {})):
            if t.is_meta and _is_float(t) and t.numel() * t.element_size() == t.untyped_storage().nbytes() and t.dtype == v.dtype:
                held = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=CPU).copy_(v)
                self._known[t.untyped_storage()._cdata] = held.as_strided((t.numel(),), (1,))

    def _from_known(self, info: OpInfo, func: Callable, args: tuple, kwargs: dict, tensors: list[torch.Tensor]) -> Any:
        """A call on meta; for real too, where the values of all its arguments are known."""
        if info.writes or info.hidden_writes:
            self._forget_written(info, args, kwargs)
            return self._on_meta(info, func, args, kwargs)
        if info.random or any(not self.has_memory(t) and self.value(t) is None for t in tensors) or any(t.numel() > SMALL for t in tensors):
            return self._on_meta(info, func, args, kwargs)
        values = func(*[self._valued(a) for a in args], **{k: self._valued(v) for k, v in self._elsewhere(func, kwargs, CPU).items()})
        if not any(_is_float(t) for t in _tensors((values,), {})):
            return values
        result = self._on_meta(info, func, args, kwargs)
        if _is_small(result):
            self._remember(result, values)
        return result

    def _forget_written(self, info: OpInfo, args: tuple, kwargs: dict) -> None:
        written = [args[p] if p < len(args) else kwargs.get(name) for p, name in info.writes] + [args[p] for p in info.hidden_writes]
        for t in _tensors(written, {}):
            self.forget(t)

    def _valued(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor):
            return self.value(a) if a.is_meta else a
        return [self._valued(x) for x in a] if type(a) in (list, tuple) and any(isinstance(x, torch.Tensor) for x in a) else a

    def _gives_floats(self, func: Callable, args: tuple, kwargs: dict) -> bool:
        try:
            result = func(*[_shadow(a) for a in args], **self._elsewhere(func, kwargs, META))
        except NotImplementedError:            # how many elements there are depends on the values of integers
            return False
        return any(_is_float(t) for t in _tensors((result,), {}))

    def _on_meta(self, info: OpInfo, func: Callable, args: tuple, kwargs: dict) -> Any:
        for position, name in info.writes:
            for t in _tensors((args[position] if position < len(args) else kwargs.get(name),), {}):
                if not t.is_meta:
                    self._decided.add(t.untyped_storage()._cdata)
        kind = _kind(func, args, kwargs)
        known = self._results.get(kind) if kind is not None else None
        if known is not None:
            return known.again(args)
        result = self._executed(func, args, kwargs)
        if kind is not None and (learnt := _Result.of(result, args, kwargs)) is not None:
            self._results[kind] = learnt
        return result

    def _executed(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        shadows = [_shadow(a) for a in self._indices(func, args)]
        moved = {k: _shadow(v) for k, v in self._elsewhere(func, kwargs, META).items()}
        try:
            result = func(*shadows, **moved)
        except NotImplementedError as e:
            raise NeedsValues(_DATA_DEPENDENT) from e
        return next((a for a, s in zip(args, shadows) if s is result), result)     # what is written in place is the argument itself

    def has_memory(self, t: torch.Tensor) -> bool:
        """Whether the tensor's elements are what its memory says: integers that floats have decided are not."""
        return not t.is_meta and t.untyped_storage()._cdata not in self._decided

    def _indices(self, func: Any, args: tuple) -> tuple:
        """Masks among the indices become the numbers that they stand for: how many these are decides a size."""
        if func._opname not in _INDEXED:
            return args
        found: list[torch.Tensor | None] = []
        for t in args[1]:
            if isinstance(t, torch.Tensor) and t.dtype == torch.bool:
                if not self.has_memory(t):
                    raise NeedsValues("a mask that floats decide says how many elements there are, and a full-size capture has no floats")
                found += t.nonzero().unbind(1)
            else:
                found.append(t)
        return (args[0], found, *args[2:])

    def _elsewhere(self, func: Any, kwargs: dict, device: torch.device) -> dict:
        """The keyword arguments with the device replaced."""
        makes = self._factories.get(func)
        if makes is None:
            arguments = func._schema.arguments
            makes = self._factories[func] = any(a.name == "device" for a in arguments) and not any("Tensor" in str(a.type) for a in arguments)
        if not makes and kwargs.get("device") is None:
            return kwargs
        return {**kwargs, "device": device, **({"pin_memory": False} if kwargs.get("pin_memory") else {})}

    # ---- what has values
    def placeholder(self) -> float:
        """A number for a float that left for Python: no other one is equal to it, so that it is known where it comes back."""
        self.items += 1
        return 1.0 + random.Random(self.items).random()

    def data(self, t: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """A float tensor that Python filled, on meta, and its bytes."""
        made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=META, requires_grad=t.requires_grad)
        if t.numel() <= SMALL:
            self._remember(made, t)
        return made, contents(t)


@dataclass(frozen=True, slots=True)
class _Result:
    """What a call on meta gives, for all calls with arguments of the same sizes: new memory of these (size, stride, dtype), or its first argument."""

    made: tuple[tuple, ...]
    form: type | None                          # list or tuple of tensors; None: one tensor
    first: bool = False

    @staticmethod
    def of(result: Any, args: tuple, kwargs: dict) -> _Result | None:
        if args and result is args[0]:
            return _Result((), None, True)
        parts = [result] if isinstance(result, torch.Tensor) else list(result) if type(result) in (list, tuple) else [None]
        before = {t.untyped_storage()._cdata for t in _tensors(args, kwargs)}
        for t in parts:
            if not isinstance(t, torch.Tensor) or not t.is_meta or t.storage_offset() or t.untyped_storage()._cdata in before or t.is_conj() or t.is_neg():
                return None
            before.add(t.untyped_storage()._cdata)
        return _Result(tuple([(t.shape, t.stride(), t.dtype) for t in parts]), None if isinstance(result, torch.Tensor) else type(result))

    def again(self, args: tuple) -> Any:
        if self.first:
            return args[0]
        made = [torch.empty_strided(size, stride, dtype=dtype, device=META) for size, stride, dtype in self.made]
        return made[0] if self.form is None else self.form(made)


def _kind(func: Any, args: tuple, kwargs: dict) -> Kind | None:
    """All that the sizes of a call's results depend on; None where that is not known."""
    if func._opname in _BY_VALUE:
        return None
    kind = (func, *map(_facts, args), *[(k, _facts(v)) for k, v in kwargs.items()])
    try:
        hash(kind)
    except TypeError:
        return None
    return kind


def _facts(a: Any) -> Any:
    if isinstance(a, torch.Tensor):
        return a.shape, a.stride(), a.dtype, a.is_meta
    if type(a) in (list, tuple):
        return tuple(map(_facts, a))
    return type(a), a


def _tensors(args, kwargs) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for a in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(a, torch.Tensor):
            found.append(a)
        elif isinstance(a, (list, tuple)):
            found += _tensors(a, {})
    return found


def _is_small(result: Any) -> bool:
    return all(t.numel() <= SMALL for t in _tensors((result,), {}))


def _is_float(t: torch.Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


def _shadow(a: Any) -> Any:
    """The argument on meta."""
    if isinstance(a, torch.Tensor):
        return a if a.is_meta else torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=META)
    if type(a) in (list, tuple) and any(isinstance(x, torch.Tensor) or x is None for x in a):
        return [_shadow(x) for x in a]
    return a


# ---- attention

@contextlib.contextmanager
def full_size() -> Iterator[None]:
    """What torch does otherwise for the time of a full-size capture."""
    patches = Patches()
    try:
        _attention(patches)
        _autocast(patches)
        _fsdp(patches)
        yield
    finally:
        patches.restore()


def _autocast(patches: Patches) -> None:
    """torch.autocast(x.device.type) is the CPU's, which leaves tensors on meta alone: casts between float types are the identity (an assumption)."""
    original = torch.autocast.__init__

    def init(context, device_type, *args, **kwargs):
        original(context, "cpu" if device_type == META.type else device_type, *args, **kwargs)

    patches.set(torch.autocast, "__init__", init)


def _fsdp(patches: Patches) -> None:
    """FSDP2 takes parameters on meta for ones that nobody has materialised yet: it refuses to run, and keeps the memory that they had before."""
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    original = FSDPParam.reset_sharded_param

    def reset_sharded_param(param):
        original(param)
        local = param.sharded_param._local_tensor
        if not local.is_meta or param._sharded_param_data.untyped_storage()._cdata == local.untyped_storage()._cdata:
            return
        dim, length = param.fsdp_placement.dim, local.size(param.fsdp_placement.dim) if local.numel() else 0
        if local.size() != param.padded_sharded_param_size:
            padded = local.new_zeros(param.padded_sharded_param_size)
            padded.narrow(dim, 0, length).copy_(local)
            local = padded
            param.sharded_param._local_tensor = local.narrow(dim, 0, length)
        param._sharded_param_data = local.view(-1)
        param._sharding_spec = param.sharded_param._spec

    patches.set(FSDPParam, "reset_sharded_param", reset_sharded_param)
    patches.set(FSDPParamGroup, "_validate_no_meta_params", lambda group: None)


def _attention(patches: Patches) -> None:
    """Attention on meta: one call where a CPU would make one, and one mask for all layers where it would make one for each."""
    original = F.scaled_dot_product_attention
    futures: dict[tuple[int, int], torch.Tensor] = {}

    def future(rows: int, columns: int) -> torch.Tensor:
        if (rows, columns) not in futures:
            futures[rows, columns] = torch.ones(rows, columns, dtype=torch.bool, device=CPU).triu(1)
        return futures[rows, columns]

    def scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        fits = all(type(t) is torch.Tensor and t.is_meta and t.dim() == 4 for t in (query, key, value)) and attn_mask is None and not dropout_p
        if not fits or (query.shape[1] != key.shape[1] and not enable_gqa) or query.shape[0] != key.shape[0]:
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        share = query.shape[1] // key.shape[1]
        if share > 1:
            key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
        if query.shape[-1] == value.shape[-1]:
            return _FLASH(query, key, value, 0.0, is_causal, scale=scale)[0]
        scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            scores = scores.masked_fill(future(query.shape[-2], key.shape[-2]), -math.inf)
        return scores.softmax(-1) @ value

    patches.everywhere({original: scaled_dot_product_attention})


# ---- what is said

COVERED = ("captured at full size, where floats have no values: digests of bytes, hidden writes (numpy, C++) and floats that come back from Python "
           "untracked are checked by the run at small sizes alone (`trainverify verify {}` without --full-size, in a case with small sizes)")
ESCAPED = "a float left for Python here; that it does not come back untracked is seen at small sizes only"


class SizesOnly(Reference):
    """What the parallel program is given: there are no bytes to write a checkpoint of."""

    def checkpoint(self) -> str:
        raise Fault(Diagnostic("META003", "ref.checkpoint() was called, and at full size there is none: floats have no bytes",
                               fix="Take the weights from ref.weights, by copies of their parts; or load nothing: parameters then hold the "
                                   "reference's of their names."))


def refusal(name: str, why: str, span: Any, rank: int) -> Diagnostic:
    return Diagnostic("META001", f"{name} cannot be captured at full size: {why}", span=span, ranks=(rank,),
                      fix="Verify the spec at small sizes, without --full-size, or keep what decides sizes and branches in integers.")


def branch(op: str, span: Any, rank: int) -> Diagnostic:
    place = f"{span.file}:{span.line}" if span is not None else "FILE:LINE"
    return Diagnostic("META002", f"a branch on a float ({op}), which has no value at full size", span=span, ranks=(rank,),
                      fix=f"Write it with tensors (torch.clamp, torch.where), or accept that it is not taken: --accept {place}")
