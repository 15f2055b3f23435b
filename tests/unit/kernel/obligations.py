"""Obligations of sharded training steps, right and wrong: pairs of (reference, parallel) elements for a degree n.

Each function takes (world, n, wrong) and returns the pairs of all elements of all outputs. A wrong variant makes one
mistake that parallel code makes.
"""
from __future__ import annotations

from fractions import Fraction

import numpy as np

from trainverify.kernel import NONNEGATIVE, POSITIVE

HALF = Fraction(1, 2)


# ---- arrays of expressions
def tensor(w, name, *shape, sign=None):
    out = np.empty(shape, dtype=object)
    for index in np.ndindex(*shape):
        out[index] = w.leaf(f"{name}{index}", sign)
    return out


def matmul(w, a, b):
    out = np.empty((a.shape[0], b.shape[1]), dtype=object)
    for i, j in np.ndindex(*out.shape):
        out[i, j] = w.dot(list(a[i]), list(b[:, j]))
    return out


def each(f, *arrays):
    return np.frompyfunc(f, len(arrays), 1)(*arrays)


def total(w, arrays):
    """The elementwise sum of arrays, as an all-reduce makes it."""
    arrays = list(arrays)
    out = np.empty(np.shape(arrays[0]), dtype=object)
    for index in np.ndindex(*out.shape):
        out[index] = w.sum([a[index] for a in arrays])
    return out


def rows_sum(w, a):
    return np.array([w.sum(list(row)) for row in a], dtype=object)[:, None]


def shards(a, n, axis=0):
    return np.split(a, n, axis)


def joined(parts, axis=0):
    return np.concatenate(list(parts), axis)


def paired(reference, parallel):
    out = []
    for r, p in zip(reference, parallel, strict=True):
        r, p = np.asarray(r, dtype=object), np.asarray(p, dtype=object)
        assert r.shape == p.shape
        out += zip(r.reshape(-1), p.reshape(-1), strict=True)
    return out


# ---- gated feed-forward, column then row parallel
def gate(w):
    return lambda a, u: w.uf("silu", a) * u


def mlp(w, x, up, gated, down):
    return matmul(w, each(gate(w), matmul(w, x, up.T), matmul(w, x, gated.T)), down.T)


def mlp_forward(w, n, wrong):
    x, up, gated, down = tensor(w, "x", 2, 4), tensor(w, "u", 2 * n, 4), tensor(w, "g", 2 * n, 4), tensor(w, "d", 4, 2 * n)
    ups, gates, downs = shards(up, n), shards(gated, n), shards(down, n, 1)
    if wrong:                                                  # gates of the ranks in reverse
        gates = gates[::-1]
    return paired([mlp(w, x, up, gated, down)], [total(w, [mlp(w, x, *s) for s in zip(ups, gates, downs, strict=True)])])


def mlp_gradients(w, x, up, gated, down, dy):
    a, u, dh = matmul(w, x, up.T), matmul(w, x, gated.T), matmul(w, dy, down)
    da = each(lambda d, a, u: d * u * w.uf("silu'", a), dh, a, u)
    du = each(lambda d, a: d * w.uf("silu", a), dh, a)
    dx = total(w, [matmul(w, da, up), matmul(w, du, gated)])
    return dx, matmul(w, da.T, x), matmul(w, du.T, x), matmul(w, dy.T, each(gate(w), a, u))


def mlp_backward(w, n, wrong):
    x, dy = tensor(w, "x", 2, 3), tensor(w, "dy", 2, 3)
    up, gated, down = tensor(w, "u", 2 * n, 3), tensor(w, "g", 2 * n, 3), tensor(w, "d", 3, 2 * n)
    ranks = [mlp_gradients(w, x, *s, dy) for s in zip(shards(up, n), shards(gated, n), shards(down, n, 1), strict=True)]
    dx = ranks[0][0] if wrong else total(w, [r[0] for r in ranks])       # the input's gradient is not reduced
    return paired(mlp_gradients(w, x, up, gated, down, dy),
                  [dx, joined(r[1] for r in ranks), joined(r[2] for r in ranks), joined((r[3] for r in ranks), 1)])


# ---- attention
def softmax(w, z):
    out = np.empty_like(z)
    for i, row in enumerate(z):
        top = w.max(list(row))
        e = [w.exp(t - top) for t in row]
        inverse = w.inv(w.sum(e))
        out[i] = [t * inverse for t in e]
    return out


