"""Communication ops as plans: the arguments of c10d and functional ops read into one normal form (trusted).

A plan's kinds and conventions are those of `ir.trace.Collective`. Parsing runs nothing, except that the results of functional
ops are allocated.
"""
from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroup, ReduceOp

Tensors = list[torch.Tensor]

REDUCE_OPS = {int(v): k.lower() for k, v in ReduceOp.RedOpType.__members__.items()}


class PlanError(ValueError):
    """The call cannot be carried out; the text says why."""


@dataclass(slots=True)
class Plan:
    """One communication call. group: global ranks in group order; root and peer are global ranks. pending: completed at its wait."""

    kind: str
    group: tuple[int, ...]
    group_name: str
    inputs: Tensors = field(default_factory=list)
    outputs: Tensors = field(default_factory=list)
    reduce_op: str | None = None
    factor: float | None = None
    root: int | None = None
    peer: int | None = None
    tag: int = 0
    in_splits: tuple[int, ...] = ()
    out_splits: tuple[int, ...] = ()
    listed: bool = False
    pending: bool = True
    result: Any = None                         # what the op returns besides a Work: tensors given to it, or those that it made
    functional: bool = False                   # the outputs were made by this call, or written in place by a functional op


@dataclass(slots=True)
class Call:
    """A dispatched op: arguments by name, and its group."""

    op: str
    args: dict[str, Any]
    group: tuple[int, ...]
    group_name: str

    def plan(self, kind: str, inputs: Tensors = (), outputs: Tensors = (), **more: Any) -> Plan:
        return Plan(kind, self.group, self.group_name, list(inputs), list(outputs), **more)

    @property
    def n(self) -> int:
        return len(self.group)

    def rank(self, in_group: int) -> int:
        if not 0 <= in_group < self.n:
            raise PlanError(f"{self.op} names member {in_group} of a group of {self.n}")
        return self.group[in_group]

    def reduction(self) -> dict[str, Any]:
        op, factor = reduce_op(self.args["reduce_op"])
        return {"reduce_op": op, "factor": factor}


