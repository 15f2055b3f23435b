"""The field: ring laws, movement, cells, special elements, order."""
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainverify.algebra.field import Field
from trainverify.algebra.primes import MODULI

from .fieldkit import one, softmax, symbols, through_memory

INF, NAN = math.inf, math.nan
derandomised = settings(derandomize=True, deadline=None, max_examples=60)


@pytest.fixture
def m():
    return Field(1)


def same(m, a, b) -> bool:
    return bool(m.equal(a, b).all())


def differ(m, a, b) -> bool:
    return not bool(m.equal(a, b).any())


def symbolic(m, *xs):
    """Numbers that are not known to be constants."""
    s = symbols(m, 1, len(xs))
    t = m.sub(s, s)
    return m.add(m.where(torch.tensor([x == x and abs(x) != INF for x in xs]), t, m.const(0)), m.data(torch.tensor(xs, dtype=torch.float64)))


# ---- ring
small = st.fractions(min_value=-50, max_value=50, max_denominator=60)


@derandomised
@given(small, small, small)
def test_rational_arithmetic_is_exact(x, y, z):
    m = Field(1)
    a, b, c = (m.const(v) for v in (x, y, z))
    got = m.sub(m.mul(m.add(a, b), c), a)
    assert m.constants.residues(got.num).tolist() == [Fraction((x + y) * z - x).numerator * pow(((x + y) * z - x).denominator, -1, p) % p for p in MODULI]


@derandomised
@given(small, small, small)
def test_polynomials_in_symbols_agree_with_python_integers(x, y, z):
    m = Field(1)
    s = symbols(m, 1, 3)
    got = m.add(m.mul(m.add(m.scale(s, x), m.const(y)), s), m.const(z))
    for i, p in enumerate(MODULI):
        fx, fy, fz = (v.numerator * pow(v.denominator, -1, p) for v in (x, y, z))
        assert got.res[i].tolist() == [((fx * v + fy) * v + fz) % p for v in s.res[i].tolist()]


def test_field_laws(m):
    a, b, c = (symbols(m, 10 * i, 2, 3) for i in (1, 2, 3))
    assert same(m, m.mul(a, m.add(b, c)), m.add(m.mul(a, b), m.mul(a, c)))
    assert same(m, m.mul(m.inv(a), a), one(m)) and same(m, m.div(a, b), m.mul(a, m.inv(b)))
    assert same(m, m.sub(a, b), m.add(a, m.neg(b))) and differ(m, m.sub(a, b), m.sub(b, a))
    assert same(m, m.sum(a), m.sum(m.sum(a, [0]), [0])) and same(m, m.scale(m.sum(a, [-1]), Fraction(1, 3)), m.div(m.sum(a, [1]), m.const(3)))
    assert same(m, m.take([m.cumsum(a, 1)], torch.tensor([3, 6])), m.sum(a, [1]))


def test_matmul_broadcasts_and_meets_its_definition(m):
    a, b = symbols(m, 10, 2, 1, 3, 4), symbols(m, 100, 5, 4, 2)
    got = m.matmul(a, b)
    assert got.shape == (2, 5, 3, 2)
    wide = m.mul(m.reshape(a, (2, 1, 3, 4, 1)), m.reshape(b, (1, 5, 1, 4, 2)))
    assert same(m, got, m.sum(wide, [3]))


def test_symbols_are_the_same_on_both_sides_and_differ_between_seeds(m):
    again = Field(1)
    assert torch.equal(m.symbols("a", 5, 4).res, again.symbols("b", 3, 6).res[:, 2:])
    assert not (m.symbols("a", 5, 4).res == Field(2).symbols("a", 5, 4).res).any()
    assert differ(m, m.symbols("a", 5, 4), m.symbols("a", 6, 4))


# ---- functions
def test_exp_and_log_are_homomorphisms(m):
    a, b = symbols(m, 10, 20), symbols(m, 50, 20)
    assert same(m, m.exp(m.add(a, b)), m.mul(m.exp(a), m.exp(b)))
    assert same(m, m.exp(m.neg(a)), m.inv(m.exp(a)))
    assert same(m, m.log(m.mul(a, b)), m.add(m.log(a), m.log(b)))
    assert same(m, m.log(m.inv(a)), m.neg(m.log(a)))
    assert same(m, m.exp(m.log(a)), a) and same(m, m.log(m.exp(a)), a)
    assert same(m, m.exp(m.sub(a, m.log(b))), m.div(m.exp(a), b))
    assert same(m, m.exp(m.scale(m.log(a), 3)), m.pow(a, 3))
    assert differ(m, m.log(m.neg(a)), m.log(a)) and differ(m, m.exp(a), m.exp(m.neg(a))) and differ(m, m.exp(a), a)
    assert differ(m, m.log(m.add(a, b)), m.add(m.log(a), m.log(b)))


