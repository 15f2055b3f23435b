"""The reference's weights put into a parallel model that only initialises its own (trusted to take no element for another; where they
belong is an assumption, which the report lists).

A plain parameter takes the reference's of the same name and shape; a DTensor takes the part that its placements give this rank.
"""
from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from trainverify.capture.model import local_tensor, named_buffers, named_parameters
from trainverify.capture.recorder import Recorder
from trainverify.capture.spans import clean_path
from trainverify.diagnostics import Diagnostic, Fault
from trainverify.ops.access import reads


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The model itself: DDP's parameters have no names of their own."""
    return module.module if isinstance(module, torch.nn.parallel.DistributedDataParallel) else module


def place_tags(chunks: list[torch.nn.Module], weights: dict[str, torch.Tensor], recorder: Recorder) -> None:
    """Write the reference's weights into the model, by recorded calls: as if the program had loaded them."""
    known = {clean_path(name): tensor for name, tensor in weights.items()}
    with torch.no_grad():
        for name, tensor in (*named_parameters(chunks), *named_buffers(chunks)):
            if not tensor.is_floating_point() or (tensor.is_meta and recorder.floats is None):
                continue
            whole = known.get(clean_path(name))
            if whole is None:
                raise _fault(recorder, f"{name} is no parameter of the reference script's model")
            if isinstance(tensor, DTensor):
                part = shard_of(whole, tensor) if whole.shape == tensor.shape else None
            else:
                part = whole if whole.shape == tensor.shape else None
            mine = local_tensor(tensor)
            if part is None or part.shape != mine.shape:
                raise _fault(recorder, f"{name} has shape {list(tensor.shape)} here and {list(whole.shape)} in the reference script's model")
            if mine.numel():
                mine.detach().copy_(part)
    recorder.note("ASSUME", "weights were placed by the verifier, since the parallel script reads no checkpoint: each parameter holds the reference's "
                            "of its name, or the part that its DTensor placements give to the rank")


def reads_weights(recorder: Recorder) -> bool:
    """Whether any recorded call has read what the reference's weights hold."""
    symbols = {call.args[2].storage for call in recorder.ops if call.name == "tv.symbol" and call.args[0] in ("weight", "buffer")}
    return any(ref.storage in symbols for call in recorder.ops if not call.name.startswith("tv.") for ref in reads(call))


def shard_of(whole: torch.Tensor, tensor: DTensor) -> torch.Tensor | None:
    """This rank's part of a whole tensor; None where a placement is none that divides or repeats. A strided shard is what an outer dimension of the
    mesh leaves of what the inner ones have divided before it."""
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return None
    placements = list(enumerate(tensor.placements))
    strided = [(i, p) for i, p in placements if type(p).__name__ == "_StridedShard"]
    part = whole
    for i, p in [x for x in placements if x not in strided] + strided[::-1]:
        if p.is_replicate():
            continue
        dim = getattr(p, "dim", None)
        if dim is None or p.is_partial():
            return None
        pieces = part.chunk(tensor.device_mesh.size(i), dim)
        part = pieces[coordinate[i]] if coordinate[i] < len(pieces) else part.narrow(dim, 0, 0)
    return part


def _fault(recorder: Recorder, message: str) -> Fault:
    return Fault(Diagnostic("SCRIPT007", message, ranks=(recorder.rank,),
                            fix="Let the parallel script load the reference's weights: give it {checkpoint}, {dcp} or {save} as an argument."))
