"""An obligation at one point, in decimal intervals that are rounded outwards (not trusted: it confirms what rational arithmetic cannot tell).

Every true value lies in its interval, so sides whose intervals are disjoint do differ, however much cancels. An uninterpreted
function is given one linear meaning, which is as good as any: the claim is for all of them.
"""
from __future__ import annotations

import hashlib
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal, DivisionByZero, InvalidOperation, Overflow
from fractions import Fraction
from typing import NamedTuple

from trainverify.certify.exact import Inexact, Undefined
from trainverify.kernel.terms import NEGATIVE, POSITIVE, ZERO, Node, Obligation, pairs, reachable

DIGITS = (50, 300)
DEGREE = 64            # whole powers up to this are multiplied out
LIMIT = 10**6          # of decimal exponents


class Interval(NamedTuple):
    low: Decimal
    high: Decimal

    @property
    def signs(self) -> int:
        """The signs that are possible."""
        zero = ZERO if self.low <= 0 <= self.high else 0
        return (NEGATIVE if self.low < 0 else 0) | zero | (POSITIVE if self.high > 0 else 0)


def surely_fails(obligation: Obligation, leaves: tuple[Fraction, ...]) -> bool:
    """Whether the claim is seen to fail at this point."""
    return any(_fails(obligation, leaves, Arithmetic(digits)) for digits in DIGITS)


def _fails(obligation: Obligation, leaves: tuple[Fraction, ...], arithmetic: Arithmetic) -> bool:
    values: dict[int, Interval] = {}

    def fill(order: list[int]) -> None:
        for i in order:
            if i not in values:
                values[i] = arithmetic.value(obligation.nodes[i], values, leaves)

    try:
        fill(reachable(obligation.nodes, [obligation.lhs, *(i for i, _ in obligation.given)]))
        if any(values[i].signs & ~sign for i, sign in obligation.given):
            return False
        try:
            fill(reachable(obligation.nodes, [obligation.rhs]))
        except Undefined:
            return True
    except (Inexact, Undefined, ArithmeticError):
        return False
    lhs, rhs = values[obligation.lhs], values[obligation.rhs]
    return lhs.high < rhs.low or rhs.high < lhs.low


class Arithmetic:
    """Interval arithmetic with so many digits. Inexact is raised where a condition is neither sure to hold nor sure to fail."""

    def __init__(self, digits: int):
        traps = [InvalidOperation, DivisionByZero, Overflow]
        self.down = Context(prec=digits, rounding=ROUND_FLOOR, Emax=LIMIT, Emin=-LIMIT, traps=traps)
        self.up = Context(prec=digits, rounding=ROUND_CEILING, Emax=LIMIT, Emin=-LIMIT, traps=traps)

    def number(self, q: Fraction) -> Interval:
        top, bottom = Decimal(q.numerator), Decimal(q.denominator)
        return Interval(self.down.divide(top, bottom), self.up.divide(top, bottom))

    def add(self, a: Interval, b: Interval) -> Interval:
        return Interval(self.down.add(a.low, b.low), self.up.add(a.high, b.high))

    def mul(self, a: Interval, b: Interval) -> Interval:
        corners = [(x, y) for x in a for y in b]
        return Interval(min(self.down.multiply(x, y) for x, y in corners), max(self.up.multiply(x, y) for x, y in corners))

    def total(self, terms: list[Interval]) -> Interval:
        result = terms[0]
        for x in terms[1:]:
            result = self.add(result, x)
        return result

    def inverse(self, a: Interval) -> Interval:
        if a.signs & ZERO:
            raise Undefined if a.signs == ZERO else Inexact
        return Interval(self.down.divide(Decimal(1), a.high), self.up.divide(Decimal(1), a.low))

    def rising(self, name: str, a: Interval, least: Decimal | None = None) -> Interval:
        """exp, ln or sqrt: decimal rounds them correctly, so the next number on either side is a bound."""
        low, high = getattr(self.down, name)(a.low), getattr(self.up, name)(a.high)
        low = self.down.next_minus(low)
        return Interval(low if least is None else max(least, low), self.up.next_plus(high))

    def exp(self, a: Interval) -> Interval:
        return self.rising("exp", a, Decimal(0))

    def log(self, a: Interval) -> Interval:
        if a.signs != POSITIVE:
            raise Inexact if a.signs & POSITIVE else Undefined
        return self.rising("ln", a)

    def sqrt(self, a: Interval) -> Interval:
        if a.signs & NEGATIVE:
            raise Undefined if a.signs == NEGATIVE else Inexact
        return self.rising("sqrt", a, Decimal(0))

    def power(self, a: Interval, q: Fraction) -> Interval:
        if q.denominator > 1:
            if a.signs == ZERO and q > 0:
                return a
            if a.signs != POSITIVE:
                raise Undefined if a.signs == NEGATIVE or (a.signs == ZERO and q < 0) else Inexact
            return self.exp(self.mul(self.log(a), self.number(q)))
        if abs(q) > DEGREE:
            raise Inexact
        result = self.number(Fraction(1))
        for _ in range(abs(int(q))):
            result = self.mul(result, a)
        return self.inverse(result) if q < 0 else result

    def compare(self, op: str, a: Interval, b: Interval, same: bool) -> Interval:
        if same or (a.low == a.high == b.low == b.high):
            holds = op in ("ge", "le", "eq")
        elif a.low > b.high:
            holds = op in ("gt", "ge", "ne")
        elif a.high < b.low:
            holds = op in ("lt", "le", "ne")
        else:
            raise Inexact
        return self.number(Fraction(holds))

    def function(self, tag: str, args: list[Interval]) -> Interval:
        """A linear function with coefficients from the tag."""
        bits = iter(hashlib.blake2b(repr((tag, len(args))).encode()).digest() * (1 + len(args)))
        return self.total([self.number(Fraction(next(bits), 64)), *(self.mul(self.number(Fraction(next(bits) + 1, 128)), a) for a in args)])

    def value(self, node: Node, values: dict[int, Interval], leaves: tuple[Fraction, ...]) -> Interval:
        args = [values[a] for a in node.args]
        match node.kind:
            case "const":
                return self.number(node.attr)
            case "leaf":
                return self.number(leaves[node.attr])
            case "add":
                return self.total(args)
            case "dot":
                return self.total([self.mul(a, b) for a, b in pairs(tuple(args))])
            case "mul":
                result = args[0]
                for x in args[1:]:
                    result = self.mul(result, x)
                return result
            case "neg":
                return Interval(args[0].high.copy_negate(), args[0].low.copy_negate())
            case "scl":
                return self.mul(self.number(node.attr), args[0])
            case "max":
                return Interval(max(a.low for a in args), max(a.high for a in args))
            case "compare":
                return self.compare(node.attr, *args, same=node.args[0] == node.args[1])
            case "uf":
                return self.function(node.attr, args)
            case "inv":
                return self.inverse(args[0])
            case "exp":
                return self.exp(args[0])
            case "log":
                return self.log(args[0])
            case "sqrt":
                return self.sqrt(args[0])
            case "pow":
                return self.power(args[0], node.attr)
        return Interval(Decimal(-1), Decimal(1))          # sin and cos
