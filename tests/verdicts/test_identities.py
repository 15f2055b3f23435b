"""Formulas that training code writes in several ways: PROVED equal with their backwards, and not with one slip in them."""
import math

import pytest
import torch
import torch.nn.functional as F

from judge import assert_equal, assert_not_equal
from pairs import LR, ROWS, WIDTH, compare, compare_forward, sgd, update

EPS = 1e-5
MAX_NORM = 0.5
MASK = torch.ones(ROWS, ROWS, dtype=torch.bool).tril()


# ---- optimizers
@pytest.mark.parametrize("make", [torch.optim.NAdam, torch.optim.AdamW, torch.optim.Adam], ids=lambda c: c.__name__)
def test_optimizers_for_each_and_in_a_loop(make):
    """Second moments over their bias corrections, before and after the root."""
    def by(**options):
        return update(lambda p: make(p, lr=LR, **options))
    assert_equal(compare(by(foreach=False), by(foreach=True), steps=2))


def clipped(parameters):
    torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)


def clipped_by_divisor(parameters, least=1.0, eps=1e-6):
    """As DeepSpeed does it: the norm over the limit, but at least 1, divides."""
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in parameters]))
    divisor = ((norm + eps) / MAX_NORM).clamp(min=least)
    for p in parameters:
        p.grad.mul_(1.0 / divisor)


def test_clipping_by_a_factor_and_by_a_divisor():
    assert_equal(compare(update(sgd, clipped), update(sgd, clipped_by_divisor), steps=2))
    assert_equal(compare(update(sgd, clipped_by_divisor), update(sgd, clipped), steps=2))


@pytest.mark.parametrize("slip", [{"least": 2.0}, {"eps": 1e-3}, {"least": 0.5}])
def test_clipping_by_another_divisor(slip):
    assert_not_equal(compare(update(sgd, clipped), update(sgd, lambda parameters: clipped_by_divisor(parameters, **slip))))


def test_a_minimum_of_what_may_be_negative_is_not_turned_over():
    def least(h):
        return h * torch.minimum(h.sum(), torch.tensor(1.0))

    def turned(h):
        return h / torch.maximum(1 / h.sum(), torch.tensor(1.0))
    assert_not_equal(compare_forward(least, turned))


def test_a_bias_correction_of_another_step():
    def adam(late):
        def build(parameters):
            optimizer = torch.optim.NAdam(parameters, lr=LR, foreach=late)
            for group in optimizer.param_groups if late else ():
                group["betas"] = (0.9, 0.998)
            return optimizer
        return update(build)
    assert_not_equal(compare(adam(False), adam(True), steps=2))


# ---- norms and activations
def rms_norm(h):
    return F.rms_norm(h, (WIDTH,), eps=EPS)


def rms_by_hand(h, eps=EPS):
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)


def layer_norm(h):
    return F.layer_norm(h, (WIDTH,), eps=EPS)


def layer_norm_by_hand(h, correction=0):
    centred = h - h.mean(-1, keepdim=True)
    return centred / (h.var(-1, correction=correction, keepdim=True) + EPS).sqrt()


def layer_norm_by_moments(h):
    mean = h.mean(-1, keepdim=True)
    return (h - mean) * (h.square().mean(-1, keepdim=True) - mean.square() + EPS).rsqrt()


def tanh_gelu_by_hand(h, cubic=0.044715):
    return 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + cubic * h ** 3)))


def gelu_by_hand(h):
    return h * (1 + torch.erf(h / math.sqrt(2))) / 2


