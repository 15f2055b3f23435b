"""TransformerEngine's linear layers and norms in plain PyTorch, with their tensor-parallel communication (trusted as an assumption of the report).

Source: transformer_engine/pytorch/module/{linear,layernorm_linear,grouped_linear,layernorm,rmsnorm}.py. Column: weights split by rows, gradients of the input
summed over the group; row: weights split by columns, outputs summed. With sequence_parallel the input or output is split along dimension 0
instead. Parameters carry the marks that Megatron-LM reads (tensor_model_parallel, sequence_parallel).
"""
from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from trainverify.adapters.standins.calls import only, refuse, stands_for, wide

LAYER_NORM = "(x - mean(x)) / sqrt(var(x) + eps) weight + bias"
RMS_NORM = "x / sqrt(mean(x^2) + eps) weight"
PRODUCT = "x weight^T + bias, tensor-parallel as parallel_mode says, along dimension 0 too with sequence_parallel"
# Steer kernels, overlap and memory; they do not change what is computed.
_WITHOUT_MEANING = frozenset({"ub_name", "ub_overlap_ag", "ub_overlap_rs", "ub_overlap_rs_dgrad", "ub_overlap_ag_fprop", "ub_overlap_rs_fprop",
                              "ub_overlap_ag_dgrad", "ub_bulk_dgrad", "ub_bulk_wgrad", "ub_split_ag", "ub_split_rs", "ub_atomic_gemm_ag",
                              "ub_atomic_gemm_rs", "symmetric_ar_type", "name"})


# ---- communication

def _all_reduced(x: Tensor, group: Any) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


