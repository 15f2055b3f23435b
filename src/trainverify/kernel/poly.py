"""Sparse Laurent polynomials with rational coefficients over interned atoms (trusted).

An atom stands for one real number: a leaf, or an operation applied to polynomials, which must have been interned before it. Two
atoms of a kind whose arguments are provably equal are one atom. What is known about an atom is a rewriting rule (a square root's
square is its argument) or is used when a difference is tested for zero (a denominator is multiplied out). All equations hold
wherever every term that was normalised is defined. Work is counted in steps, one per product of two monomials.
"""
from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from fractions import Fraction

Coefficient = int | Fraction
Monomial = tuple[tuple[int, int], ...]       # (atom, exponent), atoms ascending, no exponent is zero
Poly = dict[Monomial, Coefficient]           # no coefficient is zero; never changed once it is handed out

ONE: Poly = {(): 1}
# Exponents of exp atoms count 1/UNIT, so that they are integers for all usual fractions.
UNIT = 2**12 * 3**4 * 5**3 * 7 * 11 * 13
PRIME = 2**61 - 1
INDICATORS = ("positive", "zero")


class OutOfSteps(Exception):
    """The budget is used up."""


class Steps:
    """What is left of a budget."""

    def __init__(self, budget: int):
        self.budget = self.left = budget

    def take(self, n: int) -> None:
        self.left -= n
        if self.left < 0:
            raise OutOfSteps


def whole(c: Coefficient) -> Coefficient:
    """An integer as int: integers are much faster than fractions."""
    return c.numerator if isinstance(c, Fraction) and c.denominator == 1 else c


def constant(c: Coefficient) -> Poly:
    return {(): whole(c)} if c else {}


def accumulate(into: Poly, p: Poly, c: Coefficient = 1) -> None:
    """into += c * p, for c != 0."""
    for m, x in p.items():
        v = into.get(m, 0) + c * x
        if v:
            into[m] = whole(v)
        else:
            del into[m]


def scaled(p: Poly, c: Coefficient) -> Poly:
    if c == 1:
        return p
    return {m: whole(c * x) for m, x in p.items()} if c else {}


def minus(p: Poly, q: Poly) -> Poly:
    d = dict(p)
    accumulate(d, q, -1)
    return d


def key(p: Poly) -> frozenset:
    return frozenset(p.items())


def as_constant(p: Poly) -> Coefficient | None:
    """The value of a polynomial without atoms, else None."""
    if not p:
        return 0
    return p.get(()) if len(p) == 1 else None


def merge(m: Monomial, n: Monomial) -> Monomial:
    """The product of two monomials."""
    if not m or not n:
        return m or n
    out, i, j = [], 0, 0
    while i < len(m) and j < len(n):
        a, b = m[i], n[j]
        if a[0] < b[0]:
            out.append(a)
            i += 1
        elif b[0] < a[0]:
            out.append(b)
            j += 1
        else:
            if e := a[1] + b[1]:
                out.append((a[0], e))
            i, j = i + 1, j + 1
    return (*out, *m[i:], *n[j:])


def factor(c: Fraction) -> dict[int, int]:
    """A positive rational as a product of powers: of primes, and of what is left when small primes are divided out."""
    powers: dict[int, int] = {}
    for n, sign in ((c.numerator, 1), (c.denominator, -1)):
        p = 2
        while p * p <= n and p < 2000:
            while n % p == 0:
                powers[p] = powers.get(p, 0) + sign
                n //= p
            p += 1
        root = math.isqrt(n)
        n, e = (root, 2) if n > 1 and root * root == n else (n, 1)
        if n > 1:
            powers[n] = powers.get(n, 0) + sign * e
    return {p: e for p, e in powers.items() if e}


def mix(*values: int) -> int:
    """A well-spread number below 2^64 that depends on nothing but its arguments."""
    h = 0x9E3779B97F4A7C15
    for v in values:
        h = (h ^ (v & (1 << 64) - 1)) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
        h = (h ^ h >> 29) * 0x94D049BB133111EB & (1 << 64) - 1
        h ^= h >> 32
    return h


