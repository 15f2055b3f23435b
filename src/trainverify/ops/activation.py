"""Rows of activation functions and their backward ops, down to exp, log, erf, max and comparisons (trusted).

Each backward is the derivative of its forward, in the terms that autograd's recorded calls use for the composed form, so
that fused and composed spellings meet.
"""
from __future__ import annotations

import math
from fractions import Fraction

import torch

from trainverify.diagnostics import Diagnostic, Fault
from trainverify.ops import lift as L
from trainverify.ops.lift import lift, number
from trainverify.ops.table import Rows

rows = Rows("pointwise")
HALF = Fraction(1, 2)
TANH_SCALE = math.sqrt(2 / math.pi)       # gelu's tanh form: tanh(TANH_SCALE * (x + TANH_CUBE * x^3))
TANH_CUBE = 0.044715
LINEAR_FROM = 20                          # softplus: from here on log(1 + exp(x)) is x to 2e-9, so torch's branch is rounding


def one_minus(m, x):
    return m.sub(m.const(1), x)


def sigmoid_of(m, x):
    return m.inv(m.add(m.const(1), m.exp(m.neg(x))))


def tanh_of(m, x):
    """1 - 2 / (1 + exp(2x))"""
    return one_minus(m, m.scale(m.inv(m.add(m.const(1), m.exp(m.scale(x, 2)))), 2))


def softplus_of(m, x):
    return m.log(m.add(m.const(1), m.exp(x)))


# ---- sigmoid and its relatives
@rows("aten.sigmoid", source="torch.sigmoid")
def sigmoid(m, self):
    """1 / (1 + exp(-x))"""
    return sigmoid_of(m, lift(m, self))


@rows("aten.sigmoid_backward", source="torch.sigmoid")
def sigmoid_backward(m, grad_output, output):
    """g * y * (1 - y)"""
    y = lift(m, output)
    return m.mul(lift(m, grad_output), m.mul(y, one_minus(m, y)))


@rows("aten.logit", source="torch.logit")
def logit(m, self, eps=None):
    """log(x / (1 - x)), with x clamped to [eps, 1 - eps] if eps is given"""
    x = lift(m, self)
    if eps is not None:
        x = m.minimum(m.maximum(x, m.const(eps)), m.const(1 - eps))
    return m.log(m.div(x, one_minus(m, x)))


@rows("aten.logit_backward", source="torch.logit")
def logit_backward(m, grad_output, self, eps=None):
    """g / (x * (1 - x)), and 0 outside [eps, 1 - eps] if eps is given"""
    x = lift(m, self)
    slope = m.div(lift(m, grad_output), m.mul(x, one_minus(m, x)))
    if eps is None:
        return slope
    inside = m.mul(m.compare("ge", x, m.const(eps)), m.compare("le", x, m.const(1 - eps)))
    return m.where(inside, slope, m.const(0))


@rows("aten.log_sigmoid_forward", source="torch.nn.functional.logsigmoid")
def log_sigmoid_forward(m, self):
    """-log(1 + exp(-x)), and torch's buffer exp(-|x|)"""
    x = lift(m, self)
    return [m.neg(softplus_of(m, m.neg(x))), m.exp(m.neg(m.abs(x)))]


@rows("aten.log_sigmoid_backward", source="torch.nn.functional.logsigmoid")
def log_sigmoid_backward(m, grad_output, self, buffer):
    """g * sigmoid(-x)"""
    return m.mul(lift(m, grad_output), sigmoid_of(m, m.neg(lift(m, self))))


@rows("aten.silu", source="torch.nn.functional.silu")
def silu(m, self):
    """x * sigmoid(x)"""
    x = lift(m, self)
    return m.mul(x, sigmoid_of(m, x))


@rows("aten.silu_backward", source="torch.nn.functional.silu")
def silu_backward(m, grad_output, self):
    """g * s * (1 + x * (1 - s))"""
    x = lift(m, self)
    s = sigmoid_of(m, x)
    return m.mul(lift(m, grad_output), m.mul(s, m.add(m.const(1), m.mul(x, one_minus(m, s)))))


@rows("aten.tanh", source="torch.tanh")
def tanh(m, self):
    """1 - 2 / (1 + exp(2x))"""
    return tanh_of(m, lift(m, self))


