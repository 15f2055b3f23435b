"""Rows of elementwise ops: arithmetic, powers, elementary functions, order, masks, copies and casts (trusted).

Activations are in activation.py, constant tensors in creation.py. Order and rounding functions are opaque in the symbolic
algebras: equal if their operands are.
"""
from __future__ import annotations

import math
from fractions import Fraction

import torch

from trainverify.algebra.base import Complex
from trainverify.ir.trace import Sequence, TensorRef
from trainverify.ops import lift as L
from trainverify.ops.lift import lift, number, refuse
from trainverify.ops.table import Rows

rows = Rows("pointwise")


# ---- arithmetic
@rows("aten.add", source="torch.add", ctx=True)
def add(m, self, other, alpha=1, *, ctx):
    """self + alpha * other; of two masks: or"""
    if ctx.native[0].dtype == torch.bool:
        return _or(m, lift(m, self), lift(m, other))
    return L.add(m, self, L.scaled(m, other, alpha))


@rows("aten.sub", source="torch.sub")
def sub(m, self, other, alpha=1):
    """self - alpha * other"""
    return L.sub(m, self, L.scaled(m, other, alpha))


@rows("aten.rsub", source="torch.rsub")
def rsub(m, self, other, alpha=1):
    """other - alpha * self"""
    return L.sub(m, other, L.scaled(m, self, alpha))


@rows("aten.mul", source="torch.mul")
def mul(m, self, other):
    """self * other"""
    return L.mul(m, self, other)


@rows("aten.div", source="torch.div")
def div(m, self, other, *, rounding_mode=None):
    """self / other, rounded (opaquely) to floor or trunc if asked"""
    q = L.div(m, self, other)
    return q if rounding_mode is None else m.opaque(rounding_mode, q)


@rows("aten.true_divide", source="torch.true_divide")
def true_divide(m, self, other):
    """self / other"""
    return L.div(m, self, other)


@rows("aten.floor_divide", source="torch.floor_divide")
def floor_divide(m, self, other):
    """floor(self / other)"""
    return m.opaque("floor", L.div(m, self, other))


@rows("aten.remainder", source="torch.remainder")
def remainder(m, self, other):
    """self - other * floor(self / other)"""
    a, b = lift(m, self), lift(m, other)
    return m.sub(a, m.mul(b, m.opaque("floor", m.div(a, b))))


@rows("aten.fmod", source="torch.fmod")
def fmod(m, self, other):
    """self - other * trunc(self / other)"""
    a, b = lift(m, self), lift(m, other)
    return m.sub(a, m.mul(b, m.opaque("trunc", m.div(a, b))))


@rows("aten.neg", source="torch.neg")
def neg(m, self):
    """-self"""
    return L.neg(m, self)


@rows("aten.reciprocal", source="torch.reciprocal")
def reciprocal(m, self):
    """1 / self"""
    return L.inv(m, self)


@rows("aten.addcmul", source="torch.addcmul")
def addcmul(m, self, tensor1, tensor2, *, value=1):
    """self + value * tensor1 * tensor2"""
    return L.add(m, self, L.scaled(m, L.mul(m, tensor1, tensor2), value))


@rows("aten.addcdiv", source="torch.addcdiv")
def addcdiv(m, self, tensor1, tensor2, *, value=1):
    """self + value * tensor1 / tensor2"""
    return L.add(m, self, L.scaled(m, L.div(m, tensor1, tensor2), value))


@rows("aten.lerp", source="torch.lerp")
def lerp(m, self, end, weight):
    """self + weight * (end - self)"""
    return L.add(m, self, L.mul(m, weight, L.sub(m, end, self)))


# ---- powers
@rows("aten.pow", source="torch.pow")
def pow(m, self, exponent):
    """self ** exponent"""
    base = lift(m, self)
    if isinstance(base, Complex):
        if exponent not in (1, 2):
            raise refuse("aten.pow", f"a complex tensor to the power {exponent}", "write the power as products")
        return base if exponent == 1 else L.mul(m, base, base)
    return m.pow(base, exponent) if number(exponent) else m.power(base, lift(m, exponent))


