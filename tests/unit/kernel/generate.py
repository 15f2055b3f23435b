"""Random terms, and the numeric meaning of normal forms, for the tests of the kernel."""
from __future__ import annotations

import decimal
import random
from decimal import Decimal
from fractions import Fraction

from trainverify.kernel.poly import Poly, Ring
from trainverify.kernel.refute import DECIMAL, _uninterpreted
from trainverify.kernel.terms import COMMUTATIVE, ORDERS, pairs

from .expr import Expr, World

ARITY = {"add": (2, 4), "mul": (2, 3), "dot": (2, 4), "max": (2, 3), "uf": (1, 2), "compare": (2, 2)}
TOTAL = ("add", "add", "mul", "mul", "dot", "neg", "scl", "exp", "sin", "cos", "max", "compare", "uf", "pow")
PARTIAL = ("inv", "log", "sqrt", "root")
EXPONENTS = (Fraction(2), Fraction(3), Fraction(0))
ROOTS = (Fraction(1, 3), Fraction(3, 2), Fraction(-1, 2), Fraction(-2), Fraction(1, 4), Fraction(-1))


def number(rng: random.Random) -> Fraction:
    return Fraction(rng.choice([-3, -2, -1, 1, 1, 2, 3, 4, 6, 12]), rng.choice([1, 1, 2, 3, 4]))


def positive(w: World, rng: random.Random, x: Expr) -> Expr:
    """Something that is positive everywhere, in a form that shows it."""
    return rng.choice([lambda: w.exp(x), lambda: x * x + Fraction(1, 3), lambda: 1 + w.exp(-x), lambda: w.lift(abs(number(rng))),
                       lambda: w.max([x, w.lift(2)]), lambda: w.sqrt(w.exp(x)) + w.dot([x], [x])])()


def term(w: World, rng: random.Random, leaves: int, depth: int, safe: bool) -> Expr:
    """A random term; a safe one is defined everywhere."""
    if depth == 0 or rng.random() < 0.1:
        return w.leaf(f"x{rng.randrange(leaves)}") if rng.random() < 0.85 else w.lift(number(rng))
    below = lambda: term(w, rng, leaves, depth - 1, safe)  # noqa: E731
    kind = rng.choice(TOTAL + PARTIAL)
    if kind in PARTIAL:
        x = positive(w, rng, below()) if safe or rng.random() < 0.5 else below()
        return w.apply("pow", x, attr=rng.choice(ROOTS)) if kind == "root" else w.apply(kind, x)
    attr = {"scl": number(rng), "pow": rng.choice(EXPONENTS), "uf": rng.choice("fg"), "compare": rng.choice(ORDERS)}.get(kind)
    count = rng.randint(*ARITY.get(kind, (1, 1)))
    return w.apply(kind, *(below() for _ in range(2 * ((count + 1) // 2) if kind == "dot" else count)), attr=attr)


def rewritten(w: World, rng: random.Random, x: Expr) -> Expr:
    """An equal term in another form: operands reordered, sums and products regrouped and distributed."""
    nodes, new = w.terms.nodes, {}

    def go(i: int) -> Expr:
        if i not in new:
            kind, attr, args = nodes[i]
            if kind in COMMUTATIVE:
                units = list(pairs(args)) if kind == "dot" else [(a,) for a in args]
                rng.shuffle(units)
                new[i] = regroup(kind, [tuple(go(a) for a in rng.sample(u, len(u))) for u in units])
            else:
                new[i] = w.apply(kind, *map(go, args), attr=attr)
        return new[i]

    def regroup(kind: str, units: list[tuple[Expr, ...]]) -> Expr:
        if kind == "dot" and rng.random() < 0.5:
            return w.sum([a * b for a, b in units])
        if kind == "mul" and len(units) > 2 and rng.random() < 0.5:
            return units[0][0] * w.apply("mul", *(u[0] for u in units[1:]))
        if kind == "add" and len(units) > 2 and rng.random() < 0.5:
            return w.sum([w.sum([u[0] for u in units[:2]]), *(u[0] for u in units[2:])])
        return w.apply(kind, *(a for u in units for a in u))

    return go(x.i)


def value(ring: Ring, p: Poly, leaves: tuple[Fraction, ...], memo: dict[int, Decimal]) -> Decimal:
    """The meaning of a normal form at a point."""
    total = Decimal(0)
    for m, c in p.items():
        product = DECIMAL.number(Fraction(c))
        for a, e in m:
            x = atom_value(ring, a, leaves, memo)
            product *= (x.ln() * e / ring.params[a]).exp() if ring.kinds[a] == "exp" else x**e
        total += product
    return total


def atom_value(ring: Ring, atom: int, leaves: tuple[Fraction, ...], memo: dict[int, Decimal]) -> Decimal:
    if atom not in memo:
        args = [value(ring, p, leaves, memo) for p in ring.args[atom]]
        kind, param = ring.kinds[atom], ring.params[atom]
        memo[atom] = {
            "leaf": lambda: DECIMAL.number(leaves[param]), "exp": lambda: args[0].exp(), "inv": lambda: 1 / args[0], "log": lambda: args[0].ln(),
            "root": lambda: (args[0].ln() / param).exp() if args[0] else Decimal(0), "operand": lambda: args[0],
            "max": lambda: max(atom_value(ring, a, leaves, memo) for a in param), "positive": lambda: Decimal(int(args[0] > Decimal("1e-25"))),
            "zero": lambda: Decimal(int(abs(args[0]) < Decimal("1e-25"))), "sin": lambda: DECIMAL.cossin(args[0])[1],
            "cos": lambda: DECIMAL.cossin(args[0])[0], "uf": lambda: _uninterpreted(param, args, DECIMAL),
        }[kind]()
    return memo[atom]


def close(a: Decimal, b: Decimal) -> bool:
    return abs(a - b) <= Decimal("1e-18") * (1 + abs(a) + abs(b))


def precisely():
    return decimal.localcontext(decimal.Context(prec=50, traps=[decimal.InvalidOperation, decimal.DivisionByZero, decimal.Overflow]))


