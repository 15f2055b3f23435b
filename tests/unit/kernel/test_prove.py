"""The decision procedure: who makes a Proved, budgets, malformed obligations, and what an obligation's text says."""
import copy
import dataclasses
import pickle
from fractions import Fraction

import pytest

from trainverify.kernel import BUDGET, POSITIVE, Node, Obligation, Proved, Terms, Unknown, prove
from trainverify.kernel.terms import digest, merged, text

from .expr import World


def claim():
    w = World()
    x, y = w.leaf("x"), w.leaf("y")
    return w.claim((x + y) * (x - y), x * x - y * y)


def test_only_prove_makes_a_proved():
    verdict = prove(claim())
    with pytest.raises(TypeError):
        Proved(claim(), "same", 0)
    with pytest.raises(TypeError, match=r"only trainverify\.kernel\.prove"):
        Proved(claim(), "same", 0, object())
    with pytest.raises((TypeError, ValueError)):
        dataclasses.replace(verdict, how="same")
    with pytest.raises(dataclasses.FrozenInstanceError):
        verdict.how = "same"
    assert not hasattr(verdict, "token")


def test_a_proved_may_be_copied():
    verdict = prove(claim())
    assert copy.deepcopy(verdict) == verdict == pickle.loads(pickle.dumps(verdict))


@pytest.mark.parametrize(("sides", "how"), [
    (lambda w, x, y: (x + y * x, y * x + x), "same"), (lambda w, x, y: (w.dot([x, y], [y, x]), w.dot([y, y], [x, x])), "same"),
    (lambda w, x, y: (w.max([x, y]), w.max([y, x])), "same"), (lambda w, x, y: (2 * x * y, x * y + y * x), "flat"),
    (lambda w, x, y: (1 / (1 + w.exp(x)) + 1 / (1 + w.exp(-x)), w.lift(1)), "cleared")])
def test_how(sides, how):
    w = World()
    verdict = w.prove(*sides(w, w.leaf("x"), w.leaf("y")))
    assert isinstance(verdict, Proved) and verdict.how == how and (verdict.steps == 0) == (how == "same")


def test_the_order_of_a_call_is_kept():
    w = World()
    x, y = w.leaf("x"), w.leaf("y")
    assert not isinstance(w.prove(w.uf("f", x, y), w.uf("f", y, x)), Proved)
    assert not isinstance(w.prove(w.compare("lt", x, y), w.compare("lt", y, x)), Proved)


def test_budget_counts_steps():
    w = World()
    xs = w.leaves("x", 6)
    ob = w.claim(w.sum(xs) ** 4 * w.sum(xs), w.sum(xs) ** 5)
    full = prove(ob)
    assert isinstance(full, Proved) and 0 < full.steps < BUDGET
    assert prove(ob) == full
    assert isinstance(prove(ob, full.steps), Proved)
    short = prove(ob, full.steps - 1)
    assert isinstance(short, Unknown) and short.reason == "budget"


@pytest.mark.parametrize("sides", [
    lambda w, x: (w.exp(w.log(w.lift(2)) * 10**12), x), lambda w, x: ((1 + x) ** 10**9, x), lambda w, x: (w.sin(w.exp(w.exp(x * 100))), x),
    lambda w, x: (x ** Fraction(1, 10**9), x), lambda w, x: (w.exp(x * Fraction(1, 10**40)) - 1, x * Fraction(1, 10**40))])
def test_extreme_numbers_end(sides):
    w = World()
    assert not isinstance(w.prove(*sides(w, w.leaf("x", POSITIVE)), budget=10_000), Proved)


def test_long_chains_do_not_recurse():
    w = World()
    x = a = b = w.leaf("x")
    for _ in range(3000):
        a, b = a + 1, w.apply("add", 1, b)
    assert isinstance(w.prove(a * x + x, (b + 1) * x), Proved)


def test_deep_functions_do_not_recurse():
    w = World()
    x = a = b = w.leaf("x")
    for k in range(150):
        a, b = w.sqrt(1 + a * a / 2) + x, x + w.sqrt(b * b * Fraction(1, 2) + 1)
        if k % 10 == 0:
            a, b = w.uf("f", a), w.uf("f", b + 0)
    assert isinstance(w.prove(w.uf("g", a + x), w.uf("g", x + b)), Proved | Unknown)


@pytest.mark.parametrize("nodes", [
    [Node("leaf", -1, ())], [Node("leaf", 0, (0,))], [Node("const", 0.5, ())], [Node("const", 1, ())], [Node("exp", None, ())], [Node("sum", None, ())],
    [Node("leaf", 0, ()), Node("dot", None, (0,))], [Node("leaf", 0, ()), Node("add", None, ())], [Node("leaf", 0, ()), Node("inv", None, (1,))],
    [Node("leaf", 0, ()), Node("inv", None, (-1,))], [Node("leaf", 0, ()), Node("pow", 2, (0,))], [Node("leaf", 0, ()), Node("scl", None, (0,))],
    [Node("leaf", 0, ()), Node("compare", "is", (0, 0))], [Node("leaf", 0, ()), Node("uf", None, (0,))], [Node("leaf", 0, ()), Node("max", 3, (0,))],
    [Node("leaf", 0, ()), Node("add", None, (0, False))], []])
def test_malformed(nodes):
    with pytest.raises(ValueError, match="malformed|before it"):
        prove(Obligation(tuple(nodes), max(len(nodes) - 1, 0), 0))


@pytest.mark.parametrize("ob", [Obligation((Node("leaf", 0, ()),), 0, 1), Obligation((Node("leaf", 0, ()),), -1, 0),
                                Obligation((Node("leaf", 0, ()),), 0, 0, ((0, 0),)), Obligation((Node("leaf", 0, ()),), 0, 0, ((3, 1),))])
def test_malformed_roots(ob):
    with pytest.raises(ValueError, match="malformed"):
        prove(ob)


def test_terms_number_equal_nodes_once():
    terms = Terms()
    x = terms.add("leaf", 0)
    assert terms.add("leaf", 0) == x and terms.add("neg", None, [x]) == terms.add("neg", None, (x,)) == 1
    with pytest.raises(ValueError, match="malformed"):
        terms.add("neg", None, [x, x])


def test_merged_drops_what_is_not_mentioned():
    w = World()
    x, y = w.leaf("x"), w.leaf("y")
    w.inv(w.exp(y))
    small, origins = merged(w.claim(x + y, y + x))
    assert [n.kind for n in small.nodes] == ["leaf", "leaf", "add"] and small.lhs == small.rhs == 2
    assert [w.terms.nodes[i].kind for i in origins] == ["leaf", "leaf", "add"]


def test_text_and_digest():
    w = World()
    x = w.leaf("x", POSITIVE)
    ob = w.claim(w.uf("f", x), x * Fraction(1, 2))
    assert text(ob) == "n0 = leaf<0>()\nn1 = uf<f>(n0)\nn2 = scl<1/2>(n0)\ngiven n0 > 0\nn1 == n2\n"
    other = dataclasses.replace(ob, given=())
    assert len(digest(ob)) == 32 and digest(ob) != digest(other)
