"""Folding and definedness: what is dropped must be defined wherever the reference is; garbage is never anything else."""
import math

import numpy as np
import pytest
import torch

from trainverify.kernel.store import GARBAGE, INF_ID, NINF_ID, ONE_ID, TOTAL, ZERO_ID

from .numeric import mistakes, run


def decided(reference, parallel, values: int = 3) -> list[bool]:
    """Which elements are proved equal; whatever is proved is also right in numbers."""
    r = run(reference, parallel, (2,) * values)
    assert mistakes(r) == []
    return r.proved().tolist()


def proved(reference, parallel) -> bool:
    answers = decided(reference, parallel)
    assert len(set(answers)) == 1
    return answers[0]


def opaque(tag):
    return lambda m, x: m.opaque(tag, x)


PARTIAL = {"inv": lambda m, x: m.inv(x), "log": lambda m, x: m.log(x), "sqrt": lambda m, x: m.sqrt(x), "pow -1": lambda m, x: m.pow(x, -1),
           "pow 1/2": lambda m, x: m.pow(x, 0.5), "pow -3/2": lambda m, x: m.pow(x, -1.5), "pow 0.3": lambda m, x: m.pow(x, 0.3),
           "asin": opaque("asin"), "log1p": opaque("log1p"), "acosh": opaque("acosh"), "erfinv": opaque("erfinv"), "lgamma": opaque("lgamma")}
DROPPED = {"0 *": lambda m, x: m.mul(x, m.const(0)), "minus itself": lambda m, x: m.sub(x, x), "plus its opposite": lambda m, x: m.add(m.neg(x), x),
           "equals itself": lambda m, x: m.sub(m.const(1), m.compare("eq", x, x)), "exceeds itself": lambda m, x: m.compare("gt", x, x),
           "dot 0": lambda m, x: m.reshape(m.matmul(m.expand(m.reshape(x, (2, 1)), (2, 2)), m.const(0, (2, 1))), (2,)),
           "to the 0th": lambda m, x: m.sub(m.pow(x, 0), m.const(1))}


@pytest.mark.parametrize("function", PARTIAL)
@pytest.mark.parametrize("drop", DROPPED)
def test_what_may_be_undefined_is_not_dropped(function, drop):
    """exp(y) plus a zero that is one only where the parallel side happens to be defined; right if the reference computes it too."""
    f, zero = PARTIAL[function], DROPPED[drop]
    assert not proved(lambda m, x, y, z: m.exp(y), lambda m, x, y, z: m.add(m.exp(y), zero(m, f(m, x))))
    assert proved(lambda m, x, y, z: (f(m, x), m.exp(y))[1], lambda m, x, y, z: m.add(m.exp(y), zero(m, f(m, x))))


@pytest.mark.parametrize("function", PARTIAL)
def test_what_may_be_undefined_does_not_cancel_later(function):
    f = PARTIAL[function]
    assert not proved(lambda m, x, y, z: m.exp(y), lambda m, x, y, z: m.sub(m.add(m.exp(y), f(m, x)), f(m, x)))
    assert not proved(lambda m, x, y, z: m.exp(y), lambda m, x, y, z: m.div(m.mul(m.exp(y), m.exp(f(m, x))), m.exp(f(m, x))))
    assert not proved(lambda m, x, y, z: m.exp(y), lambda m, x, y, z: m.add(m.sum(m.stack([f(m, x), m.exp(y), m.neg(f(m, x))]), [0]), m.const(0)))


def test_functions_that_are_known_to_be_total_may_be_dropped():
    assert TOTAL >= {"erf", "floor", "atan"} and not TOTAL & {"asin", "power", "log1p", "lgamma", "tan", "fmod", "erfinv"}
    for tag in ("sinh", "floor", "atan"):
        assert proved(lambda m, x, y, z: m.exp(y), lambda m, x, y, z: m.add(m.exp(y), m.mul(m.opaque(tag, x), m.const(0))))


