"""Pooling in any number of dimensions, as extremes and means over windows (trusted).

A window is a list of positions in the image, 0 where padding lies; gathering them is a move, and the gradient of the image
is the adjoint of that move.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch

from trainverify.algebra.base import Algebra, V
from trainverify.ops.lift import lift
from trainverify.ops.movement import collect
from trainverify.ops.table import Rows

rows = Rows("reduce")


def _spread(x: Sequence[int], n: int) -> list[int]:
    """A per-dimension attribute: one number stands for all dimensions."""
    return list(x) * n if len(x) == 1 else list(x)


def windows(size: Sequence[int], out: Sequence[int], kernel, stride, padding, dilation) -> torch.Tensor:
    """[windows, taps]: the flat position (from 1) in an image of this size of every tap; 0 in the padding."""
    index = torch.ones((1,) * 2 * len(size), dtype=torch.int64)
    inside = torch.ones_like(index, dtype=torch.bool)
    n, pitch = len(size), 1
    for d in reversed(range(n)):
        taps = torch.arange(out[d])[:, None] * stride[d] - padding[d] + torch.arange(kernel[d])[None, :] * dilation[d]
        shape = [1] * (2 * n)
        shape[d], shape[n + d] = taps.shape
        index = index + (taps * pitch).reshape(shape)
        inside = inside & ((taps >= 0) & (taps < size[d])).reshape(shape)
        pitch *= size[d]
    return torch.where(inside, index, 0).reshape(math.prod(out), math.prod(kernel))


def _everywhere(index: torch.Tensor, images: int, pixels: int) -> torch.Tensor:
    """[images, windows, taps]: the windows of every image of a stack."""
    first = torch.arange(images)[:, None, None] * pixels
    return torch.where(index > 0, index + first, 0)


# ---- pooling
def _pool(x, out, kernel, stride, padding, dilation) -> tuple[torch.Tensor, int]:
    """The windows of one image, and how many images x is a stack of."""
    size = x.shape[len(x.shape) - len(out):]
    kernel, padding, dilation = (_spread(a, len(out)) for a in (kernel, padding, dilation))
    stride = _spread(stride, len(out)) if stride else kernel
    return windows(size, out, kernel, stride, padding, dilation), math.prod(x.shape) // math.prod(size)


def _dims(x, dims: int) -> int:
    return math.prod(x.shape[len(x.shape) - dims:])


def _max_pool(dims: int):
    def meaning(m, x, kernel, stride=(), padding=(0,), dilation=(1,), ceil_mode=False, *, ctx):
        """The largest element of every window; its position is a decision"""
        x, native = lift(m, x), ctx.native[0]
        index, images = _pool(x, native.shape[-dims:], kernel, stride, padding, dilation)
        inside = index.max(1, keepdim=True).values
        at = _everywhere(torch.where(index > 0, index, inside), images, _dims(x, dims))   # padding repeats an element: it decides nothing
        taken = m.take([x], at)
        if not m.is_const(taken):
            ctx.decide("argmax", [taken], _taps(at, ctx.native[1], images, _dims(x, dims)))
        return [m.reshape(m.amax(taken, [2]), tuple(native.shape)), None]

    return meaning


def _taps(at: torch.Tensor, positions: torch.Tensor, images: int, pixels: int) -> torch.Tensor:
    """[images, windows]: which element of its window each position of an image is (the first, where padding repeats one)."""
    where = positions.reshape(images, -1, 1) + torch.arange(images)[:, None, None] * pixels + 1
    return (at == where).to(torch.uint8).argmax(-1)


def _max_pool_backward(dims: int):
    def meaning(m, grad, x, kernel, stride, padding, dilation, ceil_mode, indices):
        """The gradient goes to the elements that were the largest"""
        grad, pixels = lift(m, grad), _dims(x, dims)
        first = torch.arange(math.prod(x.shape) // pixels) * pixels
        at = indices.reshape(len(first), -1) + first[:, None] + 1
        return collect(m, x.shape, at, grad)

    return meaning


def _divisors(index: torch.Tensor, size, out, kernel, stride, padding, include_pad: bool, override) -> list[int]:
    """By how much each window's sum is divided; padding counts, but not what ceil_mode adds beyond it."""
    n = len(out)
    if override:
        return [override] * index.shape[0]
    if not include_pad:
        return (index > 0).sum(1).tolist()
    kernel, padding = _spread(kernel, n), _spread(padding, n)
    stride = _spread(stride, n) if stride else kernel
    count = torch.ones([1] * n, dtype=torch.int64)
    for d in range(n):
        start = torch.arange(out[d]) * stride[d] - padding[d]
        shape = [1] * n
        shape[d] = out[d]
        count = count * (torch.clamp(start + kernel[d], max=size[d] + padding[d]) - start).reshape(shape)
    return count.reshape(-1).tolist()


def reciprocals(m: Algebra, divisors: list[int]) -> V:
    """[windows]: 1 / divisor."""
    distinct = sorted(set(divisors))
    place = torch.tensor([distinct.index(d) + 1 for d in divisors])
    return m.take([m.const(Fraction(1, d)) for d in distinct], place)


def _avg_pool(dims: int):
    def meaning(m, x, kernel, stride=(), padding=(0,), ceil_mode=False, count_include_pad=True, divisor_override=None, *, ctx):
        """The mean of every window"""
        x, native = lift(m, x), ctx.native[0]
        out, size = native.shape[-dims:], x.shape[len(x.shape) - dims:]
        index, images = _pool(x, out, kernel, stride, padding, (1,))
        over = reciprocals(m, _divisors(index, size, out, kernel, stride, padding, count_include_pad, divisor_override))
        sums = m.sum(m.take([x], _everywhere(index, images, _dims(x, dims))), [2])
        return m.reshape(m.mul(sums, over), tuple(native.shape))

    return meaning


