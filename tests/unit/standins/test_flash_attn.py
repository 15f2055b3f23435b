"""flash_attn's stand-in against its formula, element by element in float64, with gradients."""
import math

import pytest
import torch
from trainverify.adapters.standins import flash_attn as fa
from trainverify.diagnostics import Fault

SEED = 7


def made(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED + sum(shape))).requires_grad_()


def by_formula(q, k, v, scale=None, causal=False, window=(-1, -1), softcap=0.0, slopes=None):
    """Loops over batch, head and row, with exp and sums only."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    share, offset = q.shape[2] // k.shape[2], k.shape[1] - q.shape[1]
    out = []
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            for h in range(q.shape[2]):
                total, weighted = 0.0, torch.zeros(v.shape[-1], dtype=v.dtype)
                for j in range(k.shape[1]):
                    at = i + offset
                    if (causal and j > at) or (window[0] >= 0 and j < at - window[0]) or (window[1] >= 0 and j > at + window[1]):
                        continue
                    score = scale * (q[b, i, h] * k[b, j, h // share]).sum()
                    score = softcap * torch.tanh(score / softcap) if softcap else score
                    score = score - slopes[h] * abs(at - j) if slopes is not None else score
                    weight = torch.exp(score)
                    total, weighted = total + weight, weighted + weight * v[b, j, h // share]
                out.append(weighted / total if isinstance(total, torch.Tensor) else weighted)
    return torch.stack(out).reshape(q.shape[0], q.shape[1], q.shape[2], -1)


def agree(got, expected, *inputs):
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7)
    weight = torch.cos(torch.arange(got.numel(), dtype=torch.float64)).reshape(got.shape)
    for a, b in zip(torch.autograd.grad((got * weight).sum(), inputs, retain_graph=True), torch.autograd.grad((expected * weight).sum(), inputs, retain_graph=True)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("how", [
    {}, {"causal": True}, {"scale": 0.3}, {"window": (1, 0)}, {"window": (2, 1)}, {"causal": True, "window": (1, 5)}, {"softcap": 2.0, "causal": True},
    {"slopes": torch.tensor([0.5, 0.25, 0.1, 0.05], dtype=torch.float64), "causal": True}], ids=str)
@pytest.mark.parametrize("rows", [3, 5])
def test_attention(how, rows):
    q, k, v = made(2, rows, 4, 3), made(2, 5, 2, 3), made(2, 5, 2, 3)
    got = fa.flash_attn_func(q, k, v, softmax_scale=how.get("scale"), causal=how.get("causal", False), window_size=how.get("window", (-1, -1)),
                             softcap=how.get("softcap", 0.0), alibi_slopes=how.get("slopes"))
    agree(got, by_formula(q, k, v, **how), q, k, v)


def test_rows_that_see_no_key_are_zero():
    q, k, v = made(1, 5, 2, 3), made(1, 3, 2, 3), made(1, 3, 2, 3)
    got = fa.flash_attn_func(q, k, v, causal=True)
    assert got[:, :2].eq(0).all() and not got[:, 2:].eq(0).any()
    agree(got, by_formula(q, k, v, causal=True), q, k, v)


def test_packed_forms_are_the_same():
    qkv = made(2, 4, 3, 2, 3)
    expected = by_formula(*qkv.unbind(2), causal=True)
    agree(fa.flash_attn_qkvpacked_func(qkv, causal=True), expected, qkv)
    agree(fa.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], causal=True), expected, qkv)


def test_sequences_of_several_lengths():
    ends = torch.tensor([0, 3, 4, 8], dtype=torch.int32)
    q, k, v = made(8, 4, 3), made(8, 2, 3), made(8, 2, 3)
    expected = torch.cat([by_formula(q[None, a:b], k[None, a:b], v[None, a:b], causal=True)[0] for a, b in ((0, 3), (3, 4), (4, 8))])
    agree(fa.flash_attn_varlen_func(q, k, v, ends, ends, 4, 4, causal=True), expected, q, k, v)
    qkv = made(8, 3, 2, 3)
    expected = torch.cat([by_formula(*(x[None, a:b] for x in qkv.unbind(1)))[0] for a, b in ((0, 3), (3, 4), (4, 8))])
    agree(fa.flash_attn_varlen_qkvpacked_func(qkv, ends, 4), expected, qkv)
    agree(fa.flash_attn_varlen_kvpacked_func(qkv[:, 0], qkv[:, 1:], ends, ends, 4, 4), expected, qkv)


def test_tokens_behind_the_last_sequence_are_zero():
    ends = torch.tensor([0, 2, 3], dtype=torch.int32)
    q, k, v = made(5, 2, 3), made(5, 2, 3), made(5, 2, 3)
    got = fa.flash_attn_varlen_func(q, k, v, ends, ends, 2, 2)
    assert got.shape == q.shape and got[3:].eq(0).all() and not got[:3].eq(0).any()


def test_the_sums_that_it_returns():
    q, k, v = made(1, 3, 2, 4), made(1, 3, 2, 4), made(1, 3, 2, 4)
    out, sums, probabilities = fa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 2
    expected = scores.masked_fill(torch.ones(3, 3).triu(1).bool(), -math.inf).logsumexp(-1)
    torch.testing.assert_close(sums.double(), expected, rtol=1e-6, atol=1e-6)
    assert probabilities is None and not sums.requires_grad and out.requires_grad


@pytest.mark.parametrize("given", [{"dropout_p": 0.1}, {"return_attn_probs": True, "block_table": None}], ids=str)
def test_what_is_not_covered_is_refused(given):
    ends = torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(Fault) as fault:
        fa.flash_attn_varlen_func(made(2, 2, 3), made(2, 2, 3), made(2, 2, 3), ends, ends, 2, 2, **given)
    assert fault.value.diagnostics[0].code == "STAND002" and next(iter(given)) in fault.value.diagnostics[0].message


def test_padding_and_back():
    x, mask = made(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    tokens, indices, ends, longest, used = fa.unpad_input(x, mask)
    assert indices.tolist() == [0, 1, 4, 5, 6] and ends.tolist() == [0, 2, 5] and longest == 3 and used.tolist() == [2, 3]
    assert torch.equal(tokens, torch.cat([x[0, :2], x[1, :3]]))
    assert torch.equal(fa.pad_input(tokens, indices, 2, 4), x * mask[..., None])
