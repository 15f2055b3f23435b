"""The store's equations evaluated in floats, by meanings of its own: what the tests hold against every identifier and every row.

A program is a function of an algebra and values. It is run in terms, where every element gets an identifier, and at sample
points in floats. At the points where the reference is defined, an identifier's definition, every row that is interned
under it, and every element that got it must have one value; a clean one must have a value.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from trainverify.algebra.field import Field
from trainverify.algebra.real import FUNCTIONS, Real, RealValue
from trainverify.algebra.terms import Terms, TermValue
from trainverify.kernel.claims import Claims
from trainverify.kernel.elements import Elements
from trainverify.kernel.store import GARBAGE, INF_ID, NINF_ID, Store
from trainverify.relate.guess import Dictionary

FACTORS = (Fraction(2), Fraction(1, 2), Fraction(3), Fraction(-1))
TINY = 1e-11                                  # smaller numbers count as rounding errors of zero
NAN = float("nan")


# ---- meanings
class Strict(Real):
    """float64, where nan stands for undefined: 1/0 is no infinity, and what is undefined is so even if nothing is taken of it."""

    def inv(self, a):
        return RealValue(torch.where(a.t.abs() < TINY, NAN, a.t.reciprocal()))

    def div(self, a, b):
        return self.mul(a, self.inv(b))

    def log(self, a):
        return RealValue(torch.where(a.t < TINY, NAN, a.t.log()))

    def sqrt(self, a):
        return RealValue(torch.where(a.t.abs() < TINY, 0.0, a.t).sqrt())

    def pow(self, a, q):
        if float(q) < 0:
            return self.inv(self.pow(a, -q))
        return RealValue(torch.where(a.t.abs() < TINY, 0.0, a.t).pow(float(q)) + 0 * a.t)

    def compare(self, op, a, b):
        x, y = torch.broadcast_tensors(a.t, b.t)
        tie = ((x - y).abs() <= 1e-9 * (1 + x.abs() + y.abs())) & x.isfinite() & y.isfinite() | (x == y)
        more, less = (x > y) & ~tie, (x < y) & ~tie
        out = {"gt": more, "lt": less, "ge": more | tie, "le": less | tie, "eq": tie, "ne": ~tie}[op].to(x.dtype)
        return RealValue(torch.where(x.isnan() | y.isnan(), NAN, out))

    def where(self, mask, a, b):
        if isinstance(mask, torch.Tensor):
            return super().where(mask, a, b)
        return RealValue(torch.where(mask.t != 0, a.t, b.t) + 0 * (mask.t + a.t + b.t))

    def opaque(self, tag, *args):
        y = super().opaque(tag, *args).t
        return RealValue(torch.where(y.isfinite(), y, NAN))

    def sign(self, a):
        return self.sub(self.compare("gt", a, self.const(0)), self.compare("lt", a, self.const(0)))


def meaning(kind: str, attr, x: np.ndarray) -> np.ndarray:
    """The value of an operation on operands [width, points]."""
    zero = np.abs(x) < TINY
    match kind:
        case "add":
            return x.sum(0)
        case "sub":
            return x[0] - x[1]
        case "mul":
            return x.prod(0)
        case "dot":
            return (x[0::2] * x[1::2]).sum(0)
        case "neg":
            return -x[0]
        case "inv":
            return np.where(zero[0], NAN, 1 / x[0])
        case "exp" | "sin" | "cos":
            return {"exp": np.exp, "sin": np.sin, "cos": np.cos}[kind](x[0])
        case "log":
            return np.where(zero[0] | (x[0] < 0), NAN, np.log(x[0]))
        case "sqrt":
            return np.sqrt(np.where(zero[0], 0, x[0]))
        case "pow":
            return np.power(x[0], float(attr))
        case "max":
            return np.where(np.isnan(x).any(0), NAN, x.max(0))
        case "compare":
            tie = np.abs(x[0] - x[1]) <= 1e-9 * (1 + np.abs(x[0]) + np.abs(x[1]))
            return np.where(np.isnan(x).any(0), NAN, tie if attr == "eq" else (x[0] > x[1]) & ~tie)
        case "uf":
            f = torch.erf if attr == "erf" else torch.pow if attr == "power" else FUNCTIONS[attr]
            y = f(*torch.from_numpy(x))
            return torch.where(y.isfinite(), y, NAN).numpy()
    raise LookupError(kind)


def values(store: Store, first_symbol: int, symbols: np.ndarray) -> np.ndarray:
    """[identifiers, points]: every identifier by its definition; symbols [points, symbols]."""
    v = np.full((store.n, len(symbols)), NAN)
    v[INF_ID], v[NINF_ID] = np.inf, -np.inf
    for i, q in store.constants.items():
        v[i] = float(q)
    v[first_symbol:first_symbol + symbols.shape[1]] = symbols.T
    with np.errstate(all="ignore"):
        for i in np.flatnonzero(store.code[:store.n]).tolist():
            code = int(store.code[i])
            (kind, attr), _ = store.ops[code]
            v[i] = meaning(kind, attr, v[store.operands(code, store.definition(np.array([i]), code))[0]])
    return v


def row_values(store: Store, v: np.ndarray) -> list[tuple[str, int, int, np.ndarray]]:
    """(operation, code, identifier, values [points]) of every row that is interned."""
    out = []
    with np.errstate(all="ignore"):
        for arena in store.arenas.values():
            for k in range(arena.n):
                code = int(arena.code[k])
                (kind, attr), _ = store.ops[code]
                if kind != "vector":
                    out.append((f"{kind} {attr}", code, int(arena.value[k]), meaning(kind, attr, v[store.operands(code, arena.rows[k:k + 1])[0]])))
    return out


# ---- runs
class Recorder:
    """An algebra that remembers every result."""

    def __init__(self, algebra):
        self.plain, self.results, self.names = algebra, [], []

    def __getattr__(self, name: str):
        f = getattr(self.plain, name)

        def call(*args, **kwargs):
            out = f(*args, **kwargs)
            if isinstance(out, (RealValue, TermValue)):
                self.results.append(out)
                self.names.append(name)
            return out
        return call


@dataclass
class Parts:
    """The classes that a run uses; mutants replace them."""

    store: type = Store
    claims: type = Claims
    elements: type = Elements


@dataclass
class Run:
    """Both programs in terms and at sample points. sides: per side the identifiers [elements] and values [points, elements]."""

    terms: Terms
    symbols: np.ndarray
    names: list[list[str]]
    ids: list[list[np.ndarray]]
    floats: list[list[np.ndarray]]
    reference_n: int

    @property
    def claims(self) -> Claims:
        return self.terms.claims

    def proved(self) -> np.ndarray:
        """Which elements of the last results are proved equal."""
        a, b = (side[-1] for side in self.ids)
        return (a == b) & self.claims.store.clean[a]

    def defined(self) -> np.ndarray:
        """The points at which the reference is defined, and floats are sound."""
        ok = np.ones(len(self.symbols), bool)
        for ids, x in zip(self.ids[0], self.floats[0]):
            ok &= ~np.isnan(x[:, ids != GARBAGE]).any(1)
        for side in self.floats:
            for x in side:
                size = np.abs(np.where(np.isfinite(x), x, 0))
                ok &= ~((size > 1e7) | (size > TINY) & (size < 1e-8)).any(1)
        return ok


Program = Callable[..., object]


def run(reference: Program, parallel: Program, sizes: Sequence[int], guesses=None, parts: Parts | None = None, points: int = 8, seed: int = 3,
        sample: Callable[[np.random.Generator], np.ndarray] | None = None) -> Run:
    """Programs are f(algebra, *flat values of these sizes). guesses: made from the store; the honest ones if None."""
    parts = parts or Parts()
    store = parts.store()
    claims = parts.claims(store, Dictionary(store, FACTORS) if guesses is None else guesses(store))
    terms, total = Terms(Field(seed), claims, sum(sizes)), sum(sizes)
    terms.elements = parts.elements(claims)
    rng = np.random.default_rng(seed)
    symbols = np.stack([sample(rng) if sample else _point(rng, total, p) for p in range(points)])
    firsts = np.concatenate([[0], np.cumsum(sizes)])[:-1].tolist()
    out = Run(terms, symbols, [], [], [], 0)
    for side, program in (("reference", reference), ("parallel", parallel)):
        terms.begin_side(side)
        terms.at(0, 0, -1)
        out.reference_n = store.n
        recorder = _recorded(terms, program, sizes, firsts)
        out.names.append(recorder.names)
        out.ids.append([terms.ids(v).reshape(-1).numpy().copy() for v in recorder.results])
        results = [_recorded(Strict(torch.from_numpy(s)), program, sizes, firsts).results for s in symbols]
        out.floats.append([np.stack([r.t.expand(r.shape).reshape(-1).numpy() for r in group]) for group in zip(*results, strict=True)])
    return out


def _recorded(algebra, program: Program, sizes: Sequence[int], firsts: Sequence[int]) -> Recorder:
    recorder = Recorder(algebra)
    program(recorder, *(recorder.symbols("x", first, n) for first, n in zip(firsts, sizes)))
    return recorder


def _point(rng: np.random.Generator, n: int, p: int) -> np.ndarray:
    """Positive numbers at first, which square roots and logarithms need, then also negative ones, and small integers, which tie."""
    if p % 4 == 3:
        return rng.choice([-1.0, 0.0, 1.0, 2.0, 0.5], n)
    x = rng.uniform(0.2, 1.6, n)
    return x if p % 4 < 2 else x * rng.choice([-1, 1], n)


# ---- the check
def mistakes(r: Run) -> list[str]:
    """What is not true."""
    store, ok, out = r.claims.store, r.defined(), []
    v = values(store, r.terms.first_symbol, r.symbols)
    for what, _, i, x in row_values(store, v):
        if i not in (INF_ID, NINF_ID, GARBAGE) and _differs(v[i][ok], x[ok]):
            out.append(f"a row ({what}) of identifier {i}: {v[i][ok]} is not {x[ok]}")
    clean = store.clean[:store.n]
    for side, names, ids, floats in zip(("reference", "parallel"), r.names, r.ids, r.floats):
        for name, elements, x in zip(names, ids, floats):
            for k, i in enumerate(elements.tolist()):
                if i == GARBAGE:
                    continue
                mine, id_ = x[ok, k], v[i][ok]
                if i in (INF_ID, NINF_ID):
                    wrong = not (mine == id_).all()
                else:
                    wrong = _differs(id_, mine) or (clean[i] and bool(np.isnan(mine).any()))
                if wrong:
                    out.append(f"{side} {name}: identifier {i} {id_} is not {mine}")
    return out


def _differs(id_: np.ndarray, other: np.ndarray) -> bool:
    """Whether the other number is not the identifier's, at some point at which that is defined."""
    at = ~np.isnan(id_)
    a, b = id_[at], other[at]
    with np.errstate(all="ignore"):
        return not bool((np.abs(a - b) <= 1e-6 * (1 + np.abs(a) + np.abs(b))).all())
