"""An obligation at one point, in exact rational arithmetic (not trusted: it confirms or drops what a solver calls a counterexample)."""
from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

from trainverify.kernel.terms import NEGATIVE, POSITIVE, ZERO, Node, Obligation, pairs, reachable

Function = Callable[[int, tuple[Fraction, ...]], Fraction]        # the value of a node that applies an uninterpreted function, of the arguments' values
ORDERS = {"gt": Fraction.__gt__, "ge": Fraction.__ge__, "lt": Fraction.__lt__, "le": Fraction.__le__, "eq": Fraction.__eq__, "ne": Fraction.__ne__}
BITS = 100_000         # larger numbers are not worth their time


class Inexact(Exception):
    """A value is not rational, or not shown to be."""


class Undefined(Exception):
    """A term has no value."""


def claim_holds(obligation: Obligation, leaves: tuple[Fraction, ...], function: Function) -> bool:
    """Whether the claim holds at this point (it does where it says nothing). Raises Inexact where rational arithmetic cannot tell."""
    values: dict[int, Fraction] = {}

    def fill(order: list[int]) -> None:
        for i in order:
            if i not in values:
                node = obligation.nodes[i]
                args = [values[a] for a in node.args]
                values[i] = function(i, tuple(args)) if node.kind == "uf" else _value(node, args, leaves)

    try:
        fill(reachable(obligation.nodes, [obligation.lhs, *(i for i, _ in obligation.given)]))
    except Undefined:
        return True
    if not all(sign & (POSITIVE if values[i] > 0 else NEGATIVE if values[i] < 0 else ZERO) for i, sign in obligation.given):
        return True
    try:
        fill(reachable(obligation.nodes, [obligation.rhs]))
    except Undefined:
        return False
    return values[obligation.lhs] == values[obligation.rhs]


def _value(node: Node, args: list[Fraction], leaves: tuple[Fraction, ...]) -> Fraction:
    match node.kind:
        case "const":
            value = node.attr
        case "leaf":
            value = leaves[node.attr]
        case "add":
            value = sum(args)
        case "mul":
            value = math.prod(args)
        case "dot":
            value = sum(a * b for a, b in pairs(tuple(args)))
        case "neg":
            value = -args[0]
        case "scl":
            value = node.attr * args[0]
        case "max":
            value = max(args)
        case "compare":
            value = Fraction(ORDERS[node.attr](*args))
        case "inv":
            value = power(args[0], Fraction(-1))
        case "sqrt":
            value = power(args[0], Fraction(1, 2))
        case "pow":
            value = power(args[0], node.attr)
        case _:
            value = _transcendental(node.kind, args[0])
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > BITS:
        raise Inexact
    return value


def _transcendental(kind: str, x: Fraction) -> Fraction:
    """exp, log, sin and cos, at their one rational point."""
    if kind == "log" and x <= 0:
        raise Undefined
    if (kind == "log" and x != 1) or (kind != "log" and x):
        raise Inexact
    return Fraction(kind in ("exp", "cos"))


def power(x: Fraction, q: Fraction) -> Fraction:
    """x^q, if it is rational."""
    if (q < 0 and x == 0) or (q.denominator > 1 and x < 0):
        raise Undefined
    if q == 0:
        return Fraction(1)
    size = max(x.numerator.bit_length(), x.denominator.bit_length())
    if size * abs(q.numerator) > BITS:
        raise Inexact
    x = x ** q.numerator
    return x if q.denominator == 1 else Fraction(_root(x.numerator, q.denominator), _root(x.denominator, q.denominator))


def _root(n: int, d: int) -> int:
    """The whole d-th root of n >= 0."""
    low, high = 0, 1 << -(-n.bit_length() // d) + 1
    while low < high - 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**d <= n else (low, middle)
    if low**d != n:
        raise Inexact
    return low
