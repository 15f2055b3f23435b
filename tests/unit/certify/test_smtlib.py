"""The SMT-LIB form: its text, and its meaning against exact evaluation."""
import random
from fractions import Fraction

import pytest
from kernel.expr import World
from kernel.generate import number, term
from kernel.test_definedness import HOLES
from kernel.test_false import false_obligation

from trainverify.certify.exact import Inexact, claim_holds
from trainverify.certify.smtlib import ABSTRACT, in_theory, parts, script, symbol
from trainverify.certify.solvers import load
from trainverify.kernel import ANY, NEGATIVE, NONNEGATIVE, NONPOSITIVE, NONZERO, POSITIVE, ZERO, Node, Obligation, Proved, prove

SMALL = 100_000

SCRIPT = """\
; a gate, reordered
(set-logic QF_UFNRA)
(declare-fun x0 () Real)
(declare-fun x1 () Real)
(declare-fun n2 () Real)
(declare-fun real_exp (Real) Real)
(declare-fun i1 () Real)
(declare-fun n8 () Real)
(declare-fun |uf 1 f| (Real) Real)
(declare-fun n12 () Real)
(declare-fun n17 () Real)
(assert (>= x1 0.0))
(assert (and (>= n2 0.0) (= (* n2 n2) x1)))
(define-fun n3 () Real (- x1))
(define-fun n4 () Real (+ x0 n3))
(assert (> (real_exp x0) 0.0))
(assert (> (real_exp x1) 0.0))
(assert (= (* (real_exp x1) i1) 1.0))
(define-fun n5 () Real (* (real_exp x0) i1))
(define-fun n6 () Real (* n5 n2))
(define-fun n7.1 () Real (ite (>= x0 x1) x0 x1))
(define-fun n7 () Real (ite (>= n7.1 n2) n7.1 n2))
(assert (= n8 (|uf 1 f| n7)))
(define-fun n9 () Real (+ n6 n8))
(define-fun n10 () Real (real_exp x0))
(define-fun n11 () Real (real_exp x1))
(assert (=> (not (= n11 0.0)) (= (* n11 n12) 1.0)))
(define-fun n13 () Real (* n10 n12))
(define-fun n14 () Real (* n13 n2))
(define-fun n15 () Real (ite (>= x0 x1) x0 x1))
(define-fun n16.1 () Real (ite (>= x0 x1) x0 x1))
(define-fun n16 () Real (ite (>= n16.1 n2) n16.1 n2))
(assert (= n17 (|uf 1 f| n16)))
(define-fun n18 () Real (* (- (/ 2.0 3.0)) n17))
(define-fun n19 () Real (+ n14 n18))
(assert (> x1 0.0))
; the claim fails: the parallel term is undefined, or differs
(assert (or
  (not (not (= n11 0.0)))
  (not (= n9 n19))))
(check-sat)
"""


def gate():
    w = World()
    x, y = w.leaf("x"), w.leaf("y", POSITIVE)
    root = w.sqrt(y)
    return w.claim(w.exp(x - y) * root + w.uf("f", w.max([x, y, root])),
                   w.exp(x) / w.exp(y) * root + w.uf("f", w.max([root, w.max([y, x])])) * Fraction(-2, 3))


def test_text():
    assert script(gate(), ["a gate, reordered"]) == SCRIPT


def test_text_does_not_depend_on_the_process():
    assert script(gate()) == script(gate())


def test_parts():
    assert parts(gate()) == {"exp", "root", "division", "max", "function"}
    assert not in_theory(gate())
    w = World()
    x = w.leaf("x")
    assert parts(w.claim(x + x, 2 * x)) == frozenset()
    assert parts(w.claim(x**3, x * x * x)) == {"power"}
    assert parts(w.claim(x**-3, x ** Fraction(3, 2))) == {"division", "root"}
    assert parts(w.claim(x**1000, x ** Fraction(1, 1000))) == {"high power"}
    assert in_theory(w.claim(w.uf("f", x), w.compare("gt", x, x / x)))
    for part in sorted(ABSTRACT - {"high power"}):
        assert not in_theory(w.claim(x, w.apply(part, x)))


def test_different_tags_have_different_names():
    tags = ["silu", "silu'", "a|b", "a%7cb", "a\\b", "a b", "\n", "\u00e9", ""]
    names = {symbol(tag, arity) for tag in tags for arity in (0, 1)}
    assert len(names) == 2 * len(tags)
    assert all(n.isascii() and n.isprintable() and n[1:-1].isprintable() and not set("|\\") & set(n[1:-1]) for n in names)


@pytest.mark.parametrize("name", ["z3", "cvc5"])
def test_odd_tags_are_accepted(name):
    w = World()
    for tag in ("a|b", "new\nline", "silu'"):
        assert load(name).run(script(w.claim(w.uf(tag, w.leaf("x") + 1), w.uf(tag, 1 + w.leaf("x")))), SMALL).status == "unsat"
    assert load(name).run(script(w.claim(w.uf("c"), w.uf("c") + 0)), SMALL).status == "unsat"
    assert load(name).run(script(w.claim(w.uf("c"), w.uf("d"))), SMALL).status == "sat"


