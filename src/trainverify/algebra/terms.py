"""The algebra `terms`: every element is an identifier of the kernel's store, next to its fingerprint in a field (trusted).

One pass gives both. The field proposes which elements are equal, and evaluates constants; the identifiers are made by the
kernel, which merges only what it proves. Movements move identifiers. Rows are the same as in every algebra.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch

from trainverify.algebra.base import Number
from trainverify.algebra.field import Field
from trainverify.algebra.fieldvalue import FieldValue, is_dense
from trainverify.algebra.order import one_number
from trainverify.algebra.powers import Powers
from trainverify.algebra.primes import MOD_P, P, pack_p
from trainverify.kernel.claims import Claims
from trainverify.kernel.elements import Elements, Some
from trainverify.kernel.store import GARBAGE, I64, INF_ID, NINF_ID, ONE_ID, ZERO_ID
from trainverify.kernel.terms import NEGATIVE, POSITIVE


class TermValue:
    """f: the field's value; ids: int64 tensor of the same shape (of a constant: made when asked for)."""

    __slots__ = ("f", "ids")

    def __init__(self, f: FieldValue, ids: torch.Tensor | None = None):
        self.f, self.ids = f, ids

    @property
    def shape(self) -> tuple[int, ...]:
        return self.f.shape

    def __repr__(self) -> str:
        return f"TermValue({self.f}, ids={self.ids})"


class Prints:
    """The fingerprints of one result; elements are counted in contiguous order."""

    def __init__(self, field: Field, f: FieldValue):
        self._field, self._f, self._res = field, f, None

    def _residues(self) -> torch.Tensor:
        if self._res is None:
            self._res = self._field.print_of(self._f).res[:2].reshape(2, -1)
        return self._res

    def of(self, index: np.ndarray) -> np.ndarray:
        return pack_p(self._residues()[:, torch.from_numpy(index)]).numpy()

    def divided(self, index: np.ndarray, factors: tuple[Fraction, ...]) -> np.ndarray:
        return pack_p((self._residues()[:, None, torch.from_numpy(index)] * _inverses(factors)).remainder_(MOD_P[2])).numpy()


@lru_cache(maxsize=64)
def _inverses(factors: tuple[Fraction, ...]) -> torch.Tensor:
    """1 / c modulo both P, [2, factors, 1]."""
    return torch.tensor([[c.denominator * pow(c.numerator, -1, p) % p for c in factors] for p in P], dtype=torch.int64)[:, :, None]


class NoPrints:
    """For rows that nothing is guessed of."""

    def of(self, index: np.ndarray) -> None:
        return None


class Cell:
    """A memory cell: the field's, and the identifiers (None while it holds constants whose identifiers nobody has asked for: most
    are initial weights, which symbols overwrite)."""

    __slots__ = ("field", "ids", "owned")

    def __init__(self, field, ids: torch.Tensor | None):
        self.field, self.ids, self.owned = field, None if ids is None else ids.contiguous(), False


