"""What is known of the signs of atoms and polynomials (trusted).

A sign is a set of cases (bits NEGATIVE, ZERO, POSITIVE). Facts come from operations whose results have a sign by nature, from
conditions of definedness, and from the obligation's hypotheses; they are kept per atom and per primitive polynomial (without
content). Everything is conservative: a sign that is not known is ANY.
"""
from __future__ import annotations

from trainverify.kernel.poly import INDICATORS, ONE, Coefficient, Monomial, Poly, Ring, key
from trainverify.kernel.terms import ANY, NEGATIVE, NONNEGATIVE, NONZERO, POSITIVE, ZERO


class Contradiction(Exception):
    """The assumptions exclude each other: they hold nowhere."""


def flip(sign: int) -> int:
    """The sign of -a."""
    return (sign & NEGATIVE) << 2 | sign & ZERO | (sign & POSITIVE) >> 2


def times(a: int, b: int) -> int:
    """The sign of a product."""
    out = ZERO if (a | b) & ZERO else 0
    if b & POSITIVE:
        out |= a & NONZERO
    if b & NEGATIVE:
        out |= flip(a) & NONZERO
    return out


def plus(a: int, b: int) -> int:
    """The sign of a sum."""
    if a == ZERO or b == ZERO:
        return b if a == ZERO else a
    if (a | b) & NONZERO == NONZERO:
        return ANY
    return a | b if a & b & ZERO else (a | b) & NONZERO


def raised(sign: int, e: int) -> int:
    """The sign of a^e for an integer e; a negative power is defined, so its base is not zero."""
    if e == 0:
        return POSITIVE
    if e < 0:
        sign &= NONZERO
    return sign if e % 2 else (sign & ZERO) | (POSITIVE if sign & NONZERO else 0)


def of_number(c: Coefficient) -> int:
    return POSITIVE if c > 0 else NEGATIVE if c < 0 else ZERO


class Signs:
    """The facts of one proof. `changed` is set when a fact arrives after a rule asked for it and did not get it."""

    def __init__(self, ring: Ring):
        self.ring = ring
        self.changed = False
        self._atoms: dict[int, int] = {}
        self._polys: dict[frozenset, int] = {}
        self._asked: set = set()

    # ---- asking
    def of(self, p: Poly) -> int:
        c, m, q = self.ring.content(p) if p else (0, (), p)
        if not q:
            return ZERO
        sign = times(of_number(c), self._of_monomial(m))
        return sign if q == ONE else times(sign, self._of_primitive(q))

    def known(self, p: Poly) -> int:
        """As `of`, for a rule whose result depends on the answer."""
        if p:
            _, m, q = self.ring.content(p)
            self._asked.update([key(q), *(a for a, _ in m)])
        return self.of(p)

    def of_atom(self, atom: int) -> int:
        """For a rule whose result depends on the answer."""
        self._asked.add(atom)
        return self._of_atom(atom)

    def _of_atom(self, atom: int) -> int:
        kind, sign = self.ring.kinds[atom], self._atoms.get(atom, ANY)
        if kind == "exp":
            return sign & POSITIVE
        return sign & NONNEGATIVE if kind == "root" or kind in INDICATORS else sign

    def _of_monomial(self, m: Monomial) -> int:
        sign = POSITIVE
        for a, e in m:
            sign = times(sign, raised(self._of_atom(a), e))
        return sign

    def _of_primitive(self, q: Poly) -> int:
        total = ZERO
        for m, c in q.items():
            total = plus(total, times(of_number(c), self._of_monomial(m)))
            if total == ANY:
                break
        return total & self._polys.get(key(q), ANY)

    # ---- telling
    def assume(self, p: Poly, sign: int) -> None:
        """Take it as a fact that p has this sign, and what follows for its factors."""
        now = self.of(p)
        if not now & sign:
            raise Contradiction
        if now & sign == now:
            return
        sign &= now
        c, m, q = self.ring.content(p)
        factors = [(a, e, raised(self._of_atom(a), e)) for a, e in m]
        if q != ONE:
            factors.append((q, 1, self._of_primitive(q)))
        for i, (factor, e, own) in enumerate(factors):
            rest = of_number(c)
            for j, (_, _, other) in enumerate(factors):
                rest = times(rest, other & NONZERO if not sign & ZERO else other) if j != i else rest
            allowed = ANY if sign & ZERO else NONZERO
            if e % 2 and rest in (POSITIVE, NEGATIVE):
                allowed &= sign if rest == POSITIVE else flip(sign)
            self.learn(factor, allowed)

    def learn(self, factor: int | Poly, sign: int) -> None:
        """A fact about an atom or a primitive polynomial."""
        is_atom = isinstance(factor, int)
        table, name = (self._atoms, factor) if is_atom else (self._polys, key(factor))
        now = self._of_atom(factor) if is_atom else self._of_primitive(factor)
        if not now & sign:
            raise Contradiction
        if now & sign == now:
            return
        table[name] = table.get(name, ANY) & sign
        self.changed |= name in self._asked
        if is_atom and self.ring.kinds[factor] == "inv":
            self.assume(self.ring.args[factor][0], sign & NONZERO)
        elif is_atom and self.ring.kinds[factor] == "root" and not sign & ZERO:
            self.assume(self.ring.args[factor][0], POSITIVE)