@rows("aten.sqrt", source="torch.sqrt")
def sqrt(m, self):
    """The square root"""
    return m.sqrt(lift(m, self))


@rows("aten.rsqrt", source="torch.rsqrt")
def rsqrt(m, self):
    """1 / sqrt(self)"""
    return m.inv(m.sqrt(lift(m, self)))


# ---- exponentials and logarithms
@rows("aten.exp", source="torch.exp")
def exp(m, self):
    """e ** self"""
    x = lift(m, self)
    if isinstance(x, Complex):
        r = m.exp(x.re)
        return Complex(m.mul(r, m.cos(x.im)), m.mul(r, m.sin(x.im)))
    return m.exp(x)


@rows("aten.exp2", source="torch.exp2")
def exp2(m, self):
    """exp(self * log 2)"""
    return m.exp(m.mul(lift(m, self), m.log(m.const(2))))


@rows("aten.expm1", source="torch.expm1")
def expm1(m, self):
    """exp(self) - 1"""
    return m.sub(m.exp(lift(m, self)), m.const(1))


@rows("aten.log", source="torch.log")
def log(m, self):
    """The natural logarithm"""
    return m.log(lift(m, self))


@rows("aten.log1p", source="torch.log1p")
def log1p(m, self):
    """log(1 + self)"""
    return m.log(m.add(m.const(1), lift(m, self)))


@rows("aten.log2", source="torch.log2")
def log2(m, self):
    """log(self) / log 2"""
    return m.div(m.log(lift(m, self)), m.log(m.const(2)))


@rows("aten.log10", source="torch.log10")
def log10(m, self):
    """log(self) / log 10"""
    return m.div(m.log(lift(m, self)), m.log(m.const(10)))


@rows("aten.logaddexp", source="torch.logaddexp")
def logaddexp(m, self, other):
    """log(exp(self) + exp(other))"""
    return m.log(m.add(m.exp(lift(m, self)), m.exp(lift(m, other))))


@rows("aten.xlogy", source="torch.xlogy")
def xlogy(m, self, other):
    """self * log(other), and 0 where self is 0"""
    x, y = lift(m, self), lift(m, other)
    if isinstance(self, torch.Tensor) or number(self):
        zero = torch.as_tensor(self) == 0
        safe = m.where(zero, m.const(1), y)
        return m.mul(x, m.log(safe))
    return m.where(m.compare("eq", x, m.const(0)), m.const(0), m.mul(x, m.log(y)))


# ---- trigonometry, error function, other special functions
@rows("aten.sin", source="torch.sin")
def sin(m, self):
    """The sine"""
    return m.sin(lift(m, self))


@rows("aten.cos", source="torch.cos")
def cos(m, self):
    """The cosine"""
    return m.cos(lift(m, self))


@rows("aten.tan", source="torch.tan")
def tan(m, self):
    """sin / cos"""
    x = lift(m, self)
    return m.div(m.sin(x), m.cos(x))


@rows("aten.sinh", source="torch.sinh")
def sinh(m, self):
    """(exp(x) - exp(-x)) / 2"""
    e = m.exp(lift(m, self))
    return m.scale(m.sub(e, m.inv(e)), Fraction(1, 2))


@rows("aten.cosh", source="torch.cosh")
def cosh(m, self):
    """(exp(x) + exp(-x)) / 2"""
    e = m.exp(lift(m, self))
    return m.scale(m.add(e, m.inv(e)), Fraction(1, 2))


@rows("aten.erf", source="torch.erf")
def erf(m, self):
    """The error function"""
    return m.erf(lift(m, self))


@rows("aten.erfc", source="torch.erfc")
def erfc(m, self):
    """1 - erf(self)"""
    return m.sub(m.const(1), m.erf(lift(m, self)))


def _opaque(name: str):
    @rows(f"aten.{name}", source=f"torch.{name}")
    def row(m, self):
        return m.opaque(name, lift(m, self))
    row.__doc__ = f"{name}, an uninterpreted function of its operand"
    return row


for _name in ("atan", "asin", "acos", "erfinv", "lgamma", "digamma", "floor", "ceil", "trunc"):
    _opaque(_name)


