"""Square roots in the field: the power map, which remembers what a root's square is (not trusted: makes guesses).

What is its own square (a comparison) or a root of a square (an absolute value) is remembered here too, and with each of them
whether it is known to be nonnegative. Products of two equal remembered values take the square that is known.
"""
from __future__ import annotations

import math

import torch

from trainverify.algebra import primes
from trainverify.algebra.fieldvalue import NEG_INF, ROOTED, TAINT, FieldValue, codes, floats, is_garbage
from trainverify.algebra.primes import pack_p, pack_q

_SMALL = 1024                                 # elements


class Roots:
    """The part of Field that deals with roots; not used on its own. `_squares` maps a value to (its square modulo P, modulo Q, nonnegative)."""

    def sqrt(self, a):
        if a.num is not None:
            return self._fold(a.num.sqrt(), lambda: self._sqrt(a))
        a = self._operand_p(a)
        if self._phase == "optimizer" and math.prod(a.shape) > _SMALL:
            return self._sqrt(a)              # of second moments: nobody squares them again
        return self._remember_square(self._sqrt(a), a)

    def _sqrt(self, a):
        sp = None if a.sp is None else codes(torch.where(a.sp == NEG_INF, math.nan, floats(a)), is_garbage(a))
        if a.num is not None:                 # keeps roots of constants consistent modulo Q too
            return self._value(primes.sqrt(self._lift(a), primes.MODULI), sp)
        return self._from_p(primes.sqrt(a.res[:2], primes.P), sp)

    def _square_of(self, root: FieldValue) -> tuple[torch.Tensor, FieldValue, torch.Tensor]:
        """Where the square of a value is remembered, the squares, and which of these values are known to be nonnegative."""
        found, packed = self._squares.get(pack_p(root.res).reshape(-1).numpy())
        found, packed = torch.from_numpy(found), torch.from_numpy(packed)
        q, sgn = primes.unpack_q(packed[:, 1])
        res = torch.cat([primes.unpack_p(packed[:, 0]), q]).reshape(root.res.shape)
        square = FieldValue(root.shape, res, sgn=sgn.reshape(root.shape) if sgn.any() else None, flags=root.flags & TAINT)
        return found.reshape(root.shape), square, (found & (packed[:, 2] != 0)).reshape(root.shape)

    def _is_nonnegative(self, v: FieldValue) -> torch.Tensor:
        """Whether v is known as the result of a root, an absolute value or a comparison, or as a positive multiple of one."""
        found, packed = self._squares.get(pack_p(v.res).reshape(-1).numpy())
        return torch.from_numpy(found & (packed[:, 2] != 0)).reshape(v.shape)

    def _remembered_squares(self, a, b, product: FieldValue) -> FieldValue:
        same = (a.res == b.res).all(0)
        if not same.any():
            return product
        found, square, _ = self._square_of(a)
        use = same & found
        sgn = None if square.sgn is None else square.sgn * use
        return self._value(torch.where(use, square.res, product.res), product.sp, sgn, product.flags | square.flags)

    def _scaled_root(self, root: FieldValue, factor: FieldValue, product: FieldValue) -> FieldValue:
        """(c s)^2 is c^2 s^2 for a constant c and a root s (norms are divided by the root of a number of ranks)."""
        root = self.expand(root, product.shape)
        found, square, nonnegative = self._square_of(root)
        return self._remember_square(product, self._mul(square, self.mul(factor, factor)), nonnegative & (factor.num >= 0), found)

    def _like(self, v: FieldValue, out: FieldValue) -> FieldValue:
        """out, known to be nonnegative if v is (one element: its inverse, or a positive multiple)."""
        return self._remember_square(out, self._mul(out, out)) if bool(self._is_nonnegative(v).all()) else out

    def _raised(self, a: FieldValue, b: FieldValue, out: FieldValue) -> FieldValue:
        """out = a + b, one of which is a number and one element: nonnegative if both are (a norm and its epsilon)."""
        number, v = (a, b) if b.num is None else (b, a)
        return self._like(v, out) if bool((number.num > 0).all()) else out

    def _remember_square(self, root: FieldValue, square: FieldValue, nonnegative: torch.Tensor | None = None, only: torch.Tensor | None = None) -> FieldValue:
        """root, marked: mul(root, root) is square. nonnegative: which roots are known to be (all, unless it is given)."""
        prints = pack_p(root.res).reshape(-1)
        res = self._lift(square).reshape(4, -1)
        sign = torch.ones_like(prints) if nonnegative is None else nonnegative.reshape(-1).to(torch.int64)
        packed = torch.stack([pack_p(res), pack_q(res[2:], None if square.sgn is None else square.sgn.reshape(-1)), sign], 1)
        if only is not None:
            prints, packed = prints[only.reshape(-1)], packed[only.reshape(-1)]
        self._squares.put(prints.numpy(), packed.numpy())
        root.flags |= ROOTED | square.flags & TAINT
        return root
