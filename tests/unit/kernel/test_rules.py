"""Every rule of the normal form against high-precision evaluation: the normal form of a term has the term's value wherever that is defined."""
import random
from fractions import Fraction

import pytest

from trainverify.kernel import ANY, NEGATIVE, NONNEGATIVE, NONZERO, POSITIVE, ZERO
from trainverify.kernel.normal import Builder, Undefined
from trainverify.kernel.poly import OutOfSteps, Steps
from trainverify.kernel.refute import DECIMAL, ERRORS, evaluate, points
from trainverify.kernel.refute import Undefined as NoValue
from trainverify.kernel.terms import reachable

from .expr import World
from .generate import close, precisely, term, value


def compared(w, x, given=(), tries=6):
    """The number of points at which the term's and its normal form's values were compared, all of them equal."""
    ob = w.claim(x, x, given)
    order = reachable(ob.nodes, ob.roots)
    builder = Builder(ob.nodes, dict(ob.given), Steps(20_000))
    try:
        for _ in range(2):          # the second time with all the facts
            builder.restart()
            builder.build(order, reference=True)
    except (OutOfSteps, Undefined):
        return 0
    count = 0
    for leaves in points(ob, tries):
        with precisely():
            try:
                true = evaluate(ob.nodes, order, leaves, DECIMAL)
                if not all(s & (POSITIVE if true[i] > 0 else NEGATIVE if true[i] < 0 else ZERO) for i, s in ob.given):
                    continue
                memo = {}
                for i in order:
                    found = value(builder.functions.ring, builder.values[i], leaves, memo)
                    assert close(found, true[i]), (ob.nodes[i], leaves, found, true[i])
                    sign = POSITIVE if true[i] > DECIMAL.near else NEGATIVE if true[i] < -DECIMAL.near else ZERO if not true[i] else ANY
                    assert builder.signs.of(builder.values[i]) & sign, ("sign", ob.nodes[i], leaves, true[i])
                    assert builder._sign(i) & sign, ("sign by structure", ob.nodes[i], leaves, true[i])
            except (NoValue, *ERRORS):
                continue
        count += 1
    return count


@pytest.mark.parametrize("seed", range(12))
def test_random_terms(seed):
    rng = random.Random(seed)
    points_compared = 0
    for _ in range(150):
        w = World()
        points_compared += compared(w, term(w, rng, rng.randint(1, 4), rng.randint(1, 4), safe=rng.random() < 0.5))
    assert points_compared > 150


