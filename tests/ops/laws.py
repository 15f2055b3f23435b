"""Pairs of programs that compute the same over the real numbers, gradients included, and pairs that do not.

A law: name, two functions, the shapes of their inputs. In `real` a right pair agrees to rounding and a wrong pair does not; in
the field the right ones must be equal exactly and the wrong ones differ.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


class Law(NamedTuple):
    name: str
    left: Callable
    right: Callable
    shapes: list[tuple[int, ...]]
    grad: bool = True


X, Y, W, V = (6, 8), (6, 8), (8, 8), (8,)
TARGET = torch.tensor([0, 3, -100, 7, 1, 1])
KEPT = TARGET.clamp(min=0)[:, None]
VALID = TARGET != -100
CAUSAL = torch.ones(5, 5).tril().bool()


def manual_softmax(x):
    e = torch.exp(x)
    return e / e.sum(-1, keepdim=True)


def shifted_softmax(x):
    e = torch.exp(x - x.detach().amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def manual_attention(q, k, v, keep=CAUSAL):
    s = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    return F.softmax(s.masked_fill(~keep, -math.inf), -1) @ v


def flash(q, k, v, **kw):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, **kw)


def math_attention(q, k, v, **kw):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, **kw)


def online(q, k, v):
    """Two blocks of keys merged by their logsumexp, as ring attention does."""
    parts = [(torch.softmax(s, -1) @ b, s.logsumexp(-1, keepdim=True))
             for s, b in ((q @ c.transpose(-1, -2) / 2, b) for c, b in zip(k.split(2, -2), v.split(2, -2)))]
    (o, lse), (p, other) = parts
    both = torch.logaddexp(lse, other)
    return o * torch.exp(lse - both) + p * torch.exp(other - both)


def manual_layer_norm(x, w, b):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5) * w + b


def manual_rms(x, w, eps=1e-5):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w


def manual_cross_entropy(x):
    losses = (x.logsumexp(-1) - x.gather(1, KEPT)[:, 0]) * VALID
    return losses.sum() / VALID.sum()


def vocab_parallel_cross_entropy(x):
    """Two shards of the classes: the sum of exponentials is added up, the target's logit comes from its owner."""
    top = x.detach().amax(-1, keepdim=True)
    z = sum((part - top).exp().sum(-1) for part in x.split(4, -1))
    picked = (x - top).gather(1, KEPT)[:, 0]
    return ((z.log() - picked) * VALID).sum() / VALID.sum()


def tanh_gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def rotated(x, cos, sin):
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def rotated_complex(x, angle):
    z = torch.view_as_complex(x.reshape(6, 4, 2)) * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(z).flatten(-2)