def test_a_partial_function_of_equal_operands_is_one():
    assert proved(lambda m, x, y, z: m.opaque("asin", m.mul(x, m.add(y, z))), lambda m, x, y, z: m.opaque("asin", m.add(m.mul(x, y), m.mul(z, x))))


def test_a_quotient_by_itself_is_one_where_the_reference_divides():
    one = lambda m, x: m.mul(x, m.inv(x))  # noqa: E731
    assert not proved(lambda m, x, y, z: m.exp(y), lambda m, x, y, z: m.mul(m.exp(y), one(m, x)))
    assert not proved(lambda m, x, y, z: m.exp(y), lambda m, x, y, z: m.mul(m.mul(m.inv(x), x), m.exp(y)))
    assert proved(lambda m, x, y, z: m.exp(m.div(y, x)), lambda m, x, y, z: m.exp(m.mul(m.div(y, x), one(m, x))))
    assert proved(lambda m, x, y, z: (m.inv(x), m.exp(y))[1], lambda m, x, y, z: m.mul(m.mul(m.inv(x), x), m.exp(y)))


def test_conditions_follow_from_signs():
    """Of the parallel side alone: 1/(1 + exp x), log(1 + x^2), sqrt(x^2 + y^2) and 1/exp are defined everywhere."""
    safe = [lambda m, x, y: m.inv(m.add(m.const(1), m.exp(x))), lambda m, x, y: m.log(m.add(m.mul(x, x), m.const(1))),
            lambda m, x, y: m.sqrt(m.add(m.mul(x, x), m.mul(y, y))), lambda m, x, y: m.inv(m.exp(x)), lambda m, x, y: m.log(m.maximum(x, m.const(1)))]
    for f in safe:
        assert proved(lambda m, x, y, z: m.exp(z), lambda m, x, y, z: m.add(m.exp(z), m.mul(f(m, x, y), m.const(0))))
    unsafe = [lambda m, x, y: m.inv(m.add(m.const(-1), m.exp(x))), lambda m, x, y: m.log(m.mul(x, x)), lambda m, x, y: m.sqrt(m.mul(x, y)),
              lambda m, x, y: m.inv(m.maximum(x, m.const(0))), lambda m, x, y: m.log(m.maximum(x, y)), lambda m, x, y: m.inv(m.sub(m.exp(x), m.exp(y)))]
    for f in unsafe:
        assert not proved(lambda m, x, y, z: m.exp(z), lambda m, x, y, z: m.add(m.exp(z), m.mul(f(m, x, y), m.const(0))))


def test_conditions_of_the_reference_are_facts():
    """log x of the reference: then x is positive for the parallel side too."""
    for f in (lambda m, x: m.inv(x), lambda m, x: m.sqrt(x), lambda m, x: m.log(m.mul(x, x)), lambda m, x: m.log(m.inv(x)), lambda m, x: m.pow(x, -1.5)):
        assert proved(lambda m, x, y, z: (m.log(x), m.exp(z))[1], lambda m, x, y, z: m.add(m.exp(z), m.mul(f(m, x), m.const(0))))
        assert not proved(lambda m, x, y, z: (m.log(y), m.exp(z))[1], lambda m, x, y, z: m.add(m.exp(z), m.mul(f(m, x), m.const(0))))
    assert not proved(lambda m, x, y, z: (m.sqrt(x), m.exp(z))[1], lambda m, x, y, z: m.add(m.exp(z), m.mul(m.log(x), m.const(0))))
    assert not proved(lambda m, x, y, z: (m.inv(x), m.exp(z))[1], lambda m, x, y, z: m.add(m.exp(z), m.mul(m.sqrt(x), m.const(0))))


def test_a_fact_of_one_element_says_nothing_of_another():
    reference = lambda m, x, y, z: (m.log(m.take([x], torch.tensor([1]))), m.exp(z))[1]  # noqa: E731
    assert decided(reference, lambda m, x, y, z: m.add(m.exp(z), m.mul(m.log(x), m.const(0)))) == [True, False]


