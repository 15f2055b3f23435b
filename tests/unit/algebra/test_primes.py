"""Arithmetic modulo the prime pairs, against Python integers."""
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainverify.algebra import primes
from trainverify.kernel.hashtable import HashTable
from trainverify.algebra.primes import MODULI, P, Q

derandomised = settings(derandomize=True, deadline=None, max_examples=60)
numbers = st.lists(st.integers(1, 2 ** 31), min_size=1, max_size=9)


def residues(xs: list[int]) -> torch.Tensor:
    return torch.tensor([[x % m or 1 for x in xs] for m in MODULI])


def is_prime(n: int) -> bool:
    return all(n % d for d in range(2, int(n ** 0.5) + 1))


def test_the_primes_are_pairs_whose_small_squares_exist():
    for p, q in zip(P, Q):
        assert p == 2 * q + 1 and is_prime(p) and is_prime(q)
        assert pow(primes.G, q, p) == 1
    for m in MODULI:
        assert m % 8 == 7
        assert all(pow(r, (m - 1) // 2, m) == 1 for r in (2, 3, 5, 7, 11, 13, 17, 19))


@derandomised
@given(numbers, numbers)
def test_products_and_inverses(xs, ys):
    n = min(len(xs), len(ys))
    a, b = residues(xs[:n]), residues(ys[:n])
    product = (a * b).remainder_(primes.MOD[1])
    assert product.tolist() == [[x * y % m for x, y in zip(r, s)] for r, s, m in zip(a.tolist(), b.tolist(), MODULI)]
    assert ((primes.inverse(a) * a).remainder(primes.MOD[1]) == 1).all()


@derandomised
@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 5), st.integers(0, 2 ** 31))
def test_matmul_is_exact(m, k, n, seed):
    g = np.random.default_rng(seed)
    a = np.stack([g.integers(p - 1000, p, (m, k)) for p in MODULI])
    b = np.stack([g.integers(0, p, (k, n)) for p in MODULI])
    got = primes.matmul(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    for i, p in enumerate(MODULI):
        assert (got[i] == (a[i].astype(object) @ b[i].astype(object)) % p).all()


def test_matmul_splits_long_sums():
    k = primes._LIMBS + 5
    a = torch.stack([torch.full((1, k), p - 1) for p in MODULI])
    got = primes.matmul(a, a.transpose(1, 2))
    assert got.reshape(4).tolist() == [k % p for p in MODULI]


def exponents(xs: list[int]) -> torch.Tensor:
    return torch.tensor([[x % q for x in xs] for q in Q])


@derandomised
@given(numbers, numbers)
def test_exp_turns_sums_into_products_and_log_inverts_it(xs, ys):
    n = min(len(xs), len(ys))
    a, b = exponents(xs[:n]), exponents(ys[:n])
    total = (a + b).remainder(primes.MOD_Q[1])
    assert torch.equal(primes.exp(total), (primes.exp(a) * primes.exp(b)).remainder(primes.MOD_P[1]))
    back, sign = primes.log(primes.exp(a))
    assert torch.equal(back, a) and not sign.any()


@derandomised
@given(numbers, numbers)
def test_log_turns_products_into_sums_with_signs(xs, ys):
    n = min(len(xs), len(ys))
    a, b = residues(xs[:n])[:2], residues(ys[:n])[:2]
    (la, sa), (lb, sb) = primes.log(a), primes.log(b)
    lab, sab = primes.log((a * b).remainder(primes.MOD_P[1]))
    assert torch.equal(lab, (la + lb).remainder(primes.MOD_Q[1])) and torch.equal(sab, sa ^ sb)
    back = primes.exp(la)
    assert torch.equal(torch.where(sa == 1, primes.MOD_P[1] - back, back), a)


def test_log_at_the_edges():
    edge = torch.tensor([[1, 2, p - 1, p - 2, 46340, 46341, 46342, p - 46341, (p - 1) // 2] for p in P])
    logs, sign = primes.log(edge)
    back = primes.exp(logs)
    assert torch.equal(torch.where(sign == 1, primes.MOD_P[1] - back, back), edge)


@derandomised
@given(numbers, numbers)
def test_roots_are_multiplicative_and_tell_signs_apart(xs, ys):
    n = min(len(xs), len(ys))
    a, b = residues(xs[:n]), residues(ys[:n])
    ra, rb = primes.sqrt(a, MODULI), primes.sqrt(b, MODULI)
    mod = primes.MOD[1]
    assert torch.equal(primes.sqrt((a * b).remainder(mod), MODULI), (ra * rb).remainder(mod))
    squared = (ra * ra).remainder(mod)
    assert ((squared == a) | (squared == mod - a)).all()
    assert torch.equal(primes.sqrt(mod - a, MODULI), mod - ra)


@derandomised
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=8))
def test_dyadics_are_exact(xs):
    got = primes.dyadic(torch.tensor(xs, dtype=torch.float64))
    for i, m in enumerate(MODULI):
        exact = [Fraction(x) for x in xs]
        assert got[i].tolist() == [f.numerator * pow(f.denominator, -1, m) % m for f in exact]


def test_packing_is_reversible():
    x = residues([5, 2 ** 31, 123456789])
    assert torch.equal(primes.unpack_p(primes.pack_p(x)), x[:2])
    sgn = torch.tensor([0, 3, 1], dtype=torch.uint8)
    q, back = primes.unpack_q(primes.pack_q(x[2:], sgn))
    assert torch.equal(q, x[2:]) and torch.equal(back, sgn)


def test_corrupt_logarithms_are_noticed(monkeypatch):
    load = np.load

    def corrupted(f, **kwargs):
        stored = dict(load(f, **kwargs))
        stored["logs"] = stored["logs"].copy()
        stored["logs"][0, 7] += 1
        return stored
    monkeypatch.setattr(primes.np, "load", corrupted)
    with pytest.raises(RuntimeError, match="make_dlog"):
        primes._log_tables.__wrapped__()


@derandomised
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(-9, 9)), min_size=1, max_size=200))
def test_the_first_value_of_a_key_stays(pairs):
    table, model = HashTable(bits=3), {}
    for start in range(0, len(pairs), 17):
        batch = pairs[start:start + 17]
        keys, values = (np.array(c, dtype=np.int64) for c in zip(*batch))
        for k, v in batch:
            model.setdefault(k, v)
        assert table.put(keys, values[:, None])[:, 0].tolist() == [model[k] for k in keys.tolist()]
    keys = np.arange(60)
    found, values = table.get(keys)
    assert found.tolist() == [k in model for k in range(60)] and len(table) == len(model)
    assert all(values[k, 0] == v for k, v in model.items())