def _gathered(x: Tensor, group: Any) -> Tensor:
    out = x.new_empty(x.shape[0] * dist.get_world_size(group), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def _scattered(x: Tensor, group: Any) -> Tensor:
    out = x.new_empty(x.shape[0] // dist.get_world_size(group), *x.shape[1:])
    dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
    return out


def _same(x: Tensor, group: Any) -> Tensor:
    return x.view_as(x)


class Between(torch.autograd.Function):
    """A linear map between the ranks in the forward, its transpose in the backward."""

    @staticmethod
    def forward(ctx, x, group, there, back):
        ctx.group, ctx.back = group, back
        return there(x, group)

    @staticmethod
    def backward(ctx, grad):
        return ctx.back(grad, ctx.group), None, None, None


def copied_in(x: Tensor, group: Any) -> Tensor:
    """The same input on all ranks; its gradient is the sum of theirs."""
    return Between.apply(x, group, _same, _all_reduced)


def summed_out(x: Tensor, group: Any) -> Tensor:
    """The sum over the ranks, on all of them."""
    return Between.apply(x, group, _all_reduced, _same)


def gathered(x: Tensor, group: Any) -> Tensor:
    """The ranks' parts along dimension 0; each part's gradient is the sum over ranks."""
    return Between.apply(x, group, _gathered, _scattered)


def sum_scattered(x: Tensor, group: Any) -> Tensor:
    """The sum over the ranks, each keeping its part of dimension 0."""
    return Between.apply(x, group, _scattered, _gathered)


class IntoMainGrad(torch.autograd.Function):
    """The weight itself; its gradient is added to weight.main_grad, and what autograd gets is not to be read."""

    @staticmethod
    def forward(ctx, weight):
        ctx.weight = weight
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        weight = ctx.weight
        weight.main_grad.add_(grad.to(weight.main_grad.dtype))
        if not hasattr(weight, "grad_added_to_main_grad"):
            return None
        weight.grad_added_to_main_grad = True
        return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)


# ---- what all modules have

class Module(nn.Module):
    """No fp8: its state is empty."""

    fp8 = fp8_calibration = False

    def init_fp8_metadata(self, num_gemms=1):
        self.fp8_meta = {"fp8_checkpoint": False}

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        if state is not None and not (isinstance(state, Tensor) and state.numel() == 0):
            refuse(f"{type(self).__name__}: a checkpoint with fp8 state")


def marked(parameter: Tensor, dim: int) -> None:
    parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, dim, 1


def _plain_only(name: str, others: dict[str, Any]) -> None:
    for key, value in others.items():
        if key not in _WITHOUT_MEANING and value not in (None, False):
            refuse(f"{name}({key}={value!r})")


def norm(kind: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool) -> Tensor:
    scale = wide(weight) + 1 if zero_centered else wide(weight)
    if kind == "RMSNorm":
        return F.rms_norm(wide(x), tuple(weight.shape), scale, eps).to(x.dtype)
    return F.layer_norm(wide(x), tuple(weight.shape), scale, wide(bias), eps).to(x.dtype)


class _Norm(Module):
    KIND = ""

    def __init__(self, normalized_shape=None, eps=1e-5, sequence_parallel=None, params_dtype=None, zero_centered_gamma=False, hidden_size=None,
                 device=None, dtype=None, **others):
        super().__init__()
        _plain_only(f"transformer_engine.pytorch.{self.KIND}", others)
        shape = hidden_size if normalized_shape is None else normalized_shape
        self.eps, self.zero_centered_gamma, self.sequence_parallel = eps, zero_centered_gamma, sequence_parallel
        made = {"dtype": params_dtype or dtype or torch.get_default_dtype(), "device": device}
        self.weight = nn.Parameter(torch.full((shape,) if isinstance(shape, int) else tuple(shape), 0.0 if zero_centered_gamma else 1.0, **made))
        self.bias = nn.Parameter(torch.zeros_like(self.weight)) if self.KIND == "LayerNorm" else None
        for parameter in self.parameters() if sequence_parallel is not None else ():
            parameter.sequence_parallel = sequence_parallel


class LayerNorm(_Norm):
    KIND = "LayerNorm"

    @stands_for("transformer_engine.pytorch.LayerNorm", LAYER_NORM)
    def forward(self, inp):
        return norm("LayerNorm", inp, self.weight, self.bias, self.eps, self.zero_centered_gamma)


class RMSNorm(_Norm):
    KIND = "RMSNorm"

    @stands_for("transformer_engine.pytorch.RMSNorm", RMS_NORM)
    def forward(self, inp):
        return norm("RMSNorm", inp, self.weight, None, self.eps, self.zero_centered_gamma)


# ---- linear layers

class _Parallel(Module):
    """Weights and communication that Linear, LayerNormLinear and GroupedLinear share."""

    def _set_up(self, name, in_features, out_features, sequence_parallel, tp_group, tp_size, bias, return_bias, parallel_mode, fused, others):
        _plain_only(f"transformer_engine.pytorch.{name}", others)
        self.init_fp8_metadata()
        self.tp_group, self.parallel_mode = tp_group, parallel_mode
        self.tp_size = dist.get_world_size(tp_group) if tp_group is not None else tp_size
        self.in_features = in_features // (self.tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (self.tp_size if parallel_mode == "column" else 1)
        self.use_bias, self.return_bias, self.apply_bias = bias, return_bias, bias and not return_bias
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.fuse_wgrad_accumulation = fused

    def _weights(self, count, params_dtype, device, init_method, tracker, tracker_name):
        made = {"dtype": params_dtype or torch.get_default_dtype(), "device": device}
        for i in range(count or 1):
            end = "" if count is None else str(i)
            weight = nn.Parameter(torch.empty(self.out_features, self.in_features, **made))
            fork = contextlib.nullcontext() if tracker is None else tracker().fork(*([tracker_name] if tracker_name else []))
            with torch.no_grad(), fork:
                (init_method or _default_init)(weight)
            marked(weight, 1 if self.parallel_mode == "row" else 0)
            self.register_parameter(f"weight{end}", weight)
            if not self.use_bias:
                setattr(self, f"bias{end}", torch.empty(0, **made))
                continue
            bias = nn.Parameter(torch.zeros(self.out_features, **made))
            if self.parallel_mode == "row":
                bias.sequence_parallel = True
            elif self.parallel_mode == "column":
                marked(bias, 0)
            self.register_parameter(f"bias{end}", bias)

    def set_tensor_parallel_group(self, tp_group):
        self.tp_group = tp_group

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Without the bias' addition where it comes after a sum over ranks."""
        if self.fuse_wgrad_accumulation and torch.is_grad_enabled():
            weight = IntoMainGrad.apply(weight)
        if self.parallel_mode == "column" and self.tp_size > 1:
            x = (gathered if self.sequence_parallel else copied_in)(x, self.tp_group)
        inside = bias.to(x.dtype) if self.apply_bias and self.parallel_mode != "row" else None
        out = F.linear(x, weight.to(x.dtype), inside)
        if self.parallel_mode == "row" and self.tp_size > 1:
            out = (sum_scattered if self.sequence_parallel else summed_out)(out, self.tp_group)
        return out + bias.to(out.dtype) if self.apply_bias and self.parallel_mode == "row" else out


def _default_init(weight: Tensor) -> None:
    nn.init.normal_(weight, mean=0.0, std=0.023)


class Linear(_Parallel):
    def __init__(self, in_features, out_features, sequence_parallel=False, fuse_wgrad_accumulation=False, tp_group=None, tp_size=1,
                 get_rng_state_tracker=None, init_method=None, bias=True, return_bias=False, params_dtype=None, parallel_mode=None,
                 parameters_split=None, device=None, rng_tracker_name=None, **others):
        super().__init__()
        only("transformer_engine.pytorch.Linear", parameters_split=(parameters_split, None))
        self._set_up("Linear", in_features, out_features, sequence_parallel, tp_group, tp_size, bias, return_bias, parallel_mode,
                     fuse_wgrad_accumulation, others)
        self._weights(None, params_dtype, device, init_method, get_rng_state_tracker, rng_tracker_name)

    @stands_for("transformer_engine.pytorch.Linear", PRODUCT)
    def forward(self, inp, is_first_microbatch=None, fp8_output=False):
        only("transformer_engine.pytorch.Linear.forward", fp8_output=(fp8_output, False))
        out = self._product(inp, self.weight, self.bias)
        return (out, self.bias) if self.return_bias else out


class LayerNormLinear(_Parallel):
    def __init__(self, in_features, out_features, eps=1e-5, sequence_parallel=False, fuse_wgrad_accumulation=False, tp_group=None, tp_size=1,
                 get_rng_state_tracker=None, init_method=None, bias=True, normalization="LayerNorm", return_bias=False, params_dtype=None,
                 parallel_mode=None, return_layernorm_output=False, return_layernorm_output_gathered=False, parameters_split=None,
                 zero_centered_gamma=False, device=None, rng_tracker_name=None, **others):
        super().__init__()
        only("transformer_engine.pytorch.LayerNormLinear", parameters_split=(parameters_split, None),
             return_layernorm_output_gathered=(return_layernorm_output_gathered, False))
        self._set_up("LayerNormLinear", in_features, out_features, sequence_parallel, tp_group, tp_size, bias, return_bias, parallel_mode,
                     fuse_wgrad_accumulation, others)
        self.eps, self.normalization, self.zero_centered_gamma = eps, normalization, zero_centered_gamma
        self.return_layernorm_output = return_layernorm_output
        made = {"dtype": params_dtype or torch.get_default_dtype(), "device": device}
        self.layer_norm_weight = nn.Parameter(torch.full((in_features,), 0.0 if zero_centered_gamma else 1.0, **made))
        self.layer_norm_bias = nn.Parameter(torch.zeros(in_features, **made)) if normalization == "LayerNorm" else None
        for parameter in self.parameters():
            parameter.sequence_parallel = self.sequence_parallel
        self._weights(None, params_dtype, device, init_method, get_rng_state_tracker, rng_tracker_name)

    @stands_for("transformer_engine.pytorch.LayerNormLinear", f"n weight^T + bias of n = {LAYER_NORM} (or {RMS_NORM}), tensor-parallel as Linear is")
    def forward(self, inp, is_first_microbatch=None, fp8_output=False):
        only("transformer_engine.pytorch.LayerNormLinear.forward", fp8_output=(fp8_output, False))
        normed = norm(self.normalization, inp, self.layer_norm_weight, self.layer_norm_bias, self.eps, self.zero_centered_gamma)
        out = self._product(normed, self.weight, self.bias)
        parts = [out, *([self.bias] if self.return_bias else []), *([normed] if self.return_layernorm_output else [])]
        return tuple(parts) if len(parts) > 1 else out


class GroupedLinear(_Parallel):
    """Experts: one weight for each group of consecutive rows; its own communication is the program's."""

    def __init__(self, num_gemms, in_features, out_features, sequence_parallel=False, fuse_wgrad_accumulation=False, tp_group=None, tp_size=1,
                 get_rng_state_tracker=None, rng_tracker_name=None, init_method=None, bias=True, return_bias=False, params_dtype=None,
                 parallel_mode=None, device=None, **others):
        super().__init__()
        self.num_gemms = num_gemms
        self._set_up("GroupedLinear", in_features, out_features, sequence_parallel, tp_group, tp_size, bias, return_bias, parallel_mode,
                     fuse_wgrad_accumulation, others)
        if self.tp_size > 1 and parallel_mode is not None:
            refuse(f"transformer_engine.pytorch.GroupedLinear(parallel_mode={parallel_mode!r}) on {self.tp_size} tensor-parallel ranks")
        self._weights(num_gemms, params_dtype, device, init_method, get_rng_state_tracker, rng_tracker_name)

    @stands_for("transformer_engine.pytorch.GroupedLinear", "x_i weight_i^T + bias_i for each group of m_splits[i] consecutive rows")
    def forward(self, inp, m_splits, is_first_microbatch=None):
        biases = [getattr(self, f"bias{i}") for i in range(self.num_gemms)]
        rows = inp.reshape(-1, inp.shape[-1]).split([int(n) for n in m_splits])
        out = torch.cat([self._product(x, getattr(self, f"weight{i}"), biases[i]) for i, x in enumerate(rows)]).reshape(*inp.shape[:-1], -1)
        return (out, biases if self.use_bias else [None] * self.num_gemms) if self.return_bias else out
