"""Where terms are undefined: what holds only elsewhere is never proved."""
from fractions import Fraction

import pytest

from trainverify.kernel import NEGATIVE, NONNEGATIVE, NONZERO, POSITIVE, ZERO, Proved, Refuted, Unknown

from .expr import World


def decided(verdict) -> str:
    return {Proved: "proved", Refuted: "refuted"}.get(type(verdict)) or verdict.reason


# name: (reference, parallel), verdict, and the verdict with the sides exchanged
HOLES = {
    "x / x": (lambda w, x, y: (w.lift(1), x / x), "definedness", "proved"),
    "0 / x": (lambda w, x, y: (w.lift(0), 0 / x), "definedness", "proved"),
    "0 times 1 / x": (lambda w, x, y: (y, y + 0 * w.inv(x)), "definedness", "proved"),
    "difference of inverses": (lambda w, x, y: (y, y + 1 / x - 1 / x), "definedness", "proved"),
    "0 / 0": (lambda w, x, y: (w.lift(0), (x - x) / (x - x)), "undefined", "undefined"),
    "both nowhere defined": (lambda w, x, y: (1 / (x - x), w.log(-x * x) + y), "undefined", "undefined"),
    "hidden 1 / 0": (lambda w, x, y: (x, x + 0 / (y * y - y**2)), "undefined", "undefined"),
    "root of a square": (lambda w, x, y: (x, w.sqrt(x * x)), "refuted", "refuted"),
    "square of a root": (lambda w, x, y: (x, w.sqrt(x) * w.sqrt(x)), "refuted", "proved"),
    "power of a square": (lambda w, x, y: (x, (x**2) ** Fraction(1, 2)), "refuted", "refuted"),
    "square of a power": (lambda w, x, y: (x, (x ** Fraction(1, 2)) ** 2), "refuted", "proved"),
    "exp of log": (lambda w, x, y: (x, w.exp(w.log(x))), "refuted", "proved"),
    "log of exp": (lambda w, x, y: (x, w.log(w.exp(x))), "proved", "proved"),
    "log of -x": (lambda w, x, y: (w.log(-x), w.log(x)), "refuted", "refuted"),
    "log of a square": (lambda w, x, y: (2 * w.log(x), w.log(x * x)), "proved", "refuted"),
    "log of a product": (lambda w, x, y: (w.log(x) + w.log(y), w.log(x * y)), "proved", "refuted"),
    "log of a product with exp": (lambda w, x, y: (w.log(x * w.exp(y)), w.log(x) + y), "proved", "proved"),
    "root of a product": (lambda w, x, y: (w.sqrt(x) * w.sqrt(y), w.sqrt(x * y)), "proved", "refuted"),
    "log of 0": (lambda w, x, y: (w.log(x - x), y), "undefined", "undefined"),
    "cancelled factor": (lambda w, x, y: (x + y, (x * x - y * y) / (x - y)), "definedness", "proved"),
    "power zero": (lambda w, x, y: (w.lift(1), x**0), "proved", "proved"),
    "inverse of an inverse": (lambda w, x, y: (x, 1 / (1 / x)), "definedness", "proved"),
    "split denominator": (lambda w, x, y: (1 / (x * y), 1 / x * w.inv(y)), "proved", "proved"),
    "split sums": (lambda w, x, y: (1 / ((x + y) * (x - y)), 1 / (x + y) / (x - y)), "proved", "proved"),
    "square as denominator": (lambda w, x, y: (1 / (x * x), (1 / x) ** 2), "proved", "proved"),
    "positive denominator": (lambda w, x, y: (w.lift(1), (1 + x * x) / (1 + x * x)), "proved", "proved"),
    "shown by exp": (lambda w, x, y: (w.lift(1), w.log(1 + w.exp(x)) - w.log(1 + w.exp(-x)) - x + 1), "proved", "proved"),
    "known by structure only": (lambda w, x, y: ((x - y) * (x - y) + 1, 1 / w.inv(x * x - 2 * (x * y) + y * y + 1)), "proved", "proved"),
    "a variance that is not evidently positive": (lambda w, x, y: (w.lift(1), (x * x + x * y + y * y + 1) / (x * x + x * y + y * y + 1)), "definedness", "proved"),
    "root that may be zero": (lambda w, x, y: (x, x * w.sqrt(y * y) / w.sqrt(y * y)), "definedness", "proved"),
    "0 to a negative power": (lambda w, x, y: (w.lift(1), x ** Fraction(-1, 2) * x ** Fraction(1, 2)), "refuted", "proved"),
    "inverse of an indicator": (lambda w, x, y: (w.compare("gt", x, 0), 1 / w.compare("gt", x, 0)), "not equal", "not equal"),
    "negative integer power": (lambda w, x, y: (x**0 + y, x * x**-1 + y), "definedness", "proved"),
    "negative even power": (lambda w, x, y: (w.lift(1), x**2 * x**-2), "definedness", "proved"),
    "maximum that may be zero": (lambda w, x, y: (w.lift(1), w.max([x * x, y]) / w.max([x * x, y])), "definedness", "proved"),
    "minimum of positive values": (lambda w, x, y: (w.lift(1), -w.max([-w.exp(x), -w.exp(y)]) / -w.max([-w.exp(x), -w.exp(y)])), "definedness", "proved"),
    "sum that may be zero": (lambda w, x, y: (w.lift(1), (x * x + w.sqrt(y * y)) / (x * x + w.sqrt(y * y))), "definedness", "proved"),
    "product that may be zero": (lambda w, x, y: (w.lift(1), x * x * w.exp(y) / (w.exp(y) * x * x)), "definedness", "proved"),
    "cube of what may be negative": (lambda w, x, y: (x, w.sqrt(x**3 * x)), "refuted", "refuted"),
    "root of a cube": (lambda w, x, y: (x * w.sqrt(x), w.sqrt(x**3)), "proved", "proved"),
    "comparison at a tie": (lambda w, x, y: (w.lift(1), w.compare("gt", x * x, 0)), "refuted", "refuted"),
    "comparison without a tie": (lambda w, x, y: (w.lift(1), w.compare("ge", x * x, 0)), "proved", "proved"),
    "equality at zero": (lambda w, x, y: (w.lift(0), w.compare("eq", x * x * y, 0)), "refuted", "refuted"),
    "indicator at a tie": (lambda w, x, y: (w.compare("gt", x, y), 1 - w.compare("gt", y, x)), "refuted", "refuted"),
    "equality of multiples": (lambda w, x, y: (w.compare("eq", x * w.exp(y), y), w.compare("eq", -3 * x, -3 * y * w.exp(-y))), "proved", "proved"),
    "unused term": (lambda w, x, y: (x, x + 0 * w.log(w.uf("f", y))), "refuted", "proved"),
}


