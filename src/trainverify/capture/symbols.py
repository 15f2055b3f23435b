"""The reference's tensors made into symbols, and what the parallel program is handed of them (trusted: bytes and names must agree)."""
from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from trainverify.api import is_fixed
from trainverify.capture.digest import contents
from trainverify.capture.encode import dtype_name
from trainverify.capture.model import is_real_float, named_buffers, named_parameters, place, whole_tensor
from trainverify.capture.quiet import unseen
from trainverify.capture.recorder import Recorder
from trainverify.capture.meta import META, refusal
from trainverify.capture.tags import NARROW, Tagger
from trainverify.diagnostics import Diagnostic, Fault
from trainverify.ir.trace import TensorRef

_SECOND_MOMENTS = ("sq", "square", "sum", "var")   # in the names of state that is never negative
_FILLS = ("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "zero_", "fill_")


class HandedTensor(msgspec.Struct, frozen=True):
    """A tensor for the parallel program; kind and symbol are empty where its elements are no symbols. valueless: it has sizes only (at full size)."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes
    kind: str = ""
    symbol: str = ""
    valueless: bool = False

    def build(self) -> torch.Tensor:
        if self.valueless:
            return torch.empty(self.shape, dtype=getattr(torch, self.dtype), device=META)
        tensor = torch.empty(self.shape, dtype=getattr(torch, self.dtype))
        if self.data:
            tensor.reshape(-1).view(torch.uint8).copy_(torch.frombuffer(bytearray(self.data), dtype=torch.uint8))
        return tensor


class Handed(msgspec.Struct, frozen=True):
    """The reference's weights and batch as plain data. `leaves` of the batch: index of a tensor, or [value]."""

    tensors: list[HandedTensor] = []
    weights: dict[str, int] = {}
    batch: str = ""
    leaves: list[int | list[Any]] = []

    def build(self) -> tuple[list[torch.Tensor], dict[str, torch.Tensor], Any]:
        """All tensors; the state dict; the batch."""
        tensors = [t.build() for t in self.tensors]
        weights = {name: tensors[i] for name, i in self.weights.items()}
        if not self.batch:
            return tensors, weights, None
        leaves = [tensors[x] if isinstance(x, int) else x[0] for x in self.leaves]
        return tensors, weights, pytree.tree_unflatten(leaves, pytree.treespec_loads(self.batch))


class Defined(msgspec.Struct, frozen=True):
    """A symbol that was defined, and its memory; key: of a state."""

    kind: str
    name: str
    key: str
    ref: TensorRef


class Symbols:
    """Defines symbols in the reference, and keeps which memory holds which."""

    def __init__(self, recorder: Recorder, tagger: Tagger):
        self.recorder, self.tagger = recorder, tagger
        self.defined: list[Defined] = []
        self.names: dict[tuple, tuple[str, str]] = {}      # place -> (kind, name)
        self._taken: set[str] = set()

    def define_model(self, chunks: list[torch.nn.Module]) -> None:
        for name, parameter in named_parameters(chunks):
            self.define("weight", name, parameter)
        for name, buffer in named_buffers(chunks):
            self.define("buffer", name, buffer)

    def define_batch(self, batch: Any) -> None:
        for path, leaf in pytree.tree_leaves_with_path(batch):
            if isinstance(leaf, torch.Tensor) and not is_fixed(leaf):
                name = "batch" + pytree.keystr(path)
                if leaf.dtype.is_floating_point and _is_mask(leaf):
                    continue
                self.define("batch", name, leaf)

    def define_state(self, optimizer: torch.optim.Optimizer, names: dict[int, str]) -> None:
        """State that exists before the first step; numbers like `step`, and what a constructor fills in, stay what they are."""
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.dim() > 0 and not self._is_filled(value):
                    self.define("state", f"{names[id(parameter)]}::{key}", value, key)

    def _is_filled(self, state: torch.Tensor) -> bool:
        """Whether all elements are equal: training leaves none like that; Adagrad's constructor does, on both sides."""
        with unseen():
            if not state.is_meta:
                return bool((state == state.flatten()[:1]).all())
            ref = self.recorder.encoder.read(state)
        last = next((c for c in reversed(self.recorder.ops) if any(t.storage == ref.storage for t in c.targets())), None)
        return last is not None and last.name.split(".")[1] in _FILLS and ref in last.targets()

    def define(self, kind: str, name: str, tensor: torch.Tensor, key: str = "") -> None:
        """Overwrite a tensor with tags and record that its elements are symbols; tensors seen before and empty ones are left alone."""
        with unseen():
            tensor = whole_tensor(tensor)
            sharded = isinstance(tensor, DTensor)      # which cannot even be detached here
            plain = tensor if sharded else torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
            if sharded or type(plain) not in (torch.Tensor, torch.nn.Parameter) or plain.layout is not torch.strided:
                raise Fault(Diagnostic("SPEC010", f"{kind} {name} of the reference is a {type(tensor).__name__}, not a plain tensor",
                                       fix="The reference is the single-device program: build it without sharding or compression."))
            if not is_real_float(plain) or not plain.numel() or place(plain) in self.names:
                return
            self._must_be_apart(kind, name, plain)
            if plain.is_meta:
                return self._define_valueless(kind, name, plain, key)
            initial = contents(plain.to(torch.float32)).view(np.float32)
            tags = self.tagger.tag(initial, dtype_name(plain.dtype), _positive(kind, key or name, initial))
            plain.copy_(torch.from_numpy(tags.values).reshape(plain.shape))
            self.names[place(plain)] = (kind, name)
            self.recorder.blobs[f"symbol.{name}"] = contents(plain)
        if not tags.distinct:
            what = "a 16 bit float has too few values for its elements" if dtype_name(plain.dtype) in NARROW else "its elements are too many"
            self.recorder.note("CAP002", f"{kind} {name} cannot be found by its values ({what}); take it from ref.weights or ref.batch")
        call = self.recorder.emit("tv.symbol", kind, name, plain, writes=(plain,))
        self.defined.append(Defined(kind, name, key, call.args[2]))

    def _define_valueless(self, kind: str, name: str, plain: torch.Tensor, key: str) -> None:
        """At full size: the elements are symbols, and nobody needs to know them by their values."""
        self.names[place(plain)] = (kind, name)
        self.recorder.floats.forget(plain)
        call = self.recorder.emit("tv.symbol", kind, name, plain, writes=(plain,))
        self.defined.append(Defined(kind, name, key, call.args[2]))

    def _must_be_apart(self, kind: str, name: str, tensor: torch.Tensor) -> None:
        """Symbols are independent of each other, so their memory must be."""
        mine = None
        for (storage, offset, shape, stride), (_, other) in self.names.items():
            if storage == tensor.untyped_storage()._cdata:
                mine = _elements(tensor.storage_offset(), tensor.shape, tensor.stride()) if mine is None and not tensor.is_meta else mine
                if tensor.is_meta or np.intersect1d(mine, _elements(offset, shape, stride)).size:
                    raise Fault(Diagnostic("SPEC010", f"{kind} {name} and {other} share memory in part",
                                           fix="Clone one of them: the verdict is for all values of each, independently."))
        if name in self._taken:
            raise Fault(Diagnostic("SPEC010", f"two tensors of the reference are called {name}"))
        if tensor.is_meta and (tensor.numel() * tensor.element_size() != tensor.untyped_storage().nbytes() or not tensor.is_contiguous()):
            raise Fault(Diagnostic("SPEC010", f"{kind} {name} is a part of other memory, or not contiguous", fix="Clone it: at full size, each symbol has memory of its own."))
        if not tensor.is_meta and tensor.numel() != np.unique(_elements(tensor.storage_offset(), tensor.shape, tensor.stride())).size:
            raise Fault(Diagnostic("SPEC010", f"{kind} {name} is expanded: several of its elements are one memory location", fix="Clone it."))
        self._taken.add(name)

    # ---- what the parallel side gets
    def hand_over(self, chunks: list[torch.nn.Module], batch: Any) -> Handed:
        tensors: list[HandedTensor] = []
        index: dict[tuple, int] = {}

        def add(t: torch.Tensor) -> int:
            plain = whole_tensor(t).detach()
            key = place(plain)
            if key not in index:
                kind, symbol = self.names.get(place(torch.view_as_real(plain)) if plain.is_complex() else key, ("", ""))
                index[key] = len(tensors)
                valueless = plain.is_meta and bool(symbol or not plain.numel())
                data = b"" if valueless else contents(self._valued(plain)).tobytes()
                tensors.append(HandedTensor(dtype_name(plain.dtype), tuple(plain.shape), data, kind, symbol, valueless))
            return index[key]

        states = [chunk.state_dict(keep_vars=True) for chunk in chunks]      # hooks of the program may compute in it
        with unseen():
            weights = {}
            for i, state in enumerate(states):
                for name, value in state.items():
                    if isinstance(value, torch.Tensor):
                        weights[f"chunk{i}.{name}" if name in weights else name] = add(value)
            spec, leaves = self._batch(batch, add) if batch is not None else ("", [])
        return Handed(tensors, weights, spec, leaves)

    def _valued(self, plain: torch.Tensor) -> torch.Tensor:
        """At full size: what is no symbol must have values (a small table that comes from integers)."""
        known = self.recorder.floats.value(plain) if plain.is_meta else plain
        if known is None:
            raise Fault(refusal(f"a float tensor of sizes {list(plain.shape)} that is handed over and no symbol", "it has no values", None, self.recorder.rank))
        return known

    @staticmethod
    def _batch(batch: Any, add) -> tuple[str, list]:
        found, structure = pytree.tree_flatten(batch)
        leaves: list = []
        for leaf in found:
            if isinstance(leaf, torch.Tensor):
                leaves.append(add(leaf))
            elif leaf is None or isinstance(leaf, (bool, int, float, str)):
                leaves.append([leaf])
            else:
                raise Fault(Diagnostic("SPEC009", f"Training.batch holds a {type(leaf).__name__}", fix="Use dicts, lists, tuples, tensors, numbers and strings."))
        try:
            return pytree.treespec_dumps(structure), leaves
        except (NotImplementedError, TypeError, ValueError) as e:   # what torch raises for a container class that it cannot write down
            raise Fault(Diagnostic("SPEC009", f"Training.batch has a container that cannot be handed over: {e}", fix="Use dicts, lists and tuples.")) from e


def announce_batch(recorder: Recorder, batch: Any) -> None:
    """Say which memory holds which tensor of the batch, so that every sample can be followed to where it is read."""
    for path, leaf in pytree.tree_leaves_with_path(batch):
        if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided:
            recorder.emit("tv.data", "batch" + pytree.keystr(path), leaf.detach())


def _is_mask(tensor: torch.Tensor) -> bool:
    if tensor.is_meta:
        return False
    with unseen():
        return bool(((tensor == 0) | (tensor == 1)).all())


def _positive(kind: str, name: str, initial: np.ndarray) -> bool:
    """Whether the values are of a kind that is never negative: second moments, variances."""
    if kind not in ("state", "buffer") or initial.min() < 0:
        return False
    return bool(initial.any()) or any(part in name for part in _SECOND_MOMENTS)


def _elements(offset: int, shape, stride) -> np.ndarray:
    """Storage positions of a tensor's elements."""
    at = np.zeros((), dtype=np.int64) + offset
    for n, s in zip(shape, stride):
        at = at[..., None] + np.arange(n, dtype=np.int64) * s
    return at.reshape(-1)
