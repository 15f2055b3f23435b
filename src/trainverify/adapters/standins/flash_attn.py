"""flash_attn 2: attention, its variable-length and packed forms, and the padding helpers (trusted as an assumption of the report).

Source: the docstrings of flash_attn_interface.py and of bert_padding.py. q is (batch, length, heads, dim) or, with lengths, (tokens, heads, dim);
heads of q share those of k and v in order. Masks are aligned to the bottom right corner; a row that sees no key is zero.
"""
from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainverify.adapters.standins.calls import only, refuse, stands_for, wide

MEANING = "softmax(softmax_scale q k^T, masked) v, heads of q sharing those of k and v in order, causal masks and windows aligned to the bottom right"
PACKAGE = "flash_attn"
EVERYWHERE = (-1, -1)


def visible(rows: int, columns: int, causal: bool, window: tuple[int, int], device: Any = None) -> Tensor | None:
    """Which keys each query sees; None: all."""
    left, right = window
    right = 0 if causal else right
    if left < 0 and right < 0:
        return None
    i = torch.arange(rows, device=device)[:, None] + columns - rows
    j = torch.arange(columns, device=device)[None, :]
    seen = torch.ones(rows, columns, dtype=torch.bool, device=device)
    if left >= 0:
        seen = seen & (j >= i - left)
    if right >= 0:
        seen = seen & (j <= i + right)
    return seen


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, window: tuple[int, int], softcap: float, slopes: Tensor | None) -> Tensor:
    """One batch, (batch, length, heads, dim)."""
    rows, columns = q.shape[1], k.shape[1]
    if softcap or slopes is not None:
        return _by_hand(q, k, v, scale, visible(rows, columns, causal, window, q.device), softcap, slopes)[0]
    plain = causal and rows == columns and window[0] < 0
    seen = None if plain else visible(rows, columns, causal, window, q.device)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=seen, is_causal=plain, scale=scale,
                                         enable_gqa=q.shape[2] != k.shape[2])
    if seen is not None and bool((~seen.any(-1)).any()):       # depends on sizes only
        out = out.masked_fill(~seen.any(-1)[:, None], 0.0)
    return out.transpose(1, 2).contiguous()


def _by_hand(q: Tensor, k: Tensor, v: Tensor, scale: float | None, seen: Tensor | None, softcap: float, slopes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention from its formula, and the logarithms of the rows' sums, (batch, heads, rows)."""
    shared = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2).repeat_interleave(shared, 1), v.transpose(1, 2).repeat_interleave(shared, 1)
    scores = wide(q @ k.transpose(-1, -2)) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        rows, columns = scores.shape[-2:]
        distance = (torch.arange(rows, device=q.device)[:, None] + columns - rows - torch.arange(columns, device=q.device)[None, :]).abs()
        scores = scores - slopes.to(scores.dtype).reshape(-1, q.shape[1], 1, 1) * distance
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    weights = torch.softmax(scores, -1)
    if seen is not None and bool((~seen.any(-1)).any()):
        weights = torch.where(seen.any(-1)[:, None], weights, 0.0)
    return (weights.to(v.dtype) @ v).transpose(1, 2).contiguous(), torch.logsumexp(scores, -1)


def _asked(name: str, dropout_p: float, return_attn_probs: bool, **others: Any) -> None:
    only(f"{PACKAGE}.{name}", dropout_p=(dropout_p, 0.0), return_attn_probs=(return_attn_probs, False), **{k: (v, None) for k, v in others.items()})


@stands_for(f"{PACKAGE}.flash_attn_func", MEANING)
def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=EVERYWHERE, softcap=0.0, alibi_slopes=None,
                    deterministic=False, return_attn_probs=False):
    _asked("flash_attn_func", dropout_p, False)
    out = attention(q, k, v, softmax_scale, causal, tuple(window_size), softcap, alibi_slopes)
    if not return_attn_probs:
        return out
    with torch.no_grad():                      # no gradient flows through the sums in flash_attn either
        seen = visible(q.shape[1], k.shape[1], causal, tuple(window_size), q.device)
        return out, _by_hand(q, k, v, softmax_scale, seen, softcap, alibi_slopes)[1], None


@stands_for(f"{PACKAGE}.flash_attn_kvpacked_func", MEANING)
def flash_attn_kvpacked_func(q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=EVERYWHERE, softcap=0.0, alibi_slopes=None,
                             deterministic=False, return_attn_probs=False):
    _asked("flash_attn_kvpacked_func", dropout_p, return_attn_probs)
    return attention(q, *kv.unbind(2), softmax_scale, causal, tuple(window_size), softcap, alibi_slopes)


