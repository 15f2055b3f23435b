"""Sums of shares: what is linear in the shares is proved of any length and depth, and nothing else."""
import random
from fractions import Fraction

import numpy as np
import pytest
import torch

from trainverify.kernel import linear
from trainverify.kernel.linear import Shares, products
from trainverify.kernel.store import GARBAGE, INF_ID, ONE_ID, ZERO_ID
from trainverify.ops.normalise import sums

from .numeric import mistakes, run
from .test_sums import Nothing, World

TOKENS, IN, LATENT, OUT = 3, 9, 10, 40


# ---- the shares of a gradient through the backward of a norm and two matrices
def latent(m, grad, w, scale, a, x, wrong=False):
    """The gradients of x, of its matrix and of the norm's weight in y = norm(x a) scale w, from y's gradient [tokens, part]."""
    normed = m.matmul(x, a)
    root = m.inv(m.sqrt(m.add(m.scale(sums(m, m.mul(normed, normed), 1), Fraction(1, LATENT)), m.const(1))))
    unit = m.mul(normed, m.expand(root, (TOKENS, LATENT)))
    inner = m.matmul(grad, m.permute(w, (1, 0)))
    scaled = m.mul(inner, m.expand(scale, (TOKENS, LATENT)))
    mean = m.scale(sums(m, m.mul(scaled, unit), 1), Fraction(1, LATENT - wrong))
    down = m.mul(m.sub(scaled, m.mul(unit, m.expand(mean, (TOKENS, LATENT)))), m.expand(root, (TOKENS, LATENT)))
    return [m.matmul(down, m.permute(a, (1, 0))), m.matmul(m.permute(x, (1, 0)), down), m.reshape(sums(m, m.mul(inner, unit), 0), (LATENT,))]


def flat(m, values):
    return m.take(values, 1 + torch.arange(sum(int(np.prod(v.shape)) for v in values)))


def shaped(m, grad, w, scale, a, x):
    return [m.reshape(grad, (TOKENS, OUT)), m.reshape(w, (LATENT, OUT)), m.reshape(scale, (1, LATENT)), m.reshape(a, (IN, LATENT)), m.reshape(x, (TOKENS, IN))]


def whole(m, *values):
    return flat(m, latent(m, *shaped(m, *values)))


def part(m, v, rank, ranks):
    """The columns of a rank."""
    n, rows = OUT // ranks, v.shape[0]
    at = torch.arange(rows)[:, None] * OUT + rank * n + torch.arange(n)
    return m.take([v], 1 + at)


def in_shares(ranks, wrong=False, lost=False):
    def program(m, *values):
        grad, w, *rest = shaped(m, *values)
        shares = [latent(m, part(m, grad, r, ranks), part(m, w, 0 if lost and r == 1 else r, ranks), *rest, wrong=wrong and r == 1) for r in range(ranks)]
        total = shares[0]
        for share in shares[1:]:
            total = [m.add(a, b) for a, b in zip(total, share)]
        return flat(m, total)
    return program


SIZES = (TOKENS * OUT, LATENT * OUT, LATENT, IN * LATENT, TOKENS * IN)


@pytest.mark.parametrize("ranks", [2, 4])
def test_shares_that_go_through_a_norm_and_two_matrices(ranks):
    r = run(whole, in_shares(ranks), SIZES)
    assert mistakes(r) == [] and r.proved().all()
    assert r.claims.counts["proved shares"] > 40


@pytest.mark.parametrize("wrong", [{"wrong": True}, {"lost": True}])
def test_one_share_that_is_wrong(wrong):
    right, r = (run(whole, in_shares(2, **how), SIZES) for how in ({}, wrong))
    assert mistakes(r) == []
    assert not r.proved()[:TOKENS * IN].any() and right.proved()[:TOKENS * IN].all()


# ---- equations
class Shared(World):
    """A world in which nothing is proved by other means, unless it is told so."""

    def __init__(self, symbols: int = 40):
        super().__init__(symbols)
        self.asked, self.facts = [], set()
        self.shares = Shares(self.store, self.prove)

    def prove(self, rows, reps, c):
        self.asked += [(tuple(row), rep, c) for row, rep in zip(rows.tolist(), reps.tolist())]
        return np.array([(tuple(row), rep, c) in self.facts for row, rep in zip(rows.tolist(), reps.tolist())])

    def dot(self, a, b):
        x, y = self.store.vectors(np.array([a, b])).tolist()
        return int(self.claims.resolve("dot", len(a), np.array([sorted((x, y))]), Nothing())[0])

    def holds(self, row, rep, c=Fraction(1)):
        self.shares = Shares(self.store, self.prove)
        return bool(self.shares.sums(np.array([row]), np.array([rep]), c)[0])


