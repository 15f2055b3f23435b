"""Arithmetic of tracked Python floats, which left a tensor through item() (trusted): Python's float operators on values of shape ()."""
from __future__ import annotations

from functools import reduce

from trainverify.ops.activation import tanh_of
from trainverify.ops.lift import lift, number
from trainverify.ops.table import Rows

rows = Rows("scalar")


def scalar(m, x):
    """x as a value of shape ()."""
    x = lift(m, x)
    return x if tuple(x.shape) == () else m.reshape(x, ())


@rows("tv.scalar.item", source="torch.Tensor.item")
def item(m, x):
    """The tensor's only element."""
    return scalar(m, x)


@rows("tv.scalar.float", "tv.scalar.pos", source="Python float")
def same(m, a):
    """a"""
    return scalar(m, a)


@rows("tv.scalar.add", source="Python float")
def add(m, a, b):
    """a + b"""
    return m.add(scalar(m, a), scalar(m, b))


@rows("tv.scalar.sub", source="Python float")
def sub(m, a, b):
    """a - b"""
    return m.sub(scalar(m, a), scalar(m, b))


@rows("tv.scalar.mul", source="Python float")
def mul(m, a, b):
    """a * b"""
    return m.mul(scalar(m, a), scalar(m, b))


@rows("tv.scalar.truediv", source="Python float")
def truediv(m, a, b):
    """a / b"""
    return m.div(scalar(m, a), scalar(m, b))


@rows("tv.scalar.floordiv", source="Python float")
def floordiv(m, a, b):
    """floor(a / b)"""
    return m.opaque("floor", truediv(m, a, b))


@rows("tv.scalar.mod", source="Python float")
def mod(m, a, b):
    """a - b * floor(a / b)"""
    return sub(m, a, mul(m, b, floordiv(m, a, b)))


@rows("tv.scalar.pow", source="Python float")
def power(m, a, b):
    """a ** b"""
    return m.pow(scalar(m, a), b) if number(b) else m.power(scalar(m, a), scalar(m, b))


@rows("tv.scalar.neg", source="Python float")
def neg(m, a):
    """-a"""
    return m.neg(scalar(m, a))


@rows("tv.scalar.abs", source="Python float")
def absolute(m, a):
    """|a|"""
    return m.abs(scalar(m, a))


@rows("tv.scalar.min", source="Python min")
def minimum(m, *values):
    """The least of the values."""
    return reduce(m.minimum, [scalar(m, v) for v in values])


@rows("tv.scalar.max", source="Python max")
def maximum(m, *values):
    """The greatest of the values."""
    return reduce(m.maximum, [scalar(m, v) for v in values])


@rows("tv.scalar.sqrt", source="math.sqrt")
def square_root(m, a):
    """The square root of a"""
    return m.sqrt(scalar(m, a))


@rows("tv.scalar.exp", source="math.exp")
def exponential(m, a):
    """e ** a"""
    return m.exp(scalar(m, a))


@rows("tv.scalar.log", source="math.log")
def logarithm(m, a):
    """The natural logarithm of a"""
    return m.log(scalar(m, a))


@rows("tv.scalar.sin", source="math.sin")
def sine(m, a):
    """sin a"""
    return m.sin(scalar(m, a))


@rows("tv.scalar.cos", source="math.cos")
def cosine(m, a):
    """cos a"""
    return m.cos(scalar(m, a))


@rows("tv.scalar.tanh", source="math.tanh")
def hyperbolic_tangent(m, a):
    """tanh a, as torch's"""
    return tanh_of(m, scalar(m, a))


@rows("tv.scalar.round", source="Python round")
def rounded(m, a, digits=None):
    """The nearest multiple of 10 ** -digits, ties to even."""
    a = scalar(m, a)
    if not digits:
        return m.opaque("round", a)
    return m.div(m.opaque("round", m.mul(a, m.pow(m.const(10), digits))), m.pow(m.const(10), digits))
