"""The normal form of terms, and the conditions under which they are defined (trusted).

A term becomes a Laurent polynomial over atoms by rules that hold at every point where the terms built so far are defined. exp
turns sums into products and log undoes it; inverses are lazy atoms that only a test for equality multiplies out; roots, logarithms
and comparisons give up the factors whose sign is known; a maximum is the set of its operands.

Definedness is decided while terms are built, in their order: a condition of the reference is a fact from then on, a condition of
the parallel side must follow from the facts at hand. So when a parallel node's condition is judged, every equation and fact that
is used concerns nodes built before it, which are defined by induction.
"""
from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from math import lcm

from trainverify.kernel.poly import ONE, UNIT, Poly, Ring, Steps, accumulate, as_constant, constant, factor, minus, scaled, whole
from trainverify.kernel.signs import Contradiction, Signs, flip, of_number, plus, raised, times
from trainverify.kernel.terms import ANY, NEGATIVE, NONNEGATIVE, NONZERO, POSITIVE, ZERO, Node, pairs


class Undefined(Exception):
    """The terms being built are defined nowhere under the facts at hand."""


class Functions:
    """Each operation on normal forms. Conditions are assumed to hold: `Builder` has dealt with them."""

    def __init__(self, steps: Steps):
        self.ring = Ring(steps)
        self.signs = Signs(self.ring)

    def _atom(self, kind: str, param: object, args: tuple[Poly, ...], sign: int = ANY) -> int:
        atom = self.ring.intern(kind, param, args)
        if sign != ANY:
            self.signs.learn(atom, sign)
        return atom

    def _apply(self, kind: str, param: object, *args: Poly) -> Poly:
        return self.ring.power(self._atom(kind, param, args))

    def leaf(self, i: int) -> Poly:
        return self._apply("leaf", i)

    # ---- inverses and powers
    def inverse(self, p: Poly) -> Poly:
        """1/p: the content is inverted at once, what remains is an atom."""
        c, m, q = self.ring.content(p)
        if not q:
            raise Undefined
        closed = {a: inverse for a, _ in m if (inverse := self._inverse_atom(a)) is not None}
        factors = [self.ring.monomial(tuple((a, -e) for a, e in m if a not in closed), whole(1 / Fraction(c)))]
        factors += [self.ring.pow(closed[a], e) for a, e in m if a in closed]
        if q != ONE:
            factors.append(self.ring.power(self._atom("inv", None, (q,), self.signs.of(q) & NONZERO)))
        return self.ring.product(factors)

    def _inverse_atom(self, atom: int) -> Poly | None:
        """1/atom where that has a form without negative powers."""
        if self.ring.kinds[atom] == "inv":
            return self.ring.args[atom][0]
        below = self.ring.args[atom][0] if self.ring.kinds[atom] == "root" else {}
        if len(below) == 1 and all(self._inverse_atom(a) is not None for m in below for a, _ in m):
            return self.ring.mul(self.ring.power(atom, self.ring.params[atom] - 1), self.inverse(below))
        return None

    def power(self, p: Poly, e: Fraction) -> Poly:
        """p^e: an integer power, or one of the non-negative root."""
        if e.denominator != 1:
            p = self.root(e.denominator, p)
        return self.ring.pow(p if e >= 0 else self.inverse(p), abs(e.numerator))

    def root(self, order: int, p: Poly) -> Poly:
        """The non-negative root of p >= 0: taken factor by factor if none can be negative, else positive factors come out. sqrt(x^2) stays."""
        c, m, q = self.ring.content(p) if p else (0, (), p)
        if not q:
            return {}
        kept, out = scaled(q, -1 if c < 0 else 1), [self._root_of_number(order, abs(Fraction(c)))]
        signs = {a: self.signs.of_atom(a) for a, _ in m}
        apart = not any(s & NEGATIVE for s in signs.values()) and not self.signs.known(kept) & NEGATIVE
        for a, e in m:
            kind = self.ring.kinds[a]
            if kind == "exp" and e % order == 0:
                out.append(self.ring.power(a, e // order))
            elif kind == "exp" or not apart and signs[a] != POSITIVE:
                kept = self.ring.mul(kept, self.ring.power(a, e))
            elif kind == "inv":
                out.append(self.ring.pow(self.inverse(self.root(order, self.ring.args[a][0])), e))
            else:
                out.append(self._root_power(order, self.ring.power(a), e))
        if kept != ONE:
            out.append(self._root_power(order, kept, 1))
        return self.ring.product(out)

    def _root_power(self, order: int, p: Poly, e: int) -> Poly:
        sign = POSITIVE if self.signs.of(p) == POSITIVE else NONNEGATIVE
        atom = self._atom("root", order, (p,), sign)
        if e < 0:
            return self.ring.power(atom, e)
        return self.ring.mul(self.ring.power(atom, e % order), self.ring.pow(p, e // order))

    def _root_of_number(self, order: int, c: Fraction) -> Poly:
        parts = []
        for base, e in factor(c).items():
            parts.append(constant(Fraction(base) ** (e // order)))
            if e % order:
                parts.append(self._root_power(order, constant(base), e % order))
        return self.ring.product(parts)

    # ---- exponentials and logarithms
    def exp(self, p: Poly) -> Poly:
        """A product over the terms of p; exp(q log z) = z^q, where log has made sure that z > 0."""
        out = []
        for m, c in p.items():
            if len(m) == 1 and m[0][1] == 1 and self.ring.kinds[m[0][0]] == "log":
                out.append(self.power(self.ring.args[m[0][0]][0], Fraction(c)))
            else:
                unit = lcm(UNIT, Fraction(c).denominator)
                out.append(self.ring.power(self._atom("exp", unit, ({m: 1},)), int(c * unit)))
        return self.ring.product(out)

    def log(self, p: Poly) -> Poly:
        """A sum over the factors of p > 0 that are positive; those of unknown sign stay together."""
        c, m, q = self.ring.content(p)
        out: Poly = {}
        for base, e in factor(abs(Fraction(c))).items():
            accumulate(out, self._log_atom(constant(base)), e)
        kept: Poly = constant(-1 if c < 0 else 1)
        for a, e in m:
            kind = self.ring.kinds[a]
            if kind == "exp":
                accumulate(out, self.ring.args[a][0], Fraction(e, self.ring.params[a]))
            elif kind == "root":      # not zero, hence positive, and so is its argument
                accumulate(out, self.log(self.ring.args[a][0]), Fraction(e, self.ring.params[a]))
            elif self.signs.of_atom(a) != POSITIVE:
                kept = self.ring.mul(kept, self.ring.power(a, e))
            elif kind == "inv":
                accumulate(out, self.log(self.ring.args[a][0]), -e)
            else:
                accumulate(out, self._log_atom(self.ring.power(a)), e)
        kept = self.ring.mul(kept, q)
        if q == ONE and kept != ONE and self._upside_down(kept):
            accumulate(out, self._log_atom(self.inverse(kept)), -1)
        elif kept != ONE:
            accumulate(out, self._log_atom(kept))
        return out

    def _upside_down(self, p: Poly) -> bool:
        """Of a quotient and its inverse, which have opposite logarithms, one is chosen."""
        (m, _), = p.items()
        return bool(m) and m[0][1] < 0 and all(self.ring.kinds[a] != "inv" for a, _ in m)

    def _log_atom(self, p: Poly) -> Poly:
        return self._apply("log", None, p)

    # ---- order
    def greatest(self, values: Iterable[Poly]) -> Poly:
        """A maximum as the set of its operands, with nested maxima, equal operands and all constants but the greatest left out."""
        operands: set[int] = set()
        numbers = []
        for p in values:
            number, atom = as_constant(p), self._single(p, "max")
            if number is not None:
                numbers.append(number)
            elif atom is not None:
                operands |= self.ring.params[atom]
            else:
                operands.add(self.ring.intern("operand", None, (p,)))
        nested = {a: as_constant(self.ring.args[a][0]) for a in operands}
        numbers += [n for n in nested.values() if n is not None]
        operands = {a for a, n in nested.items() if n is None}
        if numbers:
            operands.add(self.ring.intern("operand", None, (constant(max(numbers)),)))
        polys = [self.ring.args[a][0] for a in sorted(operands)]
        if len(polys) == 2:
            difference = self.signs.known(minus(*polys))
            if not difference & NEGATIVE or not difference & POSITIVE:
                return polys[1 if difference & NEGATIVE else 0]
        if len(polys) == 1:
            return polys[0]
        signs = [self.signs.of(p) for p in polys]
        sign = POSITIVE if POSITIVE in signs else NONNEGATIVE if any(not s & NEGATIVE for s in signs) else ANY
        return self.ring.power(self._atom("max", frozenset(operands), (), sign))

    def _single(self, p: Poly, kind: str) -> int | None:
        """The atom that p is, if it is one of this kind."""
        if len(p) == 1:
            (m, c), = p.items()
            if c == 1 and len(m) == 1 and m[0][1] == 1 and self.ring.kinds[m[0][0]] == kind:
                return m[0][0]
        return None

    def compare(self, op: str, a: Poly, b: Poly) -> Poly:
        """0/1-valued, through [d > 0] and [d = 0]."""
        if op in ("eq", "ne"):
            out = self._indicator("zero", minus(a, b))
        else:
            out = self._indicator("positive", minus(a, b) if op in ("gt", "le") else minus(b, a))
        return minus(ONE, out) if op in ("ge", "le", "ne") else out

    def _indicator(self, kind: str, d: Poly) -> Poly:
        yes = POSITIVE if kind == "positive" else ZERO
        sign = self.signs.known(d)
        if sign == yes or not sign & yes:
            return constant(int(sign == yes))
        c, m, q = self.ring.content(d)
        scale = POSITIVE if kind == "positive" else NONZERO
        kept = tuple((a, e) for a, e in m if self.signs.of_atom(a) & ~scale)
        return self._apply(kind, None, self.ring.mul({kept: -1 if c < 0 and kind == "positive" else 1}, q))

    # ---- trigonometry
    def trigonometric(self, kind: str, p: Poly) -> Poly:
        """sin is odd and cos is even: the first coefficient of the angle is made positive."""
        if not p:
            return constant(int(kind == "cos"))
        negative = p[min(p)] < 0
        out = self._apply(kind, None, scaled(p, -1) if negative else p)
        return scaled(out, -1) if negative and kind == "sin" else out

    def uninterpreted(self, tag: str, args: tuple[Poly, ...]) -> Poly:
        return self._apply("uf", tag, *args)


# What an operation needs of its argument, and what it says of its sign.
def condition(node: Node) -> int:
    """The sign that the argument of an inv, log, sqrt or pow must have."""
    if node.kind == "inv":
        return NONZERO
    if node.kind == "log":
        return POSITIVE
    if node.kind == "sqrt":
        return NONNEGATIVE
    if node.kind == "pow":
        if node.attr.denominator == 1:
            return ANY if node.attr >= 0 else NONZERO
        return NONNEGATIVE if node.attr > 0 else POSITIVE
    return ANY


class Builder:
    """Builds normal forms of nodes in order. `missing` collects the nodes whose condition did not follow."""

    def __init__(self, nodes: tuple[Node, ...], given: dict[int, int], steps: Steps):
        self.nodes = nodes
        self.given = given
        self.functions = Functions(steps)
        self.signs = self.functions.signs
        self.values: dict[int, Poly] = {}
        self.missing: list[int] = []
        self._structural: dict[int, int] = {}

    def restart(self) -> None:
        """Forget the values, to build them again with all the facts that were found."""
        self.values, self._structural, self.signs.changed = {}, {}, False

    def build(self, order: Iterable[int], reference: bool) -> None:
        """Give every node in order (arguments first) its value. A condition is a fact on the reference side, to be shown on the other."""
        try:
            for i in order:
                if i not in self.values:
                    self._condition(i, reference)
                    self.values[i] = self._value(self.nodes[i])
                    if i in self.given:
                        self.signs.assume(self.values[i], self.given[i])
        except Contradiction:
            raise Undefined from None

    def _condition(self, i: int, reference: bool) -> None:
        node = self.nodes[i]
        need = condition(node)
        if need == ANY:
            return
        arg = node.args[0]
        self.signs.assume(self.values[arg], self._sign(arg))
        if not reference and self.signs.of(self.values[arg]) & ~need:
            self._sweep()
            if self.signs.of(self.values[arg]) & ~need:
                self.missing.append(i)
        self.signs.assume(self.values[arg], need)
        if not need & ZERO:
            self._split(arg)

    def _split(self, i: int) -> None:
        """A product that is not zero has no factor that is."""
        stack = [i]
        while stack:
            node = self.nodes[stack.pop()]
            if node.kind in ("mul", "scl", "neg") or node.kind == "dot" and len(node.args) == 2:
                for a in node.args:
                    self.signs.assume(self.values[a], NONZERO)
                stack += node.args

    def _sweep(self) -> None:
        """Learn what the structure of every node says of its value: an equal value may need it."""
        self._structural.clear()
        for i, value in list(self.values.items()):
            self.signs.assume(value, self._sign(i))

    # ---- signs by structure
    def _sign(self, i: int) -> int:
        """The sign of a node that was built, from the operations below it."""
        stack = [i]
        while stack:
            top = stack[-1]
            waiting = [a for a in self.nodes[top].args if a not in self._structural]
            if top not in self._structural and waiting:
                stack += waiting
                continue
            stack.pop()
            if top not in self._structural:
                self._structural[top] = self._sign_here(top)
        return self._structural[i]

    def _sign_here(self, i: int) -> int:
        out = self._by_operation(self.nodes[i])
        value = self.values[i]
        return out & self.signs.of(value) if out & NONZERO == NONZERO and len(value) <= 64 else out

    def _by_operation(self, node: Node) -> int:
        signs = [self._structural[a] for a in node.args]
        match node.kind:
            case "const":
                return of_number(node.attr)
            case "neg":
                return flip(signs[0])
            case "scl":
                return times(of_number(node.attr), signs[0])
            case "inv":
                return signs[0] & NONZERO
            case "exp":
                return POSITIVE
            case "add":
                return self._sum(signs)
            case "mul":
                return self._product(node.args)
            case "dot":
                return self._sum([self._product(p) for p in pairs(node.args)])
            case "sqrt":
                return raised(signs[0], 2)
            case "pow":
                return raised(signs[0], node.attr.numerator if node.attr.denominator == 1 else 2)
            case "max":
                return POSITIVE if POSITIVE in signs else ANY if all(s & NEGATIVE for s in signs) else NONNEGATIVE
            case "compare":
                return NONNEGATIVE
        return ANY

    def _sum(self, signs: list[int]) -> int:
        out = signs[0]
        for s in signs[1:]:
            out = plus(out, s)
        return out

    def _product(self, args: tuple[int, ...]) -> int:
        """Factors with equal values occur as a power."""
        powers: list[tuple[int, int]] = []
        for a in args:
            same = next((k for k, (b, _) in enumerate(powers) if self.values[a] == self.values[b]), None)
            if same is None:
                powers.append((a, 1))
            else:
                powers[same] = (powers[same][0], powers[same][1] + 1)
        out = POSITIVE
        for a, e in powers:
            out = times(out, raised(self._structural[a], e))
        return out

    # ---- values
    def _value(self, node: Node) -> Poly:
        f, ring = self.functions, self.functions.ring
        args = tuple(self.values[a] for a in node.args)
        match node.kind:
            case "const":
                return constant(node.attr)
            case "leaf":
                return f.leaf(node.attr)
            case "add":
                return self._total(args)
            case "dot":
                out: Poly = {}
                for a, b in pairs(args):
                    ring.addmul(out, a, b)
                return out
            case "mul":
                return ring.product(args)
            case "neg":
                return scaled(args[0], -1)
            case "scl":
                return scaled(args[0], whole(node.attr))
            case "inv":
                return f.inverse(args[0])
            case "exp":
                return f.exp(args[0])
            case "log":
                return f.log(args[0])
            case "sqrt":
                return f.root(2, args[0])
            case "pow":
                return f.power(args[0], node.attr)
            case "sin" | "cos":
                return f.trigonometric(node.kind, args[0])
            case "max":
                return f.greatest(args)
            case "compare":
                return f.compare(node.attr, *args)
            case "uf":
                return f.uninterpreted(node.attr, args)
        raise ValueError(f"no normal form for {node.kind}")

    def _total(self, values: tuple[Poly, ...]) -> Poly:
        out: Poly = {}
        for p in values:
            self.functions.ring.steps.take(len(p))
            accumulate(out, p)
        return out
