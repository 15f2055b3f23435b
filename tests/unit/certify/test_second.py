"""Second opinions: z3 and cvc5 on the obligations of sharded training steps, and on claims that a broken kernel would let through."""
import random
import subprocess
import sys
from fractions import Fraction

import pytest
from kernel.expr import World
from kernel.generate import rewritten, term
from kernel.obligations import ALL

from trainverify.certify.exact import Inexact, Undefined, claim_holds, power
from trainverify.certify.second import Opinion, Opinions, second_opinion
from trainverify.certify.smtlib import in_theory
from trainverify.certify.solvers import load
from trainverify.diagnostics import Fault
from trainverify.kernel import NONNEGATIVE, POSITIVE, Proved, Refuted, prove
from trainverify.kernel.rename import canonical

# solver: limit for right obligations and how many are re-proved with it; limit for wrong ones and how many counterexamples it finds at least
SOLVERS = {"z3": (500_000, 48, 50_000, 12), "cvc5": (5_000, 30, 5_000, 5)}
WITH = pytest.mark.parametrize("solver", SOLVERS)


def distinct(wrong):
    """The obligations of the 36 families, without those that are equal up to renaming."""
    found = {}
    for family, n in ALL:
        w = World()
        for pair in family(w, n, wrong):
            found.setdefault(canonical(w.claim(*pair))[0])
    return list(found)


@pytest.fixture(scope="module")
def right():
    return distinct(False)


@pytest.fixture(scope="module")
def wrong():
    """Those elements of wrong variants that are wrong."""
    return [ob for ob in distinct(True) if isinstance(prove(ob), Refuted)]


@WITH
def test_right_obligations_are_proved_again(solver, right):
    limit, least, *_ = SOLVERS[solver]
    opinions = second_opinion(right, solver, limit)
    assert len(right) == 49
    assert opinions.count("disagrees") == 0
    assert opinions.count("agrees") >= least, opinions.summary()
    assert opinions.diagnostics() == []


@WITH
def test_wrong_obligations_are_never_agreed_to(solver, wrong):
    """As if the kernel had proved them: no solver agrees, and some show what is wrong."""
    *_, limit, least = SOLVERS[solver]
    opinions = second_opinion(wrong, solver, limit)
    assert len(wrong) > 30
    assert opinions.count("agrees") == 0
    assert opinions.count("disagrees") >= least, opinions.summary()
    assert all(o.reason for o in opinions.opinions if o.answer == "no answer")


@WITH
def test_random_right_obligations(solver):
    rng, obligations = random.Random(5), []
    while len(obligations) < 40:
        w = World()
        x = term(w, rng, 3, rng.randint(1, 3), safe=True)
        ob = w.claim(x, rewritten(w, rng, x))
        if isinstance(prove(ob), Proved):
            obligations.append(ob)
    opinions = second_opinion(obligations, solver, SOLVERS[solver][2])
    assert opinions.count("disagrees") == 0
    assert opinions.count("agrees") >= 30, opinions.summary()


def claims():
    """False claims of each kind that a solver can refute."""
    w = World()
    x, y, p, z = w.leaf("x"), w.leaf("y"), w.leaf("p", POSITIVE), w.leaf("z", NONNEGATIVE)
    return {
        "sum": w.claim(x + y, x - y),
        "undefined at one point": w.claim(w.lift(1), x / x),
        "a root of a square": w.claim(x, w.sqrt(x * x)),
        "an irrational root": w.claim(w.sqrt(z), w.sqrt(z) * w.sqrt(z + 1)),
        "a maximum": w.claim(w.max([x, y]), w.max([x, y, 2 * y - x])),
        "a comparison": w.claim(w.compare("gt", x, y), w.compare("ge", x, y)),
        "a function": w.claim(w.uf("f", x), w.uf("f", y)),
        "given": w.claim(p * z, p),
        "a fractional power": w.claim(p ** Fraction(3, 2) * p ** Fraction(-1, 2), p * p),
    }


# cvc5 without coverings finds no models with irrational numbers.
@pytest.mark.parametrize(("solver", "name"), [(s, n) for s in SOLVERS for n in claims() if s == "z3" or n not in ("an irrational root", "a fractional power")])
def test_a_broken_kernel_is_found_out(solver, name):
    """The kernel is taken to have proved what is false."""
    ob = claims()[name]
    opinions = second_opinion([ob], solver)
    opinion, = opinions.opinions
    assert opinion.answer == "disagrees"
    assert not isinstance(prove(ob), Proved)
    alarm, = opinions.diagnostics()
    assert alarm.code == "SMT002" and alarm.severity == "internal" and alarm.message.startswith(f"{solver} ")
    assert "disagrees on 1" in opinions.summary()


