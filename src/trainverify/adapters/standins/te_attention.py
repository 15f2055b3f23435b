"""TransformerEngine's DotProductAttention in plain PyTorch, also over a context-parallel group (trusted as an assumption of the report).

Source: transformer_engine/pytorch/attention: masks of "causal" start at the top left corner, of "causal_bottom_right" at the other; a mask that
is given is True where nothing is seen. Under context parallelism rank r of n holds the parts r and 2n-1-r of 2n parts of the sequence. The kernel's ring, all-gather and
all-to-all compute the same; here keys and values are gathered.
"""
from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from trainverify.adapters.standins.calls import only, refuse, stands_for
from trainverify.adapters.standins.te_linear import Module, gathered

NAME = "transformer_engine.pytorch.DotProductAttention"
MEANING = ("softmax(softmax_scale q k^T, masked) v, groups of heads of q sharing those of k and v; over a context-parallel group: of the whole "
           "sequence, of which rank r of n holds the parts r and 2n-1-r of 2n")
MASKS = ("no_mask", "causal", "causal_bottom_right", "padding", "padding_causal", "padding_causal_bottom_right", "arbitrary")
# Name layouts of which nothing depends here, or steer kernels.
_WITHOUT_MEANING = frozenset({"max_seqlen_q", "max_seqlen_kv", "fast_zero_fill", "is_first_microbatch", "checkpoint_core_attention"})


def positions(rank: int, size: int, length: int, device: Any = None) -> Tensor:
    """Where in the whole sequence the rows stand that a rank of a context-parallel group holds."""
    part = length // 2
    first = torch.arange(part, device=device)
    return torch.cat([first + rank * part, first + (2 * size - 1 - rank) * part])


class DotProductAttention(Module):
    def __init__(self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0, qkv_format="sbhd", attn_mask_type="causal",
                 window_size=None, sequence_parallel=False, tp_size=1, get_rng_state_tracker=None, tp_group=None, layer_number=None,
                 attention_type="self", cp_group=None, cp_global_ranks=None, cp_stream=None, cp_comm_type="p2p", softmax_scale=None,
                 softmax_type="vanilla", return_max_logit=False):
        super().__init__()
        only(NAME, attention_dropout=(attention_dropout, 0.0), softmax_type=(softmax_type, "vanilla"), return_max_logit=(return_max_logit, False))
        self.qkv_format, self.attn_mask_type, self.window_size = qkv_format, attn_mask_type, window_size
        self.cp_group, self.cp_comm_type = cp_group, cp_comm_type
        channels = kv_channels if isinstance(kv_channels, int) else kv_channels[0]
        self.softmax_scale = 1 / math.sqrt(channels) if softmax_scale is None else softmax_scale
        self.register_load_state_dict_post_hook(_without_extra_state)

    def set_context_parallel_group(self, cp_group, cp_global_ranks, cp_stream, cp_comm_type="p2p"):
        self.cp_group, self.cp_comm_type = cp_group, cp_comm_type

    @stands_for(NAME, MEANING)
    def forward(self, query_layer, key_layer, value_layer, attention_mask=None, qkv_format=None, cu_seqlens_q=None, cu_seqlens_kv=None,
                cu_seqlens_q_padded=None, cu_seqlens_kv_padded=None, attn_mask_type=None, window_size=None, core_attention_bias_type="no_bias",
                core_attention_bias=None, alibi_slopes=None, inference_params=None, **others):
        for key, value in others.items():
            if key not in _WITHOUT_MEANING and value not in (None, False):
                refuse(f"{NAME}.forward({key}={value!r})")
        layout = qkv_format or self.qkv_format
        mask_type = (attn_mask_type or self.attn_mask_type).replace(",", "_")
        window = tuple(window_size or self.window_size or (-1, -1))
        only(f"{NAME}.forward", alibi_slopes=(alibi_slopes, None), inference_params=(inference_params, None))
        if mask_type not in MASKS or core_attention_bias_type not in ("no_bias", "post_scale_bias"):
            refuse(f"{NAME}.forward(attn_mask_type={mask_type!r}, core_attention_bias_type={core_attention_bias_type!r})")
        ranks = 1 if self.cp_group is None else dist.get_world_size(self.cp_group)
        if layout == "thd":
            if ranks > 1 or core_attention_bias is not None or any(p is not None and not torch.equal(p, c) for p, c in (
                    (cu_seqlens_q_padded, cu_seqlens_q), (cu_seqlens_kv_padded, cu_seqlens_kv))):
                refuse(f"{NAME}.forward(qkv_format='thd') with context parallelism, a bias or padding between sequences")
            return self._packed(query_layer, key_layer, value_layer, cu_seqlens_q, cu_seqlens_kv, mask_type, window)
        if layout not in ("sbhd", "bshd"):
            refuse(f"{NAME}.forward(qkv_format={layout!r})")
        order = (1, 2, 0, 3) if layout == "sbhd" else (0, 2, 1, 3)
        q, k, v = (x.permute(order) for x in (query_layer, key_layer, value_layer))
        rows, columns = _places(q.shape[2], k.shape[2], ranks, self.cp_group, q.device)
        if ranks > 1:
            if mask_type.startswith("padding") or mask_type == "arbitrary" or core_attention_bias is not None:
                refuse(f"{NAME}.forward(attn_mask_type={mask_type!r}) under context parallelism")
            k, v = (_whole(x, self.cp_group) for x in (k, v))
        seen = _seen(mask_type, window, rows, columns, attention_mask)
        out = self._attend(q, k, v, seen, core_attention_bias)
        return out.permute((2, 0, 1, 3) if layout == "sbhd" else (0, 2, 1, 3)).flatten(2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, bias: Tensor | None) -> Tensor:
        if bias is not None:
            seen = bias.to(q.dtype) if seen is None else bias.to(q.dtype).masked_fill(~seen, -math.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1])

    def _packed(self, q, k, v, ends_q, ends_k, mask_type, window):
        """Sequence after sequence, (tokens, heads, channels)."""
        parts, ends_q, ends_k = [], ends_q.tolist(), ends_k.tolist()
        if ends_q[-1] != q.shape[0]:
            refuse(f"{NAME}.forward: {q.shape[0] - ends_q[-1]} tokens behind the last sequence")
        for a, b, c, d in zip(ends_q, ends_q[1:], ends_k, ends_k[1:]):
            if b > a:
                seen = _seen(mask_type, window, torch.arange(b - a), torch.arange(d - c), None)
                parts.append(self._attend(*(x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d])), seen, None)[0].transpose(0, 1))
        return torch.cat(parts).flatten(1)


