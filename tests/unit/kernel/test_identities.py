"""Identities between fused and composed forms that correct parallel programs rely on, each with a wrong neighbour."""
from fractions import Fraction

import pytest

from trainverify.kernel import NONNEGATIVE, POSITIVE, Proved, Refuted

from .expr import World

EPS = Fraction(1, 10**5)


def norm_parts(w, x):
    mean = w.sum(x) / len(x)
    centred = [a - mean for a in x]
    return centred, w.inv(w.sqrt(w.dot(centred, centred) / len(x) + EPS))


def layer_norm(w, wrong):
    """Two-pass variance against the mean of squares minus the squared mean."""
    x, g, b = w.leaves("x", 4), w.leaves("g", 4), w.leaves("b", 4)
    centred, r = norm_parts(w, x)
    mean, squares = w.sum(x) / 4, w.dot(x, x) / (3 if wrong else 4)
    fused = w.inv(w.sqrt(squares - mean * mean + EPS))
    return [(c * r * s + t, (a - mean) * fused * s + t) for a, c, s, t in zip(x, centred, g, b)]


def layer_norm_backward(w, wrong):
    """The chain rule through mean and variance against the fused formula."""
    x, dy = w.leaves("x", 3), w.leaves("dy", 3)
    centred, r = norm_parts(w, x)
    hat = [c * r for c in centred]
    dr = w.dot(dy, centred)
    dvar = dr * r * r * r * Fraction(-1, 2)
    dcentred = [d * r + dvar * 2 * c / 3 for d, c in zip(dy, centred)]
    composed = [d - w.sum(dcentred) / 3 for d in dcentred]
    m1, m2 = w.sum(dy) / 3, w.dot(dy, hat) / (2 if wrong else 3)
    return [(a, (d - m1 - h * m2) * r) for a, d, h in zip(composed, dy, hat)]


def rms_norm_backward(w, wrong):
    x, g, dy = w.leaves("x", 4), w.leaves("g", 4), w.leaves("dy", 4)
    v = w.dot(x, x) / 4 + EPS
    r = v ** Fraction(-1, 2)
    d = [a * b for a, b in zip(g, dy)]
    dv = w.sum([a * b for a, b in zip(d, x)]) * Fraction(-1, 2) * v ** Fraction(-3, 2)
    composed = [a * r + dv * b / (4 if wrong else 2) for a, b in zip(d, x)]
    s = w.dot(d, x) / (v * 4)
    return [(c, (a - b * s) / w.sqrt(v)) for c, a, b in zip(composed, d, x)]


def softmax(w, z, shifted=True):
    top = w.max(z) if shifted else w.lift(0)
    e = [w.exp(a - top) for a in z]
    return [a / w.sum(e) for a in e]


def softmax_shift(w, wrong):
    z = w.leaves("z", 4)
    other = softmax(w, [a * 2 for a in z] if wrong else z, shifted=False)
    log_softmax = [w.exp(a - w.log(w.sum([w.exp(b) for b in z]))) for a in z]
    return list(zip(softmax(w, z), other)) + list(zip(softmax(w, z), log_softmax))


def softmax_backward(w, wrong):
    """Through exp and sum against p * (d - sum(p * d)) from the saved output."""
    z, d = w.leaves("z", 3), w.leaves("d", 3)
    e = [w.exp(a) for a in z]
    total = w.sum(e)
    dsum = -w.dot(d, e) / (total * total)
    p = softmax(w, z)
    dot = w.dot(p, d) if not wrong else w.sum(d)
    return [((a / total + dsum) * b, c * (a - dot)) for a, b, c in zip(d, e, p)]


def online_merge(blocks):
    def f(w, wrong):
        """Running maximum, sum and output over blocks."""
        z, v = w.leaves("z", 2 * blocks), w.leaves("v", 2 * blocks)
        reference = w.dot(softmax(w, z), v)
        top, scale, out = None, w.lift(0), w.lift(0)
        for k in range(0, 2 * blocks, 2):
            new = w.max(z[k:k + 2] + ([] if top is None else [top]))
            e = [w.exp(a - new) for a in z[k:k + 2]]
            fade = w.lift(0) if top is None else w.exp(top - new)
            out = out * (w.lift(1) if wrong else fade) + w.dot(e, v[k:k + 2])
            scale, top = scale * fade + w.sum(e), new
        return [(reference, out / scale)]
    return f


def logsumexp_merge(blocks):
    def f(w, wrong):
        z = w.leaves("z", 2 * blocks)
        lse = lambda xs: (lambda top: top + w.log(w.sum([w.exp(a - top) for a in xs])))(w.max(xs))  # noqa: E731
        parts = [lse(z[k:k + 2]) for k in range(0, 2 * blocks, 2)]
        whole = lse(z)
        pieces = [w.exp(a - whole) for a in parts]
        # gradients of the blocks, weighted by their share of the whole
        return [(whole, w.sum(parts) if wrong else lse(parts)), (w.exp(z[0] - whole), w.exp(z[0] - parts[0]) * pieces[0])]
    return f