def plan_of(func: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Plan:
    """The plan of a dispatched communication op."""
    names, defaults = _arguments(func)
    named = {**defaults, **dict(zip(names, args)), **kwargs}
    handler = _HANDLERS.get(func._opname)
    if handler is None:
        raise PlanError(f"{func} is not supported")
    group = group_of(named)
    call = Call(func._opname, named, tuple(dist.get_process_group_ranks(group)), group.group_name)
    plan = handler(call)
    if func.namespace == "c10d":
        plan.pending = bool(named.get("async_op", True))
        plan.result = args[0] if len(func._schema.returns) == 2 else None
    else:
        plan.functional = True
    return plan


@functools.cache
def _arguments(func: torch._ops.OpOverload) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The names of an op's arguments, and the defaults of those that have one (schemas are slow to ask)."""
    arguments = func._schema.arguments
    return tuple(a.name for a in arguments), {a.name: a.default_value for a in arguments if a.has_default_value()}


def group_of(named: dict[str, Any]) -> ProcessGroup:
    value = named.get("process_group", named.get("group_name"))
    if isinstance(value, str):
        return dist.distributed_c10d._resolve_process_group(value)
    return value if isinstance(value, ProcessGroup) else ProcessGroup.unbox(value)


def reduce_op(value: Any) -> tuple[str, float | None]:
    """Name and factor of a reduce op, given as a string (functional ops) or a boxed ReduceOp."""
    if isinstance(value, str):
        name = value.lower()
        return {"prod": "product"}.get(name, name), None
    name = REDUCE_OPS[value.op()]
    return name, _factor() if name == "premul_sum" else None


def _factor() -> float:
    """A boxed ReduceOp does not show its factor; the Python function that was called with it has it among its locals."""
    frame = sys._getframe(1)
    while frame is not None:
        for value in list(frame.f_locals.values()):
            op = getattr(value, "reduceOp", None) if type(value).__name__.endswith("Options") else value
            if isinstance(op, ReduceOp) and op.op == ReduceOp.RedOpType.PREMUL_SUM:
                factor = op.factor
                return float(factor.item() if isinstance(factor, torch.Tensor) else factor)
        frame = frame.f_back
    raise PlanError("the factor of a PREMUL_SUM cannot be found")


# ---- c10d

def _all_reduce(call: Call) -> Plan:
    tensors = call.args["tensors"]
    if call.args.get("sparse_indices") is not None:
        raise PlanError("all_reduce of sparse tensors is not supported")
    return call.plan("all_reduce", tensors, tensors, **call.reduction())


def _broadcast(call: Call) -> Plan:
    tensors, root = call.args["tensors"], call.rank(call.args["root_rank"])
    return call.plan("broadcast", tensors if root == dist.get_rank() else (), tensors, root=root)


def _reduce(call: Call) -> Plan:
    tensors, root = call.args["tensors"], call.rank(call.args["root_rank"])
    return call.plan("reduce", tensors, tensors if root == dist.get_rank() else (), root=root, **call.reduction())


def _all_gather_base(call: Call) -> Plan:
    return _gathered(call, [call.args["input_tensor"]], [call.args["output_tensor"]])


def _all_gather_coalesced(call: Call) -> Plan:
    return _gathered(call, call.args["inputs"], call.args["outputs"])


def _gathered(call: Call, inputs: Tensors, outputs: Tensors) -> Plan:
    for i, o in zip(inputs, outputs, strict=True):
        if o.numel() != i.numel() * call.n:
            raise PlanError(f"all_gather of {list(i.shape)} over {call.n} ranks into {list(o.shape)}: the numbers of elements do not fit")
    return call.plan("all_gather", inputs, outputs)


def _all_gather_lists(call: Call) -> Plan:
    outputs = call.args["output_tensors"] if "output_tensors" in call.args else call.args["output_lists"]
    inputs = call.args["input_tensors"] if "input_tensors" in call.args else call.args["input_list"]
    _lengths(call, outputs, "output")
    return call.plan("all_gather", inputs, [o for part in outputs for o in part], listed=True)


def _reduce_scatter_base(call: Call) -> Plan:
    return _scattered(call, [call.args["input_tensor"]], [call.args["output_tensor"]])


def _reduce_scatter_coalesced(call: Call) -> Plan:
    return _scattered(call, call.args["inputs"], call.args["outputs"])


def _scattered(call: Call, inputs: Tensors, outputs: Tensors) -> Plan:
    for i, o in zip(inputs, outputs, strict=True):
        if i.numel() != o.numel() * call.n:
            raise PlanError(f"reduce_scatter of {list(i.shape)} over {call.n} ranks into {list(o.shape)}: the numbers of elements do not fit")
    return call.plan("reduce_scatter", inputs, outputs, **call.reduction())


def _reduce_scatter_lists(call: Call) -> Plan:
    inputs = call.args["input_tensors"]
    _lengths(call, inputs, "input")
    return call.plan("reduce_scatter", [t for part in inputs for t in part], call.args["output_tensors"], listed=True, **call.reduction())


def _all_to_all_base(call: Call) -> Plan:
    given, made = call.args["input"], call.args["output"]
    ins = _splits(call, call.args["input_split_sizes"], given, "input")
    outs = _splits(call, call.args["output_split_sizes"], made, "output")
    return call.plan("all_to_all", [given], [made], in_splits=ins, out_splits=outs)


def _all_to_all_lists(call: Call) -> Plan:
    inputs, outputs = call.args["input_tensors"], call.args["output_tensors"]
    _lengths(call, [inputs], "input")
    _lengths(call, [outputs], "output")
    return call.plan("all_to_all", inputs, outputs, listed=True)


def _gather(call: Call) -> Plan:
    root, outputs = call.rank(call.args["root_rank"]), call.args["output_tensors"]
    made = [o for part in outputs for o in part] if root == dist.get_rank() else []
    if made:
        _lengths(call, outputs, "output")
    return call.plan("gather", call.args["input_tensors"], made, root=root, listed=True)


def _scatter(call: Call) -> Plan:
    root, inputs = call.rank(call.args["root_rank"]), call.args["input_tensors"]
    given = [t for part in inputs for t in part] if root == dist.get_rank() else []
    if given:
        _lengths(call, inputs, "input")
    return call.plan("scatter", given, call.args["output_tensors"], root=root, listed=True)


def _send(call: Call) -> Plan:
    return call.plan("send", call.args["tensors"], peer=call.rank(call.args["dst"]), tag=call.args["tag"])


def _recv(call: Call) -> Plan:
    return call.plan("recv", outputs=call.args["tensors"], peer=call.rank(call.args["src"]), tag=call.args["tag"])


def _recv_any(call: Call) -> Plan:
    raise PlanError("recv without a source takes whatever comes first, which depends on timing; name the source rank")


def _barrier(call: Call) -> Plan:
    return call.plan("barrier")


def _lengths(call: Call, lists: Sequence[Sequence[torch.Tensor]], what: str) -> None:
    for part in lists:
        if len(part) != call.n:
            raise PlanError(f"{call.op} over {call.n} ranks has {len(part)} {what} tensors")


def _splits(call: Call, sizes: Sequence[int], tensor: torch.Tensor, what: str) -> tuple[int, ...]:
    rows = tensor.shape[0] if tensor.dim() else 0
    if not sizes:
        if rows % call.n:
            raise PlanError(f"all_to_all over {call.n} ranks without split sizes: the {what}'s {rows} rows are no multiple")
        return (rows // call.n,) * call.n
    if len(sizes) != call.n or sum(sizes) != rows:
        raise PlanError(f"all_to_all over {call.n} ranks: the {what} split sizes {list(sizes)} do not fit {rows} rows")
    return tuple(int(s) for s in sizes)


# ---- functional

def _made(like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return torch.zeros(tuple(shape), dtype=like.dtype, device=like.device)


def _rows(tensor: torch.Tensor, factor_up: int = 1, factor_down: int = 1) -> tuple[int, ...]:
    first = tensor.shape[0] if tensor.dim() else 1
    if first % factor_down:
        raise PlanError(f"reduce_scatter over {factor_down} ranks: {first} rows are no multiple")
    return (first * factor_up // factor_down, *tensor.shape[1:])


def _f_all_reduce(call: Call) -> Plan:
    given = _list(call.args, "input", "inputs")
    made = given if call.op.endswith("_") else [_made(t, t.shape) for t in given]
    return _functional(call, "all_reduce", given, made, **call.reduction())


def _f_broadcast(call: Call) -> Plan:
    given, root = call.args["input"], call.rank(call.args["src"])
    made = given if call.op.endswith("_") else _made(given, given.shape)
    return _functional(call, "broadcast", [given] if root == dist.get_rank() else [], [made], root=root)


def _f_all_gather(call: Call) -> Plan:
    given = _list(call.args, "input", "inputs")
    made = [call.args["out"]] if "out" in call.args else [_made(t, _rows(t, factor_up=call.n)) for t in given]
    return _functional(call, "all_gather", given, made)


def _f_reduce_scatter(call: Call) -> Plan:
    given = _list(call.args, "input", "inputs")
    made = [call.args["out"]] if "out" in call.args else [_made(t, _rows(t, factor_down=call.n)) for t in given]
    return _functional(call, "reduce_scatter", given, made, **call.reduction())


def _f_all_to_all(call: Call) -> Plan:
    given = call.args["input"]
    ins = _splits(call, call.args["input_split_sizes"], given, "input")
    outs = tuple(int(s) for s in call.args["output_split_sizes"]) or ins
    made = _made(given, (sum(outs), *given.shape[1:]))
    return _functional(call, "all_to_all", [given], [made], in_splits=ins, out_splits=_splits(call, outs, made, "output"))


def _functional(call: Call, kind: str, given: Tensors, made: Tensors, **more: Any) -> Plan:
    listed = call.op.rstrip("_").endswith("coalesced")
    return call.plan(kind, given, made, result=list(made) if listed else made[0], **more)


def _list(args: dict[str, Any], one: str, many: str) -> Tensors:
    return [args[one]] if one in args else list(args[many])


_HANDLERS: dict[str, Callable[[Call], Plan]] = {
    "allreduce_": _all_reduce, "allreduce_coalesced_": _all_reduce, "broadcast_": _broadcast, "reduce_": _reduce,
    "_allgather_base_": _all_gather_base, "allgather_into_tensor_coalesced_": _all_gather_coalesced,
    "allgather_": _all_gather_lists, "allgather_coalesced_": _all_gather_lists,
    "_reduce_scatter_base_": _reduce_scatter_base, "reduce_scatter_tensor_coalesced_": _reduce_scatter_coalesced,
    "reduce_scatter_": _reduce_scatter_lists, "alltoall_base_": _all_to_all_base, "alltoall_": _all_to_all_lists,
    "gather_": _gather, "scatter_": _scatter, "send": _send, "recv_": _recv, "recv_any_source_": _recv_any,
    "barrier": _barrier, "monitored_barrier_": _barrier,
    "all_reduce": _f_all_reduce, "all_reduce_": _f_all_reduce, "all_reduce_coalesced": _f_all_reduce, "all_reduce_coalesced_": _f_all_reduce,
    "broadcast": _f_broadcast, "all_gather_into_tensor": _f_all_gather, "all_gather_into_tensor_out": _f_all_gather,
    "all_gather_into_tensor_coalesced": _f_all_gather, "reduce_scatter_tensor": _f_reduce_scatter,
    "reduce_scatter_tensor_out": _f_reduce_scatter, "reduce_scatter_tensor_coalesced": _f_reduce_scatter,
    "all_to_all_single": _f_all_to_all}


def sizes(plan: Plan) -> tuple[tuple[int, ...], ...]:
    """Shapes whose element counts must be the same on all members (empty where they differ by design)."""
    if plan.kind in ("all_to_all", "barrier") or (plan.kind == "all_gather" and plan.listed):
        return ()
    tensors = plan.outputs if plan.kind in ("broadcast", "scatter", "recv") else plan.inputs
    return tuple(tuple(t.shape) for t in tensors)


def dtypes(plan: Plan) -> tuple[torch.dtype, ...]:
    """dtypes that must be the same on all members."""
    tensors = plan.outputs if plan.kind in ("broadcast", "scatter", "recv") else plan.inputs
    return tuple(dict.fromkeys(t.dtype for t in tensors)) if plan.listed else tuple(t.dtype for t in tensors)


def pairwise(plan: Plan) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Elements that go to each member, and those expected from each (empty where all are alike)."""
    n = len(plan.group)
    if plan.kind == "all_to_all" and plan.listed:
        return tuple(t.numel() for t in plan.inputs), tuple(t.numel() for t in plan.outputs)
    if plan.kind == "all_to_all":
        given, made = (math.prod(t[0].shape[1:]) for t in (plan.inputs, plan.outputs))
        return tuple(s * given for s in plan.in_splits), tuple(s * made for s in plan.out_splits)
    if plan.kind == "all_gather" and plan.listed:
        own = sum(t.numel() for t in plan.inputs)
        return (own,) * n, tuple(sum(t.numel() for t in plan.outputs[j::n]) for j in range(n))
    return (), ()