@stands_for(f"{PACKAGE}.flash_attn_qkvpacked_func", MEANING)
def flash_attn_qkvpacked_func(qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=EVERYWHERE, softcap=0.0, alibi_slopes=None,
                              deterministic=False, return_attn_probs=False):
    _asked("flash_attn_qkvpacked_func", dropout_p, return_attn_probs)
    return attention(*qkv.unbind(2), softmax_scale, causal, tuple(window_size), softcap, alibi_slopes)


def sequence_by_sequence(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *how: Any) -> Tensor:
    """Sequence by sequence; tokens behind the last one are zero."""
    ends_q, ends_k = cu_q.tolist(), cu_k.tolist()
    parts = [attention(q[None, a:b], k[None, c:d], v[None, c:d], *how)[0] if d > c else q.new_zeros(b - a, q.shape[1], v.shape[2])
             for a, b, c, d in zip(ends_q, ends_q[1:], ends_k, ends_k[1:]) if b > a]
    rest = q.shape[0] - ends_q[-1]
    return torch.cat([*parts, q.new_zeros(rest, q.shape[1], v.shape[2])] if rest or not parts else parts)


def log_sums(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float | None, window: tuple[int, int]) -> Tensor:
    """The logarithms of the rows' sums, (heads, tokens)."""
    ends_q, ends_k = cu_q.tolist(), cu_k.tolist()
    return torch.cat([_by_hand(q[None, a:b], k[None, c:d], v[None, c:d], scale, visible(b - a, d - c, False, window), 0.0, None)[1][0]
                      for a, b, c, d in zip(ends_q, ends_q[1:], ends_k, ends_k[1:]) if b > a], 1)


@stands_for(f"{PACKAGE}.flash_attn_varlen_func", MEANING + ", for each sequence that cu_seqlens delimits")
def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
                           window_size=EVERYWHERE, softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None):
    _asked("flash_attn_varlen_func", dropout_p, return_attn_probs, block_table=block_table)
    return sequence_by_sequence(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, tuple(window_size), softcap, alibi_slopes)


@stands_for(f"{PACKAGE}.flash_attn_varlen_kvpacked_func", MEANING + ", for each sequence that cu_seqlens delimits")
def flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
                                    window_size=EVERYWHERE, softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False):
    _asked("flash_attn_varlen_kvpacked_func", dropout_p, return_attn_probs)
    return sequence_by_sequence(q, *kv.unbind(1), cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, tuple(window_size), softcap, alibi_slopes)


@stands_for(f"{PACKAGE}.flash_attn_varlen_qkvpacked_func", MEANING + ", for each sequence that cu_seqlens delimits")
def flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False, window_size=EVERYWHERE, softcap=0.0,
                                     alibi_slopes=None, deterministic=False, return_attn_probs=False):
    _asked("flash_attn_varlen_qkvpacked_func", dropout_p, return_attn_probs)
    return sequence_by_sequence(*qkv.unbind(1), cu_seqlens, cu_seqlens, softmax_scale, causal, tuple(window_size), softcap, alibi_slopes)


def flash_attn_with_kvcache(*args, **kwargs):
    refuse(f"{PACKAGE}.flash_attn_with_kvcache, which is for inference,")


# ---- bert_padding: plain PyTorch in the package itself

def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """Rows of x."""
    return x[indices]


def unpad_input(hidden_states, attention_mask, unused_mask=None):
    """(batch, length, ...) and a mask of 0 and 1 -> tokens, their places, cu_seqlens, the longest, tokens of each sequence."""
    all_masks = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = all_masks.sum(-1, dtype=torch.int32)
    used = attention_mask.sum(-1, dtype=torch.int32)
    indices = torch.nonzero(all_masks.flatten(), as_tuple=False).flatten()
    cu_seqlens = F.pad(torch.cumsum(lengths, 0, dtype=torch.int32), (1, 0))
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, int(lengths.max()), used


def pad_input(hidden_states, indices, batch, seqlen):
    """Tokens back to (batch, length, ...); zero where there is none."""
    out = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return out.index_copy(0, indices, hidden_states).unflatten(0, (batch, seqlen))


def modules() -> dict[str, dict[str, Any]]:
    functions = {f.__name__: f for f in (flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func, flash_attn_varlen_func,
                                         flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func, flash_attn_with_kvcache)}
    padding = {"index_first_axis": index_first_axis, "unpad_input": unpad_input, "pad_input": pad_input}
    return {"flash_attn": functions, "flash_attn.flash_attn_interface": functions, "flash_attn.bert_padding": padding}
