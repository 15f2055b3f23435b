"""The obligations of sharded training steps: right ones are proved, each wrong one is refuted by an element."""
from fractions import Fraction

import pytest

from trainverify.kernel import Proved, Refuted
from trainverify.kernel.refute import DECIMAL, evaluate
from trainverify.kernel.terms import reachable

from .expr import World
from .obligations import ALL

PARAMETERS = pytest.mark.parametrize(("family", "n"), ALL, ids=[f"{f.__name__}-{n}" for f, n in ALL])


def test_there_are_36():
    assert len(ALL) == 36


@PARAMETERS
def test_right(family, n):
    w = World()
    for reference, parallel in family(w, n, False):
        verdict = w.prove(reference, parallel)
        assert isinstance(verdict, Proved), verdict


@PARAMETERS
def test_wrong(family, n):
    w = World()
    pairs = family(w, n, True)
    verdicts = [w.prove(*pair) for pair in pairs]
    refuted = [(pair, v) for pair, v in zip(pairs, verdicts, strict=True) if isinstance(v, Refuted)]
    assert refuted
    assert all(isinstance(v, Proved | Refuted) for v in verdicts)
    (reference, parallel), verdict = refuted[0]
    found = evaluate(tuple(w.terms.nodes), reachable(w.terms.nodes, [reference.i, parallel.i]), verdict.values + (Fraction(1),) * 999, DECIMAL)
    assert abs(float(found[reference.i]) - verdict.lhs) < 1e-9 * (1 + abs(verdict.lhs))
    assert abs(float(found[parallel.i]) - verdict.rhs) < 1e-9 * (1 + abs(verdict.rhs))
    assert verdict.lhs != verdict.rhs
