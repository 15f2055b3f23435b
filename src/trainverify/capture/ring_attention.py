"""Lets torch's context_parallel run on CPU tensors (trusted to change the kernel only, not the algorithm).

torch routes the GPU's attention kernels of a sequence-sharded DTensor into its ring algorithm. On a CPU another kernel is chosen
(_scaled_dot_product_flash_attention_for_cpu), for which torch has no entry and fails. These entries call the same templated ring
with that kernel: the rotation, the merging of partial results and the load balancing stay torch's own.
"""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from trainverify.capture.patches import Note
from trainverify.diagnostics import Diagnostic, Fault

CODE, TITLE = "DIST002", "ring attention ran with the CPU's flash attention kernel"

_SEQUENCE_DIM = 2                              # of scaled_dot_product_attention: batch, head, sequence, feature


@contextlib.contextmanager
def ring_attention(note: Note) -> Iterator[None]:
    """context_parallel works on CPU tensors inside the block; `note` is told when it is used."""
    import torch.distributed.tensor.experimental._context_parallel._attention as attention

    aten = torch.ops.aten
    forward = aten._scaled_dot_product_flash_attention_for_cpu.default
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    ring = _Ring(attention, note)
    entries = {forward: ring.forward, backward: ring.backward}
    attention.custom_ops.update(entries)       # torch copies this table when a context_parallel block begins
    try:
        yield
    finally:
        for op in entries:
            del attention.custom_ops[op]


class _Ring:
    """Handlers with the signature of torch's: (op, args, kwargs) on DTensors."""

    def __init__(self, attention: Any, note: Note):
        self.attention, self.note = attention, note

    def forward(self, op, args: tuple, kwargs: dict) -> tuple:
        query, key, value, *rest = args
        dropout_p, is_causal = (*rest, *(0.0, False)[len(rest):])
        _without_mask(kwargs)
        self.note(CODE, TITLE)
        output, logsumexp, *_ = self.attention._templated_ring_attention(
            query.device_mesh.get_group(), _SEQUENCE_DIM, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
            query=query._local_tensor, key=key._local_tensor, value=value._local_tensor,
            dropout_p=kwargs.get("dropout_p", dropout_p), is_causal=kwargs.get("is_causal", is_causal), scale=kwargs.get("scale"))
        return _like(query, output), _like(query, logsumexp)

    def backward(self, op, args: tuple, kwargs: dict) -> tuple:
        grad_out, query, key, value, output, logsumexp, dropout_p, is_causal = args[:8]
        _without_mask(kwargs)
        grads = self.attention._templated_ring_attention_backward(
            query.device_mesh.get_group(), _SEQUENCE_DIM, op, grad_out=_local(grad_out), grad_out_name="grad_out",
            query=_local(query), key=_local(key), value=_local(value), out=_local(output), logsumexp=_local(logsumexp),
            is_causal=is_causal, dropout_p=dropout_p, scale=kwargs.get("scale"))
        return tuple(_like(query, g) for g in grads[:3])


def _without_mask(kwargs: dict) -> None:
    """torch's ring has no place for a mask, on a GPU neither."""
    mask = kwargs.get("attn_mask")
    if mask is not None:
        raise Fault(Diagnostic("DIST003", f"scaled_dot_product_attention has an attn_mask of shape {list(_local(mask).shape)} inside context_parallel, which takes none",
                               fix="Pass is_causal=True instead of a mask, or compute this attention outside context_parallel."))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return getattr(tensor, "_local_tensor", tensor)


def _like(source, local: torch.Tensor):
    """A DTensor of a local result that is laid out as `source`."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local, source.device_mesh, source.placements, run_check=False)
