"""Rows of matrix products (trusted). beta = 0 drops the added tensor, nan or garbage included, as torch does."""
from __future__ import annotations

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