def ground(w, rng):
    """A random claim without leaves."""
    w.leaf = lambda name, sign=None: w.lift(number(rng))
    side = lambda: term(w, rng, 1, rng.randint(1, 3), safe=rng.random() < 0.5)  # noqa: E731
    x = side()
    y = x + w.lift(0) * side() if rng.random() < 0.5 else side()
    given = [(side(), rng.choice([NEGATIVE, ZERO, POSITIVE, NONPOSITIVE, NONZERO, NONNEGATIVE, ANY]))] if rng.random() < 0.5 else []
    return w.claim(x, y, given)


def test_ground_claims_mean_what_exact_evaluation_says():
    """The script has a model iff the claim is false."""
    rng, z3, seen = random.Random(3), load("z3"), {True: 0, False: 0}
    while min(seen.values()) < 60:
        ob = ground(World(), rng)
        if not in_theory(ob) or "function" in parts(ob):
            continue
        try:
            holds = claim_holds(ob, (), lambda node, args: Fraction(0))
        except Inexact:
            continue
        seen[holds] += 1
        assert z3.run(script(ob), SMALL).status == ("unsat" if holds else "sat"), ob


# True, but it takes more than the kernel's rules of signs to see that the parallel side is defined.
CLEVER = {"a variance that is not evidently positive", "minimum of positive values"}


def test_where_terms_are_undefined():
    """No more is proved than the kernel proves, but for what is true."""
    z3, proved = load("z3"), set()
    for name, (sides, *expected) in HOLES.items():
        for verdict, swap in zip(expected, (False, True), strict=True):
            w = World()
            a, b = sides(w, w.leaf("x"), w.leaf("y"))
            if verdict in ("refuted", "definedness") and z3.run(script(w.claim(b, a) if swap else w.claim(a, b)), SMALL).status == "unsat":
                proved.add(name)
    assert proved == CLEVER


@pytest.mark.parametrize(("name", "count", "limit"), [("z3", 150, 50_000), ("cvc5", 60, 2_000)])
def test_random_false_obligations(name, count, limit):
    rng, solver = random.Random(11), load(name)
    assert all(solver.run(script(false_obligation(World(), rng)), limit).status != "unsat" for _ in range(count))


def test_logarithms_that_only_the_parallel_side_has():
    """exp(log x) is x where log x is defined, and nothing is claimed to be so elsewhere."""
    w = World()
    x, y = w.leaf("x"), w.leaf("y")
    for right in (y * w.exp(-w.log(x)) * x, y + 0 * w.log(x), y + w.log(w.exp(w.log(x))) - w.log(x), y * w.exp(w.log(x) - w.log(x))):
        ob = w.claim(y, right)
        assert not isinstance(prove(ob), Proved)
        for name in ("z3", "cvc5"):
            assert load(name).run(script(ob), SMALL).status != "unsat"
    z = w.leaf("z", NONNEGATIVE)                      # z = 0 is the only mistake here, and y = 0 none
    ob = w.claim(1 / y, 1 / y + 0 * w.log(w.exp(w.log(z) + y)))
    assert not isinstance(prove(ob), Proved)
    assert load("z3").run(script(ob), SMALL).status != "unsat" and load("cvc5").run(script(ob), SMALL).status != "unsat"
    assert isinstance(prove(w.claim(y * w.exp(-w.log(x)) * x, y)), Proved)
    assert load("z3").run(script(w.claim(y * w.exp(-w.log(x)) * x, y)), SMALL).status == "unsat"


def test_sums_of_sums_do_not_explode():
    w = World()
    x = y = w.leaf("x")
    for _ in range(200):
        y = y + y
    w.leaf("z")
    assert len(script(w.claim(w.exp(y - y + x), w.exp(x)))) < 20_000
    assert load("z3").run(script(w.claim(w.exp(y - y + x), w.exp(x))), SMALL).status == "unsat"


def test_identities_of_functions():
    """What the statements about exp, log, sin and cos suffice for."""
    z3 = load("z3")
    w = World()
    x, y, p = w.leaf("x"), w.leaf("y"), w.leaf("p", POSITIVE)
    for a, b in [(w.exp(x + y), w.exp(x) * w.exp(y)), (w.exp(2 * x - 3 * y) * w.exp(3 * y), w.exp(x) * w.exp(x)), (w.log(w.exp(x + y)), y + x),
                 (w.exp(w.log(p) + x), p * w.exp(x)), (w.exp(w.lift(0)), w.lift(1)), (w.sin(x) * w.sin(x), 1 - w.cos(x) * w.cos(x)),
                 (p ** Fraction(3, 2), p * w.sqrt(p)), (p ** Fraction(-1, 2), w.inv(w.sqrt(p))), (p**-2, w.inv(p) * w.inv(p))]:
        ob = w.claim(a, b)
        assert isinstance(prove(ob), Proved)
        assert z3.run(script(ob), 1_000_000).status == "unsat", script(ob)


def test_a_kind_without_meaning_is_refused():
    with pytest.raises(ValueError, match="no SMT-LIB meaning"):
        script(Obligation((Node("tanh", None, ()),), 0, 0))
