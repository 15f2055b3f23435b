"""What the recorder must know of an op before it runs it: how it is handled, what it writes, what it does not read (trusted).

Schemas say which arguments are written, except where they lie; those ops are listed here.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from trainverify.ops.access import SHAPE_ONLY, makes_garbage, unread

RECORD, VIEW, PASS, DECOMPOSE, COLLECTIVE, ITEM, RESIZE, ZERO, UNSUPPORTED = range(9)

_COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
_PASS_NAMESPACES = ("profiler", "prim", "debugprims", "mkldnn_prepacked", "inductor")
# They move no data: metadata, sizes, streams.
_PASS = frozenset({"aten.set_", "aten.set_data", "aten.record_stream", "aten.is_same_size", "aten.is_pinned", "aten._version", "aten.is_set_to",
                   "aten.is_contiguous", "aten.size", "aten.stride", "aten.numel", "aten.dim", "aten.storage_offset", "aten.sym_size",
                   "aten.sym_stride", "aten.sym_numel", "aten.sym_storage_offset", "aten.retain_grad", "aten.requires_grad_",
                   "aten._fw_primal", "aten._assert_async", "aten._assert_scalar", "c10d.check_for_nan"})
_VIEWS = frozenset({"aten._unsafe_view", "aten._reshape_alias", "aten.lift_fresh", "aten.lift"})
_RESIZES = frozenset({"aten.resize_", "aten.resize_as_", "aten._resize_output_"})
# Writes that schemas do not tell: op -> (positions, position of a flag that must be true).
_HIDDEN_WRITES = {"aten.native_batch_norm": ((3, 4), 5), "fsdp.all_gather_copy_in": ((1,), None)}
_NO_RANDOMNESS = ("scaled_dot_product", "flash_attention", "efficient_attention", "cudnn_attention")


@dataclass(frozen=True, slots=True)
class OpInfo:
    """name as in a trace. writes: (position, argument name) of the arguments that the schema says are written."""

    name: str
    route: int
    writes: tuple[tuple[int, str], ...] = ()
    unread: tuple[int, ...] = ()
    unread_keys: frozenset[str] = frozenset()
    reads_nothing: bool = False
    garbage: bool = False
    hidden_writes: tuple[int, ...] = ()
    hidden_if: int | None = None
    random: bool = False
    dropout: tuple[int, str] | None = None     # where the dropout probability of an attention op stands


def describe(func: Any) -> OpInfo:
    """The facts about one op overload."""
    if not isinstance(func, torch._ops.OpOverload):
        return OpInfo(str(func), UNSUPPORTED)
    base = f"{func.namespace}.{func._opname}"
    name = str(func)
    route = _route(func, base)
    if route != RECORD:
        return OpInfo(name, route)
    arguments = func._schema.arguments
    writes = tuple((i, a.name) for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)
    positions, flag = _HIDDEN_WRITES.get(base, ((), None))
    keys = frozenset(a.name for a in arguments if a.kwarg_only and a.alias_info is not None and a.alias_info.is_write)
    attention = any(part in base for part in _NO_RANDOMNESS)
    dropout = next(((i, a.name) for i, a in enumerate(arguments) if a.name == "dropout_p"), None)
    return OpInfo(name, route, writes, unread(name) or (), keys, func._opname in SHAPE_ONLY, makes_garbage(name), positions, flag,
                  torch.Tag.nondeterministic_seeded in func.tags, dropout if attention else None)


def _route(func: torch._ops.OpOverload, base: str) -> int:
    if func.namespace in _PASS_NAMESPACES or base in _PASS:
        return PASS
    if base in ("_c10d_functional._wrap_tensor_autograd",):
        return PASS
    if func.namespace in _COLLECTIVES:
        return COLLECTIVE
    if func.namespace in ("symm_mem", "_dtensor"):
        return UNSUPPORTED
    if base == "aten._local_scalar_dense":
        return ITEM
    if base in _RESIZES:
        return RESIZE
    if base == "aten._efficientzerotensor":
        return ZERO
    if base in _VIEWS:
        return VIEW
    if func.namespace == "aten" and func._can_decompose():
        return DECOMPOSE                       # some that look like views copy: contiguous, reshape, to
    return VIEW if _is_view(func) else RECORD


def _is_view(func: torch._ops.OpOverload) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