def test_roots(m):
    a, b = symbols(m, 10, 20), symbols(m, 50, 20)
    s = m.sqrt(a)
    assert same(m, m.mul(s, s), a) and same(m, m.pow(s, 2), a) and same(m, m.pow(s, 4), m.mul(a, a))
    assert same(m, m.sqrt(m.mul(a, b)), m.mul(s, m.sqrt(b))) and same(m, m.sqrt(m.inv(a)), m.inv(s))
    assert same(m, m.pow(a, 0.5), s) and same(m, m.pow(a, -0.5), m.inv(s)) and same(m, m.pow(a, 1.5), m.mul(a, s))
    r = m.inv(s)
    assert same(m, m.pow(a, -1.5), m.mul(m.mul(r, r), r)) and same(m, m.pow(m.pow(a, -0.5), 3), m.pow(a, -1.5))
    assert differ(m, m.sqrt(m.neg(a)), s) and differ(m, s, a)
    assert same(m, m.mul(through_memory(m, s), through_memory(m, s)), a)
    assert same(m, m.sqrt(m.scale(a, Fraction(1, 10))), m.div(s, m.const(math.sqrt(10))))


def test_roots_are_never_below_zero(m):
    """Nor are their positive multiples, absolute values and comparisons; negative multiples may be."""
    a = symbols(m, 10, 20)
    known = [m.sqrt(a), m.abs(a), m.compare("gt", a, m.const(0)), m.scale(m.sqrt(a), Fraction(1, 3)), m.div(m.abs(a), m.const(7))]
    for v in known:
        assert same(m, m.compare("lt", v, m.const(0)), m.const(0, (20,))) and same(m, m.compare("ge", through_memory(m, v), m.const(0)), m.const(1, (20,)))
    for v in (a, m.neg(m.scale(m.sqrt(a), 1)), m.scale(m.sqrt(a), -2), m.sub(m.abs(a), m.const(1))):
        assert differ(m, m.compare("lt", v, m.const(0)), m.const(0, (20,)))


def test_powers(m):
    a = symbols(m, 10, 4)
    assert same(m, m.pow(a, 5), m.mul(a, m.mul(m.mul(a, a), m.mul(a, a)))) and same(m, m.pow(a, -2), m.inv(m.mul(a, a)))
    assert same(m, m.pow(a, 0), m.const(1, (4,))) and same(m, m.pow(a, 0.3), m.pow(a, 0.3)) and differ(m, m.pow(a, 0.3), m.pow(a, 0.31))
    assert same(m, m.power(a, m.const(2, (4,))), m.mul(a, a))
    assert same(m, m.power(m.const(2), a), m.exp(m.mul(a, m.log(m.const(2)))))


def test_uninterpreted_functions(m):
    a, b = symbols(m, 10, 4), symbols(m, 50, 4)
    assert same(m, m.opaque("f", a, b), m.opaque("f", m.add(a, m.const(0)), b))
    assert differ(m, m.opaque("f", a, b), m.opaque("f", b, a)) and differ(m, m.opaque("f", a), m.opaque("g", a))
    assert differ(m, m.sin(a), m.cos(a)) and same(m, m.erf(m.scale(a, 2)), m.erf(m.add(a, a)))
    assert m.to_float(m.opaque("floor", m.const(2.5))).item() == 2 and m.to_float(m.opaque("mystery", m.const(2.5))) is None
    assert same(m, m.opaque("f", m.sqrt(a)), m.opaque("f", m.sqrt(a)))


# ---- order
def test_maxima_are_flattened_sets(m):
    a, b, c = symbols(m, 10, 6), symbols(m, 50, 6), symbols(m, 90, 6)
    ab = m.maximum(a, b)
    assert same(m, ab, m.maximum(b, a)) and same(m, m.maximum(a, a), a) and same(m, m.maximum(ab, b), ab)
    assert same(m, m.maximum(ab, c), m.maximum(a, m.maximum(c, b))) and same(m, m.amax(m.stack([a, b, c]), [0]), m.maximum(ab, c))
    assert same(m, m.maximum(through_memory(m, ab), c), m.maximum(a, m.maximum(c, b)))
    assert differ(m, ab, a) and differ(m, ab, m.minimum(a, b)) and differ(m, ab, m.maximum(a, c))
    assert same(m, m.minimum(m.minimum(a, b), c), m.amin(m.stack([c, a, b]), [0]))
    assert same(m, m.neg(m.minimum(a, b)), m.maximum(m.neg(a), m.neg(b)))


