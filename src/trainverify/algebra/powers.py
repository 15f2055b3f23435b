"""Powers by the other micro-ops, for algebras in which they cannot be evaluated (trusted).

Whole exponents are products, halves use the square root, a positive constant base is exp(b log a); any other power is uninterpreted.
"""
from __future__ import annotations

import math
from fractions import Fraction

import torch

from trainverify.algebra.base import Number
from trainverify.algebra.fieldvalue import broadcast


class Powers:
    """Mixed into algebras whose constants have float64 contents (`to_float`)."""

    def _pow(self, a, q: Number):
        f = Fraction(q) if math.isfinite(q) else None
        if f is None or f.denominator > 2:
            return self._opaque("power", a, self.const(q))
        if f.denominator == 1:
            return self._whole_power(a, f.numerator)
        if f > 0:
            root = self.sqrt(a)
            return root if f.numerator == 1 else self.mul(self._whole_power(a, f.numerator // 2), root)
        return self._whole_power(self.inv(self.sqrt(a)), -f.numerator)

    def _whole_power(self, a, n: int):
        if n < 0:
            return self.inv(self._whole_power(a, -n))
        if n == 0:                            # 1, where a is a number
            return self.add(self.mul(a, self.const(0)), self.const(1))
        out = None
        while n:
            if n & 1:
                out = a if out is None else self.mul(out, a)
            n >>= 1
            if n:
                a = self.mul(a, a)
        return out

    def _power(self, a, b):
        """a ** b, not both constant."""
        base, exponent = self.to_float(a), self.to_float(b)
        if exponent is not None and exponent.numel() and bool((exponent == exponent.reshape(-1)[0]).all()):
            out = self.pow(a, exponent.reshape(-1)[0].item())
            return self.expand(out, broadcast(tuple(a.shape), tuple(b.shape)))
        if base is not None and bool((base > 0).all()) and bool(torch.isfinite(base).all()):
            return self.exp(self.mul(b, self.log(a)))
        return self._opaque("power", a, b)