@rows("aten.tanh_backward", source="torch.tanh")
def tanh_backward(m, grad_output, output):
    """g * (1 - y * y)"""
    y = lift(m, output)
    return m.mul(lift(m, grad_output), one_minus(m, m.mul(y, y)))


# ---- gelu
def _gelu_inner(m, x):
    cube = m.mul(x, m.mul(x, x))
    return m.mul(m.const(TANH_SCALE), m.add(x, m.mul(m.const(TANH_CUBE), cube)))


def _gelu_erf(m, x):
    """The normal distribution's x / sqrt 2 and 1/2 (1 + erf of it)."""
    u = m.div(x, m.const(math.sqrt(2)))
    return u, m.scale(m.add(m.const(1), m.erf(u)), HALF)


@rows("aten.gelu", source="torch.nn.functional.gelu")
def gelu(m, self, *, approximate="none"):
    """x/2 * (1 + erf(x / sqrt 2)), or its tanh form"""
    x = lift(m, self)
    if approximate == "none":
        return m.mul(x, _gelu_erf(m, x)[1])
    return m.mul(m.scale(x, HALF), m.add(m.const(1), tanh_of(m, _gelu_inner(m, x))))


@rows("aten.gelu_backward", source="torch.nn.functional.gelu")
def gelu_backward(m, grad_output, self, *, approximate="none"):
    """g * gelu'(x)"""
    x = lift(m, self)
    if approximate == "none":
        u, phi = _gelu_erf(m, x)
        density = m.scale(m.mul(m.const(2 / math.sqrt(math.pi)), m.exp(m.neg(m.mul(u, u)))), HALF)
        slope = m.add(phi, m.mul(x, m.div(density, m.const(math.sqrt(2)))))
    else:
        t = tanh_of(m, _gelu_inner(m, x))
        du = m.mul(m.const(TANH_SCALE), m.add(m.const(1), m.mul(m.const(TANH_CUBE), m.scale(m.mul(x, x), 3))))
        slope = m.add(m.scale(m.add(m.const(1), t), HALF), m.mul(m.scale(x, HALF), m.mul(one_minus(m, m.mul(t, t)), du)))
    return m.mul(lift(m, grad_output), slope)


# ---- piecewise linear
@rows("aten.relu", source="torch.relu")
def relu(m, self):
    """max(x, 0)"""
    return m.maximum(lift(m, self), m.const(0))


@rows("aten.threshold", source="torch.nn.functional.threshold")
def threshold(m, self, threshold, value):
    """x where x > threshold, else value"""
    x = lift(m, self)
    return m.where(m.compare("gt", x, lift(m, threshold)), x, lift(m, value))


@rows("aten.threshold_backward", source="torch.relu")
def threshold_backward(m, grad_output, self, threshold):
    """g where x > threshold, else 0"""
    return m.where(m.compare("gt", lift(m, self), lift(m, threshold)), lift(m, grad_output), m.const(0))


@rows("aten.hardtanh", source="torch.nn.functional.hardtanh")
def hardtanh(m, self, min_val=-1, max_val=1):
    """min(max(x, min_val), max_val)"""
    return m.minimum(m.maximum(lift(m, self), lift(m, min_val)), lift(m, max_val))


def _inside(m, x, low, high):
    return m.mul(m.compare("gt", x, lift(m, low)), m.compare("lt", x, lift(m, high)))


@rows("aten.hardtanh_backward", source="torch.nn.functional.hardtanh")
def hardtanh_backward(m, grad_output, self, min_val, max_val):
    """g where min_val < x < max_val, else 0"""
    return m.where(_inside(m, lift(m, self), min_val, max_val), lift(m, grad_output), m.const(0))


@rows("aten.hardsigmoid", source="torch.nn.functional.hardsigmoid")
def hardsigmoid(m, self):
    """min(max(x + 3, 0), 6) / 6"""
    y = m.minimum(m.maximum(m.add(lift(m, self), m.const(3)), m.const(0)), m.const(6))
    return m.scale(y, Fraction(1, 6))


