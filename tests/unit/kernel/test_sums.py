"""Long sums: equal exactly if the coefficients of all summands are."""
import random
from fractions import Fraction

import numpy as np
import pytest

from trainverify.kernel import sums
from trainverify.kernel.claims import Claims
from trainverify.kernel.store import GARBAGE, INF_ID, Store
from trainverify.kernel.sums import equal_sums
from trainverify.relate.guess import Dictionary

HALF = Fraction(1, 2)


class Nothing:
    def of(self, index: np.ndarray) -> None:
        return None


class World:
    """Identifiers, made without guesses."""

    def __init__(self, symbols: int = 40):
        self.store = Store()
        self.claims = Claims(self.store, Dictionary(self.store))
        self.x = np.arange(symbols) + self.store.symbols(symbols)

    def make(self, kind: str, *operands: int) -> int:
        return int(self.claims.resolve(kind, None, np.array([operands]), Nothing())[0])

    def times(self, c: Fraction, i: int) -> int:
        return self.make("mul", *sorted((self.store.constant(c), i)))

    def equal(self, left: int, right: int, c: Fraction = Fraction(1)) -> bool:
        return equal_sums(self.store, [(c, np.array([left]))], [(Fraction(1), np.array([right]))])


@pytest.fixture
def w():
    return World()


def test_grouping_and_order_do_not_matter(w):
    whole = w.make("add", *w.x)
    parts = [w.make("add", *w.x[k::4]) for k in range(4)]
    assert w.equal(whole, w.make("add", *parts[::-1])) and w.equal(whole, w.make("add", w.make("add", *parts[:3]), parts[3]))
    assert not w.equal(whole, w.make("add", *parts[:3])) and not w.equal(whole, w.make("add", *parts, parts[0]))


def test_coefficients_are_exact(w):
    a, b, c = w.x[:3].tolist()
    third = Fraction(1, 3)
    assert w.equal(w.times(third, w.make("add", a, b)), w.make("add", w.times(third, b), w.times(third, a)))
    assert w.equal(w.make("add", a, a, a), w.times(Fraction(3), a))
    assert w.equal(w.make("add", a, b), w.times(HALF, w.make("add", a, a, b, b)))
    assert not w.equal(w.make("add", a, b), w.times(HALF, w.make("add", a, a, b)))
    assert not w.equal(w.times(third, a), w.times(Fraction(333333, 1000000), a))
    assert w.equal(a, w.times(Fraction(2), a), Fraction(2)) and not w.equal(a, w.times(Fraction(2), a), HALF)
    assert not w.equal(w.make("add", a, b, c), w.make("add", a, b, b))


def test_differences_and_signs(w):
    a, b, c = w.x[:3].tolist()
    assert w.equal(w.make("sub", a, w.make("sub", b, c)), w.make("add", w.make("sub", c, b), a))
    assert w.equal(w.make("neg", w.make("sub", a, b)), w.make("sub", b, a))
    assert not w.equal(w.make("sub", a, b), w.make("sub", b, a)) and not w.equal(w.make("neg", a), a)
    assert not w.equal(w.make("sub", a, b), w.make("add", a, b))


def test_cancellation(w):
    a, b = w.x[:2].tolist()
    assert w.equal(w.make("sub", w.make("add", a, b), b), a)
    assert w.equal(w.make("sub", w.make("add", a, b), w.make("add", b, a)), w.store.constant(Fraction(0)))
    assert not w.equal(w.make("sub", w.make("add", a, b), a), a)


def test_constants_are_summands(w):
    a, one, two = int(w.x[0]), w.store.constant(Fraction(1)), w.store.constant(Fraction(2))
    assert w.equal(w.make("add", a, one, one), w.make("add", a, two)) and not w.equal(w.make("add", a, one), w.make("add", a, two))
    assert w.equal(w.times(Fraction(3), w.make("add", a, one)), w.make("add", w.times(Fraction(3), a), w.store.constant(Fraction(3))))
    assert not w.equal(w.make("add", a, one), w.make("add", a, a)) and not w.equal(one, two) and w.equal(one, one)


def test_products_of_summands_are_summands(w):
    a, b, c = w.x[:3].tolist()
    ab, ac, bc = w.make("mul", a, b), w.make("mul", a, c), w.make("mul", b, c)
    assert w.equal(w.make("add", ab, ac, bc), w.make("add", bc, w.make("add", ac, ab)))
    assert not w.equal(w.make("add", ab, ac), w.make("add", ab, bc)) and not w.equal(w.make("add", ab, a), w.make("add", a, b))


def test_what_may_be_undefined_is_refused(w):
    a, b = w.x[:2].tolist()
    w.store.parallel = True
    inverse = w.make("inv", b)
    assert not w.store.clean[inverse]
    assert not w.equal(w.make("sub", w.make("add", a, inverse), inverse), a)
    assert not w.equal(w.make("mul", w.store.constant(Fraction(0)), inverse), w.store.constant(Fraction(0)))
    assert not w.equal(inverse, inverse) and not w.equal(GARBAGE, GARBAGE) and not w.equal(INF_ID, INF_ID)
    assert not w.equal(w.make("sub", w.make("add", a, GARBAGE), GARBAGE), a)


def test_too_many_summands_and_long_coefficients_are_refused(w, monkeypatch):
    whole, other = w.make("add", *w.x), w.make("add", *w.x[::-1])
    tiny = Fraction(1, 10**12)
    assert w.equal(whole, other)
    assert not w.equal(w.make("add", w.times(tiny, int(w.x[0])), int(w.x[1])), w.make("add", int(w.x[1]), w.times(tiny, int(w.x[0]))))
    monkeypatch.setattr(sums, "LIMIT", 30)
    assert not w.equal(whole, other)


def test_random_combinations():
    """Nested at random, against their coefficients counted by hand, and with one coefficient changed."""
    rng = random.Random(5)
    w = World(6)

    def nested(depth: int) -> tuple[int, dict[int, Fraction]]:
        if not depth:
            i = rng.choice(w.x.tolist())
            return i, {i: Fraction(1)}
        (i, p), (j, q), c = nested(depth - 1), nested(depth - 1), Fraction(rng.choice([-2, 1, 3]), rng.choice([1, 2, 3]))
        kind = rng.choice(["add", "sub", "neg", "mul"])
        if kind == "neg":
            return w.make("neg", i), {k: -v for k, v in p.items()}
        if kind == "mul":
            return w.times(c, i), {k: c * v for k, v in p.items()}
        sign = 1 if kind == "add" else -1
        return w.make(kind, i, j), {k: p.get(k, 0) + sign * q.get(k, 0) for k in {*p, *q}}

    for _ in range(150):
        i, p = nested(rng.randint(1, 6))
        right = [(c, np.array([k])) for k, c in p.items()]
        assert equal_sums(w.store, [(Fraction(1), np.array([i]))], right)
        wrong = [*right, (Fraction(rng.choice([-1, 1]), 7), np.array([rng.choice(w.x.tolist())]))]
        assert not equal_sums(w.store, [(Fraction(1), np.array([i]))], wrong)
