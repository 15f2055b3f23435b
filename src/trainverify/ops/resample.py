"""Rows of interpolation (linear, bilinear, trilinear, bicubic), forward and backward, as exact rational weights along each dimension (trusted).

Every output position along a dimension is a weighted sum of a few input positions; dimensions are treated one after the other. The gradient
is the adjoint of that map. Weights are continuous in the source coordinate, so where torch's rounded coordinate falls into the neighbouring cell
the result is the same up to rounding.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch

from trainverify.ops import lift as L
from trainverify.ops.lift import lift
from trainverify.ops.movement import collect
from trainverify.ops.table import Rows

rows = Rows("move")
CUBIC = Fraction(-3, 4)                       # torch's A of the cubic convolution

Taps = list[list[tuple[int, Fraction]]]       # per output position: which input positions, and how much of each


def _step(n: int, out: int, align_corners: bool, scale: float | None) -> Fraction:
    """How far apart the sources of neighbouring outputs are."""
    if align_corners:
        return Fraction(n - 1, out - 1) if out > 1 else Fraction(0)
    return 1 / Fraction(scale).limit_denominator(1 << 20) if scale is not None and scale > 0 else Fraction(n, out)


def _source(o: int, step: Fraction, align_corners: bool) -> Fraction:
    return step * o if align_corners else step * (o + Fraction(1, 2)) - Fraction(1, 2)


def linear_taps(n: int, out: int, align_corners: bool, scale: float | None) -> Taps:
    step, taps = _step(n, out, align_corners, scale), []
    for o in range(out):
        x = max(_source(o, step, align_corners), Fraction(0))
        low = min(math.floor(x), n - 1)
        part = min(x - low, Fraction(1))
        taps.append([(low, 1 - part), (min(low + 1, n - 1), part)])
    return taps


def cubic_taps(n: int, out: int, align_corners: bool, scale: float | None) -> Taps:
    step, taps = _step(n, out, align_corners, scale), []
    for o in range(out):
        x = _source(o, step, align_corners)
        low = math.floor(x)
        part = x - low
        taps.append([(min(max(low + k, 0), n - 1), _cubic(abs(part - k))) for k in (-1, 0, 1, 2)])
    return taps


def _cubic(d: Fraction) -> Fraction:
    a = CUBIC
    if d <= 1:
        return ((a + 2) * d - (a + 3)) * d * d + 1
    return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a


def _weights(m, taps: Taps, k: int, shape: Sequence[int]):
    """The k-th weight of every output position, in a shape that broadcasts."""
    at = [t[k][1] for t in taps]
    distinct = sorted(set(at))
    return m.take([m.const(w) for w in distinct], torch.tensor([distinct.index(w) + 1 for w in at]).reshape(tuple(shape)))


def _along(rank: int, dim: int, n: int) -> list[int]:
    return [n if d == dim else 1 for d in range(rank)]


def _index(taps: Taps, k: int) -> torch.Tensor:
    return torch.tensor([t[k][0] for t in taps])


def _spread(m, x, dim: int, taps: Taps):
    """x with the positions along dim replaced by weighted sums of them."""
    out, places = None, L.flat_index(x.shape)
    for k in range(len(taps[0])):
        part = m.mul(m.take([x], places.index_select(dim, _index(taps, k))), _weights(m, taps, k, _along(len(x.shape), dim, len(taps))))
        out = part if out is None else m.add(out, part)
    return out


def _gathered(m, g, dim: int, n: int, taps: Taps):
    """The adjoint of `_spread` from n positions."""
    shape = tuple(n if d == dim else s for d, s in enumerate(g.shape))
    places = L.flat_index(shape)
    index = torch.stack([places.index_select(dim, _index(taps, k)) for k in range(len(taps[0]))])
    shares = m.stack([m.mul(g, _weights(m, taps, k, _along(len(g.shape), dim, len(taps)))) for k in range(len(taps[0]))])
    return collect(m, shape, index, shares)


def _upsample(taps_of: Callable[..., Taps], dims: int):
    def meaning(m, self, output_size, align_corners, *scales):
        """Weighted means of the neighbouring positions along each dimension"""
        x, scales = lift(m, self), scales or (None,) * dims
        for d, (out, scale) in enumerate(zip(output_size, scales), 2):
            x = _spread(m, x, d, taps_of(x.shape[d], out, align_corners, scale))
        return x

    return meaning


def _upsample_backward(taps_of: Callable[..., Taps], dims: int):
    def meaning(m, grad_output, output_size, input_size, align_corners, *scales):
        """The gradient goes to the neighbouring positions by their weights"""
        g, scales = lift(m, grad_output), scales or (None,) * dims
        for d, (out, scale) in enumerate(zip(output_size, scales), 2):
            g = _gathered(m, g, d, input_size[d], taps_of(input_size[d], out, align_corners, scale))
        return g

    return meaning


for _name, _taps, _n in (("linear1d", linear_taps, 1), ("bilinear2d", linear_taps, 2), ("trilinear3d", linear_taps, 3), ("bicubic2d", cubic_taps, 2)):
    rows(f"aten.upsample_{_name}", source="torch.nn.functional.interpolate")(_upsample(_taps, _n))
    rows(f"aten.upsample_{_name}_backward", source="torch.nn.functional.interpolate")(_upsample_backward(_taps, _n))
