"""What a spec file uses: `Training`, `local`, `fixed`, `op`, `routing`, and the `Reference` that `parallel` is given (no torch at import; not trusted)."""
from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FIXED = "_trainverify_fixed"
ROUTING = "TRAINVERIFY_ROUTING"               # in the environment of every run


@dataclass(frozen=True, eq=False)
class Training:
    """A training program: `step()` runs forward, backward, clipping and optimizer, and returns a dict of its reported scalars or None.

    model: a Module, or a list of chunks (pipeline stages of one rank). batch: any nesting of dicts, lists and tensors (reference
    only). save(dir) writes a checkpoint (reference only; default: the state dict as safetensors). finish() is called once after
    the steps, for what is deferred to a next forward; with it, a step's parameters are compared as the next step's optimizer meets them.
    """

    model: Any
    step: Callable[[], Mapping[str, Any] | None]
    batch: Any = None
    save: Callable[[str], Any] | None = None
    finish: Callable[[], Any] | None = None


@dataclass(frozen=True, eq=False)
class Local:
    """A scalar that is this rank's share; the value to compare is the mean or sum over `group` (None: all ranks that report it)."""

    value: Any
    reduce: str = "mean"
    group: Any = None


def local(x: Any, reduce: str = "mean", group: Any = None) -> Local:
    """Declare a reported scalar as this rank's share of a "mean" or "sum" over a process group, a 1-d DeviceMesh, or all who report it."""
    if reduce not in ("mean", "sum"):
        raise ValueError(f'tv.local: reduce is "mean" or "sum", not {reduce!r}')
    return Local(x, reduce, group)


def fixed(x: Any) -> Any:
    """Keep a float tensor of the batch as the data that it is, instead of making its elements symbols. Returns x."""
    setattr(x, FIXED, True)
    return x


def is_fixed(x: Any) -> bool:
    return bool(getattr(x, FIXED, False))


def routing() -> int:
    """Which of the runs of `--routings N` this is (0 to N - 1; 0 without it): a seed for token ids and other integers of the batch."""
    return int(os.environ.get(ROUTING, "0"))


@dataclass(frozen=True, eq=False)
class CustomOp:
    """What a spec's OPS says of one operation; made by `op`."""

    name: str
    meaning: Callable | None = None
    pointwise: bool = False


def op(name: str, meaning: Callable | None = None, *, uninterpreted: bool = False, pointwise: bool = False) -> CustomOp:
    """For OPS: what the custom operation `name` ("mylib::fused_swiglu") computes.

    meaning: a function of the op's arguments, written in PyTorch. Or uninterpreted=True: an unknown function, of which every
    result depends on all inputs (pointwise=True: on the elements at its own place).
    """
    if callable(meaning) == uninterpreted:
        raise ValueError(f"tv.op({name!r}): give either a function as meaning or uninterpreted=True")
    if pointwise and not uninterpreted:
        raise ValueError(f"tv.op({name!r}): pointwise is for uninterpreted ops; a function says that itself")
    if not isinstance(name, str) or len(name.replace("::", ".").split(".")) < 2:
        raise ValueError(f'tv.op({name!r}): the name is "namespace::op"')
    return CustomOp(name, meaning, pointwise)


@dataclass(frozen=True, eq=False)
class Reference:
    """What the parallel program may take from the reference: its weights, its batch and a checkpoint, as before step 1.

    `weights` is the state dict as full plain tensors (tied entries are one tensor); `batch` is the reference's.
    """

    weights: dict[str, Any]
    batch: Any
    _checkpoint: Path = field(repr=False, default=Path())

    def checkpoint(self) -> str:
        """The folder that the reference's own `save` wrote (default: model.safetensors with the state dict)."""
        return str(self._checkpoint.absolute())