@rows("aten.hardsigmoid_backward", source="torch.nn.functional.hardsigmoid")
def hardsigmoid_backward(m, grad_output, self):
    """g / 6 where -3 < x < 3, else 0"""
    return m.where(_inside(m, lift(m, self), -3, 3), m.scale(lift(m, grad_output), Fraction(1, 6)), m.const(0))


@rows("aten.hardswish", source="torch.nn.functional.hardswish")
def hardswish(m, self):
    """x * hardsigmoid(x)"""
    x = lift(m, self)
    return m.mul(x, hardsigmoid(m, x))


@rows("aten.hardswish_backward", source="torch.nn.functional.hardswish")
def hardswish_backward(m, grad_output, self):
    """g * (0 up to -3, x/3 + 1/2 between, 1 from 3 on)"""
    x = lift(m, self)
    mid = m.add(m.scale(x, Fraction(1, 3)), m.const(HALF))
    slope = m.where(m.compare("ge", x, m.const(3)), m.const(1), m.where(m.compare("le", x, m.const(-3)), m.const(0), mid))
    return m.mul(lift(m, grad_output), slope)


@rows("aten.leaky_relu", source="torch.nn.functional.leaky_relu")
def leaky_relu(m, self, negative_slope=0.01):
    """x where x > 0, else negative_slope * x"""
    x = lift(m, self)
    return m.where(m.compare("gt", x, m.const(0)), x, L.scaled(m, x, negative_slope))


@rows("aten.leaky_relu_backward", source="torch.nn.functional.leaky_relu")
def leaky_relu_backward(m, grad_output, self, negative_slope, self_is_result):
    """g where x > 0, else negative_slope * g"""
    g = lift(m, grad_output)
    return m.where(m.compare("gt", lift(m, self), m.const(0)), g, L.scaled(m, g, negative_slope))


@rows("aten._prelu_kernel", source="torch.nn.functional.prelu")
def prelu(m, self, weight):
    """x where x > 0, else weight * x"""
    x = lift(m, self)
    return m.where(m.compare("gt", x, m.const(0)), x, m.mul(lift(m, weight), x))


@rows("aten._prelu_kernel_backward", source="torch.nn.functional.prelu")
def prelu_backward(m, grad_output, self, weight):
    """g where x > 0, else weight * g; and of the weight, at each element, 0 where x > 0, else x * g"""
    g, x = lift(m, grad_output), lift(m, self)
    above = m.compare("gt", x, m.const(0))
    return [m.where(above, g, m.mul(lift(m, weight), g)), m.where(above, m.const(0), m.mul(x, g))]


@rows("aten.softshrink", source="torch.nn.functional.softshrink")
def softshrink(m, self, lambd=0.5):
    """x - lambd above lambd, x + lambd below -lambd, else 0"""
    x, c = lift(m, self), lift(m, lambd)
    low = m.where(m.compare("lt", x, m.neg(c)), m.add(x, c), m.const(0))
    return m.where(m.compare("gt", x, c), m.sub(x, c), low)


@rows("aten.hardshrink", source="torch.nn.functional.hardshrink")
def hardshrink(m, self, lambd=0.5):
    """x where |x| > lambd, else 0"""
    x = lift(m, self)
    return shrink_backward(m, x, x, lambd)


@rows("aten.softshrink_backward", "aten.hardshrink_backward", source="torch.nn.functional.softshrink")
def shrink_backward(m, grad_output, self, lambd):
    """g where |x| > lambd, else 0"""
    x, c = lift(m, self), lift(m, lambd)
    outside = m.add(m.compare("gt", x, c), m.compare("lt", x, m.neg(c)))
    return m.where(outside, lift(m, grad_output), m.const(0))


# ---- exponential
@rows("aten.elu", source="torch.nn.functional.elu")
def elu(m, self, alpha=1, scale=1, input_scale=1):
    """scale * x where x > 0, else scale * alpha * (exp(input_scale * x) - 1)"""
    x = lift(m, self)
    low = L.scaled(m, m.sub(m.exp(L.scaled(m, x, input_scale)), m.const(1)), alpha)
    return m.where(m.compare("gt", x, m.const(0)), L.scaled(m, x, scale), L.scaled(m, low, scale))


@rows("aten.celu", source="torch.nn.functional.celu")
def celu(m, self, alpha=1.0):
    """x where x > 0, else alpha * (exp(x / alpha) - 1)"""
    return elu(m, self, alpha, 1, 1 / Fraction(alpha))


