"""Rows of matrix products and of convolution, which is one (trusted). beta = 0 drops the added tensor, nan or garbage included, as torch does."""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from trainverify.algebra.base import Complex
from trainverify.ops import lift as L
from trainverify.ops.lift import lift, number, refuse
from trainverify.ops.table import Rows

rows = Rows("matmul")


def product(m, a, b):
    """a @ b of tensors with at least two dimensions."""
    a, b = lift(m, a), lift(m, b)
    if isinstance(a, Complex) or isinstance(b, Complex):
        a, b = L.pair(m, a), L.pair(m, b)
        return Complex(m.sub(m.matmul(a.re, b.re), m.matmul(a.im, b.im)), m.add(m.matmul(a.re, b.im), m.matmul(a.im, b.re)))
    return m.matmul(a, b)


def _plus(m, self, p, beta, alpha):
    p = L.scaled(m, p, alpha)
    return p if number(beta) and beta == 0 else L.add(m, L.scaled(m, self, beta), p)


def _column(m, v):
    return L.each(m, lambda x: m.reshape(x, (*x.shape, 1)), v)


def _row(m, v):
    return L.each(m, lambda x: m.reshape(x, (1, *x.shape)), v)


def _shaped(m, v, shape):
    return L.each(m, lambda x: m.reshape(x, tuple(shape)), v)


@rows("aten.mm", source="torch.mm")
def mm(m, self, mat2):
    """self @ mat2"""
    return product(m, self, mat2)


@rows("aten.bmm", source="torch.bmm")
def bmm(m, self, mat2):
    """self @ mat2, per batch"""
    return product(m, self, mat2)


@rows("aten.mv", source="torch.mv")
def mv(m, self, vec):
    """self @ vec"""
    return _shaped(m, product(m, self, _column(m, vec)), self.shape[:1])


@rows("aten.dot", source="torch.dot")
def dot(m, self, tensor):
    """The sum of products"""
    return _shaped(m, product(m, _row(m, self), _column(m, tensor)), ())


@rows("aten.vdot", source="torch.vdot")
def vdot(m, self, other):
    """The sum of products, the first conjugated"""
    return _shaped(m, product(m, _row(m, L.conj(m, self)), _column(m, other)), ())


@rows("aten.ger", "aten.outer", source="torch.outer")
def outer(m, self, vec2):
    """All products of two vectors"""
    return L.mul(m, _column(m, self), vec2)


@rows("aten.addmm", source="torch.addmm")
def addmm(m, self, mat1, mat2, *, beta=1, alpha=1):
    """beta * self + alpha * mat1 @ mat2"""
    return _plus(m, self, product(m, mat1, mat2), beta, alpha)


@rows("aten.baddbmm", source="torch.baddbmm")
def baddbmm(m, self, batch1, batch2, *, beta=1, alpha=1):
    """beta * self + alpha * batch1 @ batch2"""
    return _plus(m, self, product(m, batch1, batch2), beta, alpha)


@rows("aten.addbmm", source="torch.addbmm")
def addbmm(m, self, batch1, batch2, *, beta=1, alpha=1):
    """beta * self + alpha * the sum over the batch of batch1 @ batch2"""
    return _plus(m, self, L.total(m, product(m, batch1, batch2), [0]), beta, alpha)


@rows("aten.addmv", source="torch.addmv")
def addmv(m, self, mat, vec, *, beta=1, alpha=1):
    """beta * self + alpha * mat @ vec"""
    return _plus(m, self, mv(m, mat, vec), beta, alpha)


@rows("aten.addr", source="torch.addr")
def addr(m, self, vec1, vec2, *, beta=1, alpha=1):
    """beta * self + alpha * outer(vec1, vec2)"""
    return _plus(m, self, outer(m, vec1, vec2), beta, alpha)


@rows("aten._addmm_activation", source="torch._addmm_activation")
def addmm_activation(m, self, mat1, mat2, *, beta=1, alpha=1, use_gelu=False):
    """relu or gelu of addmm"""
    from trainverify.ops import activation
    y = addmm(m, self, mat1, mat2, beta=beta, alpha=alpha)
    return activation.gelu(m, y) if use_gelu else activation.relu(m, y)


