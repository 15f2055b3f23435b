"""Constants: what float contents stand for, which merge, which never do."""
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from trainverify.algebra import constants
from trainverify.algebra.constants import Constants
from trainverify.algebra.field import Field
from trainverify.algebra.primes import MODULI

from .fieldkit import agree, symbols

F32, F64 = torch.float32, torch.float64


def residues(f: Fraction) -> list[int]:
    return [f.numerator * pow(f.denominator, -1, m) % m for m in MODULI]


def of(m, v) -> list[int]:
    return m.constants.residues(v.num).tolist()


@pytest.mark.parametrize("literal, meant", [
    (0.1, Fraction(1, 10)), (1e-5, Fraction(1, 10 ** 5)), (1e-8, Fraction(1, 10 ** 8)), (1e-12, Fraction(1, 10 ** 12)), (1e-15, Fraction(1, 10 ** 15)),
    (0.044715, Fraction(44715, 10 ** 6)), (3e-4, Fraction(3, 10 ** 4)), (-0.3, Fraction(-3, 10)), (0.1 + 0.2, Fraction(3, 10)), (1 / 49 * 49, Fraction(1)),
    (1 / 12288, Fraction(1, 12288)), ((1 / 3) * (1 / 7), Fraction(1, 21)), (1 - 0.9 ** 2, Fraction(19, 100)), (1 - 0.95 ** 2, Fraction(39, 400)),
    (1 - 0.999 ** 2, Fraction(1999, 10 ** 6)), (1 - 0.999 ** 3, Fraction(2997001, 10 ** 9)), (1e-3 / (1 - 0.9 ** 2), Fraction(1, 190)), (2.0 ** -30, Fraction(1, 2 ** 30)),
    (1e30, Fraction(10 ** 30)), (1 + 3 * 2.0 ** -23, 1 + Fraction(3, 2 ** 23)), (65504.0, Fraction(65504)),
])
def test_python_scalars(literal, meant):
    m = Field(1)
    assert of(m, m.const(literal)) == residues(meant)


@pytest.mark.parametrize("literal, meant", [(1e-5, Fraction(1, 10 ** 5)), (3e-4, Fraction(3, 10 ** 4)), (0.044715, Fraction(44715, 10 ** 6)), (-0.1, Fraction(-1, 10)),
                                            (1 / 9999, Fraction(1, 9999)), (0.999, Fraction(999, 1000)), (0.5, Fraction(1, 2)), (7.0, Fraction(7))])
def test_float32_scalars_are_literals(literal, meant):
    m = Field(1)
    assert of(m, m.data(torch.tensor(literal))) == residues(meant)


def test_other_data_is_exact():
    m = Field(1)
    for t in (torch.tensor([0.1]), torch.tensor([1.0078125, 0.33], dtype=torch.bfloat16), torch.tensor([0.1, 1.001], dtype=torch.float16), torch.tensor(0.33, dtype=torch.bfloat16)):
        exact = [residues(Fraction(v)) for v in t.double().reshape(-1).tolist()]
        assert torch.tensor(exact).t().tolist() == m.constants.residues(m.data(t).num.reshape(-1)).tolist()
    assert m.data(torch.tensor([True, False])).num.tolist() == [1, 0] and m.data(torch.tensor([2 ** 40])).num.item() == 2 ** 40


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_what_is_computed_from_rationals_is_known_though_float64_cancels(steps):
    """Bias corrections 1 - 0.999^n and their roots, however they are reached: as a number, as the rational or root that they are."""
    m = Field(1)
    one, beta = m.const(1), m.const(0.999)
    power = one
    for _ in range(steps):
        power = m.mul(power, beta)
    correction, exact = m.sub(one, power), 1 - Fraction(999, 1000) ** steps
    assert m.constants.meaning(correction.num.item()) == (exact, 1)
    assert of(m, correction) == residues(exact)
    assert m.constants.meaning(m.sqrt(correction).num.item()) == (exact, 2)
    assert m.constants.meaning(m.inv(m.sqrt(correction)).num.item()) == (1 / exact, 2)


def test_what_is_no_rational_is_not_reconstructed():
    g = torch.Generator().manual_seed(0)
    for row in torch.stack([torch.randint(1, p, (500,), generator=g) for p in MODULI], 1).tolist():
        assert constants.reconstructed(tuple(row)) is None
    m = Field(1)
    assert m.constants.meaning(m.exp(m.const(Fraction(1, 3))).num.item()) is None
    assert m.constants.meaning(m.add(m.sqrt(m.const(3)), m.const(1)).num.item()) is None


@pytest.mark.parametrize("f", [Fraction(3), Fraction(-7, 3), Fraction(1999, 10 ** 6), Fraction(10 ** 14, 3 ** 20), Fraction((1 << 48) - 1, (1 << 48) - 3)])
def test_residues_of_simple_rationals_give_them_back(f):
    assert constants.reconstructed(tuple(residues(f))) == f
    assert constants.reconstructed(tuple(residues(f + (1 << 48)))) is None or f + (1 << 48) == constants.reconstructed(tuple(residues(f + (1 << 48))))


