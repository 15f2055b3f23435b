"""Fused optimizers, the `_foreach_` ops that are no plain map of another row, and gradient scaling (trusted).

The fused rows follow the loops of torch.optim's single-tensor implementations. They give values for every tensor that the
schema writes, in its order: parameters, gradients (changed only by a gradient scale), then each list of state.
"""
from __future__ import annotations

import torch

from trainverify.algebra.base import Complex
from trainverify.ops.lift import lift, number
from trainverify.ops.pointwise import addcdiv, addcmul
from trainverify.ops.table import Rows

rows = Rows("optimizer")


# ---- what the fused optimizers share
def _unscaled(m, grads, grad_scale):
    return list(grads) if grad_scale is None else [m.div(g, _scalar(m, grad_scale)) for g in grads]


def _scalar(m, x):
    x = lift(m, x)
    return x if tuple(x.shape) == () else m.reshape(x, ())


def _kept(m, found_inf, old: list, new: list) -> list:
    """The new values, or the old ones if gradient scaling found an infinity."""
    if found_inf is None:
        return new
    skip = m.compare("eq", _scalar(m, found_inf), m.const(1))
    return [m.where(skip, o, n) for o, n in zip(old, new, strict=True)]


def _decayed(m, grad, param, weight_decay, maximize):
    """The gradient that is stepped along, with an L2 penalty."""
    grad = m.neg(grad) if maximize else grad
    return m.add(grad, m.scale(param, weight_decay)) if weight_decay else grad


def _unchanged(old, new) -> list:
    """State that the call names but does not use."""
    return list(new) if new else list(old)


# ---- Adam
def _adam(decoupled: bool):
    def meaning(m, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, *, lr, beta1, beta2, weight_decay, eps,
                amsgrad, maximize, grad_scale=None, found_inf=None):
        """One step of Adam on every parameter"""
        lr, scaled = _scalar(m, lr), _unscaled(m, grads, grad_scale)
        new = [_adam_step(m, *one, lr, beta1, beta2, weight_decay, eps, maximize, decoupled)
               for one in zip(params, scaled, exp_avgs, exp_avg_sqs, max_exp_avg_sqs if amsgrad else [None] * len(params), state_steps,
                              strict=True)]
        news = [[n[k] for n in new] for k in range(3)]
        largest = _unchanged(max_exp_avg_sqs, [n[3] for n in new] if amsgrad else [])
        old = [*params, *grads, *exp_avgs, *exp_avg_sqs, *max_exp_avg_sqs]
        return _kept(m, found_inf, old, [*news[0], *scaled, *news[1], *news[2], *largest])

    meaning.__doc__ = "One step of Adam with decoupled weight decay" if decoupled else "One step of Adam with an L2 penalty"
    return meaning


def _adam_step(m, param, grad, mean, square, largest, step, lr, beta1, beta2, weight_decay, eps, maximize, decoupled):
    one, step = m.const(1), _scalar(m, step)
    grad = _decayed(m, grad, param, 0 if decoupled else weight_decay, maximize)
    if decoupled and weight_decay:
        param = m.mul(param, m.sub(one, m.scale(lr, weight_decay)))
    mean = m.add(mean, m.mul(m.sub(one, m.const(beta1)), m.sub(grad, mean)))
    square = m.add(m.scale(square, beta2), m.mul(m.sub(one, m.const(beta2)), m.mul(grad, grad)))
    correction1 = m.sub(one, m.power(m.const(beta1), step))
    correction2 = m.sub(one, m.power(m.const(beta2), step))
    largest = None if largest is None else m.maximum(largest, square)
    root = m.div(m.sqrt(square if largest is None else largest), m.sqrt(correction2))
    update = m.mul(m.div(lr, correction1), m.div(mean, m.add(root, m.const(eps))))
    return m.sub(param, update), mean, square, largest


rows("aten._fused_adamw", source="torch.optim.AdamW")(_adam(True))
rows("aten._fused_adam", source="torch.optim.Adam")(_adam(False))


# ---- SGD and Adagrad
@rows("aten._fused_sgd", source="torch.optim.SGD")
def fused_sgd(m, params, grads, momentum_buffers, *, weight_decay, momentum, lr, dampening, nesterov, maximize, is_first_step,
              grad_scale=None, found_inf=None):
    """One step of SGD with momentum"""
    lr, scaled = _scalar(m, lr), _unscaled(m, grads, grad_scale)
    new, buffers = [], []
    for i, (param, grad) in enumerate(zip(params, scaled, strict=True)):
        grad = _decayed(m, grad, param, weight_decay, maximize)
        if momentum:
            buf = grad if is_first_step else m.add(m.scale(momentum_buffers[i], momentum), m.mul(m.sub(m.const(1), m.const(dampening)), grad))
            buffers.append(buf)
            grad = m.add(grad, m.scale(buf, momentum)) if nesterov else buf
        new.append(m.sub(param, m.mul(lr, grad)))
    return _kept(m, found_inf, [*params, *grads, *momentum_buffers], [*new, *scaled, *_unchanged(momentum_buffers, buffers)])


