"""TransformerEngine, as far as Megatron-LM's layer specs use it: which names stand in which module (trusted as an assumption of the report).

The layers are in te_linear.py and te_attention.py, the optimizer and the multi-tensor ops are Apex's. There is no fp8: what would need it is refused.
"""
from __future__ import annotations

import contextlib
from typing import Any

import torch

from trainverify.adapters.standins import apex
from trainverify.adapters.standins.calls import only, refuse, stands_for
from trainverify.adapters.standins.te_attention import DotProductAttention
from trainverify.adapters.standins.te_linear import GroupedLinear, LayerNorm, LayerNormLinear, Linear, Module, RMSNorm


class FP8GlobalStateManager:
    """fp8 is never on."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False

    @staticmethod
    def reset() -> None: ...


def fp8_autocast(enabled=True, **kwargs):
    """A context without effect where fp8 is off."""
    return refuse("transformer_engine.pytorch.fp8_autocast(enabled=True)") if enabled else contextlib.nullcontext()


def fp8_model_init(enabled=True, **kwargs):
    """A context without effect where fp8 is off."""
    return refuse("transformer_engine.pytorch.fp8_model_init(enabled=True)") if enabled else contextlib.nullcontext()


def _absent(name: str) -> type:
    """A class that programs name in annotations and isinstance(), and of which there is no object."""
    def __init__(self, *args, **kwargs):
        refuse(name)
    return type(name.rpartition(".")[2], (), {"__init__": __init__})


def _as(name: str, function: Any) -> Any:
    """A function of Apex's under TransformerEngine's name."""
    return stands_for(f"transformer_engine.pytorch.optimizers.{name}", function.stands_for[1])(function.__wrapped__)


class FusedAdam(apex.FusedAdam):
    step = _as("FusedAdam.step", apex.FusedAdam.step)

    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0, amsgrad=False, *,
                 set_grad_none=None, capturable=False, master_weights=False, **others):
        for key, value in others.items():
            if value not in (None, False, torch.float32):
                refuse(f"transformer_engine.pytorch.optimizers.FusedAdam({key}={value!r})")
        super().__init__(params, lr, bias_correction, betas, eps, adam_w_mode, weight_decay, amsgrad, set_grad_none is not False, capturable, master_weights)


class FusedSGD(apex.FusedSGD):
    step = _as("FusedSGD.step", apex.FusedSGD.step)


@stands_for("transformer_engine.pytorch.checkpoint", "what the function computes; it is run again in the backward")
def checkpoint(function, *args, distribute_saved_activations=False, get_rng_state_tracker=None, tp_group=None, use_reentrant=True, **kwargs):
    only("transformer_engine.pytorch.checkpoint", distribute_saved_activations=(distribute_saved_activations, False))
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)


@contextlib.contextmanager
def activation_recompute_forward(activation_recompute=False, recompute_phase=False):
    """Keeps fp8 state between a forward and its repetition; there is none."""
    yield


def is_fp8_activation_recompute_enabled() -> bool:
    return False


def get_dummy_wgrad(shape, dtype, zero=False):
    """What autograd gets for a gradient that was added to main_grad."""
    return torch.zeros(shape, dtype=dtype) if zero else torch.empty(shape, dtype=dtype)


def modules() -> dict[str, dict[str, Any]]:
    te = "transformer_engine"
    layers = {c.__name__: c for c in (DotProductAttention, GroupedLinear, LayerNorm, LayerNormLinear, Linear, RMSNorm)}
    fp8 = {"fp8_autocast": fp8_autocast, "fp8_model_init": fp8_model_init}
    quantized = {"QuantizedTensor": _absent("QuantizedTensor")}
    recipes = {n: _absent(f"{te}.common.recipe.{n}") for n in ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling",
                                                               "NVFP4BlockScaling", "Format", "Recipe")}
    ops = {n: _absent(f"{te}.pytorch.ops.{n}") for n in ("FusibleOperation", "Sequential")}
    optimizers = {"FusedAdam": FusedAdam, "FusedSGD": FusedSGD, "multi_tensor_applier": apex.MultiTensorApply(2048 * 32),
                  **{f.__name__: _as(f.__name__, f) for f in (apex.multi_tensor_l2norm, apex.multi_tensor_scale)}}
    distributed = {"checkpoint": checkpoint, "activation_recompute_forward": activation_recompute_forward,
                   "is_fp8_activation_recompute_enabled": is_fp8_activation_recompute_enabled,
                   "CudaRNGStatesTracker": _absent(f"{te}.pytorch.distributed.CudaRNGStatesTracker")}
    return {te: {}, f"{te}.common": {}, f"{te}.common.recipe": recipes, f"{te}.pytorch": {**layers, **fp8, "checkpoint": checkpoint},
            f"{te}.pytorch.fp8": {**fp8, "FP8GlobalStateManager": FP8GlobalStateManager}, f"{te}.pytorch.tensor": quantized,
            f"{te}.pytorch.ops": ops, f"{te}.pytorch.optimizers": optimizers, f"{te}.pytorch.distributed": distributed,
            f"{te}.pytorch.module": {}, f"{te}.pytorch.module.base": {"TransformerEngineBaseModule": Module, "get_dummy_wgrad": get_dummy_wgrad}}
