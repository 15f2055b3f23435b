"""Rows of softmax, layer, RMS, group and batch normalisation, forward and backward (trusted).

A maximum is subtracted only where exp would overflow: over the reals it cancels. exp(-inf) is 0 exactly, so masked entries vanish; a row that is masked
throughout is 0/0. Backward ops compute with the mean, the scale and the output that they are given.
"""
from __future__ import annotations

import math

import torch

from trainverify.ops import lift as L
from trainverify.ops.lift import lift
from trainverify.ops.table import Rows

rows = Rows("normalise")


# ---- softmax
def sums(m, x, dim: int, keepdim: bool = True):
    """The sum over one dimension (of a tensor without dimensions: itself)."""
    return L.total(m, x, _along(x, dim), keepdim)


def steady(m, x, dims):
    """x less something that is the same along dims, and what that is (None: 0)."""
    peak = m.peak(x, dims)
    return (x, None) if peak is None else (m.sub(x, peak), peak)


def _along(x, dim: int) -> list[int]:
    return [dim % len(x.shape)] if x.shape else []


def known_zero(m, z, candidates: torch.Tensor) -> torch.Tensor:
    """Which of the candidates are the constant 0 in z: sums of exponentials all of whose terms are masked."""
    out = torch.zeros(tuple(z.shape), dtype=torch.bool)
    if candidates.any():
        some = m.take([z], L.flat_index(z.shape)[candidates])
        out[candidates] = m.equal(some, m.const(0, tuple(some.shape)))
    return out


@rows("aten._softmax", source="torch.softmax")
def softmax(m, self, dim, half_to_float):
    """exp(x) / sum of exp(x)"""
    x = L.cast(m, self, torch.float32 if half_to_float else None)
    e = m.exp(steady(m, x, _along(x, dim))[0])
    return m.div(e, sums(m, e, dim))


@rows("aten._safe_softmax", source="torch.nn.functional.scaled_dot_product_attention", ctx=True)
def safe_softmax(m, self, dim, dtype=None, *, ctx):
    """softmax, and 0 in rows that are masked throughout"""
    x = L.cast(m, self, dtype)
    e = m.exp(steady(m, x, _along(x, dim))[0])
    z = sums(m, e, dim)
    dead = known_zero(m, z, (ctx.native[0] == 0).all(dim, keepdim=True))
    return m.div(e, m.where(dead, m.const(1), z) if dead.any() else z)


@rows("aten._log_softmax", source="torch.log_softmax")
def log_softmax(m, self, dim, half_to_float):
    """x - log of the sum of exp(x)"""
    x = L.cast(m, self, torch.float32 if half_to_float else None)
    x, _ = steady(m, x, _along(x, dim))
    return m.sub(x, m.log(sums(m, m.exp(x), dim)))


@rows("aten._softmax_backward_data", source="torch.softmax")
def softmax_backward(m, grad_output, output, dim, input_dtype):
    """y * (g - sum of g * y)"""
    g, y = lift(m, grad_output), lift(m, output)
    return L.cast(m, m.mul(y, m.sub(g, sums(m, m.mul(g, y), dim))), None)


@rows("aten._log_softmax_backward_data", source="torch.log_softmax")
def log_softmax_backward(m, grad_output, output, dim, input_dtype):
    """g - exp(y) * sum of g"""
    g, y = lift(m, grad_output), lift(m, output)
    return m.sub(g, m.mul(m.exp(y), sums(m, g, dim)))


# ---- layer norm and RMS norm
def _inner(shape, normalized_shape) -> list[int]:
    return list(range(len(shape) - len(normalized_shape), len(shape)))


def _rstd(m, x, dims, eps):
    """1 / sqrt(mean of x^2 + eps)"""
    return m.inv(m.sqrt(m.add(L.mean(m, m.mul(x, x), dims, True), m.const(eps))))


@rows("aten.native_layer_norm", source="torch.nn.functional.layer_norm")
def layer_norm(m, input, normalized_shape, weight, bias, eps):
    """(x - mean) / sqrt(variance + eps) * weight + bias, the mean and 1 / sqrt"""
    x = lift(m, input)
    dims = _inner(x.shape, normalized_shape)
    center = L.mean(m, x, dims, True)
    d = m.sub(x, center)
    rstd = _rstd(m, d, dims, eps)
    y = m.mul(d, rstd)
    y = y if weight is None else m.mul(y, lift(m, weight))
    y = y if bias is None else m.add(y, lift(m, bias))
    return [y, center, rstd]