@rows("aten.asinh", source="torch.asinh")
def asinh(m, self):
    """log(self + sqrt(self^2 + 1))"""
    x = lift(m, self)
    return m.log(m.add(x, m.sqrt(m.add(m.mul(x, x), m.const(1)))))


@rows("aten.acosh", source="torch.acosh")
def acosh(m, self):
    """log(self + sqrt(self^2 - 1))"""
    x = lift(m, self)
    return m.log(m.add(x, m.sqrt(m.sub(m.mul(x, x), m.const(1)))))


@rows("aten.atanh", source="torch.atanh")
def atanh(m, self):
    """log((1 + self) / (1 - self)) / 2"""
    x, one = lift(m, self), m.const(1)
    return m.scale(m.log(m.div(m.add(one, x), m.sub(one, x))), Fraction(1, 2))


@rows("aten.hypot", source="torch.hypot")
def hypot(m, self, other):
    """sqrt(self^2 + other^2)"""
    x, y = lift(m, self), lift(m, other)
    return m.sqrt(m.add(m.mul(x, x), m.mul(y, y)))


@rows("aten.atan2", source="torch.atan2")
def atan2(m, self, other):
    """The angle of (other, self), uninterpreted"""
    return m.opaque("atan2", lift(m, self), lift(m, other))


@rows("aten.round", source="torch.round")
def round(m, self, *, decimals=0):
    """The nearest integer (even at ties), or multiple of 10 ** -decimals; uninterpreted"""
    x = lift(m, self)
    if decimals == 0:
        return m.opaque("round", x)
    ten = Fraction(10) ** decimals
    return m.scale(m.opaque("round", m.scale(x, ten)), 1 / ten)


@rows("aten.fake_quantize_per_tensor_affine_cachemask", source="torch.fake_quantize_per_tensor_affine")
def fake_quantize(m, self, scale, zero_point, quant_min, quant_max):
    """(clamp(round(x / scale + zero_point)) - zero_point) * scale, and the mask of what was not clamped; rounding is uninterpreted"""
    low, high, zero = m.const(quant_min), m.const(quant_max), m.const(zero_point)
    q = m.opaque("round", m.add(m.div(lift(m, self), m.const(scale)), zero))
    kept = m.mul(m.compare("ge", q, low), m.compare("le", q, high))
    return [m.mul(m.sub(m.minimum(m.maximum(q, low), high), zero), m.const(scale)), kept]


@rows("aten.frac", source="torch.frac")
def frac(m, self):
    """self - trunc(self)"""
    x = lift(m, self)
    return m.sub(x, m.opaque("trunc", x))


# ---- order
@rows("aten.abs", source="torch.abs")
def abs(m, self):
    """The absolute value; of a complex tensor sqrt(re^2 + im^2)"""
    x = lift(m, self)
    if isinstance(x, Complex):
        return m.sqrt(m.add(m.mul(x.re, x.re), m.mul(x.im, x.im)))
    return m.abs(x)


@rows("aten.sign", "aten.sgn", source="torch.sign")
def sign(m, self):
    """-1, 0 or 1; of a complex number x / |x|, and 0 at 0"""
    x = lift(m, self)
    if not isinstance(x, Complex):
        return m.sign(x)
    size = abs(m, x)
    inverse = m.where(m.compare("eq", size, m.const(0)), m.const(0), m.inv(size))
    return Complex(m.mul(x.re, inverse), m.mul(x.im, inverse))


@rows("aten.maximum", "aten.fmax", source="torch.maximum")
def maximum(m, self, other):
    """The larger of the two"""
    return m.maximum(lift(m, self), lift(m, other))


@rows("aten.minimum", "aten.fmin", source="torch.minimum")
def minimum(m, self, other):
    """The smaller of the two"""
    return m.minimum(lift(m, self), lift(m, other))


@rows("aten.clamp", source="torch.clamp")
def clamp(m, self, min=None, max=None):
    """min(max(self, min), max); a missing bound does nothing"""
    x = lift(m, self)
    if min is not None:
        x = m.maximum(x, lift(m, min))
    return x if max is None else m.minimum(x, lift(m, max))


