"""The arithmetic of signs, exactly; and what follows from an assumption, at points where it holds."""
import itertools
import random
from fractions import Fraction

import pytest

from trainverify.kernel import ANY, NEGATIVE, NONNEGATIVE, NONPOSITIVE, NONZERO, POSITIVE, ZERO
from trainverify.kernel.poly import Ring, Steps
from trainverify.kernel.signs import Contradiction, Signs, flip, of_number, plus, raised, times

SIGNS = range(1, 8)
NUMBERS = [Fraction(n) for n in (-3, -1, 0, 1, 3)]


def having(sign):
    return [x for x in NUMBERS if of_number(x) & sign]


def signs_of(values):
    out = 0
    for v in values:
        out |= of_number(v)
    return out


def test_names():
    assert [of_number(x) for x in (-2, 0, Fraction(1, 2))] == [NEGATIVE, ZERO, POSITIVE]
    assert (NONPOSITIVE, NONZERO, NONNEGATIVE, ANY) == (NEGATIVE | ZERO, NEGATIVE | POSITIVE, ZERO | POSITIVE, NEGATIVE | ZERO | POSITIVE)


@pytest.mark.parametrize("a", SIGNS)
def test_of_one(a):
    assert flip(a) == signs_of(-x for x in having(a))
    for e in range(4):
        assert raised(a, e) == signs_of(x**e for x in having(a))
    for e in (-1, -2, -3):
        assert raised(a, e) == signs_of(x**e for x in having(a) if x)


@pytest.mark.parametrize("a", SIGNS)
@pytest.mark.parametrize("b", SIGNS)
def test_of_two(a, b):
    assert times(a, b) == signs_of(x * y for x in having(a) for y in having(b))
    assert plus(a, b) == signs_of(x + y for x in having(a) for y in having(b))


def at(p, point):
    """The value of a polynomial in leaves, or None where it is undefined."""
    total = Fraction(0)
    for m, c in p.items():
        for a, e in m:
            if e < 0 and not point[a]:
                return None
            c = c * point[a] ** e
        total += c
    return total


def random_poly(rng, ring, leaves):
    out = {(): rng.randint(-2, 2)} if rng.random() < 0.3 else {}
    out = {m: c for m, c in out.items() if c}
    for _ in range(rng.randint(1, 3)):
        m = tuple((a, rng.choice([-2, -1, 1, 2, 3])) for a in range(leaves) if rng.random() < 0.6)
        out[m] = rng.choice([-3, -1, 1, 2])
    return out


@pytest.mark.parametrize("seed", range(20))
def test_facts_hold_where_the_assumptions_do(seed):
    rng = random.Random(seed)
    for _ in range(25):
        ring = Ring(Steps(10**6))
        signs, leaves = Signs(ring), rng.randint(1, 3)
        for k in range(leaves):
            ring.intern("leaf", k)
        assumed = [(random_poly(rng, ring, leaves), rng.choice(SIGNS)) for _ in range(rng.randint(1, 3))]
        others = [random_poly(rng, ring, leaves) for _ in range(5)] + [ring.power(a) for a in range(leaves)] + [p for p, _ in assumed]
        points = [p for p in itertools.product(NUMBERS, repeat=leaves)
                  if all((v := at(q, p)) is not None and of_number(v) & s for q, s in assumed)]
        try:
            for p, s in assumed:
                signs.assume(p, s)
        except Contradiction:
            assert not points
            continue
        for p in others:
            for point in points:
                v = at(p, point)
                assert v is None or of_number(v) & signs.of(p), (assumed, p, point)


def leaf_signs(*facts):
    """The signs that are known of x and y once these facts (functions of both) are."""
    ring = Ring(Steps(1000))
    signs = Signs(ring)
    x, y = (ring.power(ring.intern("leaf", k)) for k in range(2))
    for f, s in facts:
        signs.assume(f(ring, x, y), s)
    return signs.of(x), signs.of(y), signs, ring


@pytest.mark.parametrize(("fact", "sign", "x", "y"), [
    (lambda r, x, y: x, POSITIVE, POSITIVE, ANY), (lambda r, x, y: {m: -3 * c for m, c in x.items()}, POSITIVE, NEGATIVE, ANY),
    (lambda r, x, y: r.mul(x, y), NONZERO, NONZERO, NONZERO), (lambda r, x, y: r.mul(x, y), POSITIVE, NONZERO, NONZERO),
    (lambda r, x, y: r.mul(x, r.mul(y, y)), NEGATIVE, NEGATIVE, NONZERO), (lambda r, x, y: r.pow(x, 3), NONNEGATIVE, NONNEGATIVE, ANY),
    (lambda r, x, y: r.pow(x, 2), POSITIVE, NONZERO, ANY), (lambda r, x, y: {((0, -1),): 1}, NONNEGATIVE, POSITIVE, ANY),
    (lambda r, x, y: r.mul(x, r.mul(y, y)), NONPOSITIVE, ANY, ANY)])
def test_what_follows_for_factors(fact, sign, x, y):
    assert leaf_signs((fact, sign))[:2] == (x, y)


def test_a_known_factor_tells_the_other():
    product = lambda r, x, y: r.mul(x, y)  # noqa: E731
    assert leaf_signs((lambda r, x, y: x, NEGATIVE), (product, POSITIVE))[:2] == (NEGATIVE, NEGATIVE)
    assert leaf_signs((lambda r, x, y: x, NONNEGATIVE), (product, POSITIVE))[:2] == (POSITIVE, POSITIVE)
    with pytest.raises(Contradiction):
        leaf_signs((lambda r, x, y: x, ZERO), (product, NONZERO))


def test_sums_of_what_has_a_sign():
    x, y, signs, ring = leaf_signs((lambda r, x, y: x, POSITIVE), (lambda r, x, y: y, NONNEGATIVE))
    assert signs.of({((0, 1),): 1, ((1, 1),): 2}) == POSITIVE
    assert signs.of({((0, 1),): -1, ((1, 1),): -2}) == NEGATIVE
    assert signs.of({((0, 1),): 1, ((1, 1),): -2}) == ANY
    assert signs.of({((1, 1),): 1, ((1, 2),): 2}) == NONNEGATIVE
    assert signs.of({}) == ZERO


def test_facts_about_atoms_reach_their_arguments():
    ring = Ring(Steps(1000))
    signs = Signs(ring)
    x = ring.power(ring.intern("leaf", 0))
    y = {((0, 1),): 1, (): 1}
    root, inverse, exp = ring.intern("root", 2, (x,)), ring.intern("inv", None, (y,)), ring.intern("exp", 1, (x,))
    assert signs.of(ring.power(root)) == NONNEGATIVE and signs.of(ring.power(exp)) == POSITIVE
    signs.assume(ring.power(root), NONZERO)
    assert signs.of(x) == POSITIVE
    assert signs.of(y) == POSITIVE
    ring = Ring(Steps(1000))
    signs = Signs(ring)
    ring.intern("leaf", 0)
    inverse = ring.intern("inv", None, (y,))
    signs.assume(ring.power(inverse), NEGATIVE)
    assert signs.of(y) == NEGATIVE
    assert signs.of({((0, 1),): -2, (): -2}) == POSITIVE


def test_a_late_fact_is_noticed():
    ring = Ring(Steps(1000))
    signs = Signs(ring)
    x, y = (ring.power(ring.intern("leaf", k)) for k in range(2))
    signs.assume(y, POSITIVE)
    assert not signs.changed
    assert signs.known(x) == ANY
    signs.assume(y, POSITIVE)
    assert not signs.changed
    signs.assume(x, POSITIVE)
    assert signs.changed