def label_smoothing(w, wrong):
    """Cross-entropy over a split vocabulary with smoothing, and its gradient."""
    z, s, size = w.leaves("z", 6), Fraction(1, 10), 6
    top = w.max(z)
    logs = [a - top - w.log(w.sum([w.exp(b - top) for b in z])) for a in z]
    loss = -(logs[1] * (1 - s)) - w.sum(logs) * s / size
    gradient = [w.exp(a) - ((1 - s) if k == 1 else 0) - s / size for k, a in enumerate(logs)]
    ranks = [z[:3], z[3:]]
    top2 = w.max([w.max(r) for r in ranks])
    e = [[w.exp(a - top2) for a in r] for r in ranks]
    scale = w.sum([w.sum(r) for r in e])
    lse = top2 + w.log(scale)
    mean = w.sum([w.sum(r) for r in ranks]) / (3 if wrong else size)
    loss2 = (1 - s) * (lse - z[1]) + s * (lse - mean)
    gradient2 = [a / scale - s / size - ((1 - s) if k == 1 else 0) for k, a in enumerate(e[0] + e[1])]
    return [(loss, loss2), *zip(gradient, gradient2)]


def adamw_bias_correction(w, wrong):
    """sqrt(v / c2) against sqrt(v) / sqrt(c2), the step size taken out, and decay before or inside the update."""
    p, g, m, lr, wd = (w.leaf(x) for x in ("p", "g", "m", "lr", "wd"))
    v = w.leaf("v", NONNEGATIVE)
    b1, b2, eps = Fraction(9, 10), Fraction(999, 1000), Fraction(1, 10**8)
    c1, c2 = 1 - b1**3, 1 - b2**3
    m2, v2 = m * b1 + g * (1 - b1), v * b2 + g * g * (1 - b2)
    reference = p * (1 - lr * wd) - lr * (m2 / c1) / (w.sqrt(v2 / c2) + eps)
    root = w.lift(c2) ** Fraction(1, 2)
    fused = p - lr * wd * p - (lr / c1) * m2 / (w.sqrt(v2) / root + (eps / root if wrong else eps))
    megatron = p * (1 - lr * wd) - lr * root / c1 * m2 / (w.sqrt(v2) + eps * root)
    return [(reference, fused), (reference, megatron)]


def clipped_norm(w, wrong):
    """A norm of norms over shards, and the clip coefficient that it makes."""
    g = w.leaves("g", 6)
    whole = w.sqrt(w.dot(g, g))
    parts = [w.sqrt(w.dot(g[k:k + 2], g[k:k + 2])) for k in (0, 2, 4)]
    norm = w.sqrt(w.sum([a if wrong else a * a for a in parts]))
    clip = lambda n: -w.max([-(2 / (n + Fraction(1, 10**6))), w.lift(-1)])  # noqa: E731
    return [(whole, norm), (g[1] * clip(whole), g[1] * clip(norm))]


def sigmoid_forms(w, wrong):
    x = w.leaf("x")
    e = w.exp(x)
    s = 1 / (1 + w.exp(-x))
    return [(s, e / (1 + e)), (x * s, x / (w.exp(x if wrong else -x) + 1)), (s * (1 + x * (1 - s)), s + x * w.exp(-x) * s * s),
            (2 / (1 + w.exp(-2 * x)) - 1, (e - w.exp(-x)) / (e + w.exp(-x)))]


def scale_split(w, wrong):
    """The attention scale on the product, or its root on both factors."""
    q, k = w.leaves("q", 2), w.leaves("k", 2)
    whole = 1 / w.sqrt(w.lift(6))
    part = whole if wrong else w.sqrt(whole)
    return [(w.exp(w.dot(q, k) * whole), w.exp(w.dot([a * part for a in q], [a * part for a in k])))]


def root_sum(w, wrong):
    x, y = w.leaf("x", POSITIVE), w.leaf("y", POSITIVE)
    r = 1 / w.sqrt(x + y)
    return [(x * r + y * r, w.sqrt(x * y) if wrong else w.sqrt(x + y))]


def equal_arguments(w, wrong):
    """An uninterpreted function of arguments that are equal only once denominators are multiplied out."""
    return [(w.uf("f", w.sum(softmax(w, w.leaves("z", 3)))), w.uf("f", w.lift(2 if wrong else 1)))]