def test_the_absolute_value_is_no_root_of_a_square_of_a_root():
    """sqrt(x)^2 is x where the reference takes the root, and undefined elsewhere; sqrt(x^2) is not x."""
    square = lambda m, r: m.mul(r, r)  # noqa: E731
    assert not proved(lambda m, x, y, z: m.exp(x), lambda m, x, y, z: m.exp(square(m, m.sqrt(x))))
    assert proved(lambda m, x, y, z: (m.sqrt(x), m.exp(x))[1], lambda m, x, y, z: m.exp(square(m, m.sqrt(x))))
    assert not proved(lambda m, x, y, z: m.exp(x), lambda m, x, y, z: m.exp(m.sqrt(square(m, x))))


def test_garbage_is_absorbed_by_every_operation():
    def ids(f):
        r = run(lambda m, x: m.exp(x), f, (4,))
        assert mistakes(r) == []
        return r.ids[1][-1].tolist()
    g = lambda m: m.garbage("g", 4)  # noqa: E731
    operations = [lambda m, x: m.add(x, g(m)), lambda m, x: m.add(g(m), m.const(0)), lambda m, x: m.mul(g(m), m.const(0)), lambda m, x: m.mul(x, g(m)),
                  lambda m, x: m.sub(g(m), g(m)), lambda m, x: m.sub(m.const(0), g(m)), lambda m, x: m.neg(g(m)), lambda m, x: m.exp(g(m)),
                  lambda m, x: m.inv(g(m)), lambda m, x: m.sqrt(g(m)), lambda m, x: m.log(g(m)), lambda m, x: m.maximum(g(m), x),
                  lambda m, x: m.maximum(g(m), g(m)), lambda m, x: m.compare("eq", g(m), g(m)), lambda m, x: m.compare("lt", g(m), m.const(math.inf)),
                  lambda m, x: m.opaque("atan", g(m)), lambda m, x: m.sin(g(m)), lambda m, x: m.pow(g(m), 0), lambda m, x: m.add(m.const(math.inf), g(m)),
                  lambda m, x: m.mul(m.const(math.inf), g(m)), lambda m, x: m.scatter_sum(g(m), torch.arange(4), x),
                  lambda m, x: m.expand(m.sum(g(m)), (4,)), lambda m, x: m.expand(m.amax(g(m)), (4,)), lambda m, x: m.cumsum(g(m), 0),
                  lambda m, x: m.reshape(m.matmul(m.reshape(g(m), (2, 2)), m.const(0, (2, 2))), (4,)),
                  lambda m, x: m.where(m.compare("gt", x, m.const(0)), x, g(m))]
    for f in operations:
        assert ids(f) == [GARBAGE] * 4
    assert ids(lambda m, x: m.where(torch.tensor([True, False, True, True]), m.exp(x), g(m)))[1] == GARBAGE
    assert not run(g_only := lambda m, x: g(m), g_only, (4,)).proved().any()
    assert GARBAGE not in ids(lambda m, x: m.load(m.store(m.cell(g(m)), 0, (4,), (1,), x), 0, (4,), (1,)))


