"""Search for real values at which an obligation fails (untrusted: it can only say no, or add a doubt).

Points are rationals from a fixed sequence. Float evaluation sorts out what differs visibly; a difference counts only if decimal
evaluation at two precisions confirms it, so cancellation and near-ties of comparisons do not refute. Uninterpreted
functions are given one smooth meaning, the same for both sides.
"""
from __future__ import annotations

import decimal
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

from trainverify.kernel.terms import ANY, NEGATIVE, POSITIVE, ZERO, Node, Obligation, pairs, reachable

ERRORS = (ArithmeticError, ValueError)        # overflow, division by zero, domain errors of math and decimal
# (least, greatest magnitude in 1/32, share of negative values); None: small integers, where zeros and ties are
REGIONS = ((16, 64, 0.0), (4, 64, 1.0), None, (4, 64, 0.5), (4, 64, 0.5), (1, 8, 0.0), (1, 8, 0.5), None, (32, 200, 0.2), (16, 64, 0.3), (1, 64, 0.7))
NEAR = Decimal("1e-20")
FOLDED = frozenset({"sqrt", "max", "compare"})


class Undefined(Exception):
    """A term has no value; `clear` if that is not a matter of rounding."""

    def __init__(self, clear: bool):
        super().__init__(clear)
        self.clear = clear