def _without_extra_state(module: Any, keys: Any) -> None:
    """Checkpoints need not hold the (empty) fp8 state."""
    keys.missing_keys[:] = [k for k in keys.missing_keys if not k.endswith("_extra_state")]


def _places(rows: int, columns: int, ranks: int, group: Any, device: Any) -> tuple[Tensor, Tensor]:
    """Positions of this rank's queries, and of all keys in the order in which they will stand."""
    if ranks == 1:
        return torch.arange(rows, device=device), torch.arange(columns, device=device)
    if rows % 2 or columns % 2:
        refuse(f"{NAME}: an odd number of positions ({rows}, {columns}) on a rank of a context-parallel group")
    keys = torch.cat([positions(r, ranks, columns, device) for r in range(ranks)])
    return positions(dist.get_rank(group), ranks, rows, device), keys


def _whole(x: Tensor, group: Any) -> Tensor:
    """(batch, heads, length, channels) of all ranks, rank after rank."""
    return gathered(x.permute(2, 0, 1, 3), group).permute(1, 2, 0, 3)


def _seen(mask_type: str, window: tuple[int, int], rows: Tensor, columns: Tensor, given: Any) -> Tensor | None:
    """True where a key is seen; None: everywhere."""
    i, j = rows[:, None], columns[None, :]
    shift = int(columns.max()) - int(rows.max()) if mask_type.endswith("bottom_right") else 0
    left, right = window
    seen = None
    if "causal" in mask_type:
        right = 0
    if (left >= 0 or (right >= 0 and "causal" not in mask_type)) and len(rows) != len(columns) and int(rows.max()) != int(columns.max()):
        refuse(f"{NAME}: a window over {len(columns)} keys for {len(rows)} queries")       # which corner it starts from depends on the kernel
    if left >= 0 or right >= 0:
        seen = torch.ones(len(rows), len(columns), dtype=torch.bool)
        seen = seen & (j >= i + shift - left) if left >= 0 else seen
        seen = seen & (j <= i + shift + right) if right >= 0 else seen
    if mask_type == "arbitrary" or (mask_type.startswith("padding") and given is not None):
        masks = given if isinstance(given, tuple) else (given,)
        hidden = masks[0].bool() if len(masks) == 1 else masks[0].bool().transpose(-1, -2) | masks[1].bool()
        seen = ~hidden if seen is None else seen & ~hidden
    return seen