def test_amax_in_blocks(m):
    a = symbols(m, 10, 3, 8)
    left, right = (m.take([a], torch.arange(24).reshape(3, 8)[:, s] + 1) for s in (slice(0, 3), slice(3, 8)))
    assert same(m, m.amax(a, [-1]), m.maximum(m.amax(left, [-1]), m.amax(right, [-1])))
    assert m.amax(a, [-1], True).shape == (3, 1) and m.amax(a).shape == () and same(m, m.amax(a), m.amax(m.amax(a, [0]), [0]))


def test_maxima_with_constants(m):
    a, zero = symbols(m, 10, 6), m.const(0)
    relu = m.maximum(a, zero)
    assert same(m, relu, m.mul(a, m.compare("gt", a, zero))) and same(m, m.maximum(relu, zero), relu)
    assert same(m, relu, m.where(m.compare("gt", a, zero), a, zero))
    assert same(m, m.compare("gt", relu, zero), m.compare("gt", a, zero))
    assert same(m, m.maximum(m.maximum(a, zero), m.const(-1)), relu)
    assert differ(m, m.maximum(a, m.const(1)), relu) and differ(m, m.minimum(a, zero), relu) and differ(m, m.minimum(a, m.const(1)), a)
    assert same(m, m.maximum(a, m.const(-INF)), a) and m.maximum(a, m.const(INF)).sp.eq(1).all()
    assert m.to_float(m.maximum(m.const(1), m.const(2))).item() == 2


def test_comparisons(m):
    a, b = symbols(m, 10, 6), symbols(m, 50, 6)
    gt, le, lt = m.compare("gt", a, b), m.compare("le", a, b), m.compare("lt", b, a)
    assert same(m, m.add(gt, le), one(m)) and same(m, gt, lt) and same(m, m.compare("ge", a, b), m.sub(one(m), m.compare("lt", a, b)))
    assert same(m, m.compare("gt", m.sub(a, b), m.const(0)), gt) and same(m, m.mul(gt, gt), gt) and same(m, m.mul(le, le), le)
    assert differ(m, gt, m.compare("ge", a, b)) and differ(m, gt, m.compare("gt", b, a)) and differ(m, gt, m.compare("gt", a, m.add(b, m.const(1e-4))))
    assert same(m, m.compare("eq", a, b), m.compare("eq", b, a)) and same(m, m.compare("ne", a, a), m.const(0, (6,)))
    assert same(m, m.compare("gt", a, a), m.const(0, (6,))) and same(m, m.compare("ge", a, a), one(m))
    assert m.to_float(m.compare("gt", m.const(2), m.const(1))).item() == 1
    assert same(m, m.compare("gt", a, m.const(-INF)), one(m)) and same(m, m.compare("lt", m.const(NAN), a), m.const(0, (6,)))


def test_selection(m):
    a, b = symbols(m, 10, 4), symbols(m, 50, 4)
    keep = torch.tensor([True, False, True, True])
    chosen = m.where(keep, a, b)
    assert torch.equal(m.equal(chosen, a), keep) and torch.equal(m.equal(chosen, b), ~keep)
    by_value = m.where(m.compare("gt", a, b), a, b)
    assert differ(m, by_value, a) and differ(m, by_value, m.where(m.compare("gt", a, b), b, a))
    assert same(m, by_value, m.where(m.compare("le", a, b), b, a))
    assert same(m, m.where(m.compare("gt", m.const(2), m.const(1)), a, b), a)


def test_sign_and_absolute_value(m):
    a = symbols(m, 10, 8)
    assert same(m, m.abs(m.neg(a)), m.abs(a)) and same(m, m.sign(m.neg(a)), m.neg(m.sign(a))) and differ(m, m.abs(a), a)
    assert same(m, m.mul(m.abs(a), m.abs(a)), m.mul(a, a)) and differ(m, m.sign(a), m.sign(m.add(a, m.const(1e-5))))
    assert m.to_float(m.abs(m.const(-2))).item() == 2