@rows("aten.clamp_min", source="torch.clamp")
def clamp_min(m, self, min):
    """max(self, min)"""
    return m.maximum(lift(m, self), lift(m, min))


@rows("aten.clamp_max", source="torch.clamp")
def clamp_max(m, self, max):
    """min(self, max)"""
    return m.minimum(lift(m, self), lift(m, max))


def _comparison(op: str):
    @rows(f"aten.{op}", source=f"torch.{op}")
    def row(m, self, other):
        return m.compare(op, lift(m, self), lift(m, other))
    row.__doc__ = f"self {op} other, 0 or 1"
    return row


for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    _comparison(_name)


@rows("aten.isnan", source="torch.isnan")
def isnan(m, self):
    """Whether self differs from itself"""
    x = lift(m, self)
    return m.compare("ne", x, x)


@rows("aten.isinf", source="torch.isinf")
def isinf(m, self):
    """Whether |self| is infinite"""
    return m.compare("eq", m.abs(lift(m, self)), m.const(math.inf))


@rows("aten.isfinite", source="torch.isfinite")
def isfinite(m, self):
    """Whether |self| is less than infinity"""
    return m.compare("lt", m.abs(lift(m, self)), m.const(math.inf))


@rows("aten.nan_to_num", source="torch.nan_to_num", ctx=True)
def nan_to_num(m, self, nan=None, posinf=None, neginf=None, *, ctx):
    """self, with numbers in place of nan and the infinities (default: 0 and the dtype's largest)"""
    x, info = lift(m, self), torch.finfo(ctx.native[0].dtype)
    out = m.where(m.compare("ne", x, x), m.const(0 if nan is None else nan), x)
    out = m.where(m.compare("eq", x, m.const(math.inf)), m.const(info.max if posinf is None else posinf), out)
    return m.where(m.compare("eq", x, m.const(-math.inf)), m.const(info.min if neginf is None else neginf), out)


# ---- masks
@rows("aten.where", source="torch.where")
def where(m, condition, self, other):
    """self where condition, else other"""
    a, b = lift(m, self), lift(m, other)
    if isinstance(a, Complex) or isinstance(b, Complex):
        a, b = L.pair(m, a), L.pair(m, b)
        return Complex(m.where(condition, a.re, b.re), m.where(condition, a.im, b.im))
    return m.where(condition, a, b)


@rows("aten.masked_fill", source="torch.Tensor.masked_fill")
def masked_fill(m, self, mask, value):
    """value where mask, else self"""
    return where(m, mask, value, self)


def truth(m, x, ctx, k: int):
    """Argument k as a 0/1 value; masks are that already."""
    ref = ctx.call.args[k] if k < len(ctx.call.args) else None
    if isinstance(x, torch.Tensor):
        return m.data(x != 0)
    if isinstance(ref, TensorRef) and ref.dtype == "bool":
        return x
    return m.compare("ne", lift(m, x), m.const(0))


def _and(m, a, b):
    return m.mul(a, b)


def _or(m, a, b):
    return m.sub(m.add(a, b), m.mul(a, b))


def _xor(m, a, b):
    return m.sub(m.add(a, b), m.scale(m.mul(a, b), 2))


@rows("aten.logical_and", source="torch.logical_and", ctx=True)
def logical_and(m, self, other, *, ctx):
    """a * b of truth values"""
    return _and(m, truth(m, self, ctx, 0), truth(m, other, ctx, 1))


@rows("aten.logical_or", source="torch.logical_or", ctx=True)
def logical_or(m, self, other, *, ctx):
    """a + b - a * b of truth values"""
    return _or(m, truth(m, self, ctx, 0), truth(m, other, ctx, 1))


@rows("aten.logical_xor", source="torch.logical_xor", ctx=True)
def logical_xor(m, self, other, *, ctx):
    """a + b - 2 * a * b of truth values"""
    return _xor(m, truth(m, self, ctx, 0), truth(m, other, ctx, 1))


@rows("aten.logical_not", source="torch.logical_not", ctx=True)
def logical_not(m, self, *, ctx):
    """1 - a of a truth value"""
    return m.sub(m.const(1), truth(m, self, ctx, 0))


