"""Rows of loss functions and their backward ops (trusted). reduction: 0 none, 1 mean, 2 sum."""
from __future__ import annotations

import math
from fractions import Fraction

import torch

from trainverify.ops import lift as L
from trainverify.ops.lift import lift
from trainverify.ops.table import Rows

rows = Rows("loss")
NONE, MEAN, SUM = 0, 1, 2


def _reduced(m, x, reduction):
    if reduction == NONE:
        return x
    dims = list(range(len(x.shape)))
    return L.mean(m, x, dims) if reduction == MEAN else L.total(m, x, dims)


def _share(m, grad_output, like, reduction):
    """What a reduced loss's gradient gives to each element."""
    g = lift(m, grad_output)
    n = math.prod(like.shape)
    return m.scale(g, Fraction(1, n)) if reduction == MEAN and n else g


# ---- negative log likelihood
def _classes(shape, target: torch.Tensor, ignore_index: int):
    """Positions (for take) of the target class's entry per sample, 0 where ignored; the classes are dimension 1, or 0 of a vector."""
    index = L.flat_index(shape)
    kept = target != ignore_index
    safe = target.clamp(min=0) * kept
    dim = 0 if len(shape) == 1 else 1
    at = index.gather(dim, safe.reshape(-1) if dim == 0 else safe.unsqueeze(1))
    return at.reshape(target.shape) * kept, safe, kept


def _weights(m, weight, safe, kept):
    """The weight of each sample's class, 0 where ignored."""
    if weight is None:
        return m.data(kept)
    return m.take([lift(m, weight)], (safe + 1) * kept)


@rows("aten.nll_loss_forward", "aten.nll_loss2d_forward", source="torch.nn.functional.nll_loss")
def nll_loss_forward(m, self, target, weight, reduction, ignore_index):
    """-weight[target] * x[target], reduced; and the sum of the weights that took part (of a batch that is not reduced: 0)"""
    x = lift(m, self)
    at, safe, kept = _classes(x.shape, target, ignore_index)
    w = _weights(m, weight, safe, kept)
    picked = m.take([x], at)
    losses = m.neg(picked if weight is None else m.mul(w, picked))
    dims = list(range(len(at.shape)))
    if reduction == NONE:
        return [losses, w if not dims else m.const(0)]
    total, of = L.total(m, losses, dims), L.total(m, w, dims)
    return [_over(m, total, of, weight, kept) if reduction == MEAN else total, of]


def _over(m, x, total_weight, weight, kept):
    """x over the sum of weights, which is a literal if there are no weights (0/0 if nothing took part)."""
    n = int(kept.sum())
    return m.scale(x, Fraction(1, n)) if weight is None and n else m.div(x, total_weight)


@rows("aten.nll_loss_backward", "aten.nll_loss2d_backward", source="torch.nn.functional.nll_loss")
def nll_loss_backward(m, grad_output, self, target, weight, reduction, ignore_index, total_weight):
    """-g * weight[target] at the target class, 0 elsewhere"""
    at, safe, kept = _classes(self.shape, target, ignore_index)
    g = m.neg(lift(m, grad_output))
    if reduction == MEAN:
        g = m.div(g, lift(m, total_weight)) if kept.any() else g
    g = g if weight is None else m.mul(g, _weights(m, weight, safe, kept))
    g = m.expand(g, tuple(at.shape)) if tuple(g.shape) != tuple(at.shape) else g
    where = torch.zeros(math.prod(self.shape) + 1, dtype=torch.int64)
    where[at.reshape(-1)] = L.flat_index(at.shape).reshape(-1)
    where[0] = 0
    return m.take([g], where[1:].reshape(tuple(self.shape)))


# ---- regression
@rows("aten.mse_loss", source="torch.nn.functional.mse_loss")
def mse_loss(m, self, target, reduction=MEAN):
    """(x - t)^2"""
    d = m.sub(lift(m, self), lift(m, target))
    return _reduced(m, m.mul(d, d), reduction)


@rows("aten.mse_loss_backward", source="torch.nn.functional.mse_loss")
def mse_loss_backward(m, grad_output, self, target, reduction):
    """2 * (x - t) * g"""
    d = m.sub(lift(m, self), lift(m, target))
    return m.mul(m.scale(d, 2), _share(m, grad_output, d, reduction))


def _huber(m, d, delta):
    """d^2/2 near 0, delta * (|d| - delta/2) from delta on"""
    a = m.abs(d)
    far = L.scaled(m, m.sub(a, m.scale(m.const(delta), Fraction(1, 2))), delta)
    return m.where(m.compare("lt", a, m.const(delta)), m.scale(m.mul(d, d), Fraction(1, 2)), far)


