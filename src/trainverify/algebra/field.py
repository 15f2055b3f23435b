"""The algebra `field`: values are random points of prime fields, so that equal formulas get equal fingerprints (not trusted: makes guesses).

Each element has residues modulo two pairs of primes P = 2 Q + 1 (algebra/primes.py). Ring operations act on all four. exp maps
the residues modulo Q to ones modulo P, log the other way, which makes them homomorphisms; the other pair then becomes a hash
(a *taint*), and *adoption* makes it a function of the value: the reference registers its tainted values by the reliable pair, and
whoever finds a registered one takes its companion. Two elements count as equal if either pair agrees. Everything else (maxima,
comparisons, sin, ...) is a hash of its operands' fingerprints. A square root is the power map and remembers its radicand, which
becomes its square; products of other expressions in it use the power map as it is.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch

from trainverify.algebra import primes
from trainverify.algebra.base import Number
from trainverify.algebra.constants import Constants, Rounding
from trainverify.algebra.fieldvalue import (GARBAGE, MAXED, NEG_INF, P_BAD, POS_INF, Q_BAD, ROOTED, SETTLED, TAINT, Cell, FieldValue, any_of,
                                            both_signs, codes, floats, is_dense, is_garbage, joined, spread_dims, sum_signs)
from trainverify.algebra.maxsets import MaxSets
from trainverify.algebra.order import Order
from trainverify.algebra.powers import Powers
from trainverify.algebra.primes import MOD, MOD_P, MOD_Q, mix, pack_p, pack_q
from trainverify.algebra.real import FUNCTIONS
from trainverify.algebra.roots import Roots
from trainverify.kernel.hashtable import HashTable

I64, F64 = torch.int64, torch.float64
_ONE_P, _ONE_Q = (1 << 31) | 1, (1 << 32) | (1 << 2)
_TINY = 2.0 ** -50


class Field(Order, Roots, Powers):
    """One random point: all symbols and hashes derive from the seed. Replay the reference first, then begin_side("parallel")."""

    name = "field"

    def __init__(self, seed: int = 0, constants: Constants | None = None):
        """constants: those of another field, which says when the parallel side begins (default: its own)."""
        self.seed = seed
        self._shares = constants is not None
        self.constants = constants or Constants(seed)
        self.maxsets = MaxSets(primes.key(seed, "maxsets"))
        self.compared = 0                     # elements compared by `equal`
        self._parallel = False
        self._phase = ""
        self._keys = torch.tensor([primes.key(seed, f"component{i}") for i in range(4)])
        self._purposes: dict[str, int] = {}
        self._literals: dict[tuple, FieldValue] = {}
        self._q_of_p, self._p_of_q, self._squares = HashTable(), HashTable(), HashTable(width=3)
        known_p, known_q = torch.tensor([0, _ONE_P]).numpy(), torch.tensor([0, _ONE_Q]).numpy()
        self._q_of_p.put(known_p, known_q[:, None])
        self._p_of_q.put(known_q, known_p[:, None])

    # ---- sides and evidence
    def begin_side(self, side: str) -> None:
        """"reference", then "parallel"."""
        if side not in ("reference", "parallel") or (self._parallel and side == "reference"):
            raise ValueError(f"cannot begin side {side!r} now")
        if side == "parallel" and not self._parallel:
            self._parallel = True
            if not self._shares:
                self.constants.begin_parallel()

    def at(self, rank: int, index: int, span: int, phase: str = "") -> None:
        """The replay's current place (rank, call, span), which roundings of constants note, and what the program does there."""
        self.constants.where = (rank, index, span)
        self._phase = phase

    @property
    def rounding(self) -> list[Rounding]:
        """Constants of the parallel side that were taken for the reference's."""
        return self.constants.rounding

    @property
    def error_bits(self) -> int:
        """-log2 of the odds that some element compared at this point was called equal by coincidence, if unequal formulas have
        independent random residues (formulas of very high degree, and signs under square roots, can do worse)."""
        return max(0, 60 - math.ceil(math.log2(self.compared + 1)))

    def fingerprint(self, v: FieldValue) -> torch.Tensor:
        """int64 [*shape], the same for values known to be equal; each element that is no real number has that of its kind."""
        v = self._operand_p(v)
        print_ = pack_p(self._lift(v))
        return print_ if v.sp is None else torch.where(v.sp != 0, mix(v.sp.to(I64) ^ self._key("special")) & ((1 << 62) - 1), print_)

    # ---- constants
    def const(self, x: Number, shape: Sequence[int] = ()) -> FieldValue:
        key = (type(x), x if x == x else "nan")
        v = self._literals.get(key)
        if v is None:
            v = self._literals[key] = self._literal(x)
        return self.expand(v, shape) if shape else v

    def _literal(self, x: Number) -> FieldValue:
        if isinstance(x, float):
            return FieldValue((), num=torch.tensor(self.constants.scalar(x) if math.isfinite(x) else x, dtype=F64))
        f = Fraction(x)
        num = torch.tensor(f.numerator / f.denominator, dtype=F64)
        exact = [f.numerator * pow(f.denominator, -1, m) % m for m in primes.MODULI]
        return FieldValue((), num=self.constants.settle(num, lambda: torch.tensor(exact)))

    def data(self, t: torch.Tensor) -> FieldValue:
        num = t.detach().to(F64, copy=True)
        if t.dtype == torch.float32:
            num = self.constants.data_float32(num) if t.dim() else num.new_tensor(self.constants.scalar_float32(num.item()))
        elif t.dtype == torch.float64:
            num = self.constants.settle(num, lambda: primes.dyadic(torch.where(num.isfinite(), num, 0.0)))
        return FieldValue(num.shape, num=num)

    def is_const(self, a: FieldValue) -> bool:
        return a.num is not None

    def number_of(self, a: FieldValue) -> torch.Tensor:
        """The contents of a constant."""
        return a.num

    def _fold(self, num: torch.Tensor, structure: Callable[[], FieldValue]) -> FieldValue:
        """A constant computed from constants; structure() is the same operation on residues."""
        return FieldValue(num.shape, num=self.constants.settle(num, lambda: self._lift(structure()).expand(4, *num.shape)))

    def _lift(self, v: FieldValue) -> torch.Tensor:
        """Residues; those of a constant are kept on it."""
        if v.res is None:
            v.res = self.constants.residues(v.num)
            v.sp = codes(v.num, None)
        return v.res

    # ---- hashing and adoption
    def _key(self, purpose: str) -> int:
        if purpose not in self._purposes:
            self._purposes[purpose] = primes.key(self.seed, purpose)
        return self._purposes[purpose]

    def _atoms(self, h: torch.Tensor, sp: torch.Tensor | None = None, flags: int = 0) -> FieldValue:
        """Values that are functions of a 64-bit hash."""
        return self._value(primes.spread(h, self._keys, MOD), sp, None, flags)

    def _value(self, res: torch.Tensor, sp: torch.Tensor | None = None, sgn: torch.Tensor | None = None, flags: int = 0) -> FieldValue:
        if sp is not None:
            res = res.masked_fill(sp != 0, 0)
        return FieldValue(res.shape[1:], res, None, sp, sgn, flags)

    def _settle(self, v: FieldValue, operand: bool = False) -> FieldValue:
        """v with unreliable residues replaced by those known for its value (the reference registers what is new).

        operand: v is about to enter a function, where even reliable residues are registered (a tainted equal may come).
        """
        taint = v.flags & TAINT
        if v.num is not None or not (taint and not v.flags & SETTLED or operand and not taint) or 0 in v.shape:
            return v
        if taint == Q_BAD and not operand and self._leads_to_no_exp():
            return v
        flat = v.res.reshape(4, -1)
        p, q = pack_p(flat).numpy(), pack_q(flat[2:], None if v.sgn is None else v.sgn.reshape(-1)).numpy()
        new_q = self._adopted(self._q_of_p, p, q) if taint & Q_BAD or not taint else q
        new_p = self._adopted(self._p_of_q, new_q, p) if taint & P_BAD or not taint and not self._parallel else p
        if (new_p == p).all() and (new_q == q).all():
            return FieldValue(v.shape, v.res, None, v.sp, v.sgn, v.flags | SETTLED)
        q_res, sgn = primes.unpack_q(torch.from_numpy(new_q))
        res = torch.cat([primes.unpack_p(torch.from_numpy(new_p)), q_res]).reshape(4, *v.shape)
        return FieldValue(v.shape, res, None, v.sp, sgn.reshape(v.shape) if sgn.any() else None, v.flags | SETTLED)

    def _leads_to_no_exp(self) -> bool:
        """Gradients and updates get their companions in the next forward, if they are ever exponents. Until then the residues modulo P
        tell what they are, and a table of all of them would be most of the memory. (A backward may compute the forward again.)"""
        return self._phase == "optimizer" or (self._phase in ("backward", "hook") and not self._parallel)

    def _adopted(self, table: HashTable, keys, own):
        if not self._parallel:
            return table.put(keys, own[:, None])[:, 0]
        found, values = table.get(keys)
        own = own.copy()
        own[found] = values[found, 0]
        return own

    def _operand(self, v: FieldValue) -> FieldValue:
        return self._settle(v, operand=True)

    def _operand_p(self, v: FieldValue) -> FieldValue:
        """The operand of a function that looks at its residues modulo P only."""
        return v if v.flags & TAINT == Q_BAD else self._operand(v)

    # ---- ring
    def _pair(self, a: FieldValue, b: FieldValue) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = self._lift(a), self._lift(b)
        if x.dim() != y.dim():
            n = max(x.dim(), y.dim()) - 1
            x, y = spread_dims(x, n), spread_dims(y, n)
        return x, y

    def _linear(self, a: FieldValue, b: FieldValue, op: Callable) -> FieldValue:
        x, y = self._pair(a, b)
        res = op(x, y).remainder_(MOD[x.dim() - 1])
        sp = sgn = None
        if a.sp is not None or b.sp is not None:
            sp = codes(op(floats(a), floats(b)).expand(res.shape[1:]), any_of(is_garbage(a), is_garbage(b)))
        if a.sgn is not None or b.sgn is not None:
            sgn = both_signs(a.sgn, b.sgn).expand(res.shape[1:])
        return self._value(res, sp, sgn, (a.flags | b.flags) & TAINT)

    def add(self, a, b):
        if a.num is not None and b.num is not None:
            return self._fold(a.num + b.num, lambda: self._linear(a, b, torch.add))
        out = self._linear(a, b, torch.add)
        return self._raised(a, b, out) if out.res[0].numel() == 1 and (a.num is None) != (b.num is None) else out

    def sub(self, a, b):
        if a.num is not None and b.num is not None:
            return self._fold(a.num - b.num, lambda: self._linear(a, b, torch.sub))
        return self._linear(a, b, torch.sub)

    def neg(self, a):
        if a.num is not None:
            return FieldValue(a.shape, num=-a.num)
        sp = a.sp
        if sp is not None:
            sp = torch.where(sp == POS_INF, NEG_INF, torch.where(sp == NEG_INF, POS_INF, sp)).to(torch.uint8)
        return FieldValue(a.shape, (-a.res).remainder_(MOD[len(a.shape)]), None, sp, a.sgn, a.flags & (TAINT | MAXED))

    def mul(self, a, b):
        if a.num is not None and b.num is not None:
            return self._fold(a.num * b.num, lambda: self._mul(a, b))
        return self._mul(a, b)

    def _mul(self, a, b):
        x, y = self._pair(a, b)
        res = (x * y).remainder_(MOD[x.dim() - 1])
        sp = sgn = None
        if a.sp is not None or b.sp is not None:
            sp = codes(self._product(a, b).expand(res.shape[1:]), any_of(is_garbage(a), is_garbage(b)))
        if a.sgn is not None or b.sgn is not None:
            sgn = self._scaled_signs(a, b, res.shape[1:])
        out = self._value(res, sp, sgn, (a.flags | b.flags) & TAINT)
        if a.flags & b.flags & ROOTED and a.shape == b.shape:
            out = self._remembered_squares(a, b, out)
        elif (a.flags | b.flags) & ROOTED and (a.num is None) != (b.num is None):
            out = self._scaled_root(a, b, out) if b.num is not None else self._scaled_root(b, a, out)
        elif out.res[0].numel() == 1 and (a.num is None) != (b.num is None) and bool(((a if b.num is None else b).num > 0).all()):
            out = self._like(a if a.num is None else b, out)
        return out

    @staticmethod
    def _product(a: FieldValue, b: FieldValue) -> torch.Tensor:
        """Stand-ins of a product; the sign of a symbolic number is unknown, so that times infinity is undefined."""
        x, y = floats(a), floats(b)
        out = x * y
        if a.num is None:
            out = torch.where(x.isfinite() & y.isinf(), math.nan, out)
        if b.num is None:
            out = torch.where(y.isfinite() & x.isinf(), math.nan, out)
        return out

    def _scaled_signs(self, a: FieldValue, b: FieldValue, shape) -> torch.Tensor | None:
        """Signs of logarithms survive multiplication by constants only."""
        if a.num is None and b.num is None:
            return None
        value, factor = (a, b) if b.num is not None else (b, a)
        sgn = value.sgn * self.constants.odd(factor.num)
        return sgn.expand(shape) if sgn.any() else None

    def inv(self, a):
        if a.num is not None:
            return self._fold(a.num.reciprocal(), lambda: self._inv(a))
        out = self._inv(a)
        return self._like(a, out) if out.res[0].numel() == 1 else out

    def _inv(self, a):
        """1/0 is infinite where the value is zero at both components of a pair; a lone zero residue is a coincidence and gives a
        fresh number."""
        res, flags = self._lift(a), a.flags & TAINT
        none = res == 0
        if a.sp is None and not none.any():
            return self._value(primes.inverse(res), flags=flags)
        fresh = primes.spread(mix(pack_p(res) ^ self._key("coincidental zero")), self._keys, MOD)
        out = primes.inverse(torch.where(none, fresh, res).clamp_(min=1))
        zero, stand_in = self._is_zero(none), floats(a)
        if a.sp is not None:
            infinite = (a.sp == POS_INF) | (a.sp == NEG_INF)
            out, stand_in, zero = out.masked_fill(infinite, 0), torch.where(infinite, 1.0, stand_in), zero & (a.sp == 0)
        return self._value(out, codes(torch.where(zero, math.inf, stand_in), is_garbage(a)), None, flags)

    @staticmethod
    def _is_zero(none: torch.Tensor) -> torch.Tensor:
        return (none[0] & none[1]) | (none[2] & none[3])

    def div(self, a, b):
        if a.num is not None and b.num is not None:
            return self._fold(a.num / b.num, lambda: self._mul(a, self._inv(b)))
        return self._mul(a, self.inv(b))

    def scale(self, a, c: Number):
        return self.mul(a, self.const(c))

    def sum(self, a, dims: Sequence[int] | None = None, keepdim: bool = False):
        n = len(a.shape)
        if not n:
            return a
        dims = tuple(d % n for d in dims) if dims else tuple(range(n))
        return self._added(a, lambda t, lead: t.sum([d + lead for d in dims], keepdim))

    def cumsum(self, a, dim: int):
        if not a.shape:
            return a
        dim %= len(a.shape)
        return self._added(a, lambda t, lead: t.cumsum(dim + lead))

    def _added(self, a: FieldValue, add: Callable[[torch.Tensor, int], torch.Tensor]) -> FieldValue:
        if a.num is not None:
            return self._fold(add(a.num, 0), lambda: self._added(self._lifted(a), add))
        res = add(a.res, 1)
        res = res.remainder_(MOD[res.dim() - 1])
        sp = sgn = None
        if a.sp is not None:
            sp = codes(add(floats(a), 0), add((a.sp == GARBAGE).to(I64), 0) > 0)
        if a.sgn is not None:
            sgn = sum_signs(a.sgn, lambda t: add(t, 0))
        return self._value(res, sp, sgn, a.flags & TAINT)

    def matmul(self, a, b):
        if a.num is not None and b.num is not None:
            return self._fold(a.num @ b.num, lambda: self._matmul(a, b))
        return self._matmul(a, b)

    def _matmul(self, a, b):
        x, y = self._pair(a, b)
        res, sp = primes.matmul(x, y), None
        if a.sp is not None or b.sp is not None:
            sp = self._matmul_specials(a, b)
        return self._value(res, sp, None, (a.flags | b.flags) & TAINT)

    @staticmethod
    def _matmul_specials(a: FieldValue, b: FieldValue) -> torch.Tensor | None:
        """A row or column that holds a special element makes its results nan, or garbage."""
        def marks(v: FieldValue, dim: int, code: int | None) -> torch.Tensor:
            if v.sp is None:
                return torch.zeros(v.shape, dtype=torch.bool).any(dim, keepdim=True)
            return ((v.sp != 0) if code is None else v.sp == code).any(dim, keepdim=True)
        special = marks(a, -1, None) | marks(b, -2, None)
        garbage = marks(a, -1, GARBAGE) | marks(b, -2, GARBAGE)
        return codes(torch.where(special, math.nan, 1.0).to(F64), garbage)

    # ---- functions
    def exp(self, a):
        if a.num is not None:
            return self._fold(a.num.exp(), lambda: self._exp(a))
        return self._exp(self._operand(a))

    def _exp(self, a):
        q = self._lift(a)[2:]
        p = primes.exp(q)
        d = q.dim() - 1
        if a.sgn is not None:
            negative = torch.stack([a.sgn & 1, a.sgn >> 1]).bool()
            p = torch.where(negative, MOD_P[d] - p, p)
        sp = None
        if a.sp is not None:
            stand_in = floats(a)
            p = p.masked_fill(stand_in == -math.inf, 0)
            sp = codes(torch.where(stand_in == -math.inf, 1.0, stand_in), is_garbage(a))
        return self._from_p(p, sp)

    def _from_p(self, p: torch.Tensor, sp: torch.Tensor | None) -> FieldValue:
        q = primes.spread(mix(pack_p(p) ^ self._key("q of p")), self._keys[2:], MOD_Q)
        return self._value(torch.cat([p, q]), sp, None, Q_BAD)

    def log(self, a):
        if a.num is not None:
            return self._fold(a.num.log(), lambda: self._log(a))
        return self._log(self._operand_p(a))

    def _log(self, a):
        p = self._lift(a)[:2]
        none = p == 0
        zero = none[0] & none[1]
        sp = None
        if a.sp is not None or zero.any():
            stand_in = torch.where(zero if a.sp is None else zero & (a.sp == 0), -math.inf, floats(a))
            if a.sp is not None:
                stand_in = torch.where(a.sp == NEG_INF, math.nan, stand_in)
            sp = codes(stand_in, is_garbage(a))
        if none.any():
            fresh = primes.spread(mix(pack_p(p) ^ self._key("coincidental zero")), self._keys[:2], MOD_P)
            p = torch.where(none, fresh, p).clamp_(min=1)
        q, odd = primes.log(p)
        sgn = (odd[0] | (odd[1] << 1)).to(torch.uint8)
        sgn = sgn if sgn.any() else None
        h = mix(pack_q(q, sgn) ^ self._key("p of q"))
        p = primes.spread(h, self._keys[:2], MOD_P)
        return self._value(torch.cat([p, q]), sp, sgn, P_BAD)

    def pow(self, a, q: Number):
        return self._fold(a.num.pow(float(q)), lambda: self._pow(a, q)) if a.num is not None else self._pow(a, q)

    def power(self, a, b):
        if a.num is not None and b.num is not None:
            return self._fold(a.num.pow(b.num), lambda: self._opaque("power", a, b))
        return self._power(a, b)

    def sin(self, a):
        return self._periodic("sin", torch.sin, a)

    def cos(self, a):
        return self._periodic("cos", torch.cos, a)

    def _periodic(self, tag: str, f: Callable, a):
        if a.num is None:
            return self._opaque(tag, a)
        num = f(a.num)
        return self._fold(torch.where(num.abs() < _TINY, 0.0, num), lambda: self._opaque(tag, a))

    def erf(self, a):
        return self._fold(a.num.erf(), lambda: self._opaque("erf", a)) if a.num is not None else self._opaque("erf", a)

    def opaque(self, tag: str, *args):
        if tag in FUNCTIONS and all(a.num is not None for a in args):
            return self._fold(FUNCTIONS[tag](*(a.num for a in args)), lambda: self._opaque(tag, *args))
        return self._opaque(tag, *args)

    def _opaque(self, tag: str, *args):
        h, stand_in, garbage = self._key(f"opaque|{tag}"), torch.ones((), dtype=F64), None
        for a in args:
            h = mix(self.fingerprint(a) ^ h)
            stand_in = stand_in + torch.where(floats(a).isnan(), math.nan, 0.0)
            garbage = any_of(garbage, is_garbage(a))
        stand_in = stand_in.expand(h.shape)
        return self._atoms(h, codes(stand_in, None if garbage is None else garbage.expand(h.shape)))

    # ---- movement
    def reshape(self, a, shape: Sequence[int]):
        shape = tuple(shape)
        return a if shape == a.shape else a.move(lambda t, lead: t.reshape((*t.shape[:lead], *shape)))

    def permute(self, a, dims: Sequence[int]):
        dims = [d % len(a.shape) for d in dims]
        return a.move(lambda t, lead: t.permute(*range(lead), *(d + lead for d in dims)))

    def expand(self, a, shape: Sequence[int]):
        missing = len(shape) - len(a.shape)
        shape = tuple(a.shape[i - missing] if s == -1 else s for i, s in enumerate(shape))
        if shape == a.shape:
            return a
        return a.move(lambda t, lead: t.reshape((*t.shape[:lead], *([1] * missing), *t.shape[lead:])).expand((*t.shape[:lead], *shape)))

    def take(self, sources: Sequence[FieldValue], index: torch.Tensor):
        if len(sources) == 1 and index.numel() and bool((index > 0).all()):
            return self._picked(sources[0], (index - 1).reshape(-1), tuple(index.shape))
        if all(s.num is not None for s in sources):
            num = torch.cat([torch.zeros(1, dtype=F64), *(s.num.reshape(-1) for s in sources)])
            return FieldValue(index.shape, num=num[index])
        res = torch.cat([torch.zeros(4, 1, dtype=I64), *(self._lift(s).reshape(4, -1) for s in sources)], 1)
        res = res.index_select(1, index.reshape(-1)).reshape(4, *index.shape)
        return FieldValue(index.shape, res, None, self._taken(sources, "sp", index), self._taken(sources, "sgn", index),
                          joined([s.flags for s in sources]))

    @staticmethod
    def _picked(a: FieldValue, flat: torch.Tensor, shape: tuple[int, ...]) -> FieldValue:
        out = a.move(lambda t, lead: t.reshape((*t.shape[:lead], -1)).index_select(lead, flat).reshape((*t.shape[:lead], *shape)))
        for what in ("sp", "sgn"):
            marks = getattr(out, what)
            if marks is not None and not marks.any():
                setattr(out, what, None)
        return out

    @staticmethod
    def _taken(sources: Sequence[FieldValue], what: str, index: torch.Tensor) -> torch.Tensor | None:
        if all(getattr(s, what) is None for s in sources):
            return None
        parts = [getattr(s, what) for s in sources]
        flat = [torch.zeros(math.prod(s.shape), dtype=torch.uint8) if p is None else p.reshape(-1) for s, p in zip(sources, parts)]
        out = torch.cat([torch.zeros(1, dtype=torch.uint8), *flat])[index]
        return out if out.any() else None

    def scatter_sum(self, base, index: torch.Tensor, src):
        src, flat = self.expand(src, index.shape), index.reshape(-1)
        if base.num is not None and src.num is not None:
            num = base.num.reshape(-1).index_add(0, flat, src.num.reshape(-1)).reshape(base.shape)
            return self._fold(num, lambda: self._scatter(base, flat, src))
        return self._scatter(base, flat, src)

    def _scatter(self, base, flat: torch.Tensor, src):
        def spread_into(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x.expand(base.shape).reshape(-1).index_add(0, flat, y.expand(src.shape).reshape(-1)).reshape(base.shape)
        x, y = self._lift(base), self._lift(src)
        res = x.reshape(4, -1).index_add(1, flat, y.reshape(4, -1)).reshape(x.shape).remainder_(MOD[x.dim() - 1])
        sp = sgn = None
        if base.sp is not None or src.sp is not None:
            garbage = [torch.zeros((), dtype=I64) if (g := is_garbage(v)) is None else g.to(I64) for v in (base, src)]
            sp = codes(spread_into(floats(base), floats(src)), spread_into(*garbage) > 0)
        if base.sgn is not None or src.sgn is not None:
            none = torch.zeros((), dtype=torch.uint8)
            parts = [none if v.sgn is None else v.sgn for v in (base, src)]
            wide = [p.to(I64) & 1 | (p.to(I64) >> 1) << 32 for p in parts]
            total = spread_into(*wide)
            sgn = ((total & 1) | ((total >> 32 & 1) << 1)).to(torch.uint8)
        return self._value(res, sp, sgn, (base.flags | src.flags) & TAINT)

    def cast(self, a, dtype: str):
        return a

    def stack(self, values: Sequence[FieldValue]):
        shape = (len(values), *values[0].shape)
        if all(v.num is not None for v in values):
            return FieldValue(shape, num=torch.stack([v.num for v in values]))
        res = torch.stack([self._lift(v) for v in values], 1)
        marks = {}
        for what in ("sp", "sgn"):
            parts = [getattr(v, what) for v in values]
            none = torch.zeros(values[0].shape, dtype=torch.uint8)
            marks[what] = None if all(p is None for p in parts) else torch.stack([none if p is None else p for p in parts])
        return FieldValue(shape, res, None, marks["sp"], marks["sgn"], joined([v.flags for v in values]))

    # ---- memory cells
    def symbols(self, name: str, first: int, n: int):
        return self._atoms(mix(torch.arange(first, first + n) ^ self._key("symbols")))

    def garbage(self, key: str, n: int):
        return FieldValue((n,), torch.zeros(4, n, dtype=I64), sp=torch.full((n,), GARBAGE, dtype=torch.uint8))

    def cell(self, flat: FieldValue) -> Cell:
        return Cell(self._settle(flat))

    def load(self, cell: Cell, offset: int, size: Sequence[int], stride: Sequence[int]) -> FieldValue:
        return cell.load(offset, size, stride)

    def store(self, cell: Cell, offset: int, size: Sequence[int], stride: Sequence[int], v: FieldValue) -> Cell:
        v = self._settle(v)
        whole = offset == 0 and is_dense(tuple(size), tuple(stride), cell.n)
        if v.num is not None and (cell.value.num is None and not whole):
            cell.store(offset, size, stride, self._lifted(v))
            cell.keep(offset, size, stride, v.num)
            return cell
        if v.num is None and cell.value.num is not None:
            cell.become(self._lifted(cell.value))
        cell.store(offset, size, stride, v)
        return cell

    # ---- guesses
    def print_of(self, v: FieldValue) -> FieldValue:
        """v as values are told apart by their residues modulo P."""
        return self._settle(v) if v.flags & P_BAD else v

    # ---- comparison of results
    def equal(self, a, b) -> torch.Tensor:
        """Either pair agrees (with the signs of logarithms); infinities and nan equal their own kind; garbage equals nothing."""
        x, y = self._pair(a, b)
        agree = x == y
        p, q = agree[0] & agree[1], agree[2] & agree[3]
        if a.sgn is not None or b.sgn is not None:
            q = q & ((a.sgn if a.sgn is not None else 0) == (b.sgn if b.sgn is not None else torch.zeros((), dtype=torch.uint8)))
        out = p | q
        if a.sp is not None or b.sp is not None:
            none = torch.zeros((), dtype=torch.uint8)
            s, t = (none if v.sp is None else v.sp for v in (a, b))
            out = torch.where((s | t) != 0, (s == t) & (s != GARBAGE), out)
        self.compared += out.numel()
        return out

    def to_float(self, a) -> torch.Tensor | None:
        return a.num