def token_weights(w, wrong):
    """Gradient accumulation over microbatches with unequal token counts."""
    losses, counts = w.leaves("l", 6), [4, 2]
    micro = [w.sum(losses[:4]) / 4, w.sum(losses[4:]) / 2]
    weighted = w.sum(micro) / 2 if wrong else w.sum([m * c for m, c in zip(micro, counts)]) / 6
    return [(w.sum(losses) / 6, weighted)]


def bias_before_reduction(w, wrong):
    x, a, b = w.leaves("x", 4), w.leaves("a", 4), w.leaf("b")
    parts = [w.dot(x[:2], a[:2]), w.dot(x[2:], a[2:])]
    return [(w.dot(x, a) + b, w.sum([p + b for p in parts]) if wrong else w.sum(parts) + b)]


def rotary_inverse(w, wrong):
    """Rotation by an angle and back."""
    x, y, t = w.leaf("x"), w.leaf("y"), w.leaf("t")
    c, s = w.cos(t), w.sin(t)
    a, b = x * c - y * s, x * s + y * c
    c2, s2 = w.cos(t if wrong else -t), w.sin(t if wrong else -t)
    return [(x, a * c2 - b * s2), (y, a * s2 + b * c2)]


def nested_maxima(w, wrong):
    """A maximum over shards of maxima; nested ones that are scaled stay."""
    z = w.leaves("z", 6)
    parts = [w.max(z[:2]), w.max([z[2], w.max(z[3:5])]), z[5]]
    return [(w.max(z), w.max([2 * parts[0], *parts[1:]] if wrong else parts)), (w.max([z[0], z[1], z[0]]), w.max([z[1], z[0], z[1]]))]


def roots_of_products(w, wrong):
    x, y, z, v = w.leaf("x"), w.leaf("y"), w.leaf("z", POSITIVE), w.leaf("v", NONNEGATIVE)
    return [(w.sqrt(w.exp(x) * (1 + w.exp(y))), w.exp(x if wrong else x / 2) * w.sqrt(1 + w.exp(y))), (w.sqrt(v / z), w.sqrt(v) / w.sqrt(z)),
            (w.sqrt(z * (x * x + y * y)), w.sqrt(x * x + y * y) * w.sqrt(z)), (w.sqrt(v * v * z), v * w.sqrt(z)),
            (w.sqrt(4 * x * x + 4 * y * y), 2 * w.sqrt(y * y + x * x)), (w.sqrt(z**3), z * w.sqrt(z)), (w.sqrt(1 / (z + 1)), 1 / w.sqrt(1 + z)),
            (w.log(w.sqrt(z) / (1 + z)), w.log(z) / 2 - w.log(1 + z)), (w.exp(w.log(z + 1) * Fraction(-3, 2)), 1 / ((1 + z) * w.sqrt(1 + z))),
            (w.exp(w.log(z) / 3) ** 3, z),
            (w.sqrt(z * (x + y)), w.sqrt(x + y) * w.sqrt(z)), (w.sqrt(v), v ** Fraction(1, 2)), (1 / w.sqrt(z), z ** Fraction(-1, 2)), (w.sqrt(w.lift(50)) * w.sqrt(w.lift(Fraction(9, 2))), w.lift(15))]


def late_facts(w, wrong):
    """A sign that a later condition, or the other side's form, tells."""
    x, y, z, v = w.leaf("x"), w.leaf("y"), w.leaf("z"), w.leaf("v", NONNEGATIVE)
    return [(w.sqrt(x * x) + w.log(x), (2 if wrong else 1) * x + w.log(x)),
            (w.sqrt((y * y - 2 * (y * z) + z * z) * v), w.sqrt(v) * w.sqrt((y - z) * (y - z)))]


IDENTITIES = {f.__name__: f for f in (
    layer_norm, layer_norm_backward, rms_norm_backward, softmax_shift, softmax_backward, label_smoothing, adamw_bias_correction, clipped_norm,
    sigmoid_forms, scale_split, root_sum, equal_arguments, token_weights, bias_before_reduction, rotary_inverse,
    nested_maxima, roots_of_products, late_facts)}
IDENTITIES |= {f"online_merge_{n}": online_merge(n) for n in (2, 4)} | {f"logsumexp_merge_{n}": logsumexp_merge(n) for n in (2, 4)}


@pytest.mark.parametrize("name", IDENTITIES)
def test_right(name):
    w = World()
    for k, (reference, parallel) in enumerate(IDENTITIES[name](w, False)):
        verdict = w.prove(reference, parallel)
        assert isinstance(verdict, Proved), (k, verdict)
        assert isinstance(w.prove(parallel, reference), Proved), k


@pytest.mark.parametrize("name", IDENTITIES)
def test_wrong(name):
    w = World()
    verdicts = [w.prove(*pair) for pair in IDENTITIES[name](w, True)]
    assert any(isinstance(v, Refuted) for v in verdicts)