@rows("aten.matmul", source="torch.matmul")
def matmul(m, self, other):
    """The matrix product; vectors are a row on the left, a column on the right"""
    a, b = lift(m, self), lift(m, other)
    shape = [*(() if len(a.shape) == 1 else a.shape[-2:-1]), *(() if len(b.shape) == 1 else b.shape[-1:])]
    p = product(m, _row(m, a) if len(a.shape) == 1 else a, _column(m, b) if len(b.shape) == 1 else b)
    return _shaped(m, p, (*p.shape[:-2], *shape))


@rows("aten.linear", source="torch.nn.functional.linear")
def linear(m, input, weight, bias=None):
    """input @ weight.T + bias"""
    w = L.each(m, lambda v: L.transpose(m, v) if len(v.shape) == 2 else v, weight)
    y = matmul(m, input, w)
    return y if bias is None else L.add(m, y, bias)


@rows("aten.einsum", source="torch.einsum")
def einsum(m, equation, tensors, *, path=None):
    """Products summed over the letters that the result lacks; of one or two tensors"""
    left, _, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != 2 or "..." in equation or "->" not in equation or len({*terms[0]}) < len(terms[0]) or len({*terms[1]}) < len(terms[1]):
        raise refuse("aten.einsum", f"equation {equation!r} reached the dispatcher undecomposed", "write it as matmul and sum")
    letters = [*right, *sorted({*left} - {*right, ","})]
    spread = [_letters(m, lift(m, t), term, letters) for t, term in zip(tensors, terms)]
    return L.total(m, L.mul(m, *spread), range(len(right), len(letters)))


def _letters(m, x, term: str, letters: list[str]):
    """x with one dimension per letter, in order, of size 1 where its term lacks the letter."""
    order = [term.index(c) for c in letters if c in term]
    shape = iter(x.shape[i] for i in order)
    full = [next(shape) if c in term else 1 for c in letters]
    return L.each(m, lambda v: m.reshape(m.permute(v, order), full), x)


# ---- grouped products (mixtures of experts)
def _part(m, x, dim: int, start: int, stop: int):
    return m.take([x], L.flat_index(x.shape).narrow(dim, start, stop - start))


def _joined(m, parts, dim: int, shape):
    """Values side by side along dim; what they leave of `shape` is undefined, as uninitialised memory is."""
    index, at = [], 0
    for p in parts:
        index.append(L.flat_index(p.shape) + at)
        at += index[-1].numel()
    missing = list(shape)
    missing[dim] -= sum(i.shape[dim] for i in index)
    index.append(torch.full(missing, at + 1))
    undefined = m.div(m.const(0, (1,)), m.const(0, (1,)))
    return m.take([*parts, undefined], torch.cat(index, dim))


@rows("aten._grouped_mm", source="torch.nn.functional.grouped_mm")
def grouped_mm(m, self, mat2, offs=None, bias=None, out_dtype=None):
    """One product per group; offs are the ends of the groups in the dimension that the groups share out"""
    a, b = lift(m, self), lift(m, mat2)
    if bias is not None or (offs is not None and not isinstance(offs, torch.Tensor)):
        raise refuse("aten._grouped_mm", "a bias, or offsets that are not integers", "add the bias outside")
    if offs is None:
        return L.cast(m, m.matmul(a, b), out_dtype)
    ends = offs.tolist()
    spans = list(zip([0, *ends], ends))
    flat_a, flat_b = len(a.shape) == 2, len(b.shape) == 2
    shared = flat_a and flat_b

    def group(x, i, dim, flat):
        return _part(m, x, dim, *spans[i]) if flat else m.reshape(_part(m, x, 0, i, i + 1), tuple(x.shape[1:]))

    parts = [m.matmul(group(a, i, 1 if shared else 0, flat_a), group(b, i, 0 if shared else 1, flat_b)) for i in range(len(ends))]
    if shared:
        out = m.stack(parts)
    else:
        dim = 0 if flat_a else 1
        out = _joined(m, parts, dim, (a.shape[0], b.shape[-1]) if flat_a else (a.shape[-2], b.shape[1]))
    return L.cast(m, out, out_dtype)


