"""Intervals hold the true values, so what they tell apart differs."""
import random
from decimal import Decimal
from fractions import Fraction

import pytest
from kernel.expr import World
from kernel.generate import precisely, rewritten, term
from kernel.test_false import false_obligation

from trainverify.certify.exact import Inexact, Undefined, claim_holds
from trainverify.certify.interval import Arithmetic, Interval, surely_fails
from trainverify.kernel import NONNEGATIVE, POSITIVE
from trainverify.kernel.refute import DECIMAL, Undefined as Unclear, evaluate
from trainverify.kernel.terms import reachable


def points(rng, leaves):
    return tuple(Fraction(rng.randint(-6, 6), rng.choice([1, 2, 3])) for _ in range(leaves))


def test_intervals_hold_what_decimals_say():
    rng, arithmetic, held = random.Random(1), Arithmetic(30), 0
    for _ in range(400):
        w = World()
        x = term(w, rng, 2, rng.randint(1, 4), safe=True)
        ob = w.claim(x, x)
        if any(n.kind in ("uf", "compare") for n in ob.nodes):
            continue
        leaves, values = points(rng, ob.leaves), {}
        try:
            for i in reachable(ob.nodes, ob.roots):
                values[i] = arithmetic.value(ob.nodes[i], values, leaves)
            with precisely():
                decimals = evaluate(ob.nodes, reachable(ob.nodes, ob.roots), leaves, DECIMAL)
        except (Inexact, Unclear, ArithmeticError):
            continue
        for i, interval in values.items():
            if abs(decimals[i].adjusted()) < 300:
                low, value, high = map(Fraction, (interval.low, decimals[i], interval.high))
                slack = abs(value) / 10**30 + Fraction(1, 10**40)              # decimals are rounded too
                assert low - slack <= value <= high + slack, ob.nodes[i]
                held += 1
    assert held > 500


def test_equal_terms_never_differ():
    rng = random.Random(2)
    for _ in range(300):
        w = World()
        x = term(w, rng, 2, rng.randint(1, 3), safe=True)
        ob = w.claim(x, rewritten(w, rng, x))
        assert not surely_fails(ob, points(rng, ob.leaves)), ob


def test_false_claims_mostly_do():
    rng, seen = random.Random(3), 0
    for _ in range(100):
        ob = false_obligation(World(), rng)
        seen += surely_fails(ob, points(rng, ob.leaves))
    assert seen > 60


def test_agreement_with_exact_evaluation():
    rng, failures = random.Random(4), 0
    for _ in range(600):
        w = World()
        x, y = (term(w, rng, 2, 2, safe=False) for _ in range(2))
        ob = w.claim(x, rng.choice([y, x + 0 * y]), [(w.leaf("x0"), NONNEGATIVE)])
        leaves = points(rng, ob.leaves)
        if not surely_fails(ob, leaves) or any(n.kind == "uf" for n in ob.nodes):
            continue
        try:
            assert not claim_holds(ob, leaves, lambda node, args: Fraction(0)), (ob, leaves)
            failures += 1
        except Inexact:
            pass
    assert failures > 20


def test_what_is_lost_in_a_sum_is_no_difference():
    """exp(-s^2) + 1 - 1: at any usual precision the first term is lost."""
    w = World()
    s, t = w.leaf("s"), w.leaf("t")
    small = w.exp(-(s * s))
    for value in (10, 20, 200, 2000):
        assert not surely_fails(w.claim(small, small + t - t), (Fraction(value), Fraction(1, 3)))
    assert not surely_fails(w.claim(w.exp(w.exp(s)), w.exp(w.exp(s)) + 1), (Fraction(2000), Fraction(0)))      # overflow tells nothing
    assert surely_fails(w.claim(small, small + Fraction(1, 10**100)), (Fraction(0), Fraction(0)))


def test_definedness():
    w = World()
    x, y = w.leaf("x"), w.leaf("y", POSITIVE)
    fails = lambda a, b, *point: surely_fails(w.claim(a, b), tuple(map(Fraction, point)))  # noqa: E731
    e = w.exp(x)
    assert fails(e, e + 0 * w.log(x), -1, 1) and not fails(e, e + 0 * w.log(x), -1, -1) and not fails(e, e + 0 * w.log(x), 1, 1)
    assert fails(e, e + 0 / x, 0, 1) and not fails(e + 0 / x, 2 * e, 0, 1)
    assert fails(e, e * w.sqrt(x - 2), 1, 1) and fails(e, e * (x - 2) ** Fraction(-1, 3), 2, 1)
    assert not fails(e, e + 0 / (w.exp(x) - e * 1), 1, 1)                       # zero, but not seen to be
    assert fails(w.compare("ge", e, e), w.compare("gt", e, e), 1, 1)


@pytest.mark.parametrize(("q", "low", "high"), [((3, 2), 8, 8), ((-1, 2), Fraction(1, 2), Fraction(1, 2)), ((2, 1), 16, 16), ((0, 1), 1, 1)])
def test_powers(q, low, high):
    arithmetic = Arithmetic(30)
    found = arithmetic.power(arithmetic.number(Fraction(4)), Fraction(*q))
    assert Fraction(found.low) <= low <= high <= Fraction(found.high) and found.high - found.low < Decimal("1e-25")
    assert arithmetic.power(Interval(Decimal(0), Decimal(0)), Fraction(1, 2)) == (0, 0)
    with pytest.raises(Undefined):
        arithmetic.power(Interval(Decimal(-2), Decimal(-1)), Fraction(1, 2))
    with pytest.raises(Inexact):
        arithmetic.power(Interval(Decimal(-2), Decimal(1)), Fraction(1, 2))
