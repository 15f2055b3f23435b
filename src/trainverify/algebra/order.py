"""Order in the field: maxima, comparisons, selection, sign and absolute value are hashes, since no branch is taken on a symbol.

(Not trusted: makes guesses.) A maximum is the hash of its flattened set of operands; the maximum of one value x and one constant c
is c + (x - c) * (x > c), so that relu(x) = x * (x > 0). Comparisons are hashes of the difference that respect (a > b) = 1 - (a <= b)
and are their own squares.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from trainverify.algebra import primes
from trainverify.algebra.fieldvalue import (GARBAGE, MAXED, NAN, NEG_INF, POS_INF, FieldValue, any_of, broadcast, codes, floats,
                                            is_garbage, joined, spread_dims)
from trainverify.algebra.maxsets import NONE
from trainverify.algebra.primes import MOD, mix, pack_p
from trainverify.algebra.real import COMPARISONS

I64, F64 = torch.int64, torch.float64
_SMALL = 1 << 16


def one_number(m, a, b) -> tuple:
    """(number, other) of two values of one element, of which one is a finite number; else nothing."""
    if math.prod((*a.shape, *b.shape)) != 1 or m.is_const(a) == m.is_const(b):
        return None, None
    number, x = (a, b) if m.is_const(a) else (b, a)
    return (number, x) if m.number_of(number).isfinite().all() else (None, None)


def _small(d: FieldValue) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a difference is a small integer, and where it is a positive one: it does not depend on symbols (but for one coincidence in 2^45)."""
    p = primes.MOD_P[d.res.dim() - 1]
    x = torch.where(d.res[:2] > p // 2, d.res[:2] - p, d.res[:2])
    known = (x[0] == x[1]) & (x[0].abs() <= _SMALL)
    return known, known & (x[0] > 0)


class Order:
    """The part of Field that deals with order; not used on its own."""

    # ---- maxima
    def maximum(self, a, b):
        if a.num is not None and b.num is not None:
            return FieldValue(broadcast(a.shape, b.shape), num=torch.maximum(a.num, b.num))
        number, x = one_number(self, a, b)
        if number is not None and number.num.item() < 0 and bool(self._is_nonnegative(self.neg(x))):
            return self.neg(self.minimum(self.neg(number), self.neg(x)))
        shape = broadcast(a.shape, b.shape)
        pair = self.stack([self.expand(self._lifted(self._operand_p(v)), shape) for v in (a, b)])
        for v in (a, b):
            if v.num is not None and v.num.isfinite().any():
                finite = v.num.isfinite()
                self.maxsets.note_constants(pack_p(self._lift(v))[finite], v.num[finite])
        return self.reshape(self._largest(self.permute(self.reshape(pair, (2, -1)), (1, 0))), shape)

    def _lifted(self, v: FieldValue) -> FieldValue:
        """A constant as a symbolic value (small before it is expanded)."""
        return v if v.num is None else FieldValue(v.shape, self._lift(v), sp=v.sp)

    def peak(self, a, dims):
        return None

    def minimum(self, a, b):
        """Of one value that is known to be positive and a number: c / max(1, c / x), since programs write it so too (clipping)."""
        number, x = one_number(self, a, b)
        if number is None or number.num.item() <= 0 or not bool(self._is_nonnegative(x)):
            return self.neg(self.maximum(self.neg(a), self.neg(b)))
        return self.mul(number, self.inv(self.maximum(self.const(1), self.mul(number, self.inv(x)))))

    def amax(self, a, dims: Sequence[int] = (), keepdim: bool = False):
        n = len(a.shape)
        dims = tuple(d % n for d in dims) if dims else tuple(range(n))
        if a.num is not None:
            num = a.num.amax(dims, keepdim)
            return FieldValue(num.shape, num=num)
        if not n:
            return a
        keep = [d for d in range(n) if d not in dims]
        rows = self.permute(self._operand_p(a), [*keep, *dims])
        rows = self.reshape(rows, (math.prod(a.shape[d] for d in keep), math.prod(a.shape[d] for d in dims)))
        shape = [1 if d in dims else a.shape[d] for d in range(n)] if keepdim else [a.shape[d] for d in keep]
        return self.reshape(self._largest(rows), shape)

    def amin(self, a, dims: Sequence[int] = (), keepdim: bool = False):
        return self.neg(self.amax(self.neg(a), dims, keepdim))

    def _largest(self, rows: FieldValue) -> FieldValue:
        """[r, n] symbolic operands to [r] maxima."""
        sets = self.maxsets
        prints = pack_p(rows.res).contiguous()
        own = sets.members(prints) if rows.flags & MAXED else prints.unsqueeze(-1)
        if rows.sp is not None:
            own = own.masked_fill((rows.sp == NEG_INF).unsqueeze(-1), NONE)
        union = sets.union(own.flatten(1))
        h = sets.hash(union)
        same = sets.hash(own) == h.unsqueeze(-1)              # the maximum is an operand itself
        at = same.to(torch.uint8).argmax(-1)
        single = same.any(-1)
        out = self._row_entry(rows, at)
        if not single.all():
            new = primes.spread(mix(h ^ self._key("max")), self._keys, MOD)
            new = self._clamped(rows, prints, union, new)
            out.res = torch.where(single, out.res, new)
            out.flags |= MAXED
            sets.register(pack_p(out.res)[~single], union[~single])
            out.sgn = None if out.sgn is None else out.sgn * single
        return self._value(out.res, self._largest_special(rows), out.sgn, out.flags)

    @staticmethod
    def _row_entry(rows: FieldValue, at: torch.Tensor) -> FieldValue:
        """The at-th element of each row."""
        return rows.move(lambda t, lead: t.gather(lead + 1, at.unsqueeze(-1).expand(*t.shape[:lead + 1], 1)).squeeze(-1))

    @staticmethod
    def _largest_special(rows: FieldValue) -> torch.Tensor | None:
        if rows.sp is None:
            return None
        garbage = (rows.sp == GARBAGE).any(-1)
        return codes(floats(rows).amax(-1), garbage)

    def _clamped(self, rows: FieldValue, prints: torch.Tensor, union: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Sets of one value x and one constant c: c + (x - c) * (x > c)."""
        if union.shape[1] < 2:
            return new
        constant = ~self.maxsets.constant_of(union[:, :2]).isnan()
        two = (union[:, 2:] == NONE).all(-1) & (union[:, 1] != NONE) & (constant[:, 0] != constant[:, 1])
        if not two.any():
            return new
        c_first = constant[:, 0]
        x_print, c_print = torch.where(c_first, union[:, 1], union[:, 0]), torch.where(c_first, union[:, 0], union[:, 1])
        is_x, is_c = prints == x_print.unsqueeze(-1), prints == c_print.unsqueeze(-1)
        x = self._row_entry(rows, is_x.to(torch.uint8).argmax(-1)).res
        c = self._row_entry(rows, is_c.to(torch.uint8).argmax(-1)).res
        d = (x - c).remainder_(MOD[1])
        value = (self._above(pack_p(d)) * d).add_(c).remainder_(MOD[1])
        return torch.where(two & is_x.any(-1) & is_c.any(-1), value, new)

    # ---- comparisons
    def _above(self, difference: torch.Tensor) -> torch.Tensor:
        """Residues [4, ...] of (d > 0) from packed fingerprints of d."""
        theta = primes.spread(mix(difference ^ self._key("above")), self._keys, MOD)
        return theta.masked_fill(difference == 0, 0)

    def compare(self, op: str, a, b):
        """0/1-valued; gt, ge, lt, le, eq, ne."""
        if a.num is not None and b.num is not None:
            return FieldValue(broadcast(a.shape, b.shape), num=COMPARISONS[op](a.num, b.num).to(F64))
        if op in ("lt", "le"):
            a, b, op = b, a, {"lt": "gt", "le": "ge"}[op]
        if op == "ge":                        # a >= b is not b > a
            atom, negated = self._greater(b, a), True
        elif op == "gt":
            atom, negated = self._greater(a, b), False
        else:
            atom, negated = self._same(a, b), op == "ne"
        res = (1 - atom).remainder_(MOD[atom.dim() - 1]) if negated else atom
        out = self._value(res, self._compare_garbage(a, b, res.shape[1:]))
        if a.sp is not None or b.sp is not None:
            out.res = self._decided(op, a, b, out.res)
        return self._remember_square(out, out)

    def _greater(self, a, b) -> torch.Tensor:
        d = self._operand_p(self._linear(self._operand_p(a), self._operand_p(b), torch.sub))
        print_ = pack_p(d.res)
        if b.num is not None and a.flags & MAXED:
            print_ = self._without_floor(a, b, print_)
        atom = self._above(print_)
        known, above = _small(d)
        if known.any():                       # constants that stand among other elements (counts that were gathered with sums)
            atom = torch.where(known, above.to(I64), atom)
        if a.num is not None and (a.num <= 0).any():           # a root or a distance is never below 0
            never = (a.num <= 0) & self._is_nonnegative(b)
            atom = atom.masked_fill(never.expand(atom.shape[1:]), 0)
        return atom

    def _without_floor(self, a, b, print_: torch.Tensor) -> torch.Tensor:
        """max(x, c) > d is x > d for constants c <= d."""
        own = self.maxsets.members(pack_p(a.res).contiguous())
        own = own.expand(*print_.shape, own.shape[-1])
        value = self.maxsets.constant_of(own)
        rest = (own != NONE) & ~(value <= b.num.expand(print_.shape).unsqueeze(-1))
        one = (rest.sum(-1) == 1) & ((own != NONE).sum(-1) > 1)
        if not one.any():
            return print_
        x = own.gather(-1, rest.to(torch.uint8).argmax(-1, keepdim=True)).squeeze(-1)
        bound = self._lift(b)[:2]
        d = primes.unpack_p(torch.where(one, x, 0)) - bound.reshape(2, *([1] * (x.dim() - bound.dim() + 1)), *bound.shape[1:])
        return torch.where(one, pack_p(d.remainder_(primes.MOD_P[x.dim()])), print_)

    def _same(self, a, b) -> torch.Tensor:
        d = self._operand_p(self._linear(self._operand_p(a), self._operand_p(b), torch.sub))
        x, y = pack_p(d.res), pack_p(self.neg(d).res)
        atom = primes.spread(mix(torch.minimum(x, y) ^ self._key("same")), self._keys, MOD)
        return torch.where(_small(d)[0], (x == 0).to(I64), torch.where(x == 0, 1, atom))

    @staticmethod
    def _compare_garbage(a, b, shape) -> torch.Tensor | None:
        garbage = any_of(is_garbage(a), is_garbage(b))
        return None if garbage is None else codes(torch.ones(shape, dtype=F64), garbage.expand(shape))

    @staticmethod
    def _decided(op: str, a, b, res: torch.Tensor) -> torch.Tensor:
        """Comparisons with infinities and nan do not depend on the symbols."""
        known = torch.where(floats(a).isfinite(), 0.0, floats(a)), torch.where(floats(b).isfinite(), 0.0, floats(b))
        special = ~(floats(a).isfinite() & floats(b).isfinite())
        return torch.where(special.expand(res.shape[1:]), COMPARISONS[op](*known).to(I64).expand(res.shape[1:]), res)

    # ---- selection
    def where(self, mask, a, b):
        """mask: a concrete boolean tensor (selects) or a 0/1 value (m * a + (1 - m) * b)."""
        if not isinstance(mask, torch.Tensor):
            if mask.num is None:
                return self._blend(mask, a, b)
            mask = mask.num != 0
        shape = broadcast(tuple(mask.shape), a.shape, b.shape)
        if a.num is not None and b.num is not None:
            return FieldValue(shape, num=torch.where(mask, a.num, b.num))
        x, y = (spread_dims(self._lift(v), len(shape)) for v in (a, b))
        out = FieldValue(shape, torch.where(mask, x, y), flags=joined((a.flags, b.flags)))
        none = torch.zeros((), dtype=torch.uint8)
        for what in ("sp", "sgn"):
            x, y = getattr(a, what), getattr(b, what)
            if x is not None or y is not None:
                chosen = torch.where(mask, none if x is None else x, none if y is None else y).expand(shape)
                setattr(out, what, chosen if chosen.any() else None)
        return out

    def _blend(self, m, a, b):
        known = m.res[:2]                     # modulo Q, a mask is what it was made of
        if m.sp is None and bool(((known == 0).all(0) | (known == 1).all(0)).all()):
            return self.where(known[0] == 1, a, b)             # a choice that signs or infinities have made
        x, y = (FieldValue(v.shape, self._lift(v).clone(), flags=v.flags) for v in (a, b))
        out = self._linear(self.mul(m, x), self.mul(self.sub(self.const(1), m), y), torch.add)
        if a.sp is None and b.sp is None and m.sp is None:
            return out
        shape = out.shape
        special = torch.zeros(shape, dtype=torch.bool)   # an infinity that a symbol selects: neither operand, known only by how it came about
        for v in (a, b):
            special = special if v.sp is None else special | (v.sp != 0)
        h = mix(mix(self.fingerprint(m) ^ self._key("blend")) ^ self.fingerprint(a))
        h = mix(h ^ self.fingerprint(b)).expand(shape)
        res = torch.where(special, self._atoms(h).res, out.res)
        garbage = any_of(any_of(is_garbage(a), is_garbage(b)), is_garbage(m))
        stand_in = torch.where(floats(m).isnan(), math.nan, 1.0).to(F64).expand(shape)
        return self._value(res, codes(stand_in, None if garbage is None else garbage.expand(shape)), None, out.flags)

    # ---- sign and absolute value
    def sign(self, a):
        if a.num is not None:
            return FieldValue(a.shape, num=a.num.sign())
        a = self._operand_p(a)
        x, y = pack_p(a.res), pack_p(self.neg(a).res)
        atom = self._atoms(mix(torch.minimum(x, y) ^ self._key("sign"))).res.masked_fill(x == 0, 0)
        res = torch.where(x <= y, atom, (-atom).remainder_(MOD[x.dim()]))
        if a.sp is not None:
            infinite = (a.sp == POS_INF).to(I64) - (a.sp == NEG_INF).to(I64)
            res = torch.where(infinite != 0, infinite.remainder(MOD[x.dim()]), res)
        return self._value(res, self._undefined(a))

    def abs(self, a):
        if a.num is not None:
            return FieldValue(a.shape, num=a.num.abs())
        a = self._operand_p(a)
        x, y = pack_p(a.res), pack_p(self.neg(a).res)
        res = self._atoms(mix(torch.minimum(x, y) ^ self._key("abs"))).res.masked_fill(x == 0, 0)
        sp = None if a.sp is None else codes(floats(a).abs(), is_garbage(a))
        return self._remember_square(self._value(res, sp), self._mul(a, a))

    @staticmethod
    def _undefined(a: FieldValue) -> torch.Tensor | None:
        return None if a.sp is None else codes(torch.where(a.sp == NAN, math.nan, 1.0).to(F64), is_garbage(a))
