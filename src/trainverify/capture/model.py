"""The user's model as named tensors: chunks, parameters, buffers, tied entries, local tensors (not trusted: names serve for messages)."""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from trainverify.diagnostics import Diagnostic, Fault

Named = tuple[str, torch.Tensor]


def chunks_of(model: Any, where: str) -> list[torch.nn.Module]:
    """The modules of Training.model."""
    if isinstance(model, torch.nn.Module):
        return [model]
    chunks = list(model) if isinstance(model, (list, tuple)) else []
    if not chunks or not all(isinstance(c, torch.nn.Module) for c in chunks):
        raise Fault(Diagnostic("SPEC008", f"{where} returned a Training whose model is a {type(model).__name__}",
                               fix="Give a torch.nn.Module, or a list of them (pipeline stages of one rank)."))
    return chunks


def named_parameters(chunks: list[torch.nn.Module]) -> list[Named]:
    """All parameters, tied ones once; names as in their chunk, made unique where chunks share them."""
    return _unique([list(c.named_parameters()) for c in chunks])


def named_buffers(chunks: list[torch.nn.Module]) -> list[Named]:
    """The buffers that belong to the state dict."""
    return _unique([list(_persistent(c)) for c in chunks])


def _persistent(chunk: torch.nn.Module) -> Iterator[Named]:
    seen = set()
    for prefix, module in chunk.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                yield (f"{prefix}.{name}" if prefix else name), buffer


def _unique(parts: list[list[Named]]) -> list[Named]:
    names = [name for part in parts for name, _ in part]
    shared = {n for n in names if names.count(n) > 1} if len(parts) > 1 else set()
    seen, found = set(), []
    for i, part in enumerate(parts):
        for name, tensor in part:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found.append((f"chunk{i}.{name}" if name in shared else name, tensor))
    return found


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor: a DTensor's shard, else the tensor itself. Call it with modes off."""
    if isinstance(tensor, DTensor):
        tensor = tensor._local_tensor
    elem = getattr(tensor, "elem", None)       # AsyncCollectiveTensor
    return elem if isinstance(elem, torch.Tensor) else tensor


def kept_share(tensor: torch.Tensor) -> torch.Tensor | None:
    """What a rank keeps of a parameter that is whole only while it is used and an empty tensor otherwise (DeepSpeed's ZeRO-3); None: it is no such."""
    share = getattr(tensor, "ds_tensor", None)
    return share if isinstance(share, torch.Tensor) and not getattr(tensor, "ds_persist", False) else None


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The plain tensor that a DTensor over one device is (fully_shard in a world of one rank makes such); anything else as it is."""
    local = local_tensor(tensor)
    return local if isinstance(tensor, DTensor) and local.shape == tensor.shape and tensor.device_mesh.size() == 1 else tensor


def is_real_float(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def place(tensor: torch.Tensor) -> tuple:
    """Equal for tensors that are the same memory."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def optimizer_names(optimizers: Iterable[torch.optim.Optimizer], chunks: list[torch.nn.Module]) -> dict[int, str]:
    """Names of the tensors that optimizers step, by id: the parameter's, by identity or memory, else the position in the optimizer."""
    by_id = {id(p): n for n, p in named_parameters(chunks)}
    by_place = {place(local_tensor(p)): n for n, p in named_parameters(chunks) if local_tensor(p).numel()}
    names: dict[int, str] = {}
    for i, optimizer in enumerate(optimizers):
        for g, group in enumerate(optimizer.param_groups):
            for k, p in enumerate(group["params"]):
                name = by_id.get(id(p)) or by_place.get(place(local_tensor(p)))
                names.setdefault(id(p), name or f"optimizer{i}.group{g}.{k}")
    return names
