"""Apex: fused norms, FusedAdam, FusedSGD and the multi-tensor ops of amp_C (trusted as an assumption of the report).

Sources: apex/normalization/fused_layer_norm.py, apex/optimizers/, csrc/multi_tensor_*.cu. The multi-tensor ops set their flag where a value is not finite;
over the reals none is, so it is left alone.
"""
from __future__ import annotations

import math
import numbers
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainverify.adapters.standins.calls import only, stands_for, wide

LAYER_NORM = "(x - mean(x)) / sqrt(var(x) + eps) weight + bias"
RMS_NORM = "x / sqrt(mean(x^2) + eps) weight"


# ---- norms

def _shape(normalized_shape: Any) -> tuple[int, ...]:
    return (normalized_shape,) if isinstance(normalized_shape, numbers.Integral) else tuple(normalized_shape)


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Any, eps: float) -> Tensor:
    return F.layer_norm(wide(x), _shape(shape), wide(weight), wide(bias), eps).to(x.dtype if weight is None else weight.dtype)


def _rms_norm(x: Tensor, weight: Tensor | None, shape: Any, eps: float) -> Tensor:
    return F.rms_norm(wide(x), _shape(shape), wide(weight), eps).to(x.dtype if weight is None else weight.dtype)


@stands_for("apex.normalization.fused_layer_norm_affine", LAYER_NORM)
def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
    return _layer_norm(input, weight, bias, normalized_shape, eps)


@stands_for("apex.normalization.fused_layer_norm", "(x - mean(x)) / sqrt(var(x) + eps)")
def fused_layer_norm(input, normalized_shape, eps=1e-6, memory_efficient=False):
    return _layer_norm(input, None, None, normalized_shape, eps)


@stands_for("apex.normalization.fused_rms_norm_affine", RMS_NORM)
def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
    return _rms_norm(input, weight, normalized_shape, eps)


@stands_for("apex.normalization.fused_rms_norm", "x / sqrt(mean(x^2) + eps)")
def fused_rms_norm(input, normalized_shape, eps=1e-6, memory_efficient=False):
    return _rms_norm(input, None, normalized_shape, eps)


class FusedLayerNormAffineFunction:
    """Called as an autograd.Function is; autograd differentiates what it does."""

    @staticmethod
    def apply(input, weight, bias, normalized_shape, eps, memory_efficient=False):
        return fused_layer_norm_affine(input, weight, bias, normalized_shape, eps)


class FusedRMSNormAffineFunction:
    """Called as an autograd.Function is."""

    @staticmethod
    def apply(input, weight, normalized_shape, eps, memory_efficient=False):
        return fused_rms_norm_affine(input, weight, normalized_shape, eps)


class FusedLayerNorm(nn.Module):
    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, memory_efficient=False):
        super().__init__()
        self.normalized_shape, self.eps, self.elementwise_affine = torch.Size(_shape(normalized_shape)), eps, elementwise_affine
        self.weight = nn.Parameter(torch.empty(*self.normalized_shape)) if elementwise_affine else None
        self.bias = nn.Parameter(torch.empty(*self.normalized_shape)) if elementwise_affine else None
        self.reset_parameters()

    def reset_parameters(self):
        if self.elementwise_affine:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    @stands_for("apex.normalization.FusedLayerNorm", LAYER_NORM)
    def forward(self, input):
        return _layer_norm(input, self.weight, self.bias, self.normalized_shape, self.eps)


class FusedRMSNorm(nn.Module):
    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, memory_efficient=False):
        super().__init__()
        self.normalized_shape, self.eps, self.elementwise_affine = torch.Size(_shape(normalized_shape)), eps, elementwise_affine
        self.weight = nn.Parameter(torch.empty(*self.normalized_shape)) if elementwise_affine else None
        self.reset_parameters()

    def reset_parameters(self):
        if self.elementwise_affine:
            nn.init.ones_(self.weight)

    @stands_for("apex.normalization.FusedRMSNorm", RMS_NORM)
    def forward(self, input):
        return _rms_norm(input, self.weight, self.normalized_shape, self.eps)


# ---- amp_C

@stands_for("amp_C.multi_tensor_l2norm", "the Euclidean norm of all tensors together, and of each")
def multi_tensor_l2norm(chunk_size, noop_flag, tensor_lists, per_tensor=False):
    squares = torch.stack([wide(t).square().sum() for t in tensor_lists[0]])
    return squares.sum().sqrt().reshape(1), squares.sqrt() if per_tensor else squares.new_empty(0)


@stands_for("amp_C.multi_tensor_scale", "out = in scale, for each pair of tensors")
def multi_tensor_scale(chunk_size, noop_flag, tensor_lists, scale):
    for x, out in zip(*tensor_lists, strict=True):
        out.copy_(wide(x) * scale)


@stands_for("amp_C.multi_tensor_axpby", "out = a x + b y, for each triple of tensors")
def multi_tensor_axpby(chunk_size, noop_flag, tensor_lists, a, b, arg_to_check=-1):
    for x, y, out in zip(*tensor_lists, strict=True):
        out.copy_(wide(x) * a + wide(y) * b)


ADAM = ("m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, p = p - lr (m' / (sqrt(v') + eps) + decay p) with m', v' corrected for bias "
        "(without AdamW, decay p adds to g)")


@stands_for("amp_C.multi_tensor_adam", ADAM)
def multi_tensor_adam(chunk_size, noop_flag, tensor_lists, lr, beta1, beta2, eps, step, mode, bias_correction, weight_decay):
    _adam(tensor_lists, lr, beta1, beta2, eps, step, mode == 1, bias_correction, weight_decay)