def attention(w, q, k, v, mask=None):
    z = matmul(w, q, k.T) * HALF
    return matmul(w, softmax(w, z if mask is None else z + mask), v)


def grouped_heads(w, n, wrong):
    q, k, v, mask = tensor(w, "q", 2 * n, 2, 2), tensor(w, "k", n, 2, 2), tensor(w, "v", n, 2, 2), tensor(w, "m", 2, 2)
    right = [attention(w, q[h], k[h // 2], v[h // 2], mask) for h in range(2 * n)]
    head = (lambda h: h % n) if wrong else (lambda h: h // 2)  # h % groups for h // group size
    return paired(right, [attention(w, q[h], k[head(h)], v[head(h)], mask) for h in range(2 * n)])


def attention_block(w, x, wq, wk, wv, wo, heads, groups):
    q, k, v = matmul(w, x, wq.T), matmul(w, x, wk.T), matmul(w, x, wv.T)
    cut = lambda a, h: a[:, 2 * h:2 * h + 2]  # noqa: E731
    outs = [attention(w, cut(q, h), cut(k, h * groups // heads), cut(v, h * groups // heads)) for h in range(heads)]
    return matmul(w, joined(outs, 1), wo.T)


def grouped_attention(w, n, wrong):
    x, wq, wk, wv, wo = (tensor(w, name, *s) for name, s in {"x": (2, 3), "q": (4 * n, 3), "k": (2 * n, 3), "v": (2 * n, 3), "o": (3, 4 * n)}.items())
    vs = shards(wv, n)[::-1] if wrong else shards(wv, n)
    parts = [attention_block(w, x, *s, 2, 1) for s in zip(shards(wq, n), shards(wk, n), vs, shards(wo, n, 1), strict=True)]
    return paired([attention_block(w, x, wq, wk, wv, wo, 2 * n, n)], [total(w, parts)])


def ring_attention(w, n, wrong):
    """Online softmax over blocks of keys."""
    q, k, v, mask = tensor(w, "q", 1, 2), tensor(w, "k", 2 * n, 2), tensor(w, "v", 2 * n, 2), tensor(w, "m", 1, 2 * n)
    top = scale = out = None
    for kb, vb, mb in zip(shards(k, n), shards(v, n), shards(mask, n, 1), strict=True):
        z = (matmul(w, q, kb.T) * HALF + mb)[0]
        new = w.max([*([] if top is None else [top]), *z])
        e = [w.exp(t - new) for t in z]
        part = np.array([w.dot(e, list(vb[:, c])) for c in range(2)], dtype=object)
        if top is None:
            scale, out = w.sum(e), part
        else:
            fade = w.lift(1) if wrong else w.exp(top - new)    # the running sum is not rescaled
            scale, out = scale * fade + w.sum(e), out * fade + part
        top = new
    return paired([attention(w, q, k, v, mask)], [(out * w.inv(scale))[None]])


def merge_by_logsumexp(w, n, wrong):
    """Normalised blocks merged by their logsumexp."""
    s, v = tensor(w, "s", 1, 2 * n), tensor(w, "v", 2 * n, 2)
    out = lse = None
    for sb, vb in zip(shards(s[0], n), shards(v, n), strict=True):
        top = w.max(list(sb))
        e = [w.exp(t - top) for t in sb]
        block = np.array([w.dot(e, list(vb[:, c])) * w.inv(w.sum(e)) for c in range(2)], dtype=object)
        own = top + w.log(w.sum(e))
        if out is None:
            out, lse = block, own
        else:
            both = w.log(w.exp(lse) + w.exp(own))
            out, lse = out * w.exp(lse - both) + block * w.exp((lse if wrong else own) - both), both
    return paired([matmul(w, softmax(w, s), v)], [out[None]])


def ring_gradients(w, n, wrong):
    """Backward of flash attention from the saved logsumexp, keys in blocks."""
    q, k, v, do = tensor(w, "q", 2, 2), tensor(w, "k", 2 * n, 2), tensor(w, "v", 2 * n, 2), tensor(w, "do", 2, 2)
    p, dp = softmax(w, matmul(w, q, k.T) * HALF), matmul(w, do, v.T)
    ds = p * (dp - rows_sum(w, p * dp))
    right = [matmul(w, ds, k) * HALF, matmul(w, ds.T, q) * HALF, matmul(w, p.T, do)]
    z = matmul(w, q, k.T) * HALF
    top = np.array([w.max(list(row)) for row in z], dtype=object)[:, None]
    lse = top + each(w.log, rows_sum(w, each(w.exp, z - top)))
    delta = rows_sum(w, matmul(w, p, v) * do)
    dq, dk, dv = [], [], []
    for kb, vb in zip(shards(k, n), shards(v, n), strict=True):
        pb = each(w.exp, matmul(w, q, kb.T) * HALF - lse)
        d = pb * (matmul(w, do, vb.T) - (0 * delta if wrong else delta))
        dq, dk, dv = [*dq, matmul(w, d, kb) * HALF], [*dk, matmul(w, d.T, q) * HALF], [*dv, matmul(w, pb.T, do)]
    return paired(right, [total(w, dq), joined(dk), joined(dv)])


# ---- root mean square norm
def rms(w, x, g, eps):
    factor = each(lambda s: w.inv(w.sqrt(s)), rows_sum(w, x * x) * Fraction(1, x.shape[1]) + eps)
    return x * factor * g


def rms_gradients(w, x, g, eps, dy):
    factor = each(lambda s: w.inv(w.sqrt(s)), rows_sum(w, x * x) * Fraction(1, x.shape[1]) + eps)
    dg = dy * g
    dx = dg * factor - x * factor * factor * factor * rows_sum(w, dg * x) * Fraction(1, x.shape[1])
    return dx, total(w, list(dy * x * factor))


def norm_inputs(w, rows, columns):
    return tensor(w, "x", rows, columns), tensor(w, "g", columns), w.leaf("eps", POSITIVE)


def rms_by_tokens(w, n, wrong):
    x, g, eps = norm_inputs(w, 2 * n, 4)
    parts = shards(x, n)[::-1] if wrong else shards(x, n)
    return paired([rms(w, x, g, eps)], [joined(rms(w, part, g, eps) for part in parts)])


def rms_by_features(w, n, wrong):
    x, g, eps = norm_inputs(w, 2, 2 * n)
    squares = total(w, [rows_sum(w, c * c) for c in shards(x, n, 1)])
    width = 2 if wrong else 2 * n                              # divided by the local width
    factor = each(lambda s: w.inv(w.sqrt(s * Fraction(1, width) + eps)), squares)
    return paired([rms(w, x, g, eps)], [joined((c * factor * gs for c, gs in zip(shards(x, n, 1), shards(g, n), strict=True)), 1)])


def rms_gradients_by_tokens(w, n, wrong):
    x, g, eps = norm_inputs(w, 2 * n, 3)
    dy = tensor(w, "dy", 2 * n, 3)
    ranks = [rms_gradients(w, a, g, eps, b) for a, b in zip(shards(x, n), shards(dy, n), strict=True)]
    dg = total(w, [r[1] for r in ranks])
    return paired(rms_gradients(w, x, g, eps, dy), [joined(r[0] for r in ranks), dg * Fraction(1, n) if wrong else dg])


def rms_gradients_fused(w, n, wrong):
    x, g, eps = norm_inputs(w, 2, 3)
    dy, fused = tensor(w, "dy", 2, 3), []
    for row, d in zip(x, dy * g, strict=True):
        v = w.dot(list(row), list(row)) * Fraction(1, 3) + eps
        c = w.dot(list(d), list(row)) * w.inv(v * (1 if wrong else 3))
        fused.append([(a - b * c) * w.inv(w.sqrt(v)) for a, b in zip(d, row, strict=True)])
    return paired([rms_gradients(w, x, g, eps, dy)[0]], [fused])


# ---- the rest of a step
def reduce_scatter_gather(w, n, wrong):
    parts, weight = [tensor(w, f"p{r}", 2 * n, 3) for r in range(n)], tensor(w, "w", 3, 2)
    scattered = [total(w, [shards(p, n)[r] for p in parts]) for r in range(n)]
    if wrong:                                                  # gathered one rank off
        scattered = scattered[1:] + scattered[:1]
    return paired([matmul(w, total(w, parts), weight)], [matmul(w, joined(scattered), weight)])


def vocab_embedding(w, n, wrong):
    table, zero = tensor(w, "e", 2 * n, 2), np.full(2, w.lift(0), dtype=object)
    parts = [[shard[(t - 2 * r) if not (wrong and t % 3 == 1) else (t + 1) % 2] if t // 2 == r else zero for t in range(2 * n)]
             for r, shard in enumerate(shards(table, n))]
    return paired([table], [total(w, [np.array(p, dtype=object) for p in parts])])


def vocab_cross_entropy(w, n, wrong):
    """Loss and gradient of the logits, for an arbitrary row of target weights."""
    z, t, g, out = tensor(w, "z", 2, 2 * n), tensor(w, "t", 2, 2 * n), w.leaf("g"), []
    for row, target in zip(z, t, strict=True):
        top = w.max(list(row))
        lse = top + w.log(w.sum([w.exp(a - top) for a in row]))
        weight = w.sum(list(target))
        out += [w.sum([(lse - a) * b for a, b in zip(row, target, strict=True)]), *((w.exp(a - lse) * weight - b) * g for a, b in zip(row, target, strict=True))]
    got = []
    for row, target in zip(z, t, strict=True):
        parts, targets = shards(row, n), shards(target, n)
        tops = [w.max(list(p)) for p in parts]
        top = w.max(tops)
        e = [[w.exp(a - (own if wrong else top)) for a in p] for p, own in zip(parts, tops, strict=True)]      # wrong: own maximum of each rank
        scale, weight = w.sum([w.sum(p) for p in e]), w.sum([w.sum(list(p)) for p in targets])
        picked = w.sum([w.dot([a - top for a in p], list(q)) for p, q in zip(parts, targets, strict=True)])
        got += [w.log(scale) * weight - picked]
        got += [(a / scale * weight - b) * g for p, q in zip(e, targets, strict=True) for a, b in zip(p, q, strict=True)]
    return paired([out], [got])


def experts(w, n, wrong):
    x, up, down, gates = tensor(w, "x", 2, 2), tensor(w, "u", 2 * n, 2, 2), tensor(w, "d", 2 * n, 2, 2), tensor(w, "g", 2, 2 * n)
    expert = lambda e: matmul(w, each(lambda a: w.uf("silu", a), matmul(w, x, up[e].T)), down[e].T) * gates[:, e:e + 1]  # noqa: E731
    local = [total(w, [expert(2 * r), expert(2 * r + (0 if wrong else 1))]) for r in range(n)]
    return paired([total(w, [expert(e) for e in range(2 * n)])], [total(w, local)])


def adamw(w, n, wrong):
    p, g, m = (tensor(w, name, 2 * n) for name in "pgm")
    v = tensor(w, "v", 2 * n, sign=NONNEGATIVE)
    lr, b1, decay = w.leaf("lr"), w.leaf("b1"), w.leaf("wd")
    b2, eps, c1, c2 = (w.leaf(name, POSITIVE) for name in ("b2", "eps", "c1", "c2"))
    rest = w.leaf("1-b2", POSITIVE)

    def step(p, g, m, v, c2):
        m = m * b1 + g * (1 - b1)
        v = v * b2 + g * g * rest
        root = each(lambda a: w.sqrt(a) / w.sqrt(c2) + eps, v)
        return p * (1 - lr * decay) - each(lambda a, b: lr * (a / c1) / b, m, root), m, v

    ranks = [step(*s, c1 if wrong else c2) for s in zip(*(shards(a, n) for a in (p, g, m, v)), strict=True)]
    return paired(step(p, g, m, v, c2), [joined(r[i] for r in ranks) for i in range(3)])


def gradient_accumulation(w, n, wrong):
    x, dy = tensor(w, "x", 2 * n, 3), tensor(w, "dy", 2 * n, 2)
    parts = [matmul(w, (d * HALF).T, c) * Fraction(1, 1 if wrong else n) for c, d in zip(shards(x, n), shards(dy, n), strict=True)]
    return paired([matmul(w, (dy * Fraction(1, 2 * n)).T, x)], [total(w, parts)])


DEGREES = {
    mlp_forward: (2, 4, 8), mlp_backward: (2, 4, 8), grouped_heads: (2, 4), grouped_attention: (2, 4), rms_by_tokens: (2, 8), rms_by_features: (2, 8),
    rms_gradients_by_tokens: (2, 8), rms_gradients_fused: (2,), reduce_scatter_gather: (2, 8), vocab_embedding: (2, 8), vocab_cross_entropy: (2, 4, 8),
    ring_attention: (2, 4), merge_by_logsumexp: (2, 4), ring_gradients: (2, 4), experts: (2, 4), adamw: (2, 8), gradient_accumulation: (2, 8),
}
ALL = [(f, n) for f, degrees in DEGREES.items() for n in degrees]
