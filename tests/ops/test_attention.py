"""Rows of fused attention against torch: causal, masked, grouped queries, rows that are masked throughout, ring attention."""
from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness import TABLE, assert_covered, check_function, check_row
from trainverify.algebra.real import Real
from trainverify.diagnostics import Fault
from trainverify.ops import attention

aten = torch.ops.aten
forward = aten._scaled_dot_product_flash_attention_for_cpu.default
backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
QUICK = settings(max_examples=20, deadline=None, derandomize=True, database=None)


def rnd(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv(b=1, h=2, kv=2, n=3, s=3, e=4):
    return rnd(b, h, n, e), rnd(b, kv, s, e, seed=1), rnd(b, kv, s, e, seed=2)


KEEP = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 1, 1]]).bool()
DEAD = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]]).bool()
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


def check(q, k, v, backend=SDPBackend.FLASH_ATTENTION, **kwargs):
    with sdpa_kernel(backend):
        return check_function(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **kwargs), q, k, v)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kwargs", [{}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": KEEP}, {"attn_mask": DEAD}, {"attn_mask": rnd(3, 3, seed=3)},
                                    {"attn_mask": KEEP[None, None]}], ids=str)
def test_masks(backend, kwargs):
    calls = check(*qkv(), backend, **kwargs)
    assert any(c.op is forward for c in calls) == (backend == SDPBackend.FLASH_ATTENTION)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [dict(h=4), dict(h=4, kv=1), dict(n=5), dict(n=2, s=5), dict(b=2, h=1, kv=1, n=1)])
@pytest.mark.parametrize("causal", [False, True])
def test_shapes(backend, shape, causal):
    q, k, v = qkv(**shape)
    check(q, k, v, backend, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


@pytest.mark.parametrize("mask", [(3, 3), (2, 1, 3, 3), (1, 4, 3, 3), (2, 4, 3, 3)])
def test_grouped_queries_with_masks(mask):
    """A mask may differ per query head: it follows the head, not its group."""
    q, k, v = qkv(b=2, h=4)
    check(q, k, v, attn_mask=rnd(*mask, seed=3), enable_gqa=True)


def test_backward_uses_the_given_output_and_logsumexp():
    """Ring attention calls the backward of one block of keys with the global output and logsumexp."""
    q, k, v = qkv(s=4)
    out, lse = forward(q, k, v)
    g = rnd(*out.shape, seed=5)
    for block in (slice(0, 2), slice(2, 4)):
        check_row(backward, [g, q, k[:, :, block], v[:, :, block], out, lse, 0.0, False])
    whole = backward(g, q, k, v, out, lse, 0.0, False)
    parts = [backward(g, q, k[:, :, b], v[:, :, b], out, lse, 0.0, False) for b in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])


def test_live_dropout_is_refused():
    m = Real()
    row = TABLE().lookup("aten._scaled_dot_product_flash_attention_for_cpu.default").row
    with pytest.raises(Fault, match="OPS003"):
        row.meaning(m, *(m.data(t) for t in qkv()), 0.1, ctx=None)


@QUICK
@given(b=st.integers(1, 2), kv=st.integers(1, 2), group=st.integers(1, 2), n=st.integers(1, 4), s=st.integers(1, 4), causal=st.booleans(), masked=st.booleans())
def test_any_shape(b, kv, group, n, s, causal, masked):
    q, k, v = qkv(b, kv * group, kv, n, s, 2)
    mask = None
    if masked and not causal:
        mask = torch.zeros(n, s, dtype=torch.float64).masked_fill(rnd(n, s, seed=4) > 0.3, -math.inf)
    options = {"attn_mask": mask, "scale": 0.7 if n == 2 else None}
    out, lse = forward(q, k, v, 0.0, causal, **options)
    check_row(forward, [q, k, v, 0.0, causal], options)
    check_row(backward, [rnd(*out.shape, seed=5), q, k, v, out, lse, 0.0, causal], options)


def test_every_row_was_checked():
    assert_covered(attention.rows)
