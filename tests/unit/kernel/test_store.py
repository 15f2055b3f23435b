"""The store: rows, vectors, definedness and signs, against numbers."""
import itertools
from fractions import Fraction

import numpy as np
import pytest

from trainverify.kernel.store import GARBAGE, INF_ID, NINF_ID, ONE_ID, ZERO_ID, Arena, Store, condition, distinct_rows, is_total
from trainverify.kernel.terms import ANY, NEGATIVE, NONNEGATIVE, NONZERO, POSITIVE, ZERO

from .numeric import meaning

CASES = {NEGATIVE: (-2.0, -0.5, -0.3), ZERO: (0.0,), POSITIVE: (0.3, 0.5, 2.0)}


def numbers(sign: int) -> list[float]:
    return [x for s, xs in CASES.items() if s & sign for x in xs]


def made(store: Store, kind: str, attr, *rows: tuple[int, ...]) -> np.ndarray:
    """Identifiers of rows, which are pairwise distinct."""
    rows = np.array(rows)
    code = store.operation(kind, attr, rows.shape[1])
    ids, new, keys = store.known(code, rows)
    ids[new] = store.define(code, rows[new], keys[new])
    return ids


# ---- rows
def test_equal_rows_are_one_identifier_and_others_are_not():
    s = Store()
    x = s.symbols(3)
    a = made(s, "add", None, (x, x + 1), (x, x + 2), (x + 1, x))
    assert len(set(a.tolist())) == 3 and (made(s, "add", None, (x, x + 1), (x, x + 2), (x + 1, x)) == a).all()
    others = [made(s, "sub", None, (x, x + 1)), made(s, "mul", None, (x, x + 1)), made(s, "add", None, (x, x + 1, x + 1)), made(s, "compare", "gt", (x, x + 1)),
              made(s, "compare", "eq", (x, x + 1)), made(s, "uf", "f", (x, x + 1)), made(s, "uf", "g", (x, x + 1))]
    assert len({int(i[0]) for i in others} | set(a.tolist())) == 10
    assert s.definition(a, int(s.code[a[0]])).tolist() == [[x, x + 1], [x, x + 2], [x + 1, x]]


def test_rows_with_equal_hashes_stay_apart(monkeypatch):
    monkeypatch.setattr(Arena, "keys", lambda self, code, rows: np.full(len(rows), 7))
    s = Store()
    x = s.symbols(8)
    rows = np.array(list(itertools.product(range(x, x + 8), repeat=2)))
    code = s.operation("add", None, 2)
    ids, new, keys = s.known(code, rows)
    first, inverse = distinct_rows(rows[new], keys[new])
    assert len(first) == 64 and (inverse == np.arange(64)).all()
    ids = s.define(code, rows, keys)
    assert len(set(ids.tolist())) == 64 and (s.definition(ids, code) == rows).all()
    assert s.known(code, rows[:1])[0][0] in (ids[0], -1)
    v = s.vectors(rows)
    assert (s.arenas[2].rows[v] == rows).all()


def test_distinct_rows_keep_the_order_of_elements():
    rows = np.array([[5, 6], [1, 2], [5, 6], [0, 9], [1, 2]])
    first, inverse = distinct_rows(rows, rows[:, 0] * 10)
    assert first.tolist() == [0, 1, 3] and inverse.tolist() == [0, 1, 0, 2, 1]


def test_dots_are_pairs_of_vectors():
    s = Store()
    x = s.symbols(6)
    v = s.vectors(np.array([[x, x + 1, x + 2], [x + 3, x + 4, x + 5], [x, x + 1, x + 2]]))
    assert v[0] == v[2] != v[1]
    code = s.operation("dot", 3, 2)
    assert s.operands(code, np.array([[v[0], v[1]]])).tolist() == [[x, x + 3, x + 1, x + 4, x + 2, x + 5]]


# ---- constants and names
def test_numbers_and_names():
    s = Store()
    assert [s.constant(Fraction(q)) for q in (0, 1, -1)] == [ZERO_ID, ONE_ID, s.minus_one]
    half = s.constant(Fraction(1, 2))
    assert s.constant(Fraction(2, 4)) == half and s.sign[half] == POSITIVE and s.sign[s.constant(Fraction(-1, 2))] == NEGATIVE
    assert s.unknown("pi", POSITIVE) == s.unknown("pi", POSITIVE) != s.unknown("e", POSITIVE)
    assert not s.clean[[INF_ID, NINF_ID, GARBAGE]].any() and not s.is_constant[[INF_ID, NINF_ID, GARBAGE]].any()
    first = s.symbols(3000)
    assert s.clean[first:first + 3000].all() and (s.sign[first:first + 3000] == ANY).all() and s.constant(Fraction(1, 2)) == half