def _avg_pool_backward(dims: int):
    def meaning(m, grad, x, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override):
        """Every element of a window gets its share of the gradient"""
        grad = lift(m, grad)
        out, size = grad.shape[len(grad.shape) - dims:], x.shape[len(x.shape) - dims:]
        index, images = _pool(x, out, kernel, stride, padding, (1,))
        over = reciprocals(m, _divisors(index, size, out, kernel, stride, padding, count_include_pad, divisor_override))
        share = m.mul(m.reshape(grad, (images, index.shape[0])), over)
        at = _everywhere(index, images, _dims(x, dims))
        return collect(m, x.shape, at, m.expand(m.reshape(share, (*share.shape, 1)), tuple(at.shape)))

    return meaning


for _n in (2, 3):
    rows(f"aten.max_pool{_n}d_with_indices", source=f"torch.nn.functional.max_pool{_n}d", ctx=True, kind="decision")(_max_pool(_n))
    rows(f"aten.max_pool{_n}d_with_indices_backward", source=f"torch.nn.functional.max_pool{_n}d")(_max_pool_backward(_n))
    rows(f"aten.avg_pool{_n}d", source=f"torch.nn.functional.avg_pool{_n}d", ctx=True)(_avg_pool(_n))
    rows(f"aten.avg_pool{_n}d_backward", source=f"torch.nn.functional.avg_pool{_n}d")(_avg_pool_backward(_n))


# ---- adaptive pooling
def _adaptive_windows(size: Sequence[int], out: Sequence[int]) -> torch.Tensor:
    """[windows, taps]: the positions of each window; 0 where a window is smaller than the largest."""
    index, pitch = torch.zeros(1, 1, dtype=torch.int64), 1
    for n, o in zip(reversed(size), reversed(out)):
        spans = [range(i * n // o, -(-(i + 1) * n // o)) for i in range(o)]
        wide = max(map(len, spans))
        own = torch.tensor([[s[k] * pitch if k < len(s) else -1 for k in range(wide)] for s in spans])
        both = own[:, None, :, None] + index[None, :, None, :]
        dropped = (own[:, None, :, None] < 0) | (index[None, :, None, :] < 0)
        index = torch.where(dropped, -1, both).reshape(o * index.shape[0], wide * index.shape[1])
        pitch *= n
    return index + 1


def _adaptive(x, out: Sequence[int], dims: int) -> tuple[torch.Tensor, int]:
    size = x.shape[len(x.shape) - dims:]
    return _adaptive_windows(size, out), math.prod(x.shape) // math.prod(size)


def _adaptive_avg_pool(dims: int):
    def meaning(m, x, output_size, *, ctx):
        """The mean of every window; windows cover the image in equal steps"""
        x, native = lift(m, x), ctx.native[0]
        index, images = _adaptive(x, native.shape[-dims:], dims)
        sums = m.sum(m.take([x], _everywhere(index, images, _dims(x, dims))), [2])
        return m.reshape(m.mul(sums, reciprocals(m, (index > 0).sum(1).tolist())), tuple(native.shape))

    return meaning


def _adaptive_avg_pool_backward(dims: int):
    def meaning(m, grad, x):
        """Every element of a window gets its share of the gradient"""
        grad = lift(m, grad)
        index, images = _adaptive(x, grad.shape[len(grad.shape) - dims:], dims)
        share = m.mul(m.reshape(grad, (images, index.shape[0])), reciprocals(m, (index > 0).sum(1).tolist()))
        at = _everywhere(index, images, _dims(x, dims))
        return collect(m, x.shape, at, m.expand(m.reshape(share, (*share.shape, 1)), tuple(at.shape)))

    return meaning


def _adaptive_max_pool(dims: int):
    def meaning(m, x, output_size, *, ctx):
        """The largest element of every window; its position is a decision"""
        x, native = lift(m, x), ctx.native[0]
        index, images = _adaptive(x, native.shape[-dims:], dims)
        at = _everywhere(torch.where(index > 0, index, index.max(1, keepdim=True).values), images, _dims(x, dims))
        taken = m.take([x], at)
        if not m.is_const(taken):
            ctx.decide("argmax", [taken], _taps(at, ctx.native[1], images, _dims(x, dims)))
        return [m.reshape(m.amax(taken, [2]), tuple(native.shape)), None]

    return meaning


def _adaptive_max_pool_backward(dims: int):
    def meaning(m, grad, x, indices):
        """The gradient goes to the elements that were the largest"""
        return _max_pool_backward(dims)(m, grad, x, (), (), (), (), False, indices)

    return meaning


for _n in (2, 3):
    rows(f"aten._adaptive_avg_pool{_n}d", source=f"torch.nn.functional.adaptive_avg_pool{_n}d", ctx=True)(_adaptive_avg_pool(_n))
    rows(f"aten._adaptive_avg_pool{_n}d_backward", source=f"torch.nn.functional.adaptive_avg_pool{_n}d")(_adaptive_avg_pool_backward(_n))
    rows(f"aten.adaptive_max_pool{_n}d", source=f"torch.nn.functional.adaptive_max_pool{_n}d", ctx=True, kind="decision")(_adaptive_max_pool(_n))
    rows(f"aten.adaptive_max_pool{_n}d_backward", source=f"torch.nn.functional.adaptive_max_pool{_n}d")(_adaptive_max_pool_backward(_n))