@rows("aten.bitwise_and", source="torch.bitwise_and", ctx=True)
def bitwise_and(m, self, other, *, ctx):
    """a * b of masks"""
    return _and(m, *_masks(m, (self, other), ctx))


@rows("aten.bitwise_or", source="torch.bitwise_or", ctx=True)
def bitwise_or(m, self, other, *, ctx):
    """a + b - a * b of masks"""
    return _or(m, *_masks(m, (self, other), ctx))


@rows("aten.bitwise_xor", source="torch.bitwise_xor", ctx=True)
def bitwise_xor(m, self, other, *, ctx):
    """a + b - 2 * a * b of masks"""
    return _xor(m, *_masks(m, (self, other), ctx))


@rows("aten.bitwise_not", source="torch.bitwise_not", ctx=True)
def bitwise_not(m, self, *, ctx):
    """1 - a of a mask"""
    return m.sub(m.const(1), *_masks(m, (self,), ctx))


def _masks(m, xs, ctx):
    """Operands of a bitwise op on masks; on integers that meet a mask there is no meaning in 0 and 1."""
    if ctx.native[0] is None or ctx.native[0].dtype != torch.bool:
        raise refuse(ctx.call.name, "bits of an integer that depends on symbols", "use logical operators on boolean tensors")
    return [lift(m, x) for x in xs]


# ---- complex numbers
@rows("aten.complex", source="torch.complex")
def complex_(m, real, imag):
    """real + i imag"""
    re, im = lift(m, real), lift(m, imag)
    shape = torch.broadcast_shapes(re.shape, im.shape)
    return Complex(_spread(m, re, shape), _spread(m, im, shape))


@rows("aten.polar", source="torch.polar")
def polar(m, abs, angle):
    """abs * (cos angle + i sin angle)"""
    r, a = lift(m, abs), lift(m, angle)
    return Complex(m.mul(r, m.cos(a)), m.mul(r, m.sin(a)))


@rows("aten._conj", "aten._conj_physical", "aten.conj_physical", source="torch.conj")
def conj(m, self):
    """The complex conjugate, in memory"""
    return L.conj(m, self)


# ---- identities and casts
@rows("aten.clone", "aten.alias", "aten.detach", "aten.lift_fresh", "aten.lift", "aten.lift_fresh_copy", "aten.alias_copy",
      "aten.detach_copy", source="torch.clone")
def identity(m, self, *, memory_format=None):
    """self"""
    return lift(m, self)


def _to(m, x, source, target: torch.Tensor):
    """x as the type of `target`; source: what was recorded of it (of a foreach call: the list)."""
    if isinstance(source, Sequence) and source.items:
        source = source.items[0]
    was = getattr(torch, source.dtype) if isinstance(source, TensorRef) else None
    x, to = lift(m, x), target.dtype
    if to == torch.bool and was not in (None, torch.bool):
        return m.compare("ne", x, m.const(0))
    if isinstance(x, Complex) and not to.is_complex:
        return x.re
    if to.is_complex:
        return L.pair(m, x)
    return L.cast(m, x, to) if was is not None and was.is_floating_point and was != to else x


@rows("aten._to_copy", source="torch.Tensor.to", ctx=True)
def to_copy(m, self, *_, ctx, **__):
    """self; a cast between float types is the identity"""
    return _to(m, self, ctx.call.args[0], ctx.native[0])


@rows("aten.copy", source="torch.Tensor.copy_", ctx=True)
def copy(m, self, src, non_blocking=False, *, ctx):
    """src, in the shape of self"""
    return _spread(m, _to(m, src, ctx.call.args[1], ctx.native[0]), self.shape)


def _spread(m, x, shape):
    return L.each(m, lambda v: v if tuple(v.shape) == tuple(shape) else m.expand(v, tuple(shape)), x)


@rows("aten.fill", source="torch.Tensor.fill_")
def fill(m, self, value):
    """value everywhere"""
    return _spread(m, lift(m, value), self.shape)


@rows("aten.zero", source="torch.Tensor.zero_")
def zero(m, self):
    """0 everywhere"""
    return m.const(0, tuple(self.shape))
