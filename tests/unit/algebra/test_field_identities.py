"""What real programs write in two ways: equal in the field, and different where they differ."""
import math
from fractions import Fraction

import pytest
import torch

from .fieldkit import (agree, columns, logsumexp, mean, norm, one, rows, sigmoid, softmax, square, tanh, through_memory)

SEEDS = (3, 4, 5)


def shifted_softmax(m, x):
    e = m.exp(through_memory(m, m.sub(x, m.amax(x, [-1], True))))
    return m.div(e, m.sum(e, [-1], True))


def online(m, x, w, blocks):
    """softmax(x) @ w, block by block with running maximum and sum."""
    size = x.shape[1] // blocks
    peak = total = out = None
    for b in range(blocks):
        part, v = columns(m, x, b * size, (b + 1) * size), rows(m, w, b * size, (b + 1) * size)
        top = m.amax(part, [-1], True)
        new = top if peak is None else m.maximum(peak, top)
        e = m.exp(m.sub(part, new))
        if peak is None:
            total, out = m.sum(e, [-1], True), m.matmul(e, v)
        else:
            keep = m.exp(m.sub(peak, new))
            total = m.add(m.mul(total, keep), m.sum(e, [-1], True))
            out = m.add(m.mul(out, keep), m.matmul(e, v))
        peak = through_memory(m, new)
        total, out = through_memory(m, total), through_memory(m, out)
    return m.div(out, total)


def merged(m, x, w, blocks, how):
    """softmax(x) @ w from per-block outputs and logsumexps (ring attention)."""
    size = x.shape[1] // blocks
    out = lse = None
    for b in range(blocks):
        part, v = columns(m, x, b * size, (b + 1) * size), rows(m, w, b * size, (b + 1) * size)
        o, s = m.matmul(softmax(m, part), v), logsumexp(m, part)
        if out is None:
            out, lse = o, s
        elif how == "sigmoid":
            weight = sigmoid(m, m.sub(s, lse))
            out = m.sub(out, m.mul(weight, m.sub(out, o)))
            lse = m.add(lse, m.log(m.add(one(m), m.exp(m.sub(s, lse)))))
        else:
            new = m.log(m.add(m.exp(lse), m.exp(s)))
            out = m.add(m.mul(out, m.exp(m.sub(lse, new))), m.mul(o, m.exp(m.sub(s, new))))
            lse = new
        out, lse = through_memory(m, out), through_memory(m, lse)
    return [out, lse]


def attention(m, x, w):
    return [m.matmul(softmax(m, x), w), logsumexp(m, x)]


def log_softmax(m, x):
    return m.sub(x, logsumexp(m, x))


def rms_fused_backward(m, x, w, g):
    r = m.pow(m.add(mean(m, square(m, x)), m.const(1e-5)), -0.5)
    xh, gw = m.mul(x, r), m.mul(g, w)
    return [m.mul(xh, w), m.mul(r, m.sub(gw, m.mul(xh, mean(m, m.mul(gw, xh))))), m.sum(m.mul(g, xh), [0])]


def rms_composed_backward(m, x, w, g):
    v = m.add(mean(m, square(m, x)), m.const(1e-5))
    r = through_memory(m, m.inv(m.sqrt(v)))
    gw = m.mul(g, w)
    dr = m.sum(m.mul(gw, x), [-1], True)
    dv = m.mul(m.scale(dr, -0.5), m.pow(r, 3))
    dx = m.add(m.mul(gw, r), m.mul(m.scale(x, Fraction(2, x.shape[-1])), dv))
    return [m.mul(m.mul(x, r), w), dx, m.sum(m.mul(g, m.mul(x, r)), [0])]


def layer_norm_fused(m, x, w, g):
    c = m.sub(x, mean(m, x))
    r = m.pow(m.add(mean(m, square(m, c)), m.const(1e-5)), -0.5)
    xh, gw = m.mul(c, r), m.mul(g, w)
    return [m.mul(xh, w), m.mul(r, m.sub(m.sub(gw, mean(m, gw)), m.mul(xh, mean(m, m.mul(gw, xh)))))]