@pytest.fixture
def w():
    return Shared()


def test_what_the_shares_have_in_common_is_what_must_add_up(w):
    x, whole_ = int(w.x[0]), w.make("exp", int(w.x[1]))
    product = w.make("mul", x, whole_)
    w.store.parallel = True
    u, v = (w.make("uf", int(i)) for i in w.x[2:4])
    w.store.clean[[u, v]] = True
    rows = [w.make("mul", x, u), w.make("mul", x, v)]
    assert not w.holds(rows, product) and w.asked == [((u, v), whole_, 1)]
    w.facts.add(((u, v), whole_, 1))
    assert w.holds(rows, product)
    assert not w.holds(rows, product, Fraction(2)) and not w.holds([rows[0], rows[0]], product) and not w.holds(rows, whole_)
    other = [rows[0], w.make("mul", int(w.x[5]), v)]
    assert not w.holds(other, product)


def test_products_cancel_however_they_are_grouped(w):
    a, b = w.x[:6].tolist(), w.x[6:12].tolist()
    long = w.dot(a, b)
    w.store.parallel = True
    parts = [w.dot(a[:2], b[:2]), w.dot(b[2:5], a[2:5]), w.make("mul", a[5], b[5])]
    assert w.holds(parts, long) and not w.asked
    assert not w.holds(parts[:2], long) and not w.holds([*parts, parts[0]], long)
    assert not w.holds([w.dot(a[:2], b[1:3]), *parts[1:]], long)


def test_numbers_are_factors_and_summands(w):
    a, b, one = int(w.x[0]), int(w.x[1]), w.store.constant(Fraction(1))
    three = w.store.constant(Fraction(3))
    both = w.make("add", a, one)
    w.store.parallel = True
    assert not w.holds([w.dot([a, one], [three, three]), w.times(Fraction(-2), a)], both)
    assert w.holds([w.dot([a, one], [three, three])], both, Fraction(3))
    assert products(w.store, ((both, Fraction(2)), (b, Fraction(1)))) == {(a,): 2, (b,): 1, (-1,): 2}
    assert w.holds([w.make("sub", both, b), b], both) and not w.holds([w.make("sub", both, b), a], both)
    assert w.holds([w.make("neg", a), a], ZERO_ID) and not w.holds([a, a], ZERO_ID) and not w.holds([a, ONE_ID], ONE_ID)


def test_what_may_be_undefined_is_refused(w):
    a, b = int(w.x[0]), int(w.x[1])
    product = w.make("mul", a, b)
    w.store.parallel = True
    inverse = w.make("inv", b)
    for row, rep in (([w.make("mul", a, inverse), w.make("neg", w.make("mul", a, inverse))], ZERO_ID), ([product, w.times(Fraction(0), inverse)], product)):
        assert not w.store.clean[max(row)]
        assert not w.holds(row, rep)
    for i in (inverse, GARBAGE, INF_ID):
        assert not w.holds([i], i) and not w.holds([i, ZERO_ID], i) and not w.holds([a, i], a)


def test_too_many_products_or_equations_are_refused(w, monkeypatch):
    a, b = w.x[:20].tolist(), w.x[20:40].tolist()
    long = w.dot(a, b)
    w.store.parallel = True
    parts = [w.dot(a[:9], b[:9]), w.dot(a[9:], b[9:])]
    assert w.holds(parts, long)
    monkeypatch.setattr(linear, "PRODUCTS", 19)
    assert not w.holds(parts, long)
    monkeypatch.setattr(linear, "PRODUCTS", 100)
    monkeypatch.setattr(linear, "EQUATIONS", 0)
    assert not w.holds(parts, long)


def test_random_equations():
    """Sums of products, nested at random: those that are equal as polynomials hold, those with one more term do not."""
    rng = random.Random(3)
    w = Shared(8)

    def term(depth: int) -> tuple[int, dict]:
        i, j = rng.choice(w.x.tolist()), rng.choice(w.x.tolist())
        if not depth:
            return w.make("mul", *sorted((i, j))), {tuple(sorted((i, j))): Fraction(1)}
        (i, p), (j, q) = term(depth - 1), term(depth - 1)
        kind = rng.choice(["add", "sub"])
        return w.make(kind, i, j), {k: p.get(k, 0) + (1 if kind == "add" else -1) * q.get(k, 0) for k in {*p, *q}}

    for _ in range(60):
        i, p = term(rng.randint(1, 4))
        w.store.parallel = True
        row = [w.times(c, w.make("mul", *pair)) for pair, c in p.items() if c]
        if len(row) > 1:
            assert w.holds(row, i) and not w.holds([*row, row[0]], i) and not w.holds(row[1:], i)
        w.store.parallel = False
