"""Weight-independent numbers: which float64 contents mean the same real number, and its residues (not trusted: makes guesses).

Contents with at most 24 significant bits, and whole numbers, are exact. Any other content is *settled* when it arises: it is
the constant that it equals up to float64 rounding, else a simple rational, else (parallel side) the reference's constant within
4 units in the last place of float32, which is recorded as an assumption, else what the operation on residues gives, else a
recognised root, else a number of its own. What an operation gives may be known to be a rational all the same, or the root of one: 1 - 0.999 is 1/1000, however
float64 subtracts.
"""
from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import product

import numpy as np
import torch

from trainverify.algebra import primes

SAME = 1e-13                                  # relative: two float64 evaluations of one constant
_EXACT_WHOLE = 2.0 ** 53
_SHORT, _SNAPPED = 24, 16                     # significant bits: exact up to _SHORT; float32 data beyond _SNAPPED may be a rounded constant
_SIMPLE = 1 << 48                             # above the numerators and denominators that residues are read as
_NEAR = 1e-9                                  # relative: a float64 computation of a few steps, with cancellation
_PRODUCT = math.prod(primes.MODULI)
_CRT = tuple(_PRODUCT // m * pow(_PRODUCT // m, -1, m) for m in primes.MODULI)
_DATA_LIMIT = 1 << 16                         # larger data tensors are not searched for rounded constants


@dataclass(slots=True)
class Rounding:
    """Parallel constants that were taken for the reference's; `where` is what the replay had set."""

    value: float
    representative: float
    where: object
    count: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A constant that is not exact: canonical content (positive), residues, parity (of the numerator, for the signs of logarithms),
    what it is: (q, n) for the n-th root of the rational q, None for any other number; whether the content alone tells that it is rational."""

    value: float
    residues: tuple[int, ...]
    odd: bool
    meaning: tuple[Fraction, int] | None
    rational: bool = False


def is_short(x: torch.Tensor, bits: int = _SHORT) -> torch.Tensor:
    """Where finite contents have at most `bits` significant bits; true of infinities and nan."""
    mantissa = torch.frexp(x)[0] * 2.0 ** bits
    return (mantissa == mantissa.floor()) | ~x.isfinite()


def _is_exact(v: float) -> bool:
    """As is_short, or a whole number."""
    return not math.isfinite(v) or (math.frexp(v)[0] * 2.0 ** _SHORT).is_integer() or (v.is_integer() and abs(v) < _EXACT_WHOLE)


def convergents(x: float):
    """Continued fraction convergents (numerator, denominator) of a positive float."""
    rest = Fraction(x)
    h0, h1, k0, k1 = 0, 1, 1, 0
    while True:
        whole = rest.numerator // rest.denominator
        h0, h1, k0, k1 = h1, whole * h1 + h0, k1, whole * k1 + k0
        yield h1, k1
        if rest == whole or h1 * k1 > 1 << 44:
            return
        rest = 1 / (rest - whole)


def rational(x: float) -> Fraction | None:
    """The rational that a positive float64 stands for, if it is simple enough not to be a coincidence (odds below 1 in 1000)."""
    for h, k in convergents(x):
        size = h * k
        if size > 1 << 41:
            break
        if h and abs(h / k - x) <= (SAME * x if size <= 1 << 31 else 0.0):
            return Fraction(h, k)
    for near in (f"{x:.9g}", float(np.float32(x))):
        if abs(float(near) - x) <= SAME * x:
            return Fraction(near)
    return None


def rational_float32(x: float) -> Fraction | None:
    """The simple rational that rounds to this positive float32, for scalars that were Python literals."""
    for h, k in convergents(x):
        if h * k > 1 << 15:
            break
        if h and float(np.float32(h / k)) == x:
            return Fraction(h, k)
    decimal = f"{x:.5g}"
    return Fraction(decimal) if float(np.float32(float(decimal))) == x else None


def _near_power(x: float, root: int, limit: int) -> Fraction | None:
    """x ** root as a small rational, within float64 rounding."""
    v = x ** root
    if not 1e-12 < v < 1e12:
        return None
    for h, k in convergents(v):
        if h * k > limit:
            return None
        if h and abs(h / k - v) <= 2.0 ** -50 * root * v:
            return Fraction(h, k)
    return None


def fraction_residues(f: Fraction) -> tuple[int, ...]:
    return tuple(f.numerator * pow(f.denominator, -1, m) % m for m in primes.MODULI)


def reconstructed(residues: tuple[int, ...]) -> Fraction | None:
    """The rational with numerator and denominator below 2^48 that has these residues. There is at most one, since the moduli multiply to more than 2^120, and for
    a number that is none the odds of finding one are below 2^-24."""
    low, high = _PRODUCT, sum(r * c for r, c in zip(residues, _CRT)) % _PRODUCT
    below, above = 0, 1
    while high >= _SIMPLE:
        quotient = low // high
        low, high = high, low - quotient * high
        below, above = above, below - quotient * above
    if not high or abs(above) >= _SIMPLE:
        return None
    found = Fraction(high, above)
    return found if found.denominator == abs(above) else None


def _derived(v: float, residues: tuple[int, ...]) -> tuple[Fraction, int] | None:
    """What a positive content is whose residues follow from those of rationals: a rational or the square root of one, near the content."""
    f = reconstructed(residues)
    if f is not None and abs(float(f) - v) <= _NEAR * v:
        return f, 1
    squares = _raised(residues, 2)
    for signs in product((1, -1), repeat=len(squares)):      # the power map's root of what has none is one of its negative
        f = reconstructed(tuple(s * r % m for s, r, m in zip(signs, squares, primes.MODULI)))
        if f is not None and abs(float(f) - v * v) <= _NEAR * v * v and _root(fraction_residues(f)) == residues:
            return f, 2
    return None


def _root(residues: tuple[int, ...], times: int = 1) -> tuple[int, ...]:
    for _ in range(times):
        residues = tuple(pow(r, (3 * m - 1) // 4, m) for r, m in zip(residues, primes.MODULI))
    return residues


def _times(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x * y % m for x, y, m in zip(a, b, primes.MODULI))


def _raised(a: tuple[int, ...], n: int) -> tuple[int, ...]:
    return tuple(pow(x, n, m) for x, m in zip(a, primes.MODULI))


class Constants:
    """The constants of one field: first the reference's, then the parallel side's."""

    def __init__(self, seed: int):
        self.where: object = None
        self.parallel = False
        self._seed = seed
        self._known: dict[float, Entry] = {}
        self._single: dict[float, torch.Tensor] = {}   # residues of single contents
        self._meanings: dict[float, tuple[Fraction, int] | None] = {}
        self._sorted: list[float] = []        # canonical values of both sides
        self._reference: list[float] = []     # canonical values of the reference
        self._data: list[np.ndarray] = []     # float32 data of the reference with many significant bits
        self._reference_data = np.zeros(0)
        self._reference_array = np.zeros(0)
        self._literals: dict[float, set[float]] = {}   # of the reference, by what they stand for
        self._scalars: list[Entry] = []       # irrational scalars, not from tables
        self._merged: dict[tuple[float, float, object], Rounding] = {}
        self._sqrt_pi = self._atom("sqrt(pi)")

    @property
    def rounding(self) -> list[Rounding]:
        return list(self._merged.values())

    def begin_parallel(self) -> None:
        self.parallel = True
        self._reference = list(self._sorted)
        self._reference_array = np.array(self._reference)
        self._reference_data = np.unique(np.concatenate(self._data)) if self._data else np.zeros(0)
        self._data = []

    # ---- settling
    def settle(self, x: torch.Tensor, structure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor:
        """Canonical contents of float64 x; structure() gives residues [4, ...] that the defining operation implies."""
        if x.numel() == 1:
            v = x.item()
            new = v if _is_exact(v) else self._settle_one(v, structure)
            return x if new == v or v != v else torch.full_like(x, new)
        long = ~(is_short(x) | ((x == x.round()) & (x.abs() < _EXACT_WHOLE)))
        if not long.any():
            return x
        values, inverse, counts = np.unique(x[long].numpy(), return_inverse=True, return_counts=True)
        positive = [abs(v) for v in values.tolist()]
        implied: dict[float, tuple[int, ...]] = {}
        if structure is not None and any(v not in self._known and self._find(v) is None for v in positive):
            implied = self._implied(structure()[:, long], inverse, values.tolist())
        few = len(positive) <= 2              # a scalar, not a table
        new = [math.copysign(self._entry(v, implied.get(v), int(c), few), s) for v, s, c in zip(positive, values.tolist(), counts)]
        out = x.clone()
        out[long] = torch.from_numpy(np.array(new)[inverse])
        return out

    def _settle_one(self, v: float, structure: Callable[[], torch.Tensor] | None) -> float:
        a, implied = abs(v), None
        if structure is not None and a not in self._known and self._find(a) is None:
            implied = tuple(r if v > 0 else -r % m for r, m in zip(structure().reshape(4).tolist(), primes.MODULI))
        return math.copysign(self._entry(a, implied, 1, True), v)

    def _implied(self, residues: torch.Tensor, inverse: np.ndarray, values: list[float]) -> dict[float, tuple[int, ...]]:
        first = np.zeros(len(values), dtype=np.int64)
        first[inverse[::-1]] = np.arange(len(inverse))[::-1]
        rows = residues[:, torch.from_numpy(first)].t().tolist()
        return {abs(v): tuple(r if v > 0 else -r % m for r, m in zip(row, primes.MODULI)) for v, row in zip(values, rows)}

    def _entry(self, v: float, implied: tuple[int, ...] | None, count: int, scalar: bool) -> float:
        """Canonical value for a positive content; registers it if new."""
        entry = self._known.get(v) or self._find(v)
        if entry is None:
            entry = self._new(v, implied, scalar)
        self._known[v] = entry
        if self.parallel and entry.value != v and abs(entry.value - v) > SAME * v:
            self._note(v, entry.value, count)
        return entry.value

    def _find(self, v: float) -> Entry | None:
        """The known constant that v equals up to float64 rounding."""
        near = _nearest(self._sorted, v)
        return self._known[near] if near is not None and abs(near - v) <= SAME * v else None

    def _new(self, v: float, implied: tuple[int, ...] | None, scalar: bool) -> Entry:
        f = rational(v)
        if f is not None:
            rounded = float(np.float32(v))
            if self.parallel and self._holds_data(rounded):
                return self._known_or_exact(rounded)
            return self._register(Entry(f.numerator / f.denominator, fraction_residues(f), f.numerator % 2 == 1, (f, 1), True))
        if self.parallel:
            near = [w for w in (_nearest(self._reference, v), _nearest_array(self._reference_data, v)) if w is not None]
            near = [w for w in near if abs(w - v) <= _four_ulp(v) and not (w in self._known and self._known[w].rational)]
            if near:
                return self._known_or_exact(min(near, key=lambda w: abs(w - v)))
        residues = self._recognise(v) if implied is None else implied
        meaning = _derived(v, implied) if scalar and implied is not None else None
        odd = meaning is not None and meaning[1] == 1 and meaning[0].numerator % 2 == 1
        entry = self._register(Entry(v, residues or self._atom(v), odd, meaning))
        if scalar and meaning is None:
            self._scalars.append(entry)
        return entry

    def _known_or_exact(self, v: float) -> Entry:
        return self._known.get(v) or Entry(v, fraction_residues(Fraction(v)), False, (Fraction(v), 1), True)

    def _register(self, entry: Entry) -> Entry:
        if entry.value not in self._known:
            self._known[entry.value] = entry
            insort(self._sorted, entry.value)
        return self._known[entry.value]

    def _note(self, value: float, representative: float, count: int) -> None:
        at = (value, representative, self.where)
        if at in self._merged:
            self._merged[at].count += count
        else:
            self._merged[at] = Rounding(value, representative, self.where, count)

    def _atom(self, what: object) -> tuple[int, ...]:
        """Random squares, so that roots of unrecognised constants exist."""
        return tuple(pow(primes.key(self._seed, f"constant|{what!r}|{m}") % (m - 1) + 1, 2, m) for m in primes.MODULI)

    def _recognise(self, v: float) -> tuple[int, ...] | None:
        """Roots of small rationals, times a power of sqrt(pi) or of an earlier irrational scalar."""
        for root, times in ((2, 1), (4, 2)):
            f = _near_power(v, root, 1 << 26)
            if f is not None:
                return _root(fraction_residues(f), times)
        for n in (1, -1, 2, -2):              # v = r * sqrt(pi) ** n
            f = _near_power(v / math.pi ** (n / 2), 2, 1 << 20)
            if f is not None:
                return _times(_root(fraction_residues(f)), _raised(self._sqrt_pi, n))
        for base in self._scalars[-32:]:      # v ** root = r * base ** n
            for n in (1, -1, 2, -2, 4, -4):
                for root, times in ((1, 0), (2, 1)):
                    f = _near_power(v / base.value ** (n / root), root, 1 << 20)
                    if f is not None:
                        return _times(_root(fraction_residues(f), times), _root(_raised(base.residues, n), times))
        return None

    # ---- scalars and data
    def scalar(self, x: float) -> float:
        """Canonical content of a Python float. One that PyTorch rounded to float32 on its way (an epsilon of 9.999999747378752e-06) is
        the literal that it came from."""
        v = abs(x)
        if x == round(x) and v < _EXACT_WHOLE or bool(is_short(torch.tensor(x, dtype=torch.float64), _SNAPPED)):
            return x
        literal = rational_float32(v) if float(np.float32(v)) == v else None
        if literal is None and _is_exact(v):
            return x
        value = v if literal is None else literal.numerator / literal.denominator
        self._note_literal(v, value)
        return math.copysign(self._entry(value, None, 1, True), x)

    def _note_literal(self, v: float, value: float) -> None:
        """Literals of the parallel side that the reference has rounded, or not rounded, are an assumption."""
        if not self.parallel:
            self._literals.setdefault(value, set()).add(v)
        elif v not in self._literals.get(value, {v}):
            self._note(v, value, 1)

    def scalar_float32(self, x: float) -> float:
        """Canonical content of a 0-d float32 tensor."""
        t = torch.tensor(x, dtype=torch.float64)
        if bool(is_short(t, 12)) or (x == round(x) and abs(x) < 1 << 24):
            return x
        f = rational_float32(abs(x))
        return math.copysign(self.scalar(f.numerator / f.denominator), x) if f is not None else x

    def data_float32(self, x: torch.Tensor) -> torch.Tensor:
        """Canonical contents of float32 data (as float64): exact, unless it is a rounded constant of the reference."""
        if x.numel() > _DATA_LIMIT:
            return x
        long = ~(is_short(x, _SNAPPED) | (x == x.round()))
        if not long.any():
            return x
        values, inverse, counts = np.unique(x[long].numpy(), return_inverse=True, return_counts=True)
        if not self.parallel:
            self._data.append(np.abs(values))
            return x
        near = self._near_reference(np.abs(values))
        if not near.any():
            return x
        values[near] = [self._rounded_from(v, int(c)) for v, c in zip(values[near].tolist(), counts[near])]
        out = x.clone()
        out[long] = torch.from_numpy(values[inverse])
        return out

    def _near_reference(self, values: np.ndarray) -> np.ndarray:
        """Where a constant of the reference lies within 4 units in the last place of float32."""
        known = self._reference_array
        if not len(known):
            return np.zeros(len(values), dtype=bool)
        at = np.searchsorted(known, values)
        below, above = known[(at - 1).clip(min=0)], known[at.clip(max=len(known) - 1)]
        return np.minimum(np.abs(values - below), np.abs(values - above)) <= 2.0 ** -21 * values

    def _rounded_from(self, value: float, count: int) -> float:
        v = abs(value)
        near = None if self._holds_data(v) else _nearest_array(self._reference_array, v)
        if near is None:
            return value
        if self._known[near].rational:
            same = float(np.float32(near)) == v
        else:
            same = abs(near - v) <= _four_ulp(v)
        if not same:
            return value
        self._note(v, near, count)
        return math.copysign(near, value)

    def _holds_data(self, v: float) -> bool:
        at = int(np.searchsorted(self._reference_data, v))
        return at < len(self._reference_data) and self._reference_data[at] == v

    # ---- for another field
    def entries(self, contents: Iterable[float]) -> list[Entry]:
        """What is known of those of some settled contents that are not exact."""
        return [self._known[v] for v in sorted({abs(v) for v in contents if not _is_exact(v)})]

    def adopt(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self._register(entry)

    # ---- meaning
    def meaning(self, v: float) -> tuple[Fraction, int] | None:
        """What a settled positive content is: (q, n) for the n-th root of the rational q; None for any other number."""
        if _is_exact(v):
            return Fraction(v), 1
        if v not in self._meanings:
            self._meanings[v] = self._known[v].meaning or next(((f, root) for root in (2, 4) if (f := _near_power(v, root, 1 << 26)) is not None), None)
        return self._meanings[v]

    # ---- residues
    def residues(self, x: torch.Tensor) -> torch.Tensor:
        """[4, ...] residues of settled contents; infinities and nan give 0."""
        d = x.dim()
        if x.numel() == 1:
            return self._residues_of_one(x.item()).view(4, *([1] * d))
        finite = torch.where(x.isfinite(), x, 0.0)
        whole = (finite == finite.round()) & (finite.abs() < _EXACT_WHOLE)
        if whole.all():
            return finite.to(torch.int64).remainder(primes.MOD[d])
        out = primes.dyadic(finite)
        long = ~(whole | is_short(finite))
        if long.any():
            values, inverse = np.unique(finite[long].numpy(), return_inverse=True)
            rows = torch.tensor([self._known[abs(v)].residues for v in values.tolist()], dtype=torch.int64).t()
            negative = torch.from_numpy(values < 0)
            rows = torch.where(negative, (-rows).remainder_(primes.MOD[1]), rows)
            out[:, long] = rows[:, torch.from_numpy(inverse)]
        return out

    def _residues_of_one(self, v: float) -> torch.Tensor:
        """[4] residues of one settled content, to be left unchanged."""
        got = self._single.get(v)
        if got is None:
            if not math.isfinite(v):
                residues = (0, 0, 0, 0)
            elif _is_exact(v):
                residues = fraction_residues(Fraction(v))
            else:
                residues = tuple(r if v > 0 else -r % m for r, m in zip(self._known[abs(v)].residues, primes.MODULI))
            got = self._single[v] = torch.tensor(residues)
        return got

    def odd(self, x: torch.Tensor) -> torch.Tensor:
        """uint8 0/1: whether multiplying by this constant keeps the sign bits of logarithms (an odd numerator; halves keep them)."""
        whole = x == x.round()
        if whole.all():
            return (x.abs().remainder(2) == 1).to(torch.uint8)
        flat = [self._parity(v) for v in x.reshape(-1).tolist()]
        return torch.tensor(flat, dtype=torch.uint8).reshape(x.shape)

    def _parity(self, v: float) -> bool:
        entry = self._known.get(abs(v))
        if entry is not None:
            return entry.odd
        return math.isfinite(v) and Fraction(v).numerator % 2 == 1


def _four_ulp(v: float) -> float:
    return 2.0 ** (math.frexp(v)[1] - 24 + 2)


def _nearest(ordered: list[float], v: float) -> float | None:
    at = bisect_left(ordered, v)
    return min(ordered[max(at - 1, 0):at + 1], key=lambda w: abs(w - v), default=None)


def _nearest_array(ordered: np.ndarray, v: float) -> float | None:
    at = int(np.searchsorted(ordered, v))
    return min(ordered[max(at - 1, 0):at + 1].tolist(), key=lambda w: abs(w - v), default=None)