@pytest.mark.parametrize("name", HOLES)
def test_holes(name):
    w = World()
    sides, forth, back = HOLES[name]
    a, b = sides(w, w.leaf("x"), w.leaf("y"))
    assert decided(w.prove(a, b)) == forth
    assert decided(w.prove(b, a)) == back


def test_the_nodes_are_named():
    w = World()
    x, y = w.leaf("x"), w.leaf("y")
    bad = w.inv(y)
    verdict = w.prove(x, x + 0 * bad)
    assert verdict == Unknown("definedness", verdict.steps, (bad.i,))


@pytest.mark.parametrize(("sign", "root", "quotient", "log"), [
    (POSITIVE, "proved", "proved", "proved"), (NONNEGATIVE, "proved", "definedness", "definedness"), (NONZERO, "refuted", "proved", "refuted"),
    (NEGATIVE, "refuted", "proved", "refuted")])
def test_given_signs_of_leaves(sign, root, quotient, log):
    w = World()
    x = w.leaf("x", sign)
    assert decided(w.prove(x, w.sqrt(x * x))) == root
    assert decided(w.prove(w.lift(1), x / x)) == quotient
    assert decided(w.prove(x, w.exp(w.log(x)))) == log


def test_powers_of_what_may_be_zero():
    w = World()
    v = w.leaf("v", NONNEGATIVE)
    assert decided(w.prove(w.lift(1), v ** Fraction(1, 2) * v ** Fraction(-1, 2))) == "definedness"
    assert decided(w.prove(v, v ** Fraction(1, 2) * v ** Fraction(1, 2))) == "proved"


def test_a_leaf_that_is_given_zero():
    w = World()
    x = w.leaf("x", ZERO)
    assert decided(w.prove(w.lift(1), x / x)) != "proved"


def test_given_signs_of_terms():
    """A decision of the reference: c < 1 gives min(c, 1) = c."""
    w = World()
    c = w.leaf("c")
    least = -w.max([-c, w.lift(-1)])
    assert decided(w.prove(c, least)) == "refuted"
    assert decided(w.prove(c, least, [(1 - c, POSITIVE)])) == "proved"
    assert decided(w.prove(w.lift(1), least, [(1 - c, NEGATIVE)])) == "proved"


def test_a_given_term_is_defined():
    w = World()
    x, y = w.leaf("x"), w.leaf("y")
    assert decided(w.prove(y, y + 0 * w.inv(x))) == "definedness"
    assert decided(w.prove(y, y + 0 * w.inv(x), [(w.log(x), 7)])) == "proved"


def test_hypotheses_that_exclude_each_other_prove_nothing():
    w = World()
    x = w.leaf("x")
    assert decided(w.prove(x, x + 1, [(x, POSITIVE), (-x, POSITIVE)])) in ("undefined", "no point")


def test_claims_without_a_point_are_not_proved():
    """Nothing shows that x^2 + xy + y^2 + 1 is positive, so nothing shows that the reference is nowhere defined."""
    w = World()
    x, y = w.leaf("x"), w.leaf("y")
    nowhere = w.log(-(x * x + x * y + y * y) - 1)
    assert decided(w.prove(nowhere + x, x + nowhere + (x - x))) == "no point"


def test_facts_of_the_parallel_side_come_in_order():
    """A condition may not be discharged by one that stands later."""
    w = World()
    x = w.leaf("x")
    early = 1 / x
    late = w.log(x)
    assert decided(w.prove(w.lift(0), early - early + 0 * late)) != "proved"
    assert decided(w.prove(0 * late, early - early)) == "proved"