# ---- convolution
def _windows(shape, kernel, stride, padding, dilation) -> torch.Tensor:
    """Position (for take; 0: padding) of the input element under each kernel place: [batch, channels, *outputs, *kernel]."""
    pads = [p for pad in reversed(padding) for p in (pad, pad)]
    index = F.pad(L.flat_index(shape), pads)
    for d, (k, step, spread) in enumerate(zip(kernel, stride, dilation)):
        index = index.unfold(2 + d, (k - 1) * spread + 1, step)[..., ::spread]
    return index


class _Convolution:
    """The shapes of one call: columns [batch, group, outputs, inputs per output], kernels [1, group, inputs per output, channels]."""

    def __init__(self, shape, weight_shape, stride, padding, dilation, transposed, groups):
        if transposed:
            raise refuse("aten.convolution", "a transposed convolution", "write it as a matrix product")
        self.kernel = tuple(weight_shape[2:])
        n = len(self.kernel)
        full = [list(v) * n if len(v) == 1 else list(v) for v in (stride, padding, dilation)]
        index = _windows(shape, self.kernel, *full)
        self.batch, self.groups, self.sizes, self.channels = shape[0], groups, tuple(index.shape[2:2 + n]), weight_shape[0]
        index = index.reshape(shape[0], groups, shape[1] // groups, *index.shape[2:])
        order = (0, 1, *range(3, 3 + n), 2, *range(3 + n, 3 + 2 * n))
        self.index = index.permute(order).reshape(shape[0], groups, math.prod(self.sizes), -1)

    def kernels(self, m, weight):
        w = m.reshape(weight, (1, self.groups, self.channels // self.groups, -1))
        return L.transpose(m, w)

    def output(self, m, y):
        """[batch, group, outputs, channels per group] as [batch, channels, *outputs]"""
        return m.reshape(L.transpose(m, y), (self.batch, self.channels, *self.sizes))

    def columns_of(self, m, grad):
        return L.transpose(m, m.reshape(grad, (self.batch, self.groups, self.channels // self.groups, -1)))


@rows("aten.convolution", source="torch.nn.functional.conv2d")
def convolution(m, input, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    """The product of the kernels with every window of the input, plus bias"""
    c = _Convolution(input.shape, weight.shape, stride, padding, dilation, transposed, groups)
    y = c.output(m, m.matmul(m.take([lift(m, input)], c.index), c.kernels(m, lift(m, weight))))
    return y if bias is None else m.add(y, m.reshape(lift(m, bias), (-1, *[1] * len(c.sizes))))


@rows("aten.convolution_backward", source="torch.nn.functional.conv2d")
def convolution_backward(m, grad_output, input, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, output_mask):
    """The gradients of input, weight and bias that output_mask asks for"""
    c = _Convolution(input.shape, weight.shape, stride, padding, dilation, transposed, groups)
    g = c.columns_of(m, lift(m, grad_output))

    def of_input():
        spread = m.matmul(g, L.transpose(m, c.kernels(m, lift(m, weight))))
        n = math.prod(input.shape)
        whole = m.scatter_sum(m.const(0, (n + 1,)), c.index, spread)
        return m.reshape(_part(m, whole, 0, 1, n + 1), tuple(input.shape))

    def of_weight():
        per_sample = m.matmul(L.transpose(m, g), m.take([lift(m, input)], c.index))
        return m.reshape(m.sum(per_sample, [0]), tuple(weight.shape))

    def of_bias():
        return m.sum(lift(m, grad_output), [0, *range(2, 2 + len(c.sizes))])

    return [f() for f, wanted in zip((of_input, of_weight, of_bias), output_mask) if wanted]
