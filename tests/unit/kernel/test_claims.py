"""Claims: whatever the guesses propose, only what is true is merged."""
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch

from trainverify.kernel import claims as claims_module
from trainverify.kernel.claims import Claims
from trainverify.kernel.store import ZERO_ID, Store
from trainverify.relate.guess import Dictionary
from trainverify.relate.structure import Structure, packed

from .numeric import FACTORS, Run, mistakes, row_values, run, values
from .programs import play, program, varied

SCALES = (Fraction(1), Fraction(2), Fraction(-1), Fraction(1, 2), Fraction(3), Fraction(0), Fraction(101, 100))


def random_run(seed: int, guesses=None, wrong: float = 0.06, length: int = 11) -> Run:
    rng = random.Random(seed)
    steps = program(rng, 3, length)
    return run(play(steps), play(varied(rng, steps, 3, wrong)), (4, 4, 4), guesses=guesses, seed=seed)


# ---- honest fingerprints
def test_random_programs():
    counts, proved = Counter(), 0
    for seed in range(12):
        r = random_run(seed)
        assert mistakes(r) == []
        counts.update(r.claims.counts)
        proved += int(r.proved().sum())
    assert counts["proved flat"] > 30 and proved > 8


# ---- corrupted guesses
class Wild:
    """Proposes anything: identifiers at random, also such as stand for nothing, or the newest, or always the same."""

    def __init__(self, store: Store, rng: random.Random, manner: str):
        self.store, self.rng, self.manner = store, np.random.default_rng(rng.randrange(1 << 30)), manner

    def find(self, prints: np.ndarray) -> np.ndarray:
        n = len(prints)
        match self.manner:
            case "random":
                return self.rng.integers(-1, self.store.n, n)
            case "newest":
                return np.maximum(self.store.n - 1 - self.rng.integers(0, 12, n), ZERO_ID)
            case "same":
                return np.full(n, self.store.n // 2)
        return self.rng.integers(-3, 3 * self.store.n, n)      # "beyond"

    def learn(self, prints: np.ndarray, ids: np.ndarray) -> None:
        pass

    def scales(self, index: np.ndarray, prints, code: int, rows: np.ndarray):
        for c in SCALES[1:4]:
            yield c, self.find(index)

    def ambiguous(self, prints: np.ndarray) -> np.ndarray:
        return self.rng.random(len(prints)) < 0.5

    def find_other(self, code: int, rows: np.ndarray) -> np.ndarray:
        return self.find(rows)

    def learn_other(self, prints: np.ndarray, code: int, rows: np.ndarray, ids: np.ndarray) -> None:
        pass


@pytest.mark.parametrize("manner", ["random", "newest", "same", "beyond"])
def test_wild_guesses_merge_nothing_that_is_false(monkeypatch, manner):
    monkeypatch.setattr(claims_module, "DEPTH", 3)
    tried = 0
    for seed in range(3):
        r = random_run(100 + seed, guesses=lambda store: Wild(store, random.Random(seed), manner), length=7)
        assert mistakes(r) == []
        tried += r.claims.counts["claims"]
    assert tried > 300


def test_dictionary_that_mixes_up_fingerprints():
    """Every third answer belongs to another fingerprint."""
    class Mixed(Dictionary):
        def find(self, prints):
            out = super().find(prints)
            return np.where(np.arange(len(out)) % 3 == 0, np.roll(out, 1), out)
    for seed in range(3):
        assert mistakes(random_run(200 + seed, guesses=lambda store: Mixed(store, FACTORS))) == []


def false_claims(seed: int, wanted: int) -> tuple[int, int]:
    """(false claims that were tried, true ones among them that were proved): rows of a run against other identifiers and factors."""
    r = random_run(seed, length=9)
    store, ok, rng = r.claims.store, r.defined(), np.random.default_rng(seed)
    if ok.sum() < 3:
        return 0, 0
    v = values(store, r.terms.first_symbol, r.symbols)
    rows = [(code, i, x) for _, code, i, x in row_values(store, v)]
    interned = {}
    for arena in store.arenas.values():
        for k in range(arena.n):
            interned.setdefault(int(arena.code[k]), []).append(k)
    at = Counter()
    by_code: dict[int, list[tuple[np.ndarray, np.ndarray, int]]] = {}
    for code, i, x in rows:
        arena = store.arenas[store.ops[code][1]]
        by_code.setdefault(code, []).append((arena.rows[interned[code][at[code]]], x, i))
        at[code] += 1
    nodes = np.flatnonzero(store.code[:store.n])
    tried = proved = 0
    while tried < wanted:
        code = int(rng.choice(list(by_code)))
        pick = rng.integers(0, len(by_code[code]), 40)
        lines = np.stack([by_code[code][k][0] for k in pick])
        c = SCALES[int(rng.integers(len(SCALES)))]
        own = np.array([by_code[code][k][2] for k in pick])
        reps = np.where(rng.random(40) < 0.3, own, np.where(rng.random(40) < 0.3, own + rng.integers(-3, 4, 40), rng.choice(nodes, 40)))
        reps = np.clip(reps, 0, store.n - 1)
        answers = r.claims.claim(code, lines, reps, c)
        for k, rep, answer in zip(pick, reps.tolist(), answers.tolist()):
            row, claimed = by_code[code][k][1][ok], float(c) * v[rep][ok]
            defined = ~np.isnan(claimed)
            false = not bool((np.abs(row[defined] - claimed[defined]) <= 1e-6 * (1 + np.abs(row[defined]) + np.abs(claimed[defined]))).all())
            assert not (false and answer), (code, store.ops[code], by_code[code][k][0], rep, c)
            tried += false
            proved += answer
    return tried, proved


def test_ten_thousand_false_claims(monkeypatch):
    monkeypatch.setattr(claims_module, "LADDER", ((300, False),))
    monkeypatch.setattr(claims_module, "GIVE_UP", 1 << 30)
    tried = proved = 0
    seed = 300
    while tried < 10_000:
        monkeypatch.setattr(claims_module, "DEPTH", seed % 2)
        more = false_claims(seed, 1700)
        tried, proved, seed = tried + more[0], proved + more[1], seed + 1
    assert proved > 100


# ---- traps
def claims_of(*factors: Fraction) -> Claims:
    store = Store()
    return Claims(store, Dictionary(store, factors))


class Nothing:
    def of(self, index: np.ndarray) -> None:
        return None


def test_rows_of_one_kind_whose_leaves_are_of_several():
    """Where the first row's leaf is unfolded, the second row's may be a symbol, or a number too long to be written out."""
    c = claims_of()
    store = c.store
    x = store.symbols(6)
    inner = int(c.resolve("exp", None, np.array([[x]]), Nothing())[0])
    long = store.constant(Fraction(1, 3**40))
    left = c.resolve("mul", None, np.array([[x + 1, x + 2], [x + 3, x + 4], [x + 4, x + 5]]), Nothing())
    code = store.operation("add", None, 2)
    for other in (x + 5, long):
        rows = np.sort(np.array([[inner, x + 3], [other, x + 3]]), 1)
        assert not c.claim(code, rows, left[:2], Fraction(1)).any()
    sums = c.resolve("add", None, np.array([[x + 3, inner], [x + 3, x + 5]]), Nothing())
    store.parallel = True
    terms = c.resolve("sub", None, np.stack([np.array([x + 3, x + 3]), c.resolve("neg", None, np.array([[inner], [x + 5]]), Nothing())], 1), Nothing())
    code = store.operation("sub", None, 2)
    assert (terms != sums).all() and c.claim(code, store.definition(terms, code), sums, Fraction(1)).all()


def test_identifiers_that_do_not_exist_are_not_merged_with():
    c = claims_of()
    store = c.store
    x = store.symbols(2)
    code = store.operation("add", None, 2)
    for rep in (store.n, store.n + 5, store._room - 1, store._room + 100, -1, 2, 3, 4):
        assert not c.claim(code, np.array([[x, x + 1]]), np.array([rep]), Fraction(1)).any()


def test_unclean_leaves_settle_nothing():
    """Of garbage nothing is proved, not even that it is itself."""
    c = claims_of()
    x = c.store.symbols(1)
    node = c.resolve("add", None, np.array([[x, x]]), Nothing())
    code = c.store.operation("add", None, 2)
    for row in ([4, x], [4, 4], [2, x]):
        assert not c.claim(code, np.array([row]), node, Fraction(1)).any()


def test_a_multiple_is_named_by_its_factor():
    """Guessed with the right factor: the identifier is that multiple of the reference's, neither it nor its inverse multiple."""
    r = run(lambda m, x, y: m.exp(m.mul(x, y)), lambda m, x, y: m.scale(m.div(m.exp(m.mul(y, x)), m.exp(m.neg(m.const(0, (4,))))), 2), (4, 4))
    assert mistakes(r) == [] and not r.proved().any()
    halves = torch.tensor([[1, 2], [3, 4]])
    loss = run(lambda m, x, y: m.sum(m.mul(x, y)),
               lambda m, x, y: m.scale(m.add(*(m.sum(m.mul(m.take([x], i), m.scale(m.take([y], i), 2))) for i in halves)), 0.5), (4, 4))
    assert mistakes(loss) == [] and loss.proved().all()


def test_failures_are_told():
    r = run(lambda m, x, y: m.sub(m.exp(x), y), lambda m, x, y: m.sub(m.exp(x), y), (2, 2), guesses=lambda store: Wild(store, random.Random(1), "same"))
    assert r.claims.failures and all(f.reason for f in r.claims.failures)


# ---- what a claim that fails may cost
def resolved(c: Claims, kind: str, *rows: list[int], attr=None) -> list[int]:
    return c.resolve(kind, attr, np.array(rows), Nothing()).tolist()


def layers(c: Claims, depth: int, width: int) -> int:
    """A sum of products of sums of products ..., of symbols of its own."""
    if not depth:
        return c.store.symbols(1)
    return resolved(c, "add", [resolved(c, "mul", [layers(c, depth - 1, width), layers(c, depth - 1, width)])[0] for _ in range(width)])[0]


def test_a_root_that_is_a_value_but_for_its_sign_is_not_unfolded():
    """Adam's first denominator: in a field the root of a square is the value itself for half of all values."""
    c = claims_of()
    g = layers(c, 4, 3)
    thousandth, thousand = (c.store.constant(q) for q in (Fraction(1, 1000), Fraction(1000)))
    (moment,) = resolved(c, "mul", sorted([resolved(c, "mul", [g, g])[0], thousandth]))
    (corrected,) = resolved(c, "sqrt", [moment])
    (root,) = resolved(c, "pow", [thousand], attr=Fraction(1, 2))
    code = c.store.operation("mul", None, 2)
    assert not c.claim(code, np.array([sorted([corrected, root])]), np.array([g]), Fraction(1)).any()
    assert c.failures[-1].reason == "sign" and c.wasted < 1000


def test_a_false_claim_costs_only_so_much_of_what_a_run_may_lose(monkeypatch):
    """And where some rows of a claim are proved, the others may cost as much again."""
    lost = []
    for alone in (300, 1 << 40):
        monkeypatch.setattr(claims_module, "ALONE", alone)
        c = claims_of()
        a, b = layers(c, 4, 3), layers(c, 4, 3)
        code, row = c.store.code[a], c.store.definition(np.array([a]), int(c.store.code[a]))
        assert not c.claim(int(code), row, np.array([b]), Fraction(1)).any()
        lost.append(c.wasted)
        x = c.store.symbols(2)
        left, right = resolved(c, "exp", [x])[0], resolved(c, "exp", [x + 1])[0]
        (whole,) = resolved(c, "exp", resolved(c, "add", [x, x + 1]))
        assert c.claim(c.store.operation("mul", None, 2), np.array([sorted([left, right])]), np.array([whole]), Fraction(1)).all()
    assert lost[0] < 3000 < lost[1], lost


def test_a_value_that_seems_to_be_a_number_is_taken_for_it_once():
    """1 is 2 times a half, 5 times a fifth and so on; a claim that something is 1 would be made with every factor."""
    store = Store()
    d = Dictionary(store, [Fraction(2), Fraction(5), Fraction(10)])
    x = store.symbols(1)
    ids = [store.constant(Fraction(1, n)) for n in (2, 5, 10)]
    d.learn(np.array([200, 500, 1000, 70]), np.array([*ids, x]))

    class Seems:
        """Rows of which the first is 1 by its print, the second ten times x."""
        def of(self, index):
            return np.array([1, 77])[index]

        def divided(self, index, factors):
            return np.stack([np.array([100 * int(f), 70 if f == 10 else 7])[index] for f in factors])
    found = {c: reps.tolist() for c, reps in d.scales(np.arange(2), Seems(), store.operation("exp", None, 1), np.array([[x], [x]]))}
    assert found[Fraction(2)] == [ids[0], -1] and [r[0] for c, r in found.items() if c != 2] == [-1] * (len(found) - 1) and found[Fraction(10)][1] == x


# ---- what only its structure tells apart
def zeros(m, x, y, more=None):
    """Four different zeros, each of which takes an unfolding to prove."""
    a, b = m.mul(m.exp(x), m.exp(y)), m.exp(m.add(x, y))
    return m.sub(a, b) if more is None else m.sub(m.add(a, more), m.add(b, more))


@pytest.mark.parametrize("patience", [claims_module.PATIENCE, -1_000_000])
def test_zeros_that_are_not_proved_to_be_zero_are_told_apart(monkeypatch, patience):
    """As the gradients of the biases of keys, which are all zero."""
    monkeypatch.setattr(claims_module, "PATIENCE", patience)
    r = run(lambda m, x, y: m.scale(zeros(m, x, y), 3), lambda m, x, y: m.scale(zeros(m, x, y, y), 3), (4, 4))
    assert mistakes(r) == [] and r.proved().all()
    assert (r.ids[0][-1] == ZERO_ID).all() == (patience > 0)
    scaled = run(lambda m, x, y: zeros(m, x, y), lambda m, x, y: m.scale(m.scale(zeros(m, x, y, y), 4), 0.25), (4, 4))
    assert mistakes(scaled) == [] and scaled.proved().all()


def marks(store: Store, code: int, *rows: list[int]) -> list[int]:
    return packed(Structure(store).of_rows(code, np.array(rows))).tolist()


@pytest.mark.parametrize("met_before", [False, True])
def test_marks_let_factors_through_roots(met_before):
    """sqrt(1000 v) is sqrt(v) sqrt(1000) by structure, and sqrt(x x) is not x."""
    store = Store()
    v = store.symbols(1)

    def made(kind, *row, attr=None):
        code, rows = store.operation(kind, attr, len(row)), np.array([row])
        return int(store.define(code, rows, store.known(code, rows)[2])[0])

    sqrt, mul, inv = store.operation("sqrt", None, 1), store.operation("mul", None, 2), store.operation("inv", None, 1)
    thousand = store.constant(Fraction(1000))
    scaled, square = made("mul", thousand, v), made("mul", v, v)
    known = made("pow", thousand, attr=Fraction(1, 2)) if met_before else None
    inside = marks(store, sqrt, [scaled])[0]
    store.parallel = True
    root, factor = made("sqrt", v), known or made("pow", thousand, attr=Fraction(1, 2))
    assert marks(store, mul, [root, factor])[0] == inside
    assert marks(store, mul, [root, thousand])[0] != inside
    assert marks(store, mul, [made("inv", made("inv", root)), factor])[0] == inside
    assert marks(store, inv, [made("inv", v)])[0] == marks(store, mul, [v, store.constant(Fraction(1))])[0]
    assert marks(store, sqrt, [square])[0] not in (marks(store, mul, [v, c])[0] for c in (store.constant(Fraction(1)), store.constant(Fraction(-1))))


def test_marks_by_structure():
    store = Store()
    x = store.symbols(6)

    def made(kind, *row, attr=None):
        code, rows = store.operation(kind, attr, len(row)), np.array([row])
        return int(store.define(code, rows, store.known(code, rows)[2])[0])

    two = store.constant(Fraction(2))
    add, mul, sub, exp = (store.operation(k, None, n) for k, n in (("add", 2), ("mul", 2), ("sub", 2), ("exp", 1)))
    double, total, product = made("mul", two, x), made("add", x, x + 1), made("mul", x, x + 1)
    one, other = marks(store, add, [x, x + 1], [x + 1, x])
    assert one == other != marks(store, add, [x, x + 2])[0]
    assert marks(store, add, [x, x])[0] == marks(store, mul, [x, two])[0]                # multiples and sums are seen through
    assert marks(store, sub, [total, x + 1])[0] == marks(store, sub, [double, x])[0]
    assert marks(store, mul, [product, x])[0] != marks(store, mul, [made("mul", x, x), x + 1])[0]      # products of the reference are not
    store.parallel = True
    open_ = made("mul", x, made("sub", total, x))
    assert marks(store, mul, [open_, two])[0] == marks(store, add, [made("mul", x, x + 1), open_])[0]  # those of the other side are
    assert marks(store, exp, [total])[0] == marks(store, exp, [made("add", x + 1, x)])[0] != marks(store, exp, [double])[0]
    greatest = store.operation("max", None, 3)
    assert marks(store, greatest, [x, x + 1, x + 2])[0] == marks(store, greatest, [x + 2, x, x + 1])[0]