@rows("aten._fused_rms_norm", source="torch.nn.functional.rms_norm", ctx=True)
def rms_norm(m, input, normalized_shape, weight, eps=None, *, ctx):
    """x / sqrt(mean of x^2 + eps) * weight, and 1 / sqrt"""
    x = lift(m, input)
    eps = torch.finfo(ctx.native[-1].dtype).eps if eps is None else eps
    rstd = _rstd(m, x, _inner(x.shape, normalized_shape), eps)
    y = m.mul(x, rstd)
    return [y if weight is None else m.mul(y, lift(m, weight)), rstd]


def _norm_backward(m, g, unit, rstd, weight, dims, centered: bool):
    """Gradient of y = unit * weight, unit = (x - mean?) * rstd, with respect to x."""
    gw = g if weight is None else m.mul(g, lift(m, weight))
    dx = m.sub(gw, m.mul(unit, L.mean(m, m.mul(gw, unit), dims, True)))
    if centered:
        dx = m.sub(dx, L.mean(m, gw, dims, True))
    return m.mul(rstd, dx)


@rows("aten.native_layer_norm_backward", source="torch.nn.functional.layer_norm")
def layer_norm_backward(m, grad_out, input, normalized_shape, mean, rstd, weight, bias, output_mask):
    """The gradients of input, weight and bias that output_mask asks for"""
    g, r = lift(m, grad_out), lift(m, rstd)
    unit = m.mul(m.sub(lift(m, input), lift(m, mean)), r)
    dims = _inner(g.shape, normalized_shape)
    outer = list(range(dims[0]))
    results = (lambda: _norm_backward(m, g, unit, r, weight, dims, True),
               lambda: L.total(m, m.mul(g, unit), outer), lambda: L.total(m, g, outer))
    return [f() for f, wanted in zip(results, output_mask) if wanted]


@rows("aten._fused_rms_norm_backward", source="torch.nn.functional.rms_norm")
def rms_norm_backward(m, grad_out, input, normalized_shape, rstd, weight, output_mask):
    """The gradients of input and weight that output_mask asks for"""
    g, r = lift(m, grad_out), lift(m, rstd)
    unit = m.mul(lift(m, input), r)
    dims = _inner(g.shape, normalized_shape)
    results = (lambda: _norm_backward(m, g, unit, r, weight, dims, False),
               lambda: L.total(m, m.mul(g, unit), list(range(dims[0]))))
    return [f() for f, wanted in zip(results, output_mask) if wanted]