# ---- signs
@pytest.mark.parametrize("kind", ["add", "sub", "mul", "max"])
def test_signs_of_two_operands(kind):
    for a, b in itertools.product(range(1, 8), repeat=2):
        s = Store()
        x = s.symbols(2)
        s.sign[[x, x + 1]] = a, b
        sign = int(s.sign[made(s, kind, None, (x, x + 1))[0]])
        for p, q in itertools.product(numbers(a), numbers(b)):
            assert sign & sign_of(meaning(kind, None, np.array([[p], [q]]))[0]), (kind, a, b, p, q)


@pytest.mark.parametrize(("kind", "attr"), [("neg", None), ("inv", None), ("exp", None), ("sqrt", None), ("log", None), ("sin", None), ("pow", Fraction(2)),
                                            ("pow", Fraction(-2)), ("pow", Fraction(3)), ("pow", Fraction(1, 4)), ("uf", "atan")])
def test_signs_of_one_operand(kind, attr):
    for a in range(1, 8):
        s = Store()
        x = s.symbols(1)
        s.sign[x] = a
        s.parallel = True
        node = int(made(s, kind, attr, (x,))[0])
        with np.errstate(all="ignore"):
            results = [meaning(kind, attr, np.array([[p]]))[0] for p in numbers(a)]
        defined = [r for r in results if np.isfinite(r)]
        assert all(s.sign[node] & sign_of(r) for r in defined)
        assert not (s.clean[node] and len(defined) < len(results)), (kind, attr, a)


def test_signs_of_squares_and_sums_of_squares():
    for a in range(1, 8):
        s = Store()
        x = s.symbols(1)
        s.sign[x] = a
        sign = int(s.sign[made(s, "mul", None, (x, x))[0]])
        assert all(sign & sign_of(p * p) for p in numbers(a)) and not sign & NEGATIVE
    s = Store()
    x = s.symbols(4)
    v = s.vectors(np.array([[x, x + 1], [x + 2, x + 3]]))
    assert s.sign[made(s, "dot", 2, (v[0], v[0]), (v[0], v[1]))].tolist() == [NONNEGATIVE, ANY]


def sign_of(x: float) -> int:
    return POSITIVE if x > 0 else NEGATIVE if x < 0 else ZERO


# ---- definedness
def test_conditions():
    assert [condition(k, None) for k in ("inv", "log", "sqrt", "exp", "add")] == [NONZERO, POSITIVE, NONNEGATIVE, None, None]
    powers = {2: None, -2: NONZERO, Fraction(1, 2): NONNEGATIVE, Fraction(-1, 2): POSITIVE}
    assert all(condition("pow", Fraction(q)) == needs for q, needs in powers.items())
    assert is_total("atan") and not is_total("acosh") and not is_total("a custom operation")


def test_what_the_reference_computes_is_defined_and_what_the_parallel_side_computes_must_be_shown_to_be():
    s = Store()
    x = s.symbols(3)
    reference = made(s, "log", None, (x,))
    assert s.clean[reference].all() and s.sign[x] == POSITIVE and s.sign[x + 1] == ANY
    s.parallel = True
    assert made(s, "log", None, (x,)) == reference
    assert s.clean[made(s, "log", None, (x + 1,), (x + 2,))].tolist() == [False, False] and s.sign[x + 1] == ANY
    assert s.clean[made(s, "inv", None, (x,), (x + 1,))].tolist() == [True, False]
    assert s.clean[made(s, "uf", "atan", (x,), (x + 1,))].all() and not s.clean[made(s, "uf", "acosh", (x,))].any()


def test_what_reads_the_unclean_is_unclean():
    s = Store()
    x = s.symbols(2)
    s.parallel = True
    bad = int(made(s, "inv", None, (x,))[0])
    for kind, attr, row in (("add", None, (x, bad)), ("mul", None, (bad, x)), ("exp", None, (bad,)), ("max", None, (x, bad)), ("compare", "gt", (x, bad)),
                            ("uf", "atan", (bad,)), ("add", None, (x, x, bad)), ("neg", None, (bad,)), ("sub", None, (bad, bad))):
        assert not s.clean[made(s, kind, attr, row)].any()
    v = s.vectors(np.array([[x, x + 1], [x, bad]]))
    assert s.clean[made(s, "dot", 2, (v[0], v[0]), (v[0], v[1]), (v[1], v[1]))].tolist() == [True, False, False]