# ---- special elements
def test_infinities_follow_ieee(m):
    x = symbolic(m, 1.0, 2.0, 3.0)
    low = m.const(-INF)
    assert m.add(x, low).sp.tolist() == [2, 2, 2] and m.sub(x, low).sp.tolist() == [1, 1, 1]
    assert m.add(m.add(x, low), m.const(INF)).sp.tolist() == [3, 3, 3] and m.sub(low, low).num.isnan().all()
    masked = m.where(torch.tensor([True, False, True]), x, low)
    e = m.exp(masked)
    assert e.sp is None and same(m, m.take([e], torch.tensor([2])), m.const(0, (1,)))
    assert same(m, m.amax(masked), m.amax(m.take([x], torch.tensor([1, 3])))) and m.neg(masked).sp.tolist() == [0, 1, 0]
    assert m.scale(masked, -2).sp.tolist() == [0, 1, 0] and m.mul(masked, m.const(0)).sp.tolist() == [0, 3, 0]
    assert m.mul(masked, symbols(m, 70, 3)).sp.tolist() == [0, 3, 0] and m.inv(m.add(x, low)).sp is None
    assert m.log(m.exp(masked)).sp.tolist() == [0, 2, 0] and m.sum(masked).sp.item() == 2


def test_divisions_by_zero(m):
    zero = m.sub(symbols(m, 1, 3), symbols(m, 1, 3))
    assert m.div(zero, zero).sp.tolist() == [3, 3, 3] and m.mul(zero, m.inv(zero)).sp.tolist() == [3, 3, 3]
    assert m.div(one(m), zero).sp.tolist() == [1, 1, 1] and m.inv(m.const(0)).num.item() == INF
    assert m.div(m.const(0), m.const(0)).num.isnan().all()
    assert m.log(zero).sp.tolist() == [2, 2, 2] and m.log(m.const(-1)).num.isnan().all()


def test_a_fully_masked_softmax_row_is_undefined(m):
    x = symbols(m, 1, 2, 3)
    masked = m.where(torch.tensor([[True], [False]]), x, m.const(-INF))
    shifted = m.sub(masked, m.amax(masked, [-1], True))
    for y in (softmax(m, masked), softmax(m, shifted), m.exp(shifted)):
        assert (y.sp[1] == 3).all() and (y.sp[0] == 0).all()
    assert same(m, softmax(m, masked), softmax(m, shifted))
    assert not m.equal(m.exp(shifted), m.const(1, (2, 3))).any()


def test_garbage_is_absorbed_moved_and_equal_to_nothing(m):
    g, x = m.garbage("a", 3), symbols(m, 1, 3)
    for v in (m.add(x, g), m.mul(m.const(0), g), m.sub(g, g), m.exp(g), m.maximum(x, g), m.opaque("f", g), m.compare("gt", g, x), m.inv(g), m.sqrt(g),
              m.log(g), m.sin(g), m.sign(g), m.abs(g), m.where(m.compare("gt", x, m.const(0)), x, g), m.cumsum(g, 0), m.neg(g)):
        assert (v.sp == 4).all() and not m.equal(v, v).any()
    assert m.sum(g).sp.item() == 4 and m.matmul(m.reshape(x, (1, 3)), m.reshape(g, (3, 1))).sp.item() == 4
    keep = torch.tensor([True, False, True])
    assert m.where(keep, x, g).sp.tolist() == [0, 4, 0] and m.take([x, g], torch.tensor([1, 4, 0])).sp.tolist() == [0, 4, 0]
    assert m.scatter_sum(x, torch.tensor([1, 1]), m.take([g], torch.tensor([1, 2]))).sp.tolist() == [0, 4, 0]


def test_nan_equals_nan_only(m):
    x = symbols(m, 1, 2)
    poison = m.mul(m.add(x, m.const(INF)), m.const(0))
    assert same(m, poison, m.const(NAN, (2,))) and differ(m, poison, x) and differ(m, poison, m.add(x, m.const(INF)))


def test_an_infinity_behind_a_symbolic_mask(m):
    x, y = symbols(m, 1, 3), symbols(m, 10, 3)
    mask = m.compare("gt", y, m.const(0))
    blended = m.where(mask, x, m.const(-INF))
    assert same(m, blended, m.where(mask, x, m.const(-INF))) and blended.sp is None
    assert differ(m, blended, m.where(mask, x, m.const(INF))) and differ(m, blended, x) and differ(m, blended, m.mul(mask, x))