@rows("aten.smooth_l1_loss", source="torch.nn.functional.smooth_l1_loss")
def smooth_l1_loss(m, self, target, reduction=MEAN, beta=1.0):
    """d^2 / (2 beta) for |d| < beta, else |d| - beta/2"""
    d = m.sub(lift(m, self), lift(m, target))
    return _reduced(m, m.div(_huber(m, d, beta), m.const(beta)) if beta != 0 else m.abs(d), reduction)


@rows("aten.smooth_l1_loss_backward", source="torch.nn.functional.smooth_l1_loss")
def smooth_l1_loss_backward(m, grad_output, self, target, reduction, beta):
    """g * d / beta for |d| < beta, else g * sign(d)"""
    d = m.sub(lift(m, self), lift(m, target))
    slope = m.sign(d)
    if beta != 0:
        slope = m.where(m.compare("lt", m.abs(d), m.const(beta)), m.div(d, m.const(beta)), slope)
    return m.mul(slope, _share(m, grad_output, d, reduction))


@rows("aten.huber_loss", source="torch.nn.functional.huber_loss")
def huber_loss(m, self, target, reduction=MEAN, delta=1.0):
    """d^2/2 for |d| < delta, else delta * (|d| - delta/2)"""
    return _reduced(m, _huber(m, m.sub(lift(m, self), lift(m, target)), delta), reduction)


@rows("aten.huber_loss_backward", source="torch.nn.functional.huber_loss")
def huber_loss_backward(m, grad_output, self, target, reduction, delta):
    """g * d for |d| < delta, else g * delta * sign(d)"""
    d = m.sub(lift(m, self), lift(m, target))
    slope = m.where(m.compare("lt", m.abs(d), m.const(delta)), d, L.scaled(m, m.sign(d), delta))
    return m.mul(slope, _share(m, grad_output, d, reduction))


# ---- binary cross-entropy
@rows("aten.binary_cross_entropy", source="torch.nn.functional.binary_cross_entropy")
def binary_cross_entropy(m, self, target, weight=None, reduction=MEAN):
    """-(t log x + (1 - t) log(1 - x)), each log at least -100"""
    x, t = lift(m, self), lift(m, target)
    one, floor = m.const(1), m.const(-100)
    logs = [m.maximum(m.log(p), floor) for p in (x, m.sub(one, x))]
    loss = m.neg(m.add(m.mul(t, logs[0]), m.mul(m.sub(one, t), logs[1])))
    return _reduced(m, loss if weight is None else m.mul(loss, lift(m, weight)), reduction)


@rows("aten.binary_cross_entropy_backward", source="torch.nn.functional.binary_cross_entropy")
def binary_cross_entropy_backward(m, grad_output, self, target, weight=None, reduction=MEAN):
    """g * (x - t) / max(x (1 - x), 1e-12)"""
    x, t = lift(m, self), lift(m, target)
    slope = m.div(m.sub(x, t), m.maximum(m.mul(x, m.sub(m.const(1), x)), m.const(1e-12)))
    slope = slope if weight is None else m.mul(slope, lift(m, weight))
    return m.mul(slope, _share(m, grad_output, x, reduction))


@rows("aten.binary_cross_entropy_with_logits", source="torch.nn.functional.binary_cross_entropy_with_logits")
def binary_cross_entropy_with_logits(m, self, target, weight=None, pos_weight=None, reduction=MEAN):
    """(1 - t) x + (1 + (pos_weight - 1) t) log(1 + exp(-x))"""
    x, t = lift(m, self), lift(m, target)
    one = m.const(1)
    tail = m.log(m.add(one, m.exp(m.neg(x))))
    if pos_weight is not None:
        tail = m.mul(m.add(one, m.mul(m.sub(lift(m, pos_weight), one), t)), tail)
    loss = m.add(m.mul(m.sub(one, t), x), tail)
    return _reduced(m, loss if weight is None else m.mul(loss, lift(m, weight)), reduction)


# ---- soft margin
@rows("aten.soft_margin_loss", source="torch.nn.functional.soft_margin_loss")
def soft_margin_loss(m, self, target, reduction=MEAN):
    """log(1 + exp(-t x))"""
    z = m.mul(lift(m, self), lift(m, target))
    return _reduced(m, m.log(m.add(m.const(1), m.exp(m.neg(z)))), reduction)


@rows("aten.soft_margin_loss_backward", source="torch.nn.functional.soft_margin_loss")
def soft_margin_loss_backward(m, grad_output, self, target, reduction):
    """-g * t * sigmoid(-t x)"""
    x, t = lift(m, self), lift(m, target)
    slope = m.div(t, m.add(m.const(1), m.exp(m.mul(t, x))))
    return m.neg(m.mul(slope, _share(m, grad_output, x, reduction)))
