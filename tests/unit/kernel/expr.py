"""Expressions with operators over kernel terms, for the tests of the kernel."""
from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from trainverify.kernel import Obligation, Terms, Verdict, prove

Number = int | Fraction


class Expr:
    __slots__ = ("i", "w")

    def __init__(self, w: World, i: int):
        self.w, self.i = w, i

    def __add__(self, o):
        return self.w.apply("add", self, o)

    __radd__ = __add__

    def __neg__(self):
        return self.w.apply("neg", self)

    def __sub__(self, o):
        return self.w.apply("add", self, -self.w.lift(o))

    def __rsub__(self, o):
        return self.w.apply("add", o, -self)

    def __mul__(self, o):
        return self.w.apply("scl", self, attr=Fraction(o)) if isinstance(o, (int, Fraction)) else self.w.apply("mul", self, o)

    __rmul__ = __mul__

    def __truediv__(self, o):
        return self * (1 / Fraction(o) if isinstance(o, (int, Fraction)) else self.w.inv(o))

    def __rtruediv__(self, o):
        return self.w.lift(o) * self.w.inv(self)

    def __pow__(self, q):
        return self.w.apply("pow", self, attr=Fraction(q))


class World:
    """Makes expressions; `given` collects the signs that are stated for leaves."""

    def __init__(self):
        self.terms = Terms()
        self.given: list[tuple[int, int]] = []
        self._names: dict[str, int] = {}

    def lift(self, x: Expr | Number) -> Expr:
        return x if isinstance(x, Expr) else Expr(self, self.terms.add("const", Fraction(x)))

    def apply(self, kind: str, *args, attr=None) -> Expr:
        return Expr(self, self.terms.add(kind, attr, [self.lift(a).i for a in args]))

    def leaf(self, name: str, sign: int | None = None) -> Expr:
        if name not in self._names:
            self._names[name] = self.terms.add("leaf", len(self._names))
            if sign is not None:
                self.given.append((self._names[name], sign))
        return Expr(self, self._names[name])

    def leaves(self, name: str, *shape: int, sign: int | None = None):
        """Nested lists of leaves."""
        if not shape:
            return self.leaf(name, sign)
        return [self.leaves(f"{name}.{k}", *shape[1:], sign=sign) for k in range(shape[0])]

    def sum(self, xs: Sequence) -> Expr:
        return self.apply("add", *xs)

    def dot(self, xs: Sequence, ys: Sequence) -> Expr:
        return self.apply("dot", *(z for pair in zip(xs, ys, strict=True) for z in pair))

    def max(self, xs: Sequence) -> Expr:
        return self.apply("max", *xs)

    def uf(self, tag: str, *args) -> Expr:
        return self.apply("uf", *args, attr=tag)

    def compare(self, op: str, a, b) -> Expr:
        return self.apply("compare", a, b, attr=op)

    def inv(self, x): return self.apply("inv", x)
    def exp(self, x): return self.apply("exp", x)
    def log(self, x): return self.apply("log", x)
    def sqrt(self, x): return self.apply("sqrt", x)
    def sin(self, x): return self.apply("sin", x)
    def cos(self, x): return self.apply("cos", x)

    def claim(self, lhs, rhs, given=()) -> Obligation:
        """given: further pairs of expression and sign."""
        return self.terms.obligation(self.lift(lhs).i, self.lift(rhs).i, [*self.given, *((x.i, s) for x, s in given)])

    def prove(self, lhs, rhs, given=(), **options) -> Verdict:
        return prove(self.claim(lhs, rhs, given), **options)