def test_the_alarm_says_where():
    w = World()
    x, y = w.leaf("x"), w.leaf("y")
    opinion = Opinion(w.claim(x, y), "disagrees", "", (Fraction(0), Fraction(-1, 2)))
    alarm, = Opinions("z3", "5.4.0", (opinion,)).diagnostics()
    assert alarm.message == "z3 5.4.0 has a counterexample to obligation 519950d9c3e5dcbeaacbcba383aba5d5, which the kernel proved"
    assert alarm.notes == ("the sides differ, or the parallel one is undefined, at x1 = -1/2",)


def test_a_model_of_an_abstraction_is_no_disagreement():
    """exp(x/2)^2 = exp(x) is more than the script says about exp, so a solver finds a model; it refutes nothing."""
    w = World()
    x = w.leaf("x")
    ob = w.claim(w.exp(x), w.exp(x * Fraction(1, 2)) * w.exp(x * Fraction(1, 2)))
    assert isinstance(prove(ob), Proved) and not in_theory(ob)
    for solver in SOLVERS:
        opinions = second_opinion([ob], solver)
        assert (opinions.opinions[0].answer, opinions.opinions[0].reason) in [("no answer", "theory"), ("no answer", "incomplete"), ("no answer", "limit")]
        assert opinions.diagnostics() == []


@WITH
def test_opinions_do_not_depend_on_order(solver, right):
    some = [ob for ob in right if len(ob.nodes) < 60]
    first = second_opinion(some, solver, 3_000).opinions
    assert first == second_opinion(some[::-1], solver, 3_000).opinions[::-1]


def test_summary():
    w = World()
    ob = w.claim(w.leaf("x"), w.leaf("x"))
    limit, theory = Opinion(ob, "no answer", "limit"), Opinion(ob, "no answer", "theory")
    opinions = Opinions("z3", "5.4.0", (Opinion(ob, "agrees"), limit, theory, limit))
    assert opinions.summary() == ("z3 5.4.0 re-proved 1 of 4 obligations; no answer on 3 (2 at the limit of their effort, "
                                  "1 outside the theory (exp, log, sin, cos, high powers))")


def test_progress():
    w = World()
    steps = []
    second_opinion([w.claim(w.leaf("x"), w.leaf("x"))] * 3, "z3", progress=lambda done, all_: steps.append((done, all_)))
    assert steps == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(("solver", "package"), [("z3", "z3-solver"), ("cvc5", "cvc5")])
def test_missing_solver(monkeypatch, solver, package):
    monkeypatch.setitem(sys.modules, solver, None)
    with pytest.raises(Fault) as fault:
        second_opinion([], solver)
    diagnostic, = fault.value.diagnostics
    assert diagnostic.code == "SMT001" and diagnostic.severity == "error"
    assert diagnostic.fix == f"pip install 'trainverify[smt]' (or only {package})"


def test_unknown_solver():
    with pytest.raises(ValueError, match="no solver named 'yices'"):
        load("yices")


def test_solvers_are_not_imported_before_they_are_used():
    code = "import sys, trainverify.certify.second, trainverify.certify.dump; sys.exit(bool({'z3', 'cvc5', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# ---- exact evaluation
def test_powers():
    q = Fraction
    assert power(q(4, 9), q(3, 2)) == q(8, 27)
    assert power(q(4, 9), q(-3, 2)) == q(27, 8)
    assert power(q(0), q(0)) == 1 and power(q(0), q(1, 2)) == 0 and power(q(-2), q(-3)) == q(-1, 8)
    assert power(q(10**30), q(1, 30)) == 10 and power(q(1), q(1, 7)) == 1
    for x in (q(2), q(4, 3), q(10**30 + 1)):
        with pytest.raises(Inexact):
            power(x, q(1, 2))
    for x, e in [(q(0), q(-1)), (q(0), q(-1, 2)), (q(-1), q(1, 2)), (q(-1), q(1, 3))]:
        with pytest.raises(Undefined):
            power(x, e)


def test_claims_at_points():
    w = World()
    x, y = w.leaf("x"), w.leaf("y", POSITIVE)
    zero = lambda node, args: Fraction(len(args))  # noqa: E731
    at = lambda a, b, *point: claim_holds(w.claim(a, b), tuple(map(Fraction, point)), zero)  # noqa: E731
    assert at(x / x, w.lift(1), 0, 1) and not at(w.lift(1), x / x, 0, 1)          # undefined on the left, on the right
    assert at(x, y, 1, -1) and not at(x, y, 1, 2)                                 # what is given does not hold; it does
    assert at(w.exp(x) + w.log(y), w.cos(x) + w.sin(x), 0, 1)
    assert at(w.uf("f", x, y), w.lift(2), 0, 1)
    assert at(w.max([x, y]) + w.compare("lt", x, y), y + 1, 0, 1)
    with pytest.raises(Inexact):
        at(w.exp(x), w.exp(x), 1, 1)