def softmax_by_hand(h):
    e = (h - h.detach().amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


# ---- attention
def attention(h, kernel=F.scaled_dot_product_attention):
    q, k, v = (h * s for s in (1.0, 0.5, 2.0))
    return kernel(*(t[None, None] for t in (q, k, v)))[0, 0]


def causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def attention_by_hand(q, k, v, scale=WIDTH ** -0.5):
    return (q @ k.mT * scale).softmax(-1) @ v


def causal_by_hand(q, k, v):
    return (q @ k.mT / WIDTH ** 0.5).masked_fill(~MASK, -math.inf).softmax(-1) @ v


def blockwise(blocks, rescale=True):
    """Online softmax: running maximum, sum and output."""
    def kernel(q, k, v):
        top, total, out = None, 0, 0
        for keys, values in zip(k.tensor_split(blocks, -2), v.tensor_split(blocks, -2)):
            s = q @ keys.mT / WIDTH ** 0.5
            high = s.detach().amax(-1, keepdim=True)
            new = high if top is None else torch.maximum(top, high)
            e = (s - new).exp()
            old = 0 if top is None else (top - new).exp() if rescale else 1
            total, out, top = total * old + e.sum(-1, keepdim=True), out * old + e @ values, new
        return out / total
    return lambda h: attention(h, kernel)


def merged(blocks):
    """Outputs of blocks, weighted by their logsumexp."""
    def kernel(q, k, v):
        parts = [(q @ keys.mT / WIDTH ** 0.5, values) for keys, values in zip(k.tensor_split(blocks, -2), v.tensor_split(blocks, -2))]
        lse = torch.stack([s.logsumexp(-1, keepdim=True) for s, _ in parts])
        whole = lse.logsumexp(0)
        return sum((part - whole).exp() * (s.softmax(-1) @ values) for part, (s, values) in zip(lse, parts))
    return lambda h: attention(h, kernel)


# ---- losses of h
def cross_entropy(h, smoothing=0.0):
    return F.cross_entropy(h, torch.arange(len(h)), label_smoothing=smoothing)


def cross_entropy_by_hand(h, smoothing=0.0):
    top = h.detach().amax(-1, keepdim=True)
    lse = (h - top).exp().sum(-1).log() + top[:, 0]
    return ((1 - smoothing) * (lse - h.diagonal()) + smoothing * (lse - h.mean(-1))).mean()


def by_vocabulary(h, parts=2, smoothing=0.0):
    """The parts of a vocabulary on their own, then put together."""
    shards = h.tensor_split(parts, -1)
    top = torch.stack([s.detach().amax(-1) for s in shards]).amax(0)
    total = sum((s - top[:, None]).exp().sum(-1) for s in shards)
    target, picked, first = torch.arange(len(h)), 0, 0
    for s in shards:
        inside = (target >= first) & (target < first + s.shape[1])
        picked = picked + torch.where(inside, s[torch.arange(len(h)), (target - first).clamp(0, s.shape[1] - 1)], 0)
        first += s.shape[1]
    lse = total.log() + top
    return ((1 - smoothing) * (lse - picked) + smoothing * (lse - sum(s.sum(-1) for s in shards) / h.shape[1])).mean()


PAIRS = {
    "rms_norm": (rms_norm, rms_by_hand),
    "layer_norm": (layer_norm, layer_norm_by_hand),
    "layer_norm by moments": (layer_norm, layer_norm_by_moments),
    "softmax": (lambda h: h.softmax(-1), softmax_by_hand),
    "log_softmax": (lambda h: h.log_softmax(-1), lambda h: h - h.logsumexp(-1, keepdim=True)),
    "gelu": (F.gelu, gelu_by_hand),
    "tanh gelu": (lambda h: F.gelu(h, approximate="tanh"), tanh_gelu_by_hand),
    "silu": (F.silu, lambda h: h / (1 + (-h).exp())),
    "sigmoid": (lambda h: h * h.sigmoid(), F.silu),
    "attention": (lambda h: attention(h), lambda h: attention(h, attention_by_hand)),
    "causal attention": (lambda h: attention(h, causal), lambda h: attention(h, causal_by_hand)),
    "attention in 2 blocks": (lambda h: attention(h), blockwise(2)),
    "attention in 4 blocks": (lambda h: attention(h), blockwise(4)),
    "attention merged from 2": (lambda h: attention(h), merged(2)),
    "attention merged from 4": (lambda h: attention(h), merged(4)),
    "cross-entropy": (cross_entropy, cross_entropy_by_hand),
    "cross-entropy, smoothed": (lambda h: cross_entropy(h, 0.1), lambda h: cross_entropy_by_hand(h, 0.1)),
    "cross-entropy by vocabulary": (cross_entropy, by_vocabulary),
    "cross-entropy by vocabulary, smoothed": (lambda h: cross_entropy(h, 0.1), lambda h: by_vocabulary(h, 3, 0.1)),
    "an inverse": (lambda h: h * (h * h + 1).reciprocal(), lambda h: h / (1 + h.square())),
}
SLIPS = {
    "another epsilon": (rms_norm, lambda h: rms_by_hand(h, 1e-6)),
    "the sample variance": (layer_norm, lambda h: layer_norm_by_hand(h, 1)),
    "another cubic": (lambda h: F.gelu(h, approximate="tanh"), lambda h: tanh_gelu_by_hand(h, 0.044)),
    "the other gelu": (F.gelu, lambda h: F.gelu(h, approximate="tanh")),
    "silu with the wrong sign": (F.silu, lambda h: h / (1 + h.exp())),
    "no scale": (lambda h: attention(h), lambda h: attention(h, lambda q, k, v: attention_by_hand(q, k, v, 1.0))),
    "not causal": (lambda h: attention(h, causal), lambda h: attention(h)),
    "an online softmax that does not rescale": (lambda h: attention(h), blockwise(2, rescale=False)),
    "no smoothing": (lambda h: cross_entropy(h, 0.1), cross_entropy_by_hand),
    "smoothing over a part": (lambda h: cross_entropy(h, 0.1), lambda h: by_vocabulary(h[:, :-1], 2, 0.1)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_equal(name):
    assert_equal(compare_forward(*PAIRS[name]))


@pytest.mark.parametrize("name", SLIPS)
def test_slip(name):
    assert_not_equal(compare_forward(*SLIPS[name]))