RIGHT = [
    Law("softmax", lambda x: F.softmax(x, -1), manual_softmax, [X]),
    Law("softmax and a shift", lambda x: F.softmax(x, -1), shifted_softmax, [X]),
    Law("softmax of a scaled product", lambda x, w: F.softmax(x @ w.t() / 8, -1), lambda x, w: F.softmax((x / 2) @ (w / 4).t(), -1), [X, W]),
    Law("log_softmax", lambda x: F.log_softmax(x, -1), lambda x: x - x.logsumexp(-1, keepdim=True), [X]),
    Law("log of softmax", lambda x: F.log_softmax(x, -1), lambda x: torch.log(F.softmax(x, -1)), [X], False),
    Law("nested softmax in split sums", lambda x, w: F.softmax(F.softmax(x, -1) @ w, -1),
        lambda x, w: (lambda p: F.softmax(p[:, :4] @ w[:4] + p[:, 4:] @ w[4:], -1))(F.softmax(x, -1)), [X, W]),
    Law("cross entropy", lambda x: F.cross_entropy(x, TARGET), manual_cross_entropy, [X]),
    Law("vocabulary-parallel cross entropy", lambda x: F.cross_entropy(x, TARGET), vocab_parallel_cross_entropy, [X]),
    Law("cross entropy in two micro-batches", lambda x: F.cross_entropy(x, TARGET),
        lambda x: sum(F.cross_entropy(a, t, reduction="sum") for a, t in zip(x.split(3), TARGET.split(3))) / VALID.sum(), [X]),
    Law("causal attention", lambda q, k, v: flash(q, k, v, is_causal=True), manual_attention, [(1, 2, 5, 4)] * 3),
    Law("causal attention by a mask", lambda q, k, v: flash(q, k, v, is_causal=True),
        lambda q, k, v: flash(q, k, v, attn_mask=CAUSAL), [(1, 2, 5, 4)] * 3),
    Law("attention by parts", lambda q, k, v: flash(q, k, v), lambda q, k, v: math_attention(q, k, v), [(1, 1, 4, 4)] * 3),
    Law("online attention", lambda q, k, v: flash(q, k, v), online, [(1, 1, 3, 4), (1, 1, 4, 4), (1, 1, 4, 4)]),
    Law("grouped attention", lambda q, k, v: flash(q, k, v, enable_gqa=True),
        lambda q, k, v: flash(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)), [(1, 4, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)]),
    Law("layer norm", lambda x, w, b: F.layer_norm(x, (8,), w, b, 1e-5), manual_layer_norm, [X, V, V]),
    Law("group norm of one group", lambda x, w, b: F.layer_norm(x, (8,), w, b, 1e-5), lambda x, w, b: F.group_norm(x, 1, w, b, 1e-5), [X, V, V]),
    Law("RMS norm", lambda x, w: F.rms_norm(x, (8,), w, 1e-5), manual_rms, [X, V]),
    Law("variance", lambda x: x.var(-1, unbiased=False), lambda x: x.pow(2).mean(-1) - x.mean(-1).pow(2), [X]),
    Law("sigmoid", torch.sigmoid, lambda x: 1 / (1 + torch.exp(-x)), [X]),
    Law("silu", F.silu, lambda x: x * torch.sigmoid(x), [X]),
    Law("tanh", torch.tanh, lambda x: 2 * torch.sigmoid(2 * x) - 1, [X]),
    Law("softplus", F.softplus, lambda x: torch.log(1 + torch.exp(x)), [X]),
    Law("logsigmoid", F.logsigmoid, lambda x: -F.softplus(-x), [X]),
    Law("gelu, tanh form", lambda x: F.gelu(x, approximate="tanh"), tanh_gelu, [X]),
    Law("gelu", F.gelu, lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), [X]),
    Law("relu", F.relu, lambda x: torch.clamp(x, min=0), [X], False),
    Law("swiglu of a split product", lambda x, w: (lambda g: F.silu(g[:, :4]) * g[:, 4:])(x @ w), lambda x, w: F.silu(x @ w[:, :4]) * (x @ w[:, 4:]), [X, W]),
    Law("rotation by complex numbers", lambda x, a: rotated(x, a.cos(), a.sin()), rotated_complex, [X, (6, 4)]),
    Law("einsum", lambda x, w: torch.einsum("bi,ij->bj", x, w), lambda x, w: x @ w, [X, W]),
    Law("linear", lambda x, w, b: F.linear(x, w, b), lambda x, w, b: sum(p @ q.t() for p, q in zip(x.split(4, 1), w.split(4, 1))) + b, [X, W, V]),
    Law("norm of norms", lambda x: x.norm(), lambda x: torch.stack([x[:2].norm(), x[2:].norm()]).norm(), [X], False),
    Law("norm from squares", lambda x: x.norm(), lambda x: (x[:2].norm() ** 2 + x[2:].norm() ** 2) ** 0.5, [X], False),
    Law("square root of a square", lambda x: torch.sqrt(x * x + 1) ** 2, lambda x: x * x + 1, [X]),
    Law("inverse root", lambda x: torch.rsqrt(x * x + 1), lambda x: (x * x + 1).pow(-0.5), [X]),
    Law("power 3/2", lambda x: (x * x + 1).pow(1.5), lambda x: (x * x + 1) * (x * x + 1).sqrt(), [X], False),   # u / sqrt(u) is no root in the field
    Law("mean squared error", lambda x, y: F.mse_loss(x, y), lambda x, y: (x - y).pow(2).mean(), [X, Y]),
    Law("binary cross entropy", lambda x, y: F.binary_cross_entropy_with_logits(x, y.detach()),
        lambda x, y: (F.softplus(x) - y.detach() * x).mean(), [X, Y]),
    Law("convolution", lambda x, w: F.conv1d(x[None], w.reshape(2, 6, 3)), lambda x, w: (x.t().unfold(0, 3, 1).reshape(6, 18) @ w.reshape(2, 18).t()).t()[None], [X, (2, 18)]),
    Law("cumulative sum", lambda x: x.cumsum(-1), lambda x: x @ torch.ones(8, 8, dtype=x.dtype).triu(), [X]),
    Law("product", lambda x: x[:, :3].prod(-1), lambda x: x[:, 0] * x[:, 1] * x[:, 2], [X]),
]