class Ring:
    """The atoms of one proof, and arithmetic modulo what is known of them."""

    def __init__(self, steps: Steps):
        self.steps = steps
        self.kinds: list[str] = []
        self.params: list[Hashable] = []                 # leaf number, exponent of exp, order of a root, tag ...
        self.args: list[tuple[Poly, ...]] = []
        self._limit: dict[int, int] = {}                 # atoms with a rewriting rule: from this exponent on
        self._index: dict[tuple, int] = {}
        self._buckets: dict[tuple, list[int]] = {}
        self._values: list[tuple[int, int, int]] = []

    # ---- atoms
    def intern(self, kind: str, param: Hashable = None, args: tuple[Poly, ...] = ()) -> int:
        """The atom of this kind and parameter whose arguments are equal to the given ones."""
        name = (kind, param, *map(key, args))
        atom = self._index.get(name)
        if atom is None:
            bucket = self._buckets.setdefault((kind, param, *map(self.fingerprint, args)) if args else name, [])
            same = (old for old in bucket if all(self.equal(p, q) for p, q in zip(args, self.args[old], strict=True)))
            atom = next(same, None)
            if atom is None:
                atom = self._new(kind, param, args)
                bucket.append(atom)
            self._index[name] = atom
        return atom

    def _new(self, kind: str, param: Hashable, args: tuple[Poly, ...]) -> int:
        atom = len(self.kinds)
        self.kinds.append(kind)
        self.params.append(param)
        self.args.append(args)
        self._values.append(self._value(atom))
        if kind == "root":
            self._limit[atom] = param
        elif kind == "cos" or kind in INDICATORS:
            self._limit[atom] = 2
        return atom

    def power(self, atom: int, e: int = 1) -> Poly:
        """atom^e, below the exponent from which a rule rewrites it."""
        return {((atom, e),): 1} if e else ONE

    def monomial(self, m: Monomial, c: Coefficient) -> Poly:
        """c * m, rewritten."""
        out: Poly = {}
        self._rewrite(out, m, c)
        return out

    # ---- a linear map to a prime field: equal polynomials have equal values (but for relations between atoms), and only those are compared
    def fingerprint(self, p: Poly) -> int:
        total = 0
        for m, c in p.items():
            term = c % PRIME if isinstance(c, int) else c.numerator * pow(c.denominator, -1, PRIME)
            for a, e in m:
                value, radicand, order = self._values[a]
                if order:
                    e, turns = e % order, e // order
                    term = term * pow(radicand, turns, PRIME) % PRIME
                term = term * pow(value, e, PRIME) % PRIME
            total += term
        return total % PRIME

    def _value(self, atom: int) -> tuple[int, int, int]:
        """A value, and for a root its radicand's value and its order."""
        kind = self.kinds[atom]
        free = mix(atom) % (PRIME - 1) + 1
        below = self.fingerprint(self.args[atom][0]) if kind in ("inv", "root") else 0
        if not below:
            return free, 1, 0
        if kind == "inv":
            return pow(below, -1, PRIME), 1, 0
        root = pow(below, (PRIME + 1) // 4, PRIME)
        return (root, 1, 0) if self.params[atom] == 2 and root * root % PRIME == below else (free, below, self.params[atom])

    # ---- arithmetic
    def mul(self, p: Poly, q: Poly) -> Poly:
        if p == ONE or q == ONE:
            return q if p == ONE else p
        out: Poly = {}
        self.addmul(out, p, q)
        return out

    def addmul(self, into: Poly, p: Poly, q: Poly) -> None:
        """into += p * q, rewritten."""
        self.steps.take(len(p) * len(q) + 1)
        limit = self._limit
        for m, c in p.items():
            for n, d in q.items():
                k = merge(m, n)
                if limit and any(a in limit and e >= limit[a] for a, e in k):
                    self._rewrite(into, k, c * d)
                    continue
                v = into.get(k, 0) + c * d
                if v:
                    into[k] = whole(v)
                else:
                    del into[k]

    def _rewrite(self, into: Poly, m: Monomial, c: Coefficient) -> None:
        """into += c * m, where m holds powers that a rule rewrites: root(p)^s = p, cos^2 = 1 - sin^2, an indicator's square is itself."""
        base: list[tuple[int, int]] = []
        rest: Poly = constant(c)
        for a, e in m:
            limit = self._limit.get(a)
            if limit is None or e < limit:
                base.append((a, e))
            elif self.kinds[a] in INDICATORS:
                base.append((a, 1))
            else:
                if e % limit:
                    base.append((a, e % limit))
                rest = self.mul(rest, self.pow(self._limit_power(a), e // limit))
        self.addmul(into, {tuple(base): 1}, rest)

    def _limit_power(self, atom: int) -> Poly:
        if self.kinds[atom] == "root":
            return self.args[atom][0]
        sin = self.intern("sin", None, self.args[atom])
        return {(): 1, ((sin, 2),): -1}

    def pow(self, p: Poly, n: int) -> Poly:
        self.steps.take(n)
        out = ONE
        while n:
            if n & 1:
                out = self.mul(out, p)
            n >>= 1
            p = self.mul(p, p) if n else p
        return out

    def product(self, factors: Iterable[Poly]) -> Poly:
        out = ONE
        for f in factors:
            out = self.mul(out, f)
        return out

    def content(self, p: Poly) -> tuple[Coefficient, Monomial, Poly]:
        """p = c * m * q, where q has 1 as its first coefficient and no factor common to its terms; q is empty if p is zero."""
        self.steps.take(len(p))
        low: dict[int, int] = {}
        count: dict[int, int] = {}
        for m in p:
            for a, e in m:
                low[a] = min(e, low.get(a, e))
                count[a] = count.get(a, 0) + 1
        common = ((a, e if count[a] == len(p) else min(e, 0)) for a, e in sorted(low.items()))
        m = tuple((a, e) for a, e in common if e)
        q = self.mul(p, {tuple((a, -e) for a, e in m): 1}) if m else p     # may rewrite, and so find that p is zero
        if not q:
            return 0, (), q
        c = q[min(q)]
        return c, m, scaled(q, 1 / Fraction(c))

    # ---- equality
    def equal(self, p: Poly, q: Poly) -> bool:
        """Whether p and q were shown to be equal; False says nothing."""
        return p == q or self.vanishes(minus(p, q))

    def vanishes(self, d: Poly) -> bool:
        """Whether d was shown to be zero: it is multiplied by its denominators, newest atom first, and these are nonzero where d is defined."""
        while d:
            clear = [(a, e) for m in d for a, e in m if self._must_clear(a, e)]
            if not clear:
                return False
            atom = max(a for a, _ in clear)
            exponents = [e for a, e in clear if a == atom]
            if self.kinds[atom] == "inv":
                d = self._times_denominator(d, atom, max(exponents))
            else:
                d = self.mul(d, self.power(atom, -min(exponents)))
        return True

    def _must_clear(self, atom: int, e: int) -> bool:
        kind = self.kinds[atom]
        return kind == "inv" or e < 0 and kind in ("root", "cos")

    def _times_denominator(self, d: Poly, atom: int, degree: int) -> Poly:
        """d * q^degree, where the atom is 1/q."""
        parts: list[Poly] = [{} for _ in range(degree + 1)]
        for m, c in d.items():
            parts[next((e for a, e in m if a == atom), 0)][tuple(f for f in m if f[0] != atom)] = c
        out = parts[0]
        for part in parts[1:]:
            out = dict(self.mul(out, self.args[atom][0]))
            accumulate(out, part)
        return out