RULES = {
    "product of sums": lambda w, x, y: (x + y) * (x - y) * (2 * x + 3),
    "power": lambda w, x, y: (x + y) ** 5,
    "power zero": lambda w, x, y: x**0 + y,
    "negative power": lambda w, x, y: (x + y) ** -3 * y**-2,
    "inverse of content": lambda w, x, y: 1 / (6 * x * y + 4 * x * x),
    "inverse of inverse": lambda w, x, y: 1 / (1 / (x + y) + 1 / x),
    "inverse of a root": lambda w, x, y: (1 + x) / w.sqrt(w.lift(3)) / w.sqrt(w.sqrt(w.lift(5))) / w.sqrt(x),
    "square of a root": lambda w, x, y: w.sqrt(x + y) * w.sqrt(x + y) * w.sqrt(x + y),
    "root of a square": lambda w, x, y: w.sqrt(x * x) + w.sqrt(x * x * y * y),
    "root of a quotient": lambda w, x, y: w.sqrt(x / y) + w.sqrt(1 / x),
    "root of a number": lambda w, x, y: w.sqrt(w.lift(12)) + w.lift(54) ** Fraction(2, 3),
    "root of exponentials": lambda w, x, y: w.sqrt(w.exp(x) * (1 + w.exp(y))),
    "root of a signed product": lambda w, x, y: w.sqrt(-x * y) + w.sqrt(-2 * x),
    "root of a shared factor": lambda w, x, y: w.sqrt(x * y + x * x) + w.sqrt(1 / (x + y)),
    "exponential of a sum": lambda w, x, y: w.exp(x - 2 * y + x * y + 1),
    "exponential of fractions": lambda w, x, y: w.exp(x / 3) * w.exp(x / 7) * w.exp(y / 1000003),
    "exponential of a logarithm": lambda w, x, y: w.exp(2 * w.log(x) - 3 * w.log(x + y) + y),
    "exponential of a part of a logarithm": lambda w, x, y: w.exp(w.log(x) / 2 - w.log(x + y) * 2 / 3),
    "logarithm of an exponential": lambda w, x, y: w.log(w.exp(x) * w.exp(-y) * 6),
    "logarithm of a product": lambda w, x, y: w.log(x * y) + w.log(x) + w.log(x * w.exp(y)),
    "logarithm of a negative": lambda w, x, y: w.log(-x) + w.log(-x * y * y),
    "logarithm of a quotient": lambda w, x, y: w.log(x / y) + w.log(1 / (x + y)) + w.log(1 / x),
    "logarithm of a root": lambda w, x, y: w.log(w.sqrt(x + y)) + w.log(w.sqrt(x) / 3),
    "logarithm of a square": lambda w, x, y: w.log(x * x) + w.log(x**3),
    "logarithm of a number": lambda w, x, y: w.log(w.lift(12) / 35 * x),
    "maximum": lambda w, x, y: w.max([x, w.max([y, w.lift(1)]), w.lift(2), y + 0]),
    "maximum of changed maxima": lambda w, x, y: (w.max([x, 2 * w.max([x, y])]) + w.max([x, -w.max([x, y])]) + w.max([x, w.max([x, y]) ** 2])
                                                  + w.max([y, x * w.max([x, y])]) + w.max([y, w.max([x, y]) + 1])),
    "maximum of one": lambda w, x, y: w.max([x, x + 0]),
    "maximum of ordered": lambda w, x, y: w.max([w.exp(x), w.lift(0)]) + w.max([w.lift(0), -w.exp(x)]) + w.max([x, x + 1]),
    "comparisons": lambda w, x, y: w.sum([w.compare(op, x * w.exp(y), 2 * y) * k for k, op in enumerate(("gt", "ge", "lt", "le", "eq", "ne"), 2)]),
    "comparisons of equals": lambda w, x, y: w.sum([w.compare(op, x + y, y + x) * k for k, op in enumerate(("gt", "ge", "lt", "le", "eq", "ne"), 2)]),
    "comparisons of negatives": lambda w, x, y: w.compare("gt", -2 * x, x * x) + w.compare("eq", -2 * x, y * 3) + w.compare("lt", w.exp(x), 0),
    "indicator squared": lambda w, x, y: w.compare("gt", x, y) * w.compare("gt", x, y) * x + w.compare("gt", x, y) ** 5,
    "comparison of powers": lambda w, x, y: w.compare("gt", x * x * y, x) + w.compare("lt", x * y / 2, 0) + w.compare("eq", x * x * y, y * x),
    "sine and cosine": lambda w, x, y: w.sin(-x) * w.cos(y - x) + w.cos(x) ** 4 + w.sin(x - x) + w.cos(0 * x),
    "inverse cosine": lambda w, x, y: w.sin(x) / w.cos(x) ** 3,
    "uninterpreted": lambda w, x, y: w.uf("f", (x * x - y * y) / (x - y), w.exp(x)) - w.uf("f", x + y, w.exp(x)) + w.uf("g"),
}


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule):
    w = World()
    assert compared(w, RULES[rule](w, w.leaf("x"), w.leaf("y")), tries=24) >= 2


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sign", [POSITIVE, NEGATIVE, NONNEGATIVE, NONZERO])
def test_rule_with_known_signs(rule, sign):
    w = World()
    compared(w, RULES[rule](w, w.leaf("x", sign), w.leaf("y", POSITIVE)), tries=12)
