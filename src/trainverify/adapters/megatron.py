"""megatron-core without a GPU and without the compiled kernels of Apex and TransformerEngine (every patch is listed in the report as an assumption).

Its Python fallbacks for those kernels are incomplete: one reads a norm with float(), one refuses sequence parallelism, one name is never defined. Each
patch does what Megatron does where the kernels are installed, and nothing else: no mark, factor or reduction that it would not set itself.
"""
from __future__ import annotations

import copy
from collections.abc import Callable
from types import MappingProxyType, ModuleType
from typing import Any

FRAMEWORK = "megatron.core"

Patch = Callable[[Any, str, Any, str], None]


def after_import(module_name: str, module: ModuleType, patch: Patch) -> None:
    change = _CHANGES.get(module_name)
    if change is not None:
        change(module, patch)


def _utils(module: ModuleType, patch: Patch) -> None:
    """The norm of the gradients stays a tensor, as Apex's kernel returns it."""
    import torch

    def l2_norm(chunk_size, noop_flag, tensor_lists, per_tensor, *args):
        norms = [torch.norm(tensor) for tensors in tensor_lists for tensor in tensors]
        return torch.norm(torch.stack(norms)).reshape(1), None

    patch(module, "local_multi_tensor_l2_norm", l2_norm,
          "the fallback for Apex's multi_tensor_l2norm reads norms with float(), whose origin nobody can follow; the same norm, on tensors")


def _torch_norm(module: ModuleType, patch: Patch) -> None:
    """Norms under sequence parallelism are those of the TransformerEngine path: the same norm, whose parameters carry config.sequence_parallel."""
    make = module.WrappedTorchNorm.__new__

    def new(cls, config, *args, **kwargs):
        if not config.sequence_parallel:
            return make(cls, config, *args, **kwargs)
        plain = copy.copy(config)
        plain.sequence_parallel = False
        norm = make(cls, plain, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    patch(module.WrappedTorchNorm, "__new__", staticmethod(new),
          "torch's norms are refused under sequence parallelism; the parameters get the attribute sequence_parallel=config.sequence_parallel, "
          "as TransformerEngine's and Apex's norms give it to theirs")


def _moe_utils(module: ModuleType, patch: Patch) -> None:
    if not hasattr(module, "te_general_gemm"):
        patch(module, "te_general_gemm", None, "not defined where TransformerEngine is missing, but asked for; None takes the branch of plain torch.mm")

    def maybe_move_tensor_to_cpu(tensor, as_numpy=False, record_stream=False):
        import torch
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    patch(module, "maybe_move_tensor_to_cpu", maybe_move_tensor_to_cpu, "converts to numpy only what is_cuda says to be on a GPU; every tensor is taken to be")


_CHANGES = MappingProxyType({
    "megatron.core.utils": _utils,
    "megatron.core.transformer.torch_norm": _torch_norm,
    "megatron.core.transformer.moe.moe_utils": _moe_utils,
})