WRONG = [
    Law("softmax scaled", lambda x: F.softmax(x, -1), lambda x: F.softmax(x * 1.001, -1), [X]),
    Law("softmax over the other dimension", lambda x: F.softmax(x, -1), lambda x: F.softmax(x, 0), [X]),
    Law("epsilon", lambda x, w: F.rms_norm(x, (8,), w, 1e-3), lambda x, w: manual_rms(x, w, 1e-2), [X, V]),
    Law("epsilon outside the root", lambda x: (x * x + 1).sqrt() + 0.1, lambda x: (x * x + 1.1).sqrt(), [X]),
    Law("unbiased variance", lambda x: x.var(-1, unbiased=False), lambda x: x.var(-1), [X]),
    Law("mean of means of unequal parts", lambda x: F.cross_entropy(x, TARGET),
        lambda x: sum(F.cross_entropy(a, t) for a, t in zip(x.split(3), TARGET.split(3))) / 2, [X]),
    Law("ignored targets counted", lambda x: F.cross_entropy(x, TARGET), lambda x: F.cross_entropy(x, TARGET, reduction="sum") / 6, [X]),
    Law("no causal mask", lambda q, k, v: flash(q, k, v, is_causal=True), lambda q, k, v: flash(q, k, v), [(1, 2, 5, 4)] * 3),
    Law("heads paired in another order", lambda q, k, v: flash(q, k, v, enable_gqa=True),
        lambda q, k, v: flash(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)), [(1, 4, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)]),
    Law("attention scale", lambda q, k, v: flash(q, k, v), lambda q, k, v: flash(q, k, v, scale=0.25), [(1, 2, 5, 4)] * 3),
    Law("merging without weights", lambda q, k, v: flash(q, k, v),
        lambda q, k, v: (flash(q, k[:, :, :2], v[:, :, :2]) + flash(q, k[:, :, 2:], v[:, :, 2:])) / 2, [(1, 1, 3, 4), (1, 1, 4, 4), (1, 1, 4, 4)]),
    Law("gelu's two forms", F.gelu, lambda x: F.gelu(x, approximate="tanh"), [X]),
    Law("min for max", lambda x, y: torch.maximum(x, y), lambda x, y: torch.minimum(x, y), [X, Y]),
    Law("max over one side", lambda x, y: torch.maximum(x, y), lambda x, y: x, [X, Y], False),
    Law("rotation backwards", lambda x, a: rotated(x, a.cos(), a.sin()), lambda x, a: rotated(x, a.cos(), -a.sin()), [X, (6, 4)]),
    Law("split sums of the wrong halves", lambda x, w: x @ w, lambda x, w: x[:, :4] @ w[4:] + x[:, 4:] @ w[:4], [X, W]),
    Law("norm without a root", lambda x: x.norm(), lambda x: x[:2].norm() + x[2:].norm(), [X], False),
    Law("gradient detached", lambda x: F.silu(x), lambda x: x * torch.sigmoid(x).detach(), [X]),
    Law("gradient of a shift", lambda x: F.softmax(x, -1).log(), lambda x: x - x.detach().logsumexp(-1, keepdim=True), [X]),
    Law("clipping that binds", lambda x: x * torch.clamp(1 / x.norm(), max=1.0), lambda x: x, [X], False),
]