def test_random_numbers_are_rarely_taken_for_rationals():
    g = torch.Generator().manual_seed(0)
    sample = (torch.rand(2000, generator=g, dtype=F64) + 0.5).tolist()
    assert sum(constants.rational(x) is not None for x in sample) <= 4


def test_constants_of_one_field_are_found_by_value():
    m = Field(1)
    x = symbols(m, 1, 4)
    pi = m.const(math.pi)
    computed = m.opaque("acos", m.const(-1))
    assert m.equal(m.mul(x, pi), m.mul(x, computed)).all()
    assert not m.equal(m.mul(x, pi), m.mul(x, m.const(math.pi + 1e-9))).any()
    third = m.div(m.const(1), m.const(3))
    assert m.equal(m.mul(x, third), m.div(x, m.const(3))).all() and m.equal(m.mul(x, third), m.scale(x, 1 / 3)).all()


def test_roots_of_small_rationals():
    m = Field(1)
    x = symbols(m, 1, 4)
    for d in (8, 64, 96, 128, 192):
        by_literal, computed = m.scale(x, 1 / math.sqrt(d)), m.div(x, m.sqrt(m.const(d)))
        assert m.equal(by_literal, computed).all() and m.equal(by_literal, m.scale(x, d ** -0.5)).all() and m.equal(by_literal, m.mul(x, m.pow(m.const(d), -0.5))).all()
        assert m.equal(m.scale(by_literal, d ** -0.5), m.scale(x, Fraction(1, d))).all()
        assert m.equal(m.scale(m.scale(x, d ** -0.25), d ** -0.25), by_literal).all()
    assert m.equal(m.scale(x, math.sqrt(2 / math.pi)), m.scale(m.scale(x, math.sqrt(2)), 1 / math.sqrt(math.pi))).all()
    assert m.equal(m.scale(m.scale(x, 2 / math.sqrt(math.pi)), math.sqrt(0.5) * 0.5), m.scale(x, 1 / math.sqrt(2 * math.pi))).all()
    assert m.equal(m.scale(m.scale(x, math.pi), 0.5), m.scale(x, math.pi / 2)).all()


@pytest.mark.parametrize("first", (False, True))
def test_scales_of_long_contexts(first):
    """mscale = 0.1 ln(40) + 1, squared in Python or applied twice, whichever comes first."""
    scale = 0.1 * math.log(40) + 1
    twice = lambda m, x: m.scale(m.scale(x, scale), scale)
    at_once = lambda m, x: m.scale(x, scale * scale)
    assert agree(*((twice, at_once) if first else (at_once, twice)), (5,))
    with_root = lambda m, x: m.scale(x, scale * scale / math.sqrt(192))
    assert agree(lambda m, x: m.scale(twice(m, x), 192 ** -0.5), with_root, (5,)) and not agree(twice, lambda m, x: m.scale(x, scale), (5,))
    in_tensors = lambda m, x: (lambda s: m.mul(m.mul(x, s), s))(m.add(m.scale(m.log(m.const(40)), 0.1), m.const(1)))
    assert agree(in_tensors, at_once, (5,)) and agree(twice, in_tensors, (5,))


def test_constant_arithmetic_is_exact_where_float64_is_not():
    m = Field(1)
    x = symbols(m, 1, 4)
    correction = m.sub(m.const(1), m.power(m.const(0.999), m.const(7)))
    assert m.equal(m.mul(x, m.inv(correction)), m.div(x, correction)).all()
    assert m.equal(m.mul(x, correction), m.sub(x, m.scale(x, Fraction(999, 1000) ** 7))).all()
    assert m.equal(m.mul(x, correction), m.scale(x, 1 - 0.999 ** 7)).all()
    assert m.equal(m.exp(m.add(x, m.log(m.const(3)))), m.scale(m.exp(x), 3)).all()


# ---- RoPE tables
def table(kind: str, start: int = 0, base: float = 10000.0):
    """cos and sin of position times frequency, in one of the ways that models compute them."""
    dim, positions = 6, torch.arange(start, start + 8)

    def build(m):
        pos, a = m.data(positions.float()), m.data(torch.arange(0, dim, 2).float())
        pos = m.reshape(pos, (8, 1))
        if kind == "numpy":
            f = positions.numpy()[:, None] / base ** (np.arange(0, dim, 2) / dim)
            return [m.data(torch.from_numpy(np.cos(f).astype("f"))), m.data(torch.from_numpy(np.sin(f).astype("f")))]
        if kind == "float64":
            f = positions.double()[:, None] / base ** (torch.arange(0, dim, 2).double() / dim)
            return [m.data(f.cos()), m.data(f.sin())]
        power = m.power(m.const(base), m.div(a, m.const(dim)))
        angle = {"standard": lambda: m.mul(pos, m.inv(power)), "divided": lambda: m.div(pos, power), "matmul": lambda: m.matmul(pos, m.reshape(m.inv(power), (1, 3))),
                 "negative": lambda: m.mul(pos, m.power(m.const(base), m.div(m.neg(a), m.const(dim)))),
                 "exp": lambda: m.mul(pos, m.exp(m.scale(m.div(m.neg(a), m.const(dim)), math.log(base))))}[kind]()
        return [m.cos(angle), m.sin(angle)]
    return build