@rows("aten._fused_adagrad", source="torch.optim.Adagrad", ctx=True)
def fused_adagrad(m, params, grads, state_sums, state_steps, *, lr, lr_decay, weight_decay, eps, maximize, grad_scale=None,
                  found_inf=None, ctx):
    """One step of Adagrad; the overload with a number for lr names the step counts as written"""
    one, lr, scaled = m.const(1), _scalar(m, lr), _unscaled(m, grads, grad_scale)
    new, sums = [], []
    for param, grad, total, step in zip(params, scaled, state_sums, state_steps, strict=True):
        grad = _decayed(m, grad, param, weight_decay, maximize)
        rate = m.div(lr, m.add(one, m.scale(m.sub(_scalar(m, step), one), lr_decay)))
        sums.append(m.add(total, m.mul(grad, grad)))
        new.append(m.sub(param, m.div(m.mul(rate, grad), m.add(m.sqrt(sums[-1]), m.const(eps)))))
    got = _kept(m, found_inf, [*params, *grads, *state_sums], [*new, *scaled, *sums])
    return got + list(state_steps) if len(ctx.native) > len(got) else got


# ---- foreach
def _scalars(m, scalars, n: int) -> list:
    """`value` (shared), a list of scalars, or a tensor of them, as one per entry."""
    if isinstance(scalars, (list, tuple)):
        return list(scalars)
    if number(scalars) or tuple(scalars.shape) == ():
        return [scalars] * n
    return [m.take([lift(m, scalars)], torch.tensor(i + 1)) for i in range(n)]


@rows("aten._foreach_addcmul", source="torch._foreach_addcmul")
def foreach_addcmul(m, self, tensor1, tensor2, value=1):
    """addcmul of every entry"""
    values = _scalars(m, value, len(self))
    return [addcmul(m, *one[:3], value=one[3]) for one in zip(self, tensor1, tensor2, values, strict=True)]


@rows("aten._foreach_addcdiv", source="torch._foreach_addcdiv")
def foreach_addcdiv(m, self, tensor1, tensor2, value=1):
    """addcdiv of every entry"""
    values = _scalars(m, value, len(self))
    return [addcdiv(m, *one[:3], value=one[3]) for one in zip(self, tensor1, tensor2, values, strict=True)]


@rows("aten._foreach_max", source="torch._foreach_max")
def foreach_max(m, self):
    """The greatest element of every entry"""
    return [m.amax(x, tuple(range(len(x.shape)))) if x.shape else x for x in self]


@rows("aten._foreach_powsum", source="torch._foreach_powsum")
def foreach_powsum(m, self, ord=2, dtype=None):
    """The sum of |x| ** ord over every entry"""
    return [m.sum(m.mul(x, x) if ord == 2 else m.pow(m.abs(x), ord)) for x in self]


# ---- gradient scaling
@rows("aten._amp_foreach_non_finite_check_and_unscale", source="torch.amp.GradScaler.unscale_", ctx=True)
def amp_unscale(m, grads, found_inf, inv_scale, *, ctx):
    """Gradients times inv_scale; over the reals they are finite: an infinity that was recorded is a decision"""
    inv_scale, new = _scalar(m, inv_scale), []
    for g in grads:
        new.append(Complex(m.mul(g.re, inv_scale), m.mul(g.im, inv_scale)) if isinstance(g, Complex) else m.mul(g, inv_scale))
    outcome = ctx.native[-1]
    if not bool((outcome != 0).any()):
        return [*new, lift(m, found_inf)]
    ctx.decide("nonfinite", list(grads), outcome)
    return [*new, m.const(1, tuple(outcome.shape))]


@rows("aten._amp_update_scale", source="torch.amp.GradScaler.update", ctx=True)
def amp_update_scale(m, scale, growth_tracker, found_inf, growth_factor, backoff_factor, growth_interval, *, ctx):
    """Backs off after an infinity, grows after enough finite steps; the count of those is an integer"""
    scale, found_inf = lift(m, scale), lift(m, found_inf)
    grows = int(growth_tracker) + 1 == growth_interval
    if not m.is_const(found_inf):
        ctx.decide("mask", [found_inf], ctx.native[-1] == 0)
    found = m.compare("ne", found_inf, m.const(0))
    new = m.where(found, m.scale(scale, backoff_factor), m.scale(scale, growth_factor) if grows else scale)
    return [new, *[None] * (len(ctx.native) - 1)]
