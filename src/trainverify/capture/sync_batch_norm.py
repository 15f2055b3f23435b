"""Lets torch.nn.SyncBatchNorm run on CPU tensors (trusted: its normalisation is that of torch's kernels, an assumption of the report).

torch has five functions of it for GPUs only, and SyncBatchNorm and DDP refuse other tensors. Its collectives and its autograd function are torch's own,
which sees these functions in torch's place; they are written in PyTorch's operations and recorded as such. What the ranks tell each other of their rows
is the variance, where torch's kernels tell 1 / sqrt(variance + eps) and take the variance from that again: a root is not to be squared for nothing.
"""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from trainverify.capture.patches import Note, Patches

SYNC = "the kernels of torch's SyncBatchNorm compute statistics, normalisation and gradients as documented; they did not run"


@contextlib.contextmanager
def sync_batch_norm(note: Note) -> Iterator[None]:
    """SyncBatchNorm works on CPU tensors inside the block; `note` is told where it synchronises."""
    from torch.nn.modules import _functions

    patches = Patches()
    forward = torch.nn.SyncBatchNorm.forward

    def on_cpu(module: torch.nn.SyncBatchNorm, input: Tensor) -> Tensor:
        # The names of devices that it takes: cuda, hpu, xpu and this one.
        asked = Patches()
        asked.set(torch._C, "_get_privateuse1_backend_name", lambda: "cpu")
        try:
            return forward(module, input)
        finally:
            asked.restore()

    try:
        patches.set(_functions, "torch", _Torch(note))
        patches.set(torch.nn.SyncBatchNorm, "forward", on_cpu)
        patches.set(torch.nn.parallel.DistributedDataParallel, "_passing_sync_batchnorm_handle", lambda ddp, module: None)    # it refuses CPU modules
        yield
    finally:
        patches.restore()


class _Torch:
    """torch, as SyncBatchNorm's autograd function sees it."""

    def __init__(self, note: Note):
        self._note = note

    def __getattr__(self, name: str) -> Any:
        if name not in FUNCTIONS:
            return getattr(torch, name)
        self._note("ASSUME", SYNC)
        return FUNCTIONS[name]


def _all_but_channels(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _along(v: Tensor, x: Tensor) -> Tensor:
    """One number per channel, in the shape that broadcasts along x."""
    return v.reshape(1, -1, *[1] * (x.dim() - 2))


def _wide(x: Tensor) -> Tensor:
    """The type in which the kernels add up."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def batch_norm_stats(input: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel."""
    var, mean = torch.var_mean(_wide(input), _all_but_channels(input), correction=0)
    return mean, var


def batch_norm_gather_stats_with_counts(input: Tensor, mean: Tensor, var: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
                                        momentum: float, eps: float, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) of all ranks' elements, of which each tells its own, one row each; the running statistics move by momentum."""
    count, total = counts.reshape(-1, 1), counts.sum()
    center = (mean * count).sum(0) / total
    squares = ((var + (mean - center) ** 2) * count).sum(0)
    if running_mean is not None:
        running_mean.mul_(1 - momentum).add_(center * momentum)
    if running_var is not None:
        running_var.mul_(1 - momentum).add_(squares / (total - 1) * momentum)
    return center, torch.rsqrt(squares / total + eps)


def batch_norm_elemt(input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, eps: float) -> Tensor:
    """(x - mean) * invstd * weight + bias"""
    y = (_wide(input) - _along(mean, input)) * _along(invstd, input)
    y = y if weight is None else y * _along(weight, input)
    return (y if bias is None else y + _along(bias, input)).to(input.dtype)


def batch_norm_backward_reduce(grad: Tensor, input: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, input_g: bool, weight_g: bool,
                               bias_g: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Per channel: the sums of g and of g * (x - mean), where the input's gradient is asked for, and the gradients of weight and bias."""
    dims, g = _all_but_channels(input), _wide(grad)
    sum_g = g.sum(dims)
    sum_gd = (g * (_wide(input) - _along(mean, input))).sum(dims)
    of_weight = (sum_gd * invstd).to(weight.dtype) if weight is not None and weight_g else None
    of_bias = sum_g.to(sum_g.dtype if weight is None else weight.dtype).clone() if bias_g else None
    return sum_g if input_g else None, sum_gd if input_g else None, of_weight, of_bias


def batch_norm_backward_elemt(grad: Tensor, input: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, sum_dy: Tensor, sum_dy_xmu: Tensor,
                              count: Tensor) -> Tensor:
    """weight * invstd * (g - mean of g - (x - mean) * invstd^2 * mean of g (x - mean))"""
    total = count.sum().to(mean.dtype)
    d = _wide(input) - _along(mean, input)
    y = _wide(grad) - _along(sum_dy / total, input) - d * _along(sum_dy_xmu / total * invstd * invstd, input)
    y = y * _along(invstd if weight is None else invstd * weight, input)
    return y.to(grad.dtype)


FUNCTIONS = MappingProxyType({f.__name__: f for f in (batch_norm_stats, batch_norm_gather_stats_with_counts, batch_norm_elemt, batch_norm_backward_reduce,
                                                      batch_norm_backward_elemt)})