# ---- group norm
def _grouped(m, x, n, c, hxw, group):
    return m.reshape(lift(m, x), (n, group, c // group, hxw))


def _per_channel(m, w, group):
    return m.reshape(lift(m, w), (1, group, -1 if w is None else math.prod(w.shape) // group, 1))


@rows("aten.native_group_norm", source="torch.nn.functional.group_norm")
def group_norm(m, input, weight, bias, N, C, HxW, group, eps):
    """Layer norm of each group of channels, and the means and 1 / sqrt per group"""
    x = _grouped(m, input, N, C, HxW, group)
    center = L.mean(m, x, [2, 3], True)
    d = m.sub(x, center)
    rstd = _rstd(m, d, [2, 3], eps)
    y = m.mul(d, rstd)
    y = y if weight is None else m.mul(y, _per_channel(m, weight, group))
    y = y if bias is None else m.add(y, _per_channel(m, bias, group))
    return [m.reshape(y, input.shape), m.reshape(center, (N, group)), m.reshape(rstd, (N, group))]


@rows("aten.native_group_norm_backward", source="torch.nn.functional.group_norm")
def group_norm_backward(m, grad_out, input, mean, rstd, weight, N, C, HxW, group, output_mask):
    """The gradients of input, weight and bias that output_mask asks for"""
    g = _grouped(m, grad_out, N, C, HxW, group)
    r = m.reshape(lift(m, rstd), (N, group, 1, 1))
    center = m.reshape(lift(m, mean), (N, group, 1, 1))
    unit = m.mul(m.sub(_grouped(m, input, N, C, HxW, group), center), r)
    w = None if weight is None else _per_channel(m, weight, group)
    results = (lambda: m.reshape(_norm_backward(m, g, unit, r, w, [2, 3], True), input.shape),
               lambda: m.reshape(m.sum(m.mul(g, unit), [0, 3]), (C,)), lambda: m.reshape(m.sum(g, [0, 3]), (C,)))
    return [f() for f, wanted in zip(results, output_mask) if wanted]


# ---- batch norm
def _over_batch(m, x, *per_channel):
    """Every dimension but that of the channels, and values of one number per channel in the shape that broadcasts along x (None stays None)."""
    shape = (1, x.shape[1], *[1] * (len(x.shape) - 2))
    return [d for d in range(len(x.shape)) if d != 1], *(None if v is None else m.reshape(lift(m, v), shape) for v in per_channel)


@rows("aten.native_batch_norm", source="torch.nn.functional.batch_norm", ctx=True)
def batch_norm(m, input, weight, bias, running_mean, running_var, training, momentum, eps, *, ctx):
    """(x - mean) / sqrt(variance + eps) * weight + bias over all but the channels, the mean and 1 / sqrt; in training, the running statistics moved by momentum"""
    x = lift(m, input)
    dims, w, b, center, spread = _over_batch(m, x, weight, bias, *((None, None) if training else (running_mean, running_var)))
    if training:
        center = L.mean(m, x, dims, True)
    d = m.sub(x, center)
    if training:
        spread = L.mean(m, m.mul(d, d), dims, True)
    rstd = m.inv(m.sqrt(m.add(spread, m.const(eps))))
    y = m.mul(d, rstd)
    y = y if w is None else m.mul(y, w)
    y = y if b is None else m.add(y, b)
    saved = tuple(ctx.native[1].shape)                      # nothing is saved outside training
    out = [y, *(m.reshape(v, saved) if math.prod(saved) else m.const(0, saved) for v in (center, rstd))]
    if len(ctx.native) == 5 and not training:               # the op is told that it writes them
        out += [lift(m, running_mean), lift(m, running_var)]
    elif training and running_mean is not None:
        n = L.count(x.shape, dims)
        unbiased = m.div(m.scale(spread, n), m.const(n - 1))
        out += [_moved(m, old, m.reshape(new, saved), momentum) for old, new in ((running_mean, center), (running_var, unbiased))]
    return out


@rows("aten._native_batch_norm_legit", source="torch.nn.functional.batch_norm", ctx=True)
def batch_norm_legit(m, input, weight, bias, *rest, ctx):
    """native_batch_norm, with running statistics or (no_stats) without"""
    return batch_norm(m, input, weight, bias, *(rest if len(rest) == 5 else (None, None, *rest)), ctx=ctx)


def _moved(m, old, new, momentum):
    old = lift(m, old)
    return m.add(old, L.scaled(m, m.sub(new, old), momentum))


@rows("aten.native_batch_norm_backward", source="torch.nn.functional.batch_norm")
def batch_norm_backward(m, grad_out, input, weight, running_mean, running_var, save_mean, save_invstd, train, eps, output_mask):
    """The gradients of input, weight and bias that output_mask asks for"""
    g, x = lift(m, grad_out), lift(m, input)
    if train:
        dims, w, center, r = _over_batch(m, x, weight, save_mean, save_invstd)
    else:
        dims, w, center, spread = _over_batch(m, x, weight, running_mean, running_var)
        r = m.inv(m.sqrt(m.add(spread, m.const(eps))))
    unit = m.mul(m.sub(x, center), r)

    def of_input():
        return _norm_backward(m, g, unit, r, w, dims, True) if train else m.mul(g if w is None else m.mul(g, w), r)
    results = (of_input, lambda: L.total(m, m.mul(g, unit), dims), lambda: L.total(m, g, dims))
    return [f() for f, wanted in zip(results, output_mask) if wanted]


# ---- weight norm
def _except(m, x, dim: int):
    """The sum over all dimensions but one, kept."""
    return L.total(m, x, [d for d in range(len(x.shape)) if d != dim], True)


@rows("aten._weight_norm_interface", source="torch.nn.utils.parametrizations.weight_norm")
def weight_norm(m, v, g, dim=0):
    """g * v / |v|, the length taken over all dimensions but dim, and the lengths"""
    v = lift(m, v)
    length = m.sqrt(_except(m, m.mul(v, v), dim))
    return [m.mul(v, m.div(lift(m, g), length)), length]


@rows("aten._weight_norm_interface_backward", source="torch.nn.utils.parametrizations.weight_norm")
def weight_norm_backward(m, grad_w, saved_v, saved_g, saved_norms, dim):
    """The gradients of v and g"""
    gw, v, length = lift(m, grad_w), lift(m, saved_v), lift(m, saved_norms)
    unit = m.div(v, length)
    along = _except(m, m.mul(gw, unit), dim)
    return [m.mul(m.div(lift(m, saved_g), length), m.sub(gw, m.mul(unit, along))), along]