# ---- movement and memory
def test_take_and_scatter(m):
    a, b = symbols(m, 1, 3), m.const(5, (2,))
    got = m.take([a, b], torch.tensor([[1, 0], [4, 3]]))
    assert got.shape == (2, 2) and same(m, m.take([got], torch.tensor([1, 4])), m.take([a], torch.tensor([1, 3])))
    assert same(m, m.take([got], torch.tensor([2, 3])), m.data(torch.tensor([0.0, 5.0])))
    total = m.scatter_sum(m.const(1, (2, 2)), torch.tensor([0, 3, 3]), a)
    first, second = m.take([a], torch.tensor([[1, 0], [0, 2]])), m.take([a], torch.tensor([[0, 0], [0, 3]]))
    assert same(m, total, m.add(m.add(first, second), one(m)))


def test_views_in_memory(m):
    a = symbols(m, 1, 6)
    cell = m.cell(a)
    seen = m.load(cell, 0, (2, 3), (3, 1))
    turned = m.load(cell, 0, (3, 2), (1, 3))
    cell = m.store(cell, 1, (2,), (3,), symbols(m, 50, 2))
    assert same(m, seen, m.reshape(a, (2, 3))) and same(m, turned, m.permute(seen, (1, 0)))
    now = m.load(cell, 0, (6,), (1,))
    assert m.equal(now, a).tolist() == [True, False, True, True, False, True]
    cell = m.store(cell, 0, (6,), (1,), a)
    cell = m.store(cell, 0, (1,), (1,), m.const(0, (1,)))
    assert m.equal(m.load(cell, 0, (6,), (1,)), a).sum() == 5 and same(m, now, now) and not m.equal(now, a).all()


def test_constant_memory_becomes_symbolic_and_back(m):
    cell = m.cell(m.const(-INF, (4,)))
    assert m.is_const(m.load(cell, 0, (2,), (1,)))
    cell = m.store(cell, 1, (2,), (1,), symbols(m, 1, 2))
    assert m.load(cell, 0, (4,), (1,)).sp.tolist() == [2, 0, 0, 2] and m.load(cell, 1, (2,), (1,)).sp is None
    cell = m.store(cell, 0, (2, 2), (1, 2), m.const(3, (2, 2)))
    assert same(m, m.load(cell, 0, (4,), (1,)), m.const(3, (4,)))
    cell = m.store(cell, 0, (4,), (1,), m.const(7, (4,)))
    assert m.is_const(m.load(cell, 0, (4,), (1,)))
    cell = m.store(cell, 1, (1,), (1,), m.const(8, (1,)))
    assert m.to_float(m.load(cell, 0, (4,), (1,))).tolist() == [7, 8, 7, 7]


def test_garbage_memory_is_overwritten_element_by_element(m):
    cell = m.cell(m.garbage("k", 3))
    cell = m.store(cell, 0, (2,), (1,), m.const(1, (2,)))
    assert m.load(cell, 0, (3,), (1,)).sp.tolist() == [0, 0, 4]


def test_shapes(m):
    a = symbols(m, 1, 2, 1, 3)
    assert m.expand(a, (4, 2, 5, -1)).shape == (4, 2, 5, 3) and m.permute(a, (2, 0, -2)).shape == (3, 2, 1)
    assert m.stack([m.const(1, (2,)), symbols(m, 1, 2)]).shape == (2, 2) and m.sum(a, [-1], True).shape == (2, 1, 1)
    assert m.add(a, symbols(m, 1, 4, 2, 2, 1)).shape == (4, 2, 2, 3) and m.reshape(a, (-1,)).shape == (6,)
    assert m.sum(symbols(m, 1, 0, 3), [0]).shape == (3,) and m.exp(symbols(m, 1, 0)).shape == (0,)


def test_fingerprints_follow_equality(m):
    a = symbols(m, 1, 5)
    assert torch.equal(m.fingerprint(m.add(a, a)), m.fingerprint(m.scale(a, 2)))
    assert (m.fingerprint(a) >= 0).all() and m.fingerprint(m.garbage("k", 2)).shape == (2,)


def test_sides_begin_in_order(m):
    m.begin_side("reference")
    m.begin_side("parallel")
    with pytest.raises(ValueError):
        m.begin_side("reference")
    with pytest.raises(ValueError):
        m.begin_side("sideways")


def test_error_bits_shrink_with_comparisons(m):
    before = m.error_bits
    m.equal(symbols(m, 1, 1000), symbols(m, 1, 1000))
    assert before == 60 and m.error_bits == 50
