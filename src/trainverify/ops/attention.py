"""Rows of fused scaled dot-product attention, forward and backward (trusted).

Heads of the query that share a head of key and value (grouped-query attention) become a dimension of their own. The
backward op uses the output and the logsumexp that it is given: in context-parallel attention these are the global ones.
"""
from __future__ import annotations

import math

import torch

from trainverify.diagnostics import Diagnostic, Fault
from trainverify.ops import lift as L
from trainverify.ops.lift import lift
from trainverify.ops.normalise import known_zero, steady
from trainverify.ops.table import Rows

rows = Rows("attention")


def _no_dropout(p) -> None:
    if p != 0:
        raise Fault(Diagnostic("OPS003", f"live dropout: attention draws a random mask with p = {p}, so two programs cannot be compared",
                               fix="set the attention dropout to 0, or call model.eval()"))


def _grouped(m, x, heads: int, group: int):
    """[batch, heads * group, rows, width] as [batch, heads, group, rows, width]."""
    b, _, rows_, width = x.shape
    return m.reshape(x, (b, heads, group, rows_, width))


def _mask(m, mask, heads: int, group: int):
    """The additive mask in the five dimensions of the scores; a boolean one keeps where it is true."""
    if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:
        mask = m.where(mask, m.const(0), m.const(-math.inf))
    x = lift(m, mask)
    shape = (1,) * (4 - len(x.shape)) + tuple(x.shape)
    split = (heads, group) if shape[1] == heads * group and shape[1] != 1 else (shape[1], 1)
    return m.reshape(x, (shape[0], *split, *shape[2:]))


def _scores(m, q, k, mask, causal: bool, scale):
    """scale * q @ k^T, masked by -inf."""
    s = L.scaled(m, m.matmul(q, L.transpose(m, k)), scale)
    if mask is not None:
        s = m.add(s, mask)
    if causal:
        keep = torch.ones(s.shape[-2:], dtype=torch.bool).tril()
        s = m.where(keep, s, m.const(-math.inf))
    return s


def _operands(m, query, key, value, attn_mask, is_causal, scale):
    """Grouped query, key, value, the scores, the scale, and the number of query heads per key head."""
    q, k, v = lift(m, query), lift(m, key), lift(m, value)
    heads = k.shape[1]
    group = q.shape[1] // heads
    q, k, v = _grouped(m, q, heads, group), _grouped(m, k, heads, 1), _grouped(m, v, heads, 1)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    mask = None if attn_mask is None else _mask(m, attn_mask, heads, group)
    return q, k, v, _scores(m, q, k, mask, is_causal, scale), scale, group


@rows("aten._scaled_dot_product_flash_attention_for_cpu", source="torch.nn.functional.scaled_dot_product_attention", ctx=True)
def flash_attention(m, query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None, ctx):
    """softmax(scale * q k^T + mask) v, and the logsumexp of the scores (0, 0 in rows that are masked throughout)"""
    _no_dropout(dropout_p)
    _, _, v, s, _, _ = _operands(m, query, key, value, attn_mask, is_causal, scale)
    out_shape = (*query.shape[:3], value.shape[-1])
    s, peak = steady(m, s, [4])
    e = m.exp(s)
    z = m.sum(e, [4], True)
    native = ctx.native[0]
    dead = known_zero(m, z, (native == 0).all(-1).reshape(z.shape))
    z = m.where(dead, m.const(1), z) if dead.any() else z
    out = m.matmul(m.div(e, z), v)
    lse = m.log(z) if peak is None else m.add(m.log(z), peak)
    return [m.reshape(out, out_shape), m.reshape(lse, out_shape[:3])]


@rows("aten._scaled_dot_product_flash_attention_for_cpu_backward", source="Dao et al., FlashAttention (2022), algorithm 4")
def flash_attention_backward(m, grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, *, attn_mask=None, scale=None):
    """With P = exp(s - lse): dv = P^T g, ds = P * (g v^T - sum of g * out), dq = scale ds k, dk = scale ds^T q"""
    _no_dropout(dropout_p)
    q, k, v, s, scale, group = _operands(m, query, key, value, attn_mask, is_causal, scale)
    heads = k.shape[1]
    g, o = (_grouped(m, lift(m, x), heads, group) for x in (grad_out, out))
    lse = m.reshape(lift(m, logsumexp), (*s.shape[:4], 1))
    p = m.exp(m.sub(s, lse))
    delta = m.sum(m.mul(g, o), [4], True)
    ds = m.mul(p, m.sub(m.matmul(g, L.transpose(m, v)), delta))
    dq = L.scaled(m, m.matmul(ds, k), scale)
    dk = L.scaled(m, m.matmul(L.transpose(m, ds), q), scale)
    dv = m.matmul(L.transpose(m, p), g)
    shared = [m.sum(x, [2]) if group > 1 else x for x in (dk, dv)]
    return [m.reshape(x, like.shape) for x, like in zip((dq, *shared), (query, key, value))]