def rotated(tab, note=None):
    def f(m, x):
        cos, sin = tab(m)
        a, b = (m.take([x], torch.arange(48).reshape(8, 6)[:, s] + 1) for s in (slice(0, 3), slice(3, 6)))
        if note is not None:
            note.append(m)
        return [m.sub(m.mul(a, cos), m.mul(b, sin)), m.add(m.mul(a, sin), m.mul(b, cos))]
    return f


KINDS = ("standard", "divided", "negative", "exp", "matmul", "numpy", "float64")


@pytest.mark.parametrize("kind", KINDS)
def test_right_tables_merge(kind):
    seen = []
    assert agree(rotated(table("standard")), rotated(table(kind), seen), (8, 6))
    assert agree(rotated(table(kind)), rotated(table("standard")), (8, 6))
    merges = seen[0].rounding
    assert bool(merges) == (kind == "numpy")
    assert all(abs(r.value - r.representative) <= 4 * np.spacing(np.float32(r.value)) and r.count >= 1 for r in merges)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start, base", [(1, 10000.0), (0, 10001.0), (0, 500000.0)])
def test_wrong_tables_differ(kind, start, base):
    assert not agree(rotated(table("standard")), rotated(table(kind, start, base)), (8, 6))


def test_exact_data_never_merges():
    """A buffer that is 3 units in the last place off, and one in bfloat16."""
    scaled = lambda m, x, t: m.mul(x, m.data(t))
    near_one = torch.full((6,), 1 + 3 * 2.0 ** -23)
    assert not agree(lambda m, x: scaled(m, x, torch.ones(6)), lambda m, x: scaled(m, x, near_one), (6,))
    c = torch.rand(6, generator=torch.Generator().manual_seed(1))
    assert not agree(lambda m, x: scaled(m, x, c), lambda m, x: scaled(m, x, torch.nextafter(c, c + 1)), (6,))
    coarse = torch.tensor([1.0078125, 0.99609375, 1.0, 0.9921875, 1.015625, 1.0], dtype=torch.bfloat16)
    assert not agree(lambda m, x: scaled(m, x, torch.ones(6)), lambda m, x: scaled(m, x, coarse), (6,))
    assert not agree(lambda m, x: m.scale(x, 0.1), lambda m, x: m.scale(x, 0.10000001), (6,))


def test_learning_rates_in_float32():
    assert agree(lambda m, x: m.scale(x, 3e-4), lambda m, x: m.mul(x, m.data(torch.tensor(3e-4))), (6,))
    assert agree(lambda m, x: m.scale(x, 3e-4), lambda m, x: m.mul(x, m.data(torch.tensor([3e-4]))), (6,))
    assert not agree(lambda m, x: m.scale(x, 3e-4), lambda m, x: m.mul(x, m.data(torch.tensor([3.0001e-4]))), (6,))


def test_merges_are_recorded_with_their_place_and_never_chain():
    c = Constants(1)
    first = c.settle(torch.tensor([0.1234567890123, 0.9876543210987], dtype=F64))
    c.begin_parallel()
    c.where = (0, 5, 17)
    step = 3 * 2.0 ** -27                     # 3 units in the last place of float32 near 0.12
    off = c.settle(first[:1] + torch.tensor([step, step, 2 * step], dtype=F64))
    assert off.tolist() == [first[0], first[0], first[0] + 2 * step]
    (merge,) = c.rounding
    assert (merge.representative, merge.count, merge.where) == (first[0].item(), 2, (0, 5, 17)) and merge.value == pytest.approx(first[0].item() + step)
    assert torch.equal(c.settle(first), first) and len(c.rounding) == 1


def test_the_reference_does_not_merge_with_itself():
    c = Constants(1)
    x = torch.tensor([0.1234567890123, 0.1234567890123 * (1 + 1e-8)], dtype=F64)
    assert torch.equal(c.settle(x), x) and not c.rounding
    got = c.residues(x)
    assert (got[:, 0] != got[:, 1]).all()


def test_infinities_and_nan_are_constants():
    m = Field(1)
    v = m.data(torch.tensor([math.inf, -math.inf, math.nan, 1.0]))
    assert m.is_const(v) and m.fingerprint(v)[3] == m.fingerprint(m.const(1)) and v.sp.tolist() == [1, 2, 3, 0]
    assert m.const(math.nan).num.isnan() and m.const(math.nan).num is m.const(math.nan).num


def test_single_contents_have_the_residues_of_tables():
    m, contents = Field(1), [0.0, -0.0, 3.0, -2.5, 0.1, -1 / 3, 2.0 ** -40, 1e22, 2 ** 0.5, float("inf"), float("nan")]
    table = m.data(torch.tensor(contents, dtype=torch.float64))
    for k, x in enumerate(contents):
        one = m.data(torch.tensor([x], dtype=torch.float64))
        assert torch.equal(m._lift(one)[:, 0], m._lift(table)[:, k]) and (x != x or one.num.item() == table.num[k].item()), x