def layer_norm_composed(m, x, w, g):
    """With sqrt and division, whose backward divides by the root twice."""
    n = x.shape[-1]
    c = m.sub(x, mean(m, x))
    s = through_memory(m, m.sqrt(m.add(m.sub(mean(m, square(m, x)), square(m, mean(m, x))), m.const(1e-5))))
    y, gw = m.div(c, s), m.mul(g, w)
    ds = m.sum(m.neg(m.mul(gw, m.div(y, s))), [-1], True)
    dv = m.div(ds, m.scale(s, 2))
    dc = m.add(m.div(gw, s), m.mul(m.scale(c, Fraction(2, n)), dv))
    return [m.mul(y, w), m.sub(dc, mean(m, dc))]


def gelu_tanh(m, x, constant=0.044715):
    u = m.scale(m.add(x, m.scale(m.pow(x, 3), constant)), math.sqrt(2 / math.pi))
    return m.mul(m.scale(x, 0.5), m.add(one(m), tanh(m, u)))


def gelu_tanh_by_sigmoid(m, x):
    u = m.scale(m.mul(x, m.add(one(m), m.scale(m.mul(x, x), 0.044715))), 2 * math.sqrt(2 / math.pi))
    return m.mul(x, sigmoid(m, u))


def gelu_backward_fused(m, x):
    density = m.scale(m.exp(m.scale(m.mul(x, x), -0.5)), 1 / math.sqrt(2 * math.pi))
    return m.add(m.scale(m.add(one(m), m.erf(m.scale(x, 1 / math.sqrt(2)))), 0.5), m.mul(x, density))


def gelu_backward_composed(m, x):
    u = m.div(x, m.const(math.sqrt(2)))
    derf = m.scale(m.exp(m.neg(square(m, u))), 2 / math.sqrt(math.pi))
    return m.add(m.scale(m.add(one(m), m.erf(u)), 0.5), m.mul(m.scale(x, 0.5), m.div(derf, m.const(math.sqrt(2)))))


def nested(f):
    """A second softmax over what the first, computed by f, gives."""
    return lambda m, x, w: softmax(m, m.matmul(through_memory(m, f(m, x, w)), columns(m, w, 0, 6)))