def test_infinities_of_masks():
    inf, x_ = math.inf, "x"
    cases = [("add", x_, -inf, NINF_ID), ("sub", x_, -inf, INF_ID), ("sub", x_, inf, NINF_ID), ("add", inf, -inf, GARBAGE), ("sub", inf, inf, GARBAGE),
             ("mul", 0, inf, GARBAGE), ("mul", x_, inf, GARBAGE), ("mul", 2, -inf, NINF_ID), ("mul", -2, -inf, INF_ID), ("maximum", x_, inf, INF_ID),
             ("maximum", -inf, -inf, NINF_ID), ("div", x_, inf, ZERO_ID), ("div", 1, 0, GARBAGE), ("div", 0, 0, GARBAGE)]
    for op, a, b, expected in cases:
        f = lambda m, x: getattr(m, op)(*(x if v is x_ else m.mul(m.const(v), m.add(m.mul(x, m.const(0)), m.const(1))) for v in (a, b)))  # noqa: E731
        r = run(lambda m, x: m.exp(x), f, (2,))
        assert r.ids[1][-1].tolist() == [expected] * 2, (op, a, b)
    r = run(lambda m, x: m.exp(x), lambda m, x: m.maximum(x, m.const(-inf)), (2,))
    assert r.ids[1][-1].tolist() == r.ids[1][0].tolist()
    compared = [("gt", inf, 1, ONE_ID), ("gt", -inf, -inf, ZERO_ID), ("eq", inf, inf, ONE_ID), ("eq", -inf, 0, ZERO_ID), ("lt", -inf, 3, ONE_ID)]
    for op, a, b, expected in compared:
        f = lambda m, x: m.compare(op, *(m.add(m.mul(x, m.const(0)), m.const(v)) for v in (a, b)))  # noqa: E731
        assert run(f, f, (2,)).ids[1][-1].tolist() == [expected] * 2
    lost = lambda m, x: m.add(m.log(x), m.const(-inf))  # noqa: E731
    assert (run(lambda m, x: m.exp(x), lost, (2,)).ids[1][-1] == GARBAGE).all()


def test_masked_attention_meets_its_unmasked_part():
    mask = torch.tensor([True, False])

    def reference(m, x, y, z):
        s = m.where(mask, x, m.const(-math.inf))
        e = m.exp(m.sub(s, m.amax(s, [0], True)))
        return m.div(e, m.sum(e, [0], True))
    assert decided(reference, lambda m, x, y, z: m.where(mask, m.const(1, (2,)), m.const(0))) == [True, True]
    assert decided(reference, lambda m, x, y, z: m.where(~mask, m.const(1, (2,)), m.const(0))) == [False, False]


def test_infinite_and_undefined_outputs_are_never_proved():
    for f in (lambda m, x: m.add(x, m.const(math.inf)), lambda m, x: m.div(x, m.const(0)), lambda m, x: m.log(m.const(-1.0, (2,))),
              lambda m, x: m.sqrt(m.neg(m.add(m.const(1), m.mul(x, x))))):
        assert not run(f, f, (2,)).proved().any()


def test_exact_rationals_are_folded_and_long_ones_kept():
    f = lambda m, x: m.add(m.mul(x, m.const(0)), m.const(0.1))  # noqa: E731
    r = run(lambda m, x: m.mul(f(m, x), f(m, x)), lambda m, x: m.scale(f(m, x), 0.1), (2,))
    assert r.proved().all() and mistakes(r) == []
    store = r.claims.store
    assert store.constants[int(r.ids[0][-1][0])].as_integer_ratio() == (1, 100)

    def power(m, x):
        out = m.add(m.mul(x, m.const(0)), m.const(3))
        for _ in range(7):
            out = m.mul(out, out)
        return out
    r = run(power, lambda m, x: m.add(power(m, x), m.const(0)), (1,))
    assert r.proved().all() and all(q.numerator.bit_length() <= 64 for q in r.claims.store.constants.values())


def test_sums_over_many_places_and_of_none():
    index = torch.tensor([0, 1, 1, 0])
    r = run(lambda m, x, y: m.scatter_sum(x, index, y),
            lambda m, x, y: m.add(x, m.add(m.take([y], torch.tensor([4, 3])), m.take([y], torch.tensor([1, 2])))), (2, 4))
    assert r.proved().all() and mistakes(r) == []
    wrong = run(lambda m, x, y: m.scatter_sum(x, index, y), lambda m, x, y: m.scatter_sum(x, 1 - index, y), (2, 4))
    assert not wrong.proved().any() and mistakes(wrong) == []
    empty = run(lambda m, x: x, lambda m, x: m.sum(m.reshape(m.take([x], torch.zeros(0, dtype=torch.int64)), (3, 0)), [1]), (2,))
    assert np.array_equal(empty.ids[1][-1], [ZERO_ID] * 3)