class Terms(Powers):
    """field: a fresh one. total: how many symbols there are."""

    name = "terms"

    def __init__(self, field: Field, claims: Claims, total: int):
        self.field, self.claims, self.nodes, self.elements = field, claims, claims.store, Elements(claims)
        self.first_symbol = self.nodes.symbols(total)
        self.places: list[tuple[int, int, int]] = [(-1, -1, -1)]
        self._known: dict[float, int] = {math.inf: INF_ID, -math.inf: NINF_ID}
        self._constants(torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64))

    # ---- sides and places
    def begin_side(self, side: str) -> None:
        self.field.begin_side(side)
        self.nodes.parallel = side == "parallel"

    def at(self, rank: int, index: int, span: int, phase: str = "") -> None:
        """The replay's place, which new identifiers remember (`places` by their origin)."""
        self.field.at(rank, index, span, phase)
        self.nodes.now = len(self.places)
        self.places.append((rank, index, span))

    # ---- identifiers
    def ids(self, v: TermValue) -> torch.Tensor:
        if v.ids is None:
            v.ids = self._constants(v.f.num)
        return v.ids

    def _constants(self, num: torch.Tensor) -> torch.Tensor:
        if not num.numel():
            return torch.zeros(num.shape, dtype=torch.int64)
        flat = num.reshape(-1)
        if num.numel() == 1 or bool((flat == flat[0]).all()):
            return torch.full(num.shape, self._constant(flat[0].item()))
        values, inverse = np.unique(flat.numpy(), return_inverse=True)
        made = np.array([self._constant(v) for v in values.tolist()], I64)
        return torch.from_numpy(made[inverse.reshape(-1)]).reshape(num.shape)

    def _constant(self, v: float) -> int:
        """The identifier of a settled content."""
        i = self._known.get(v)
        if i is None:
            i = self._known[v] = GARBAGE if v != v else self._number(v)
            if not self.nodes.parallel and i != GARBAGE:
                mark = Prints(self.field, FieldValue((1,), self.field.constants.residues(torch.tensor([v], dtype=torch.float64))))
                self.claims.guesses.learn(mark.of(np.zeros(1, I64)), np.array([i]))
        return i

    def _number(self, v: float) -> int:
        meaning = self.field.constants.meaning(abs(v))
        if meaning is None:
            i = self.nodes.unknown(abs(v), POSITIVE)
        elif meaning[1] == 1:
            return self.nodes.constant(meaning[0] if v > 0 else -meaning[0])
        else:
            i = self._function("pow", Fraction(1, meaning[1]), self.nodes.constant(meaning[0]))
        return i if v > 0 else self._function("neg", None, i)

    def _function(self, kind: str, attr, operand: int) -> int:
        return int(self.claims.resolve(kind, attr, np.array([[operand]]), NoPrints())[0])

    def _value(self, f: FieldValue, make: Callable[[Prints], np.ndarray]) -> TermValue:
        """A result: constants need no identifiers."""
        if f.num is not None:
            return TermValue(f)
        if not math.prod(f.shape):
            return TermValue(f, torch.zeros(f.shape, dtype=torch.int64))
        return TermValue(f, torch.from_numpy(make(Prints(self.field, f))).reshape(f.shape))

    def _flat(self, v: TermValue, shape: Sequence[int]) -> np.ndarray:
        return self.ids(v).expand(tuple(shape)).reshape(-1).numpy()

    def _binary(self, f: FieldValue, op: Callable, a: TermValue, b: TermValue) -> TermValue:
        return self._value(f, lambda prints: op(self._flat(a, f.shape), self._flat(b, f.shape), prints))

    def _unary(self, f: FieldValue, op: Callable, a: TermValue) -> TermValue:
        return self._value(f, lambda prints: op(self._flat(a, f.shape), prints))

    # ---- constants
    def const(self, x: Number, shape: Sequence[int] = ()):
        return TermValue(self.field.const(x, tuple(shape)))

    def data(self, t: torch.Tensor):
        return TermValue(self.field.data(t))

    def is_const(self, a) -> bool:
        return a.f.num is not None

    # ---- ring
    def add(self, a, b):
        return self._binary(self.field.add(a.f, b.f), self.elements.add, a, b)

    def sub(self, a, b):
        return self._binary(self.field.sub(a.f, b.f), self.elements.sub, a, b)

    def neg(self, a):
        return self._unary(self.field.neg(a.f), self.elements.neg, a)

    def mul(self, a, b):
        return self._binary(self.field.mul(a.f, b.f), self.elements.mul, a, b)

    def inv(self, a):
        return self._unary(self.field.inv(a.f), self.elements.inv, a)

    def div(self, a, b):
        return TermValue(self.field.div(a.f, b.f)) if self.is_const(a) and self.is_const(b) else self.mul(a, self.inv(b))

    def scale(self, a, c: Number):
        return self.mul(a, self.const(c))

    def sum(self, a, dims: Sequence[int] | None = None, keepdim: bool = False):
        n = len(a.shape)
        if not n:
            return a
        dims = sorted(d % n for d in dims) if dims else list(range(n))
        return self._value(self.field.sum(a.f, dims, keepdim), lambda prints: self.elements.total(self._rows(a, dims), prints))

    def _rows(self, a, dims: Sequence[int]) -> np.ndarray:
        """Identifiers [rest, elements of dims]."""
        keep = [d for d in range(len(a.shape)) if d not in dims]
        return self.ids(a).permute(*keep, *dims).reshape(math.prod(a.shape[d] for d in keep), -1).numpy()

    def cumsum(self, a, dim: int):
        f = self.field.cumsum(a.f, dim)
        if not a.shape or f.num is not None or not math.prod(a.shape):
            return TermValue(f, a.ids)
        dim %= len(a.shape)
        rows = self.ids(a).movedim(dim, -1)
        lines, n = rows.reshape(-1, rows.shape[-1]).numpy(), rows.shape[-1]
        parts = [self.elements.total(lines[:, :j + 1], Prints(self.field, f.move(lambda t, lead, j=j: t.select(dim + lead, j)))) for j in range(n)]
        ids = torch.from_numpy(np.stack(parts, 1)).reshape(rows.shape).movedim(-1, dim)
        return TermValue(f, ids)

    def matmul(self, a, b):
        f = self.field.matmul(a.f, b.f)

        def product(prints: Prints) -> np.ndarray:
            batch = f.shape[:-2]
            x, y = (self.ids(v).expand(*batch, *v.shape[-2:]).reshape(math.prod(batch), *v.shape[-2:]).numpy() for v in (a, b))
            return self.elements.dot(x, y, prints)
        return self._value(f, product)

    # ---- functions
    def exp(self, a):
        return self._unary(self.field.exp(a.f), self.elements.exp, a)

    def log(self, a):
        return self._unary(self.field.log(a.f), self.elements.log, a)

    def sqrt(self, a):
        return self._unary(self.field.sqrt(a.f), self.elements.sqrt, a)

    def pow(self, a, q: Number):
        return TermValue(self.field.pow(a.f, q)) if self.is_const(a) else self._pow(a, q)

    def power(self, a, b):
        return TermValue(self.field.power(a.f, b.f)) if self.is_const(a) and self.is_const(b) else self._power(a, b)

    def sin(self, a):
        return self._unary(self.field.sin(a.f), lambda x, prints: self.elements.function("sin", x, prints), a)

    def cos(self, a):
        return self._unary(self.field.cos(a.f), lambda x, prints: self.elements.function("cos", x, prints), a)

    def erf(self, a):
        return self._uninterpreted(self.field.erf(a.f), "erf", a)

    def opaque(self, tag: str, *args):
        return self._uninterpreted(self.field.opaque(tag, *(a.f for a in args)), tag, *args)

    def _opaque(self, tag: str, *args):
        return self._uninterpreted(self.field._opaque(tag, *(a.f for a in args)), tag, *args)

    def _uninterpreted(self, f: FieldValue, tag: str, *args):
        return self._value(f, lambda prints: self.elements.uninterpreted(tag, [self._flat(a, f.shape) for a in args], prints))

    # ---- order
    def maximum(self, a, b):
        """Where both are negative, as a minimum: see there."""
        f = self.field.maximum(a.f, b.f)
        number, x = one_number(self, a, b)
        if number is not None and number.f.num.item() < 0 and self._has_sign(x, NEGATIVE) and self._has_sign(opposite := self.neg(x), POSITIVE):
            return TermValue(f, self.ids(self.neg(self.minimum(self.neg(number), opposite))))
        return self._value(f, lambda prints: self.elements.greatest(np.stack([self._flat(a, f.shape), self._flat(b, f.shape)], 1), prints))

    def minimum(self, a, b):
        """Of a positive number c and one x > 0: min(c, x) = c / max(1, c / x), which is how the field sees it. The sign is the store's, which holds
        wherever the reference is defined, so that 1 / x is defined there too."""
        number, x = one_number(self, a, b)
        if number is None or number.f.num.item() <= 0 or not self._has_sign(x, POSITIVE):
            least = self.neg(self.maximum(self.neg(a), self.neg(b)))
        else:
            least = self.mul(number, self.inv(self.maximum(self.const(1), self.mul(number, self.inv(x)))))
        return least if self.is_const(least) else TermValue(self.field.minimum(a.f, b.f), self.ids(least))

    def _has_sign(self, x: TermValue, sign: int) -> bool:
        return bool((self.nodes.sign[self.ids(x).reshape(-1).numpy()] == sign).all())

    def number_of(self, a) -> torch.Tensor:
        """The contents of a constant."""
        return a.f.num

    def amax(self, a, dims: Sequence[int] = (), keepdim: bool = False):
        n = len(a.shape)
        if not n:
            return a
        dims = sorted(d % n for d in dims) if dims else list(range(n))
        return self._value(self.field.amax(a.f, dims, keepdim), lambda prints: self.elements.greatest(self._rows(a, dims), prints))

    def amin(self, a, dims: Sequence[int] = (), keepdim: bool = False):
        return self.neg(self.amax(self.neg(a), dims, keepdim))

    def peak(self, a, dims):
        return None

    def compare(self, op: str, a, b):
        f = self.field.compare(op, a.f, b.f)
        if f.num is not None:
            return TermValue(f)
        if op in ("lt", "le"):
            a, b, op = b, a, {"lt": "gt", "le": "ge"}[op]
        if op == "ge":
            a, b = b, a
        atom = "eq" if op in ("eq", "ne") else "gt"
        if op in ("gt", "eq"):
            return self._binary(f, lambda x, y, prints: self.elements.compare(atom, x, y, prints), a, b)
        positive = self.compare(atom, a, b)
        return TermValue(f, self.sub(self.const(1), positive).ids)

    def where(self, mask, a, b):
        if not isinstance(mask, torch.Tensor):
            if not self.is_const(mask):
                f = self.field.where(mask.f, a.f, b.f)
                x, y, chosen = (self._flat(v, f.shape) for v in (a, b, mask))
                if ((chosen == ZERO_ID) | (chosen == ONE_ID)).all():
                    return TermValue(f, torch.from_numpy(np.where(chosen == ONE_ID, x, y)).reshape(f.shape))
                blend = self.add(self.mul(mask, a), self.mul(self.sub(self.const(1), mask), b))
                return TermValue(f, self.ids(blend).expand(f.shape))
            mask = mask.f.num != 0
        f = self.field.where(mask, a.f, b.f)
        return TermValue(f) if f.num is not None else TermValue(f, torch.where(mask, self.ids(a), self.ids(b)))

    def sign(self, a):
        f = self.field.sign(a.f)
        if f.num is not None:
            return TermValue(f)
        zero = self.const(0)
        return TermValue(f, self.ids(self.sub(self.compare("gt", a, zero), self.compare("gt", zero, a))))

    def abs(self, a):
        f = self.field.abs(a.f)
        return TermValue(f) if f.num is not None else TermValue(f, self.ids(self.maximum(a, self.neg(a))))

    # ---- movement
    def _moved(self, a, f: FieldValue, move: Callable[[torch.Tensor], torch.Tensor]):
        return TermValue(f, None if a.ids is None else move(a.ids))

    def reshape(self, a, shape: Sequence[int]):
        return self._moved(a, self.field.reshape(a.f, shape), lambda t: t.reshape(tuple(shape)))

    def permute(self, a, dims: Sequence[int]):
        return self._moved(a, self.field.permute(a.f, dims), lambda t: t.permute(tuple(dims)))

    def expand(self, a, shape: Sequence[int]):
        return self._moved(a, self.field.expand(a.f, shape), lambda t: t.expand(tuple(shape)))

    def take(self, sources: Sequence[TermValue], index: torch.Tensor):
        f = self.field.take([s.f for s in sources], index)
        if f.num is not None:
            return TermValue(f)
        if len(sources) == 1 and index.numel() and bool((index > 0).all()):
            return TermValue(f, self.ids(sources[0]).reshape(-1)[index - 1])
        flat = torch.cat([torch.full((1,), ZERO_ID), *(self.ids(s).reshape(-1) for s in sources)])
        return TermValue(f, flat[index])

    def scatter_sum(self, base, index: torch.Tensor, src):
        f = self.field.scatter_sum(base.f, index, src.f)
        return self._value(f, lambda prints: self._scattered(base, index, src, prints))

    def _scattered(self, base, index: torch.Tensor, src, prints: Prints) -> np.ndarray:
        """Sums of as many summands as arrive at a place."""
        out, places = self._flat(base, base.shape).copy(), index.reshape(-1).numpy()
        values = self._flat(src, index.shape)
        some = values != ZERO_ID
        places, values = places[some], values[some]
        order = np.argsort(places, kind="stable")
        places, values = places[order], values[order]
        at, start, counts = np.unique(places, return_index=True, return_counts=True)
        for n in np.unique(counts).tolist():
            which = np.flatnonzero(counts == n)
            rows = np.concatenate([out[at[which], None], values[start[which, None] + np.arange(n)]], 1)
            out[at[which]] = self.elements.total(rows, Some(prints, at[which]))
        return out

    def cast(self, a, dtype: str):
        return a

    def stack(self, values: Sequence[TermValue]):
        f = self.field.stack([v.f for v in values])
        return TermValue(f) if f.num is not None else TermValue(f, torch.stack([self.ids(v) for v in values]))

    # ---- memory cells
    def symbols(self, name: str, first: int, n: int):
        return TermValue(self.field.symbols(name, first, n), torch.arange(first, first + n) + self.first_symbol)

    def garbage(self, key: str, n: int):
        return TermValue(self.field.garbage(key, n), torch.full((n,), GARBAGE))

    def cell(self, flat: TermValue) -> Cell:
        return Cell(self.field.cell(flat.f), flat.ids)

    def load(self, cell: Cell, offset: int, size: Sequence[int], stride: Sequence[int]):
        size, stride = tuple(size), tuple(stride)
        f = self.field.load(cell.field, offset, size, stride)
        if cell.ids is None:
            return TermValue(f)
        if offset == 0 and is_dense(size, stride, len(cell.ids)):
            cell.owned = False
            return TermValue(f, cell.ids.reshape(size))
        return TermValue(f, cell.ids.as_strided(size, stride, cell.ids.storage_offset() + offset).clone(memory_format=torch.contiguous_format))

    def store(self, cell: Cell, offset: int, size: Sequence[int], stride: Sequence[int], v: TermValue) -> Cell:
        size, stride = tuple(size), tuple(stride)
        whole = offset == 0 and is_dense(size, stride, cell.field.n)
        if cell.ids is None and not whole and v.ids is not None:
            cell.ids, cell.owned = self._constants(cell.field.value.num), True
        cell.field = self.field.store(cell.field, offset, size, stride, v.f)
        if whole:
            cell.ids, cell.owned = None if v.ids is None else v.ids.reshape(-1).contiguous(), False
        elif cell.ids is not None:
            if not cell.owned:
                cell.ids, cell.owned = cell.ids.clone(), True
            cell.ids.as_strided(size, stride, cell.ids.storage_offset() + offset).copy_(self.ids(v))
        return cell

    # ---- comparison of results
    def equal(self, a, b) -> torch.Tensor:
        """Proved equal: one identifier, of a number that is defined wherever the reference is."""
        x, y = torch.broadcast_tensors(self.ids(a), self.ids(b))
        return (x == y) & torch.from_numpy(self.nodes.clean)[x]

    def fingerprint(self, v) -> torch.Tensor:
        """What tells values apart, here exactly: their identifiers."""
        return self.ids(v)

    def to_float(self, a) -> torch.Tensor | None:
        return a.f.num
