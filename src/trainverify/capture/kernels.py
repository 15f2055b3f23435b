"""Lets torch's own attention kernels that need a GPU run on CPU tensors (trusted: each computes what its documentation says, an assumption of the report).

FlexAttention is torch's function with its unfused form, written so that autograd differentiates it: torch has no backward of it on a CPU. The block
mask counts as the kernel reads it: blocks that are not listed are not seen, listed ones where mask_mod says so, full ones everywhere.
"""
from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainverify.adapters.standins.calls import wide
from trainverify.adapters.standins.flash_attn import log_sums, sequence_by_sequence
from trainverify.capture.patches import Note, Patches
from trainverify.diagnostics import Diagnostic, Fault

FLEX = "torch's flex_attention computes softmax(score_mod(scale q k^T)) v where the block mask lets keys be seen; its fused kernel did not run"
VARLEN = "torch's varlen_attn computes softmax(scale q k^T) v for each sequence, windows aligned to the bottom right; its kernel did not run"


@contextlib.contextmanager
def attention_kernels(note: Note) -> Iterator[None]:
    """flex_attention and varlen_attn work on CPU tensors inside the block; `note` is told where they are called."""
    import torch.nn.attention.flex_attention as flex
    import torch.nn.attention.varlen as varlen

    patches = Patches()
    try:
        # The names that flex_attention looks up: so that whoever holds it, compiled or not, gets this.
        patches.set(flex, "_validate_device", lambda query, key, value: None)
        patches.set(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        patches.set(flex, "setup_compilation_env", contextlib.nullcontext)
        patches.set(flex, "flex_attention_hop", _Flex(flex, note))
        patches.everywhere({varlen.varlen_attn: _Varlen(note)})
        yield
    finally:
        patches.restore()


@contextlib.contextmanager
def plain_lstm() -> Iterator[None]:
    """torch.nn.LSTM runs as products and activations, as torch does without oneDNN, whose one kernel for a layer has no meaning in the op table."""
    patches, lstm = Patches(), torch._VF.lstm

    def plain(*args: Any) -> Any:
        enabled = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        try:
            return lstm(*args)
        finally:
            torch._C._set_mkldnn_enabled(enabled)

    try:
        patches.set(torch._VF, "lstm", plain)
        yield
    finally:
        patches.restore()


class _Flex:
    """In place of the higher-order op: (output, logarithm of sums, largest score), the latter two to base 2, as the kernel returns them."""

    def __init__(self, flex: Any, note: Note):
        self.flex, self.note = flex, note

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, score_mod: Any, block_mask: tuple, scale: float,
                 options: dict) -> tuple[Tensor, Tensor, Tensor]:
        self.note("ASSUME", FLEX)
        batch, heads, rows, columns = *query.shape[:3], key.shape[2]
        key, value = (x.expand(batch, *x.shape[1:]) for x in (key, value))
        seen = self._seen(block_mask, batch, heads, rows, columns)
        hidden = None if seen is None else ~seen.any(-1, keepdim=True)
        nothing = query.new_empty(0)
        if score_mod is self.flex._identity and not options["OUTPUT_LOGSUMEXP"] and not options["OUTPUT_MAX"]:
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale, enable_gqa=heads != key.shape[1])
            return (out if hidden is None or not bool(hidden.any()) else out.masked_fill(hidden, 0.0)), nothing, nothing
        share = heads // key.shape[1]
        key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
        scores = wide(query) @ wide(key).transpose(-1, -2) * scale
        places = tuple(torch.arange(n) for n in scores.shape)
        with self._indexing():
            scores = self.flex._vmap_for_bhqkv(score_mod, prefix=(0,))(scores, *places)
        if seen is not None:
            scores = scores.masked_fill(~seen, -math.inf)
        weights = torch.softmax(scores, -1)
        if hidden is not None and bool(hidden.any()):
            weights = weights.masked_fill(hidden, 0.0)
        out = weights.to(value.dtype) @ value
        return (out.to(query.dtype), scores.logsumexp(-1) / math.log(2) if options["OUTPUT_LOGSUMEXP"] else nothing,
                scores.amax(-1) / math.log(2) if options["OUTPUT_MAX"] else nothing)

    def _seen(self, mask: tuple, batch: int, heads: int, rows: int, columns: int) -> Tensor | None:
        """Which keys each query sees, (batch, heads, rows, columns); None: all."""
        _, _, count, indices, full_count, full_indices, *_, row_block, column_block, mask_mod = mask
        if mask_mod is self.flex.noop_mask and min(row_block, column_block) >= self.flex._LARGE_SPARSE_BLOCK_SIZE:
            return None
        at = torch.arange(rows)[:, None] // row_block, torch.arange(columns)[None, :] // column_block
        with self._indexing():
            seen = self.flex._vmap_for_bhqkv(mask_mod, prefix=())(*(torch.arange(n) for n in (batch, heads, rows, columns)))
        blocks = -(-columns // column_block)
        seen = seen & _listed(count, indices, blocks)[..., at[0], at[1]]
        if full_count is not None:
            seen = seen | _listed(full_count, full_indices, blocks)[..., at[0], at[1]]
        return seen

    @staticmethod
    def _indexing() -> Any:
        """Tensors may be indexed by the tensors that vmap maps over."""
        from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

        return TransformGetItemToIndex()


def _listed(count: Tensor, indices: Tensor, blocks: int) -> Tensor:
    """Which blocks of keys are among the first count[..., i] of indices[..., i, :]."""
    first = torch.arange(indices.shape[-1]) < count[..., None]
    return ((indices[..., None] == torch.arange(blocks)) & first[..., None]).any(-2)


class _Varlen:
    """torch.nn.attention.varlen.varlen_attn"""

    def __init__(self, note: Note):
        self.note = note

    def __call__(self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False,
                 seqused_k=None, block_table=None, num_splits=None):
        self.note("ASSUME", VARLEN)
        if seqused_k is not None or block_table is not None or cu_seq_k is None:
            raise Fault(Diagnostic("STAND002", "varlen_attn with seqused_k or block_table, which are for inference, is not covered by the stand-in",
                                   fix="Leave them out."))
        if query.shape[1] != key.shape[1] and not enable_gqa:
            raise ValueError(f"Expect query and key/value to have the same number of heads but got Hq={query.shape[1]} and Hkv={key.shape[1]}.")
        out = sequence_by_sequence(query, key, value, cu_seq_q, cu_seq_k, scale, False, tuple(window_size), 0.0, None)
        if return_aux is None or not return_aux.lse:
            return out
        return out, log_sums(query, key, value, cu_seq_q, cu_seq_k, scale, tuple(window_size))