def _adam(tensor_lists, lr, beta1, beta2, eps, step, decoupled, bias_correction, weight_decay) -> None:
    correction1, correction2 = (1 - beta1 ** step, 1 - beta2 ** step) if bias_correction else (1.0, 1.0)
    for g, p, m, v in zip(*tensor_lists, strict=True):
        old, g = p.to(m.dtype), g.to(m.dtype)
        if weight_decay and decoupled:
            old = old * (1 - lr * weight_decay)
        elif weight_decay:
            g = g + weight_decay * old
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.copy_(old.addcdiv(m, v.sqrt() / math.sqrt(correction2) + eps, value=-lr / correction1))


SGD = "p = p - lr d with d = g + decay p, and with momentum d = momentum d + (1 - dampening) d"


def _sgd(tensor_lists, weight_decay, momentum, dampening, lr, nesterov, first, decay_after_momentum) -> None:
    for g, p, kept in zip(*tensor_lists, strict=True):
        d = g.to(p.dtype)
        if weight_decay and not decay_after_momentum:
            d = d + weight_decay * p
        if momentum:
            kept.copy_(d) if first else kept.mul_(momentum).add_(d, alpha=1 - dampening)
            d = d + momentum * kept if nesterov else kept
        if weight_decay and decay_after_momentum:
            d = d + weight_decay * p
        p.add_(d, alpha=-lr)


class MultiTensorApply:
    """multi_tensor_applier(op, flag, lists, *arguments)"""

    available = True

    def __init__(self, chunk_size):
        self.chunk_size = chunk_size

    def __call__(self, op, noop_flag_buffer, tensor_lists, *args):
        return op(self.chunk_size, noop_flag_buffer, tensor_lists, *args)


# ---- optimizers

class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0, amsgrad=False,
                 set_grad_none=True, capturable=False, master_weights=False):
        only("apex.optimizers.FusedAdam", amsgrad=(amsgrad, False), capturable=(capturable, False), master_weights=(master_weights, False))
        super().__init__(params, {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode, self.set_grad_none = 1 if adam_w_mode else 0, set_grad_none

    def zero_grad(self, set_to_none=None):
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)

    @stands_for("apex.optimizers.FusedAdam.step", ADAM)
    @torch.no_grad()
    def step(self, closure=None, grads=None, output_params=None, scale=None, grad_norms=None, grad_scaler=None):
        only("apex.optimizers.FusedAdam.step", grads=(grads, None), output_params=(output_params, None), scale=(scale, None),
             grad_norms=(grad_norms, None), grad_scaler=(grad_scaler, None))
        loss = _called(closure)
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            lists = [[], [], [], []]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
                    state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
                for entry, tensor in zip(lists, (p.grad, p, state["exp_avg"], state["exp_avg_sq"])):
                    entry.append(tensor)
            _adam(lists, group["lr"], *group["betas"], group["eps"], group["step"], bool(self.adam_w_mode), group["bias_correction"], group["weight_decay"])
        return loss


class FusedSGD(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, wd_after_momentum=False,
                 materialize_master_grads=True, set_grad_none=False):
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        super().__init__(params, {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov})
        self.wd_after_momentum, self.set_grad_none = wd_after_momentum, set_grad_none

    def zero_grad(self, set_to_none=None):
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)

    @stands_for("apex.optimizers.FusedSGD.step", SGD)
    @torch.no_grad()
    def step(self, closure=None):
        loss = _called(closure)
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                first = group["momentum"] != 0 and "momentum_buffer" not in state
                if first:
                    state["momentum_buffer"] = torch.zeros_like(p)
                _sgd([[p.grad], [p], [state.get("momentum_buffer")]], group["weight_decay"], group["momentum"], group["dampening"], group["lr"],
                     group["nesterov"], first, self.wd_after_momentum)
        return loss


def _called(closure: Any) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def clip_grad_norm_(parameters, max_norm, norm_type=2.0, error_if_nonfinite=False):
    """apex.contrib.clip_grad, by torch's own."""
    return _clip(parameters, max_norm, norm_type)


@stands_for("apex.contrib.clip_grad.clip_grad_norm_", "what torch.nn.utils.clip_grad_norm_ does")
def _clip(parameters, max_norm, norm_type):
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm, math.inf if norm_type == "inf" else norm_type)


def modules() -> dict[str, dict[str, Any]]:
    functions = {f.__name__: f for f in (fused_layer_norm_affine, fused_layer_norm, fused_rms_norm_affine, fused_rms_norm)}
    norms = {"FusedLayerNorm": FusedLayerNorm, "FusedRMSNorm": FusedRMSNorm, "MixedFusedLayerNorm": FusedLayerNorm, "MixedFusedRMSNorm": FusedRMSNorm}
    autograd = {"FusedLayerNormAffineFunction": FusedLayerNormAffineFunction, "FusedRMSNormAffineFunction": FusedRMSNormAffineFunction}
    applier = {"MultiTensorApply": MultiTensorApply, "multi_tensor_applier": MultiTensorApply(2048 * 32)}
    optimizers = {"FusedAdam": FusedAdam, "FusedSGD": FusedSGD}
    ops = {f.__name__: f for f in (multi_tensor_l2norm, multi_tensor_scale, multi_tensor_axpby, multi_tensor_adam)}
    clip = {"clip_grad_norm_": clip_grad_norm_}
    return {"apex": {}, "apex.normalization": norms, "apex.normalization.fused_layer_norm": {**norms, **functions, **autograd},
            "apex.multi_tensor_apply": applier, "apex.optimizers": optimizers, "apex.contrib": {}, "apex.contrib.clip_grad": clip, "amp_C": ops}