EQUAL = {
    "softmax shift": (softmax, shifted_softmax, [(4, 8)]),
    "softmax with its scale split": (
        lambda m, q, k: softmax(m, m.scale(m.matmul(q, k), 1 / 8 ** 0.5)),
        lambda m, q, k: softmax(m, m.matmul(m.scale(q, 8 ** -0.25), m.scale(k, 8 ** -0.25))), [(4, 6), (6, 5)]),
    "online softmax, 2 blocks": (lambda m, x, w: attention(m, x, w)[0], lambda m, x, w: online(m, x, w, 2), [(4, 8), (8, 8)]),
    "online softmax, 4 blocks": (lambda m, x, w: attention(m, x, w)[0], lambda m, x, w: online(m, x, w, 4), [(4, 8), (8, 8)]),
    "logsumexp merge, 2 blocks": (attention, lambda m, x, w: merged(m, x, w, 2, "exp"), [(4, 8), (8, 8)]),
    "logsumexp merge, 4 blocks": (attention, lambda m, x, w: merged(m, x, w, 4, "exp"), [(4, 8), (8, 8)]),
    "sigmoid merge, 4 blocks": (attention, lambda m, x, w: merged(m, x, w, 4, "sigmoid"), [(4, 8), (8, 8)]),
    "nested over split sums": (
        nested(lambda m, x, w: m.matmul(softmax(m, x), w)),
        nested(lambda m, x, w: m.add(m.matmul(columns(m, softmax(m, x), 0, 4), rows(m, w, 0, 4)),
                                     m.matmul(columns(m, softmax(m, x), 4, 8), rows(m, w, 4, 8)))), [(4, 8), (8, 8)]),
    "nested over online softmax": (nested(lambda m, x, w: attention(m, x, w)[0]), nested(lambda m, x, w: online(m, x, w, 4)), [(4, 8), (8, 8)]),
    "nested over sigmoid merge": (nested(lambda m, x, w: attention(m, x, w)[0]),
                                  nested(lambda m, x, w: merged(m, x, w, 2, "sigmoid")[0]), [(4, 8), (8, 8)]),
    "nested shift": (lambda m, x, w: softmax(m, m.matmul(softmax(m, x), w)),
                     lambda m, x, w: shifted_softmax(m, through_memory(m, m.matmul(shifted_softmax(m, x), w))), [(4, 8), (8, 8)]),
    "log_softmax and log of softmax": (log_softmax, lambda m, x: m.log(softmax(m, x)), [(4, 8)]),
    "log_softmax with shift": (log_softmax, lambda m, x: m.sub(m.sub(x, m.amax(x, [-1], True)), logsumexp(m, m.sub(x, m.amax(x, [-1], True)))), [(4, 8)]),
    "softmax from log_softmax": (softmax, lambda m, x: m.exp(through_memory(m, log_softmax(m, x))), [(4, 8)]),
    "vocab-parallel cross entropy": (
        lambda m, x: mean(m, m.neg(columns(m, log_softmax(m, x), 2, 3)), (0,)),
        lambda m, x: mean(m, (lambda s, top: m.sub(m.log(m.add(m.sum(m.exp(m.sub(columns(m, x, 0, 4), top)), [-1], True),
                                                               m.sum(m.exp(m.sub(columns(m, x, 4, 8), top)), [-1], True))), m.sub(s, top)))(
            columns(m, x, 2, 3), m.amax(x, [-1], True)), (0,)), [(4, 8)]),
    "z-loss": (lambda m, x: square(m, logsumexp(m, x)),
               lambda m, x: (lambda t: square(m, m.add(t, logsumexp(m, m.sub(x, t)))))(m.amax(x, [-1], True)), [(4, 8)]),
    "entropy": (lambda m, x: m.neg(m.sum(m.mul(softmax(m, x), log_softmax(m, x)), [-1])),
                lambda m, x: m.sub(logsumexp(m, x, False), m.sum(m.mul(softmax(m, x), x), [-1])), [(4, 8)]),
    "label smoothing": (
        lambda m, x: m.add(m.scale(columns(m, log_softmax(m, x), 1, 2), -0.9), m.scale(mean(m, log_softmax(m, x)), -0.1)),
        lambda m, x: m.sub(logsumexp(m, x), m.add(m.scale(columns(m, x, 1, 2), 0.9), m.scale(mean(m, x), 1 - 0.9))), [(4, 8)]),
    "sigmoid": (sigmoid, lambda m, x: m.div(m.exp(x), m.add(m.exp(x), one(m))), [(9,)]),
    "tanh": (tanh, lambda m, x: m.div(m.sub(m.exp(x), m.exp(m.neg(x))), m.add(m.exp(x), m.exp(m.neg(x)))), [(9,)]),
    "logsigmoid": (lambda m, x: m.neg(m.log(m.add(one(m), m.exp(m.neg(x))))), lambda m, x: m.log(sigmoid(m, x)), [(9,)]),
    "softplus": (lambda m, x: m.log(m.add(one(m), m.exp(x))), lambda m, x: m.add(x, m.log(m.add(one(m), m.exp(m.neg(x))))), [(9,)]),
    "gelu tanh": (gelu_tanh, gelu_tanh_by_sigmoid, [(9,)]),
    "gelu backward": (gelu_backward_fused, gelu_backward_composed, [(9,)]),
    "norm of norms": (norm, lambda m, x: norm(m, m.stack([through_memory(m, norm(m, rows(m, x, 0, 3))), norm(m, rows(m, x, 3, 6))])), [(6, 4)]),
    "norm of norms of norms": (norm, lambda m, x: norm(m, m.stack([norm(m, m.stack([norm(m, rows(m, x, i, i + 1)), norm(m, rows(m, x, i + 1, i + 3))]))
                                                                   for i in (0, 3)])), [(6, 4)]),
    "norm of replicated parts": (
        norm, lambda m, x: m.pow(m.add(*[m.pow(through_memory(m, m.div(norm(m, x), m.const(math.sqrt(2)))), 2)] * 2), 0.5), [(6, 4)]),
    "squared norms all-reduced": (norm, lambda m, x: m.pow(m.add(m.pow(norm(m, rows(m, x, 0, 3)), 2.0), m.pow(norm(m, rows(m, x, 3, 6)), 2.0)), 0.5), [(6, 4)]),
    "clip by norm of norms": (
        lambda m, x: m.mul(x, m.minimum(m.div(m.const(0.5), m.add(norm(m, x), m.const(1e-6))), one(m))),
        lambda m, x: m.mul(x, m.neg(m.maximum(m.neg(m.div(m.const(0.5), m.add(norm(m, m.stack([norm(m, rows(m, x, 0, 2)), norm(m, rows(m, x, 2, 6))])),
                                                                              m.const(1e-6)))), m.const(-1)))), [(6, 4)]),
    "RMSNorm": (rms_fused_backward, rms_composed_backward, [(4, 8), (8,), (4, 8)]),
    "LayerNorm": (layer_norm_fused, layer_norm_composed, [(4, 8), (8,), (4, 8)]),
    "variance": (lambda m, x: mean(m, square(m, m.sub(x, mean(m, x)))), lambda m, x: m.sub(mean(m, square(m, x)), square(m, mean(m, x))), [(4, 8)]),
    "x / |x|": (lambda m, x: m.div(x, m.sqrt(m.sum(square(m, x), [-1], True))), lambda m, x: m.mul(x, m.pow(m.sum(m.pow(x, 2), [-1], True), -0.5)), [(4, 8)]),
    "root of a quotient": (lambda m, x: m.sqrt(m.div(square(m, x), m.const(0.3))), lambda m, x: m.div(m.sqrt(square(m, x)), m.const(math.sqrt(0.3))), [(9,)]),
    "power 3/2": (lambda m, x: m.pow(x, 1.5), lambda m, x: m.mul(x, m.sqrt(x)), [(9,)]),
    "relu": (lambda m, x: m.maximum(x, m.const(0)), lambda m, x: m.mul(x, m.compare("gt", x, m.const(0))), [(9,)]),
    "exp of log": (lambda m, x: m.div(m.exp(m.log(m.sum(m.exp(x)))), m.sum(m.exp(x))), lambda m, x: one(m), [(9,)]),
    "Adam's denominator": (
        lambda m, g, v: m.div(g, m.add(m.div(m.sqrt(v), m.const((1 - 0.999 ** 3) ** 0.5)), m.const(1e-8))),
        lambda m, g, v: (lambda root, step: m.scale(m.div(g, m.add(m.div(m.sqrt(v), m.mul(root, step)), m.div(m.const(1e-8), step))), -1 / 1e-3))(
            m.sqrt(m.sub(one(m), m.power(m.const(0.999), m.data(torch.tensor(3.0))))), m.const(-1e-3)), [(9,), (9,)]),
}
DIFFERENT = {
    "scale of softmax": (softmax, lambda m, x: softmax(m, m.scale(x, 1.0001)), [(4, 8)]),
    "eps": (lambda m, x: m.pow(m.add(x, m.const(1e-5)), -0.5), lambda m, x: m.pow(m.add(x, m.const(1e-6)), -0.5), [(9,)]),
    "eps inside and outside": (lambda m, x: m.add(m.sqrt(x), m.const(1e-8)), lambda m, x: m.sqrt(m.add(x, m.const(1e-8))), [(9,)]),
    "maximum of one block": (lambda m, x, w: online(m, x, w, 2),
                             lambda m, x, w: m.matmul(m.div(m.exp(x), m.sum(m.exp(columns(m, x, 0, 4)), [-1], True)), w), [(4, 8), (8, 8)]),
    "merge without rescaling": (attention, lambda m, x, w: [m.scale(m.add(attention(m, columns(m, x, 0, 4), rows(m, w, 0, 4))[0],
                                                                          attention(m, columns(m, x, 4, 8), rows(m, w, 4, 8))[0]), 0.5),
                                                            logsumexp(m, x)], [(4, 8), (8, 8)]),
    "logsumexp of one block": (logsumexp, lambda m, x: logsumexp(m, columns(m, x, 0, 7)), [(4, 8)]),
    "sum of norms": (norm, lambda m, x: m.add(norm(m, rows(m, x, 0, 3)), norm(m, rows(m, x, 3, 6))), [(6, 4)]),
    "clip that forgets a part": (
        lambda m, x: m.mul(x, m.minimum(m.inv(norm(m, x)), one(m))), lambda m, x: m.mul(x, m.minimum(m.inv(norm(m, rows(m, x, 0, 3))), one(m))), [(6, 4)]),
    "clip left out": (lambda m, x: m.mul(x, m.minimum(m.inv(norm(m, x)), one(m))), lambda m, x: x, [(6, 4)]),
    "RMSNorm's backward without its mean": (
        lambda m, x, w, g: rms_fused_backward(m, x, w, g)[1],
        lambda m, x, w, g: m.mul(m.mul(g, w), m.pow(m.add(mean(m, square(m, x)), m.const(1e-5)), -0.5)), [(4, 8), (8,), (4, 8)]),
    "gelu's constant": (gelu_tanh, lambda m, x: gelu_tanh(m, x, 0.0447), [(9,)]),
    "tanh and erf gelu": (gelu_tanh, lambda m, x: m.mul(m.scale(x, 0.5), m.add(one(m), m.erf(m.scale(x, 2 ** -0.5)))), [(9,)]),
    "max and min": (lambda m, x, y: m.maximum(x, y), lambda m, x, y: m.minimum(x, y), [(9,), (9,)]),
    "threshold": (lambda m, x: m.where(m.compare("gt", x, m.const(0)), x, m.const(0)),
                  lambda m, x: m.where(m.compare("gt", x, m.const(1e-4)), x, m.const(0)), [(9,)]),
    "log of the negative": (lambda m, x: x, lambda m, x: m.log(m.neg(m.exp(x))), [(9,)]),
    "beta of Adam": (lambda m, v: m.div(m.sqrt(v), m.const((1 - 0.999 ** 3) ** 0.5)), lambda m, v: m.div(m.sqrt(v), m.const((1 - 0.999 ** 2) ** 0.5)), [(9,)]),
    "second token's loss": (lambda m, x: columns(m, log_softmax(m, x), 2, 3), lambda m, x: columns(m, log_softmax(m, x), 3, 4), [(4, 8)]),
}


@pytest.mark.parametrize("name", EQUAL)
def test_equal_programs_meet(name):
    reference, parallel, shapes = EQUAL[name]
    assert all(agree(reference, parallel, *shapes, seed=s) for s in SEEDS)


@pytest.mark.parametrize("name", EQUAL)
def test_they_meet_in_the_other_order(name):
    reference, parallel, shapes = EQUAL[name]
    assert agree(parallel, reference, *shapes)


@pytest.mark.parametrize("name", DIFFERENT)
def test_wrong_variants_differ(name):
    reference, parallel, shapes = DIFFERENT[name]
    assert not any(agree(reference, parallel, *shapes, seed=s) for s in SEEDS)