@rows("aten.elu_backward", source="torch.nn.functional.elu")
def elu_backward(m, grad_output, alpha, scale, input_scale, is_result, self_or_result):
    """g * scale where x > 0, else g * scale * alpha * input_scale * exp(input_scale * x), from x or from the result"""
    g, x = lift(m, grad_output), lift(m, self_or_result)
    if is_result:
        low = L.scaled(m, m.add(x, L.scaled(m, m.const(scale), alpha)), input_scale)
    else:
        low = L.scaled(m, L.scaled(m, L.scaled(m, m.exp(L.scaled(m, x, input_scale)), input_scale), alpha), scale)
    return m.mul(g, m.where(m.compare("gt", x, m.const(0)), m.const(scale), low))


@rows("aten.softplus", source="torch.nn.functional.softplus")
def softplus(m, self, beta=1, threshold=20):
    """log(1 + exp(beta x)) / beta"""
    x = lift(m, self)
    z = L.scaled(m, x, beta)
    y = softplus_of(m, z)
    y = y if beta == 1 else m.div(y, m.const(beta))
    return y if _negligible(threshold) else m.where(m.compare("gt", z, lift(m, threshold)), x, y)


@rows("aten.softplus_backward", source="torch.nn.functional.softplus")
def softplus_backward(m, grad_output, self, beta, threshold):
    """g * sigmoid(beta x)"""
    g, z = lift(m, grad_output), L.scaled(m, self, beta)
    slope = m.mul(g, sigmoid_of(m, z))
    return slope if _negligible(threshold) else m.where(m.compare("gt", z, lift(m, threshold)), g, slope)


def _negligible(threshold) -> bool:
    return number(threshold) and threshold >= LINEAR_FROM


@rows("aten.mish", source="torch.nn.functional.mish")
def mish(m, self):
    """x * tanh(log(1 + exp(x)))"""
    x = lift(m, self)
    return m.mul(x, tanh_of(m, softplus_of(m, x)))


@rows("aten.mish_backward", source="torch.nn.functional.mish")
def mish_backward(m, grad_output, self):
    """g * (t + x * sigmoid(x) * (1 - t * t))"""
    x = lift(m, self)
    t = tanh_of(m, softplus_of(m, x))
    slope = m.add(t, m.mul(m.mul(x, sigmoid_of(m, x)), one_minus(m, m.mul(t, t))))
    return m.mul(lift(m, grad_output), slope)


@rows("aten.glu", source="torch.nn.functional.glu")
def glu(m, self, dim=-1):
    """a * sigmoid(b) of the two halves"""
    a, b = _halves(m, lift(m, self), dim)
    return m.mul(a, sigmoid_of(m, b))


@rows("aten.glu_backward", source="torch.nn.functional.glu")
def glu_backward(m, grad_output, self, dim):
    """(g * s, g * a * s * (1 - s)) side by side, s = sigmoid(b)"""
    x, g = lift(m, self), lift(m, grad_output)
    a, b = _halves(m, x, dim)
    s = sigmoid_of(m, b)
    first, second = m.mul(g, s), m.mul(m.mul(g, a), m.mul(s, one_minus(m, s)))
    index = L.flat_index(a.shape)
    return m.take([first, second], torch.cat([index, index + index.numel()], dim))


def _halves(m, x, dim):
    first, second = L.flat_index(x.shape).chunk(2, dim)
    return m.take([x], first), m.take([x], second)


# ---- dropout: only the one that drops nothing
@rows("aten.native_dropout", source="torch.nn.functional.dropout")
def native_dropout(m, input, p, train):
    """x, if nothing is dropped"""
    if train is not False and p != 0:
        raise Fault(Diagnostic("OPS003", f"live dropout: p = {p} draws a random mask, so two programs cannot be compared",
                               fix="set dropout to 0, or call model.eval()"))
    return [lift(m, input), None]


@rows("aten.native_dropout_backward", source="torch.nn.functional.dropout")
def native_dropout_backward(m, grad_output, mask, scale):
    """g * mask * scale"""
    return L.scaled(m, m.mul(lift(m, grad_output), lift(m, mask)), scale)