@dataclass(frozen=True, slots=True)
class Point:
    """Leaf values with the values of both sides there; rhs is None if it is undefined."""

    values: tuple[Fraction, ...]
    lhs: float
    rhs: float | None


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Numbers of one precision. near: a smaller difference (relative to 1 + size) counts as none."""

    number: Callable[[Fraction], Any]
    exp: Callable[[Any], Any]
    log: Callable[[Any], Any]
    sqrt: Callable[[Any], Any]
    cossin: Callable[[Any], tuple[Any, Any]]
    near: Any


def _decimal(q: Fraction) -> Decimal:
    return Decimal(q.numerator) / q.denominator


def _cossin(x: Decimal) -> tuple[Decimal, Decimal]:
    """Cosine and sine, by Taylor series of a part of the angle and doubling."""
    if x.adjusted() > 50:
        raise Undefined(False)
    with decimal.localcontext() as context:
        context.prec += 20 + max(0, x.adjusted())
        halvings = max(0, int(abs(x)).bit_length() + 4)
        y = x / 2**halvings
        cos, sin, term, k = Decimal(1), Decimal(0), Decimal(1), 0
        while abs(term) > Decimal(10) ** -context.prec:
            k += 1
            term = term * y / k
            if k % 2:
                sin += term if k % 4 == 1 else -term
            else:
                cos += term if k % 4 == 0 else -term
        for _ in range(halvings):
            cos, sin = 2 * cos * cos - 1, 2 * sin * cos
        return cos, sin


FLOAT = Arithmetic(lambda q: q.numerator / q.denominator, math.exp, math.log, math.sqrt, lambda x: (math.cos(x), math.sin(x)), 1e-9)
DECIMAL = Arithmetic(_decimal, Decimal.exp, Decimal.ln, Decimal.sqrt, _cossin, Decimal("1e-25"))


def evaluate(nodes: tuple[Node, ...], order: list[int], leaves: tuple[Fraction, ...], arithmetic: Arithmetic) -> dict[int, Any]:
    """The values of the nodes in order, or Undefined."""
    values: dict[int, Any] = {}
    for i in order:
        node = nodes[i]
        values[i] = _apply(node, [values[a] for a in node.args], leaves, arithmetic)
    return values


def _apply(node: Node, args: list[Any], leaves: tuple[Fraction, ...], arithmetic: Arithmetic) -> Any:
    match node.kind:
        case "const":
            return arithmetic.number(node.attr)
        case "leaf":
            return arithmetic.number(leaves[node.attr])
        case "add":
            return sum(args)
        case "dot":
            return sum(a * b for a, b in pairs(tuple(args)))
        case "mul":
            return math.prod(args)
        case "neg":
            return -args[0]
        case "scl":
            return arithmetic.number(node.attr) * args[0]
        case "max":
            return max(args)
        case "exp":
            return arithmetic.exp(args[0])
        case "sin":
            return arithmetic.cossin(args[0])[1]
        case "cos":
            return arithmetic.cossin(args[0])[0]
        case "compare":
            return arithmetic.number(Fraction(_compare(node.attr, args[0], args[1], arithmetic.near)))
        case "uf":
            return _uninterpreted(node.attr, args, arithmetic)
    return _partial(node, args[0], arithmetic)


def _partial(node: Node, x: Any, arithmetic: Arithmetic) -> Any:
    """inv, log, sqrt and pow."""
    near = abs(x) <= arithmetic.near
    match node.kind:
        case "inv":
            if x == 0 or near:
                raise Undefined(False)
            return 1 / x
        case "log":
            if x <= 0 or near:
                raise Undefined(not near)
            return arithmetic.log(x)
        case "sqrt":
            if x < 0:
                raise Undefined(not near)
            return arithmetic.sqrt(x)
        case "pow":
            q = node.attr
            if q.denominator == 1:
                if q < 0 and (x == 0 or near):
                    raise Undefined(False)
                return x ** int(q) if q else arithmetic.number(Fraction(1))
            if x < 0 or near:
                raise Undefined(not near)
            return arithmetic.exp(arithmetic.log(x) * arithmetic.number(q))
    raise ValueError(f"no numeric meaning for {node.kind}")


def _compare(op: str, a: Any, b: Any, near: Any) -> bool:
    """Values that agree up to rounding count as equal."""
    if abs(a - b) <= near * (1 + abs(a) + abs(b)):
        return op in ("ge", "le", "eq")
    return {"gt": a > b, "ge": a > b, "lt": a < b, "le": a < b, "eq": False, "ne": True}[op]


def _uninterpreted(tag: str, args: list[Any], arithmetic: Arithmetic) -> Any:
    """A smooth function that no identity is likely to hold for."""
    weights = random.Random(tag)
    t = arithmetic.number(Fraction(weights.randrange(64, 192), 128))
    for x in args:
        t += x * arithmetic.number(Fraction(weights.randrange(64, 192), 128))
    return (1 + t / 2) / (1 + t * t)


def points(obligation: Obligation, count: int) -> Iterator[tuple[Fraction, ...]]:
    """Leaf values that have the signs that are given for leaves."""
    signs = {obligation.nodes[i].attr: s for i, s in obligation.given if obligation.nodes[i].kind == "leaf"}
    rng = random.Random(20240229)
    for k in range(count):
        region = REGIONS[k % len(REGIONS)]
        yield tuple(_draw(rng, region, signs.get(leaf, ANY)) for leaf in range(obligation.leaves))


def _draw(rng: random.Random, region: tuple[int, int, float] | None, sign: int) -> Fraction:
    if region is None:
        return Fraction(rng.choice([x for x, s in ((-2, NEGATIVE), (-1, NEGATIVE), (0, ZERO), (1, POSITIVE), (2, POSITIVE)) if s & sign]))
    low, high, negative = region
    minus = rng.random() < negative
    x = Fraction(rng.randrange(low * 32, high * 32), 1024)
    if not sign & (NEGATIVE if minus else POSITIVE):
        minus = bool(sign & NEGATIVE)
    return Fraction(0) if sign == ZERO else -x if minus else x


class Filter:
    """Evaluates one obligation at sample points."""

    def __init__(self, obligation: Obligation):
        self.obligation = obligation
        given = [i for i, _ in obligation.given]
        self.first = reachable(obligation.nodes, [obligation.lhs, *given])
        done = set(self.first)
        self.then = [i for i in reachable(obligation.nodes, [obligation.rhs]) if i not in done]

    def sides(self, leaves: tuple[Fraction, ...], arithmetic: Arithmetic) -> tuple[Any, Any] | None:
        """Both sides' values (None for a right side that is clearly undefined), or None where the claim says nothing or rounding hides it."""
        nodes = self.obligation.nodes
        try:
            values = evaluate(nodes, self.first, leaves, arithmetic)
            for i, sign in self.obligation.given:
                if not sign & (POSITIVE if values[i] > 0 else NEGATIVE if values[i] < 0 else ZERO):
                    return None
            try:
                for i in self.then:
                    values[i] = _apply(nodes[i], [values[a] for a in nodes[i].args], leaves, arithmetic)
            except Undefined as e:
                return (values[self.obligation.lhs], None) if e.clear else None
        except (Undefined, *ERRORS):
            return None
        return values[self.obligation.lhs], values[self.obligation.rhs]

    def at(self, leaves: tuple[Fraction, ...], precise: bool = False) -> Point | bool:
        """The point if it refutes, True if both sides agree there, False if it says nothing."""
        if not precise:
            sides = self.sides(leaves, FLOAT)
            if sides is None:
                return False
            if sides[1] is not None and all(map(math.isfinite, sides)):
                a, b = sides
                if abs(a - b) <= 1e-7 * (abs(a) + abs(b)) + 1e-9:
                    return True
        return self._precisely(leaves)

    def _precisely(self, leaves: tuple[Fraction, ...]) -> Point | bool:
        results = []
        for precision in (40, 70):
            context = decimal.Context(prec=precision, Emax=10**6, Emin=-10**6,
                                      traps=[decimal.InvalidOperation, decimal.DivisionByZero, decimal.Overflow])
            with decimal.localcontext(context):
                sides = self.sides(leaves, DECIMAL)
            if sides is None:
                return False
            results.append(sides)
        (a, b), (a2, b2) = results
        if (b is None) != (b2 is None):
            return False
        if b is None:
            return Point(leaves, float(a2), None)
        noise = abs(a - a2) + abs(b - b2)
        if abs(a2 - b2) > NEAR * (abs(a2) + abs(b2)) and abs(a2 - b2) > 1000 * noise:
            return Point(leaves, float(a2), float(b2))
        return abs(a2 - b2) <= NEAR * (1 + abs(a2) + abs(b2))


def refuting_point(obligation: Obligation, agreements: int = 3, tries: int = 33) -> Point | int:
    """A point that refutes, else the number of points at which both sides are defined and agree: at most `agreements`, and as many as there are
    where a sign can decide (sqrt(x x) is x at half of all points)."""
    filter_ = Filter(obligation)
    if any(n.kind in FOLDED for n in obligation.nodes):
        agreements = tries
    agreed = 0
    for precise in (False, True):             # floats first; if they overflow everywhere, decimals
        for leaves in points(obligation, tries):
            found = filter_.at(leaves, precise)
            if isinstance(found, Point):
                return found
            agreed += found
            if agreed == agreements:
                break
        if agreed:
            break
    return agreed


def late_refuting_point(obligation: Obligation, tries: int = 33, precise: int = 6) -> Point | None:
    """A longer search, for what normal forms did not prove; at the first points it finds differences that floats do not show."""
    filter_ = Filter(obligation)
    for k, leaves in enumerate(points(obligation, tries)):
        found = filter_.at(leaves, precise=k < precise)
        if isinstance(found, Point):
            return found
    return None
