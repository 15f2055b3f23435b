"""Obligations that are false by construction: never proved, whatever the order of the kernel's steps."""
import random
from fractions import Fraction

import pytest

from trainverify.kernel import NEGATIVE, POSITIVE, Proved, Refuted, prove
from trainverify.kernel.poly import Steps
from trainverify.kernel.prove import normal_forms_agree
from trainverify.kernel.refute import Filter, Point
from trainverify.kernel.terms import Node, Obligation, merged

from .expr import World
from .generate import number, positive, rewritten, term

COUNT = 10_000
PARTS = 10


def false_obligation(w, rng):
    """A term that is defined everywhere, against a rewriting of it that is off by something that is zero nowhere."""
    leaves = rng.randint(1, 4)
    x = term(w, rng, leaves, rng.randint(1, 3), safe=True)
    y = rewritten(w, rng, x)
    off = positive(w, rng, term(w, rng, leaves, rng.randint(0, 2), safe=True))
    match rng.randrange(5):
        case 0:
            return w.claim(x, y + off)
        case 1:
            return w.claim(x + off * number(rng), y)
        case 2:
            return w.claim(x, y + Fraction(1, 10**rng.randint(1, 9)))
        case 3:
            return w.claim(off, rewritten(w, rng, off) * rng.choice([Fraction(-1), Fraction(2), Fraction(101, 100)]))
        case _:
            return w.claim(w.exp(x), w.exp(y + off * rng.choice([-1, 1])))


@pytest.mark.parametrize("part", range(PARTS))
def test_random_false_obligations(part):
    rng = random.Random(part)
    refuted = 0
    for _ in range(COUNT // PARTS):
        ob = false_obligation(World(), rng)
        how, _ = normal_forms_agree(merged(ob)[0], Steps(3_000))
        assert how not in ("flat", "cleared"), ob
        verdict = prove(ob, budget=3_000)
        assert not isinstance(verdict, Proved), ob
        refuted += isinstance(verdict, Refuted)
    assert refuted > 0.9 * COUNT / PARTS


def mutated(rng, ob):
    """The parallel side with one number, operation or argument changed."""
    nodes = list(ob.nodes)
    i = rng.randrange(len(nodes))
    kind, attr, args = nodes[i]
    if kind in ("const", "scl"):
        attr = attr + rng.choice([Fraction(1), Fraction(-1), Fraction(1, 3)])
    elif kind == "leaf":
        attr = attr + 1
    elif kind == "compare":
        attr = {"gt": "lt", "lt": "le", "le": "ge", "ge": "gt", "eq": "ne", "ne": "eq"}[attr]
    elif kind in ("neg", "exp", "sin", "cos"):
        kind = rng.choice(["neg", "exp", "sin", "cos"])
    elif len(args) > 1:
        args = args[::-1] if kind == "uf" else args[:-2] if kind == "dot" and len(args) > 2 else args[:-1] + (args[0],)
    elif i:
        args = (rng.randrange(i),) * len(args)
    nodes[i] = Node(kind, attr, args)
    return nodes


def test_what_is_proved_has_no_counterexample():
    """One operation changed: whatever is proved nevertheless agrees at points that the kernel has not seen."""
    rng = random.Random(7)
    proved = 0
    for _ in range(1500):
        w = World()
        x = term(w, rng, rng.randint(1, 3), rng.randint(1, 3), safe=rng.random() < 0.6)
        n = len(w.terms.nodes)
        wrong = mutated(rng, w.claim(x, x))
        shifted = [Node(k, a, tuple(c + n for c in args)) for k, a, args in wrong]
        ob = Obligation((*w.terms.nodes, *shifted), x.i, x.i + n)
        if not isinstance(prove(ob, budget=3_000), Proved):
            continue
        proved += 1
        check = Filter(ob)
        for _ in range(30):
            leaves = tuple(Fraction(rng.randint(-40, 40), rng.choice([1, 8, 16])) for _ in range(ob.leaves))
            assert not isinstance(check.at(leaves, precise=True), Point), (ob, leaves)
    assert proved > 50


def test_near_misses_are_refuted():
    w = World()
    x, y = w.leaf("x"), w.leaf("y")
    for power in (3, 9, 14):
        assert isinstance(w.prove(x * y, x * y + w.lift(Fraction(1, 10**power)) * x), Refuted)


def test_cancellation_does_not_refute():
    """Float64 sees a difference here; there is none."""
    w = World()
    x = w.leaf("x")
    big = 10**18 * w.exp(x)
    assert isinstance(w.prove((big + x * x + 1) - big, x * x + 1), Proved)
    assert isinstance(w.prove(w.sqrt((big + 1) - big), w.lift(1)), Proved)
    assert isinstance(w.prove(w.compare("gt", w.sqrt(w.lift(2)) * w.sqrt(w.lift(2)), w.lift(2)) + x, x), Proved)


def test_signs_that_are_given_are_sampled():
    w = World()
    x, y = w.leaf("x", NEGATIVE), w.leaf("y", POSITIVE)
    verdict = w.prove(w.sqrt(x * x), y)
    assert isinstance(verdict, Refuted) and verdict.values[0] < 0 < verdict.values[1]
