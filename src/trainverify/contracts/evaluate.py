"""Blocks evaluated in the kernel's terms: what a single operation folds to, and what equals what for all values of some leaves (trusted).

Every evaluation has leaves of its own, fresh symbols; so what is proved there holds for any values.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from trainverify.algebra.base import Algebra, V
from trainverify.algebra.field import Field
from trainverify.algebra.fieldvalue import FieldValue, broadcast
from trainverify.algebra.terms import Prints, Terms, TermValue
from trainverify.contracts.graph import Graph, Signature
from trainverify.contracts.patterns import CONSTANT, I32, I64, UNKNOWN, Blocks, Pattern, Patterns, bits, contents
from trainverify.kernel.claims import Claims
from trainverify.kernel.store import GARBAGE, INF_ID, NINF_ID, Store


CONDITIONS = frozenset({"inv", "log", "sqrt"})
SPECIAL = np.concatenate([bits(torch.tensor([0.0, 1.0, math.inf, -math.inf], dtype=torch.float64)), np.array([UNKNOWN], I64)])
ROOM = 1 << 20                                # identifiers of a store; then there is a new one
TINY, HUGE = Fraction(1, 1 << 1000), Fraction(1 << 1000)     # what float64 has with all its bits
PLAIN = CONDITIONS | {"add", "sub", "mul", "neg", "exp", "sin", "cos", "erf", "matmul", "sum"}


class Nothing:
    """Guesses nothing: what is equal then is equal by folding."""

    def find(self, prints):
        return np.full(len(prints), -1, I64)

    def learn(self, prints, ids) -> None:
        return None

    def scales(self, index, prints, code, rows):
        return ()

    def ambiguous(self, prints):
        return np.zeros(len(prints), bool)

    def find_other(self, code, rows):
        return np.full(len(rows), -1, I64)

    def learn_other(self, prints, code, rows, ids) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Outcome:
    """A signature's result: its elements from its operands' blocks, constants, or (slot = how many blocks there are) the new block, whose elements are all
    results in order. Elements that fold to the same are the first of them. used: the slots of `pattern`."""

    pattern: Pattern
    used: Blocks
    size: int
    clean: bool
    new: bool


# ---- operations on values of blocks
def operand(m: Algebra, p: Pattern, blocks: Sequence[V]) -> V:
    """The value that the pattern describes; blocks: flat, by the pattern's slots."""
    if not p.slots and not (p.place == UNKNOWN).any():
        return _constant(m, contents(p.place).reshape(p.shape))
    if p.whole and blocks[0].shape[0] == len(p.slot):
        return m.reshape(blocks[0], p.shape)
    sources, starts = list(blocks), np.cumsum([1] + [b.shape[0] for b in blocks])
    fixed = p.slot == CONSTANT
    index = p.place + np.where(fixed, 0, starts[np.where(fixed, 0, p.slot)])
    if fixed.any():
        held, lost = p.place[fixed], p.place[fixed] == UNKNOWN
        index[fixed] = starts[-1] + np.where(lost, int((~lost).sum()), np.cumsum(~lost) - 1)
        if not lost.all():
            sources.append(_constant(m, contents(held[~lost])))
        if lost.any():
            sources.append(m.garbage("garbage", 1))
    return m.take(sources, torch.from_numpy(index).reshape(p.shape))


def apply(m: Algebra, s: Signature, blocks: Sequence[V]) -> V:
    """The operation on values of its blocks (flat)."""
    values = [operand(m, p, [blocks[k] for k in slots]) for p, slots in zip(s.patterns, s.maps)]
    if s.name in ("sum", "amax", "amin"):
        return getattr(m, s.name)(values[0], *s.attr)
    if s.name == "compare":
        return m.compare(s.attr, *values)
    if s.name == "opaque":
        return m.opaque(s.attr, *values)
    if s.name == "scatter_sum":
        return m.scatter_sum(values[0], s.attr.tensor, values[1])
    return getattr(m, s.name)(*values) if s.attr is None else getattr(m, s.name)(*values, s.attr)


def fresh(m: Terms, sizes: Sequence[int]) -> tuple[int, list[TermValue]]:
    """Symbols of these sizes, flat: their first identifier, and values."""
    first = m.nodes.symbols(sum(sizes))
    out, at = [], first
    for n in sizes:
        out.append(TermValue(m.field.symbols("leaves", at, n), torch.arange(at, at + n)))
        at += n
    return first, out


def number_of(store: Store, i: int) -> Fraction | float:
    """The constant that an identifier is: a number, an infinity, or nan for garbage."""
    return store.constants[i] if i in store.constants else {INF_ID: math.inf, NINF_ID: -math.inf, GARBAGE: math.nan}[i]


def is_fixed(store: Store, ids: np.ndarray) -> np.ndarray:
    """Which identifiers are constants."""
    return store.is_constant[ids] | np.isin(ids, (INF_ID, NINF_ID, GARBAGE))


class Evaluator:
    def __init__(self, seed: int, patterns: Patterns, graph: Graph, factors: Sequence[Fraction]):
        self.patterns, self.graph, self.factors, self.seed = patterns, graph, tuple(factors), seed
        self.field = Field(seed)
        self.constants = Terms(self.field, Claims(Store(), Nothing()), 0)
        self._folding = self._terms(Claims(Store(), Nothing()))
        self._outcomes: dict[tuple, Outcome] = {}

    def _terms(self, claims: Claims) -> Terms:
        return Terms(Field(self.seed, self.field.constants), claims, 0)

    def begin_side(self, side: str) -> None:
        self.constants.begin_side(side)
        self._renew()

    def _renew(self) -> None:
        self._folding = self._terms(Claims(Store(), Nothing()))
        self._folding.begin_side("parallel" if self.graph.parallel else "reference")

    def _trying(self) -> Terms:
        """Terms in which a single operation is tried: it has leaves of its own, so that a store that has grown is left, too."""
        if self._folding.nodes.n > ROOM:
            self._renew()
        return self._folding

    # ---- constants
    def places(self, store: Store, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which identifiers are constants that float64 contents stand for, and those's bits."""
        values, inverse = np.unique(ids, return_inverse=True)
        fixed = is_fixed(store, values)
        place = np.zeros(len(values), I64)
        for k in np.flatnonzero(fixed).tolist():
            content = self.content(number_of(store, int(values[k])))
            if content is None:
                fixed[k] = False
            else:
                place[k] = bits(torch.tensor([content], dtype=torch.float64))[0]
        inverse = inverse.reshape(-1)
        return fixed[inverse], place[inverse]

    def content(self, number: Fraction | float) -> float | None:
        """What stands for a constant; None: for a number whose nearest content means another one."""
        if isinstance(number, float):
            return number
        if number and not TINY < abs(number) < HUGE:
            return None
        content = self.field.const(number).num.item()
        return content if self.field.constants.meaning(abs(content)) == (abs(number), 1) else None

    # ---- folding
    def outcome(self, signature: int, blocks: Blocks) -> Outcome:
        """What the operation makes of these blocks, apart from which they are."""
        s, g = self.graph.signatures[signature], self.graph
        clean = tuple([g.clean[b] for b in blocks])
        key = (signature, g.parallel, clean)
        found = self._outcomes.get(key)
        if found is None and (plain := self._plain(s)) is not None:
            pattern, used, size = plain
            found = self._outcomes[key] = Outcome(pattern, used, size, all(clean) and s.name not in CONDITIONS, bool(size))
        if found is None:
            sizes, m = [self._extent(s, k) for k in range(s.slots)], self._trying()
            first, leaves = fresh(m, sizes)
            for k, ok in enumerate(clean):
                if not ok:
                    start = first + sum(sizes[:k])
                    m.nodes.clean[start:start + sizes[k]] = False
            got = apply(m, s, leaves)
            found = self._outcomes[key] = self._classified(m.nodes, m.ids(got), first, sizes)
        return found

    def _plain(self, s: Signature) -> tuple[Pattern, Blocks, int] | None:
        """(pattern, used, size) of an operation in which nothing can fold; None: it has to be tried."""
        if s.name not in PLAIN or any(not len(p.slot) or self._may_fold(s.name, p) for p in s.patterns):
            return None
        shapes = [p.shape for p in s.patterns]
        keys = [_keys(p, slots) for p, slots in zip(s.patterns, s.maps)]
        if s.name == "matmul":
            shape, key = _products(*(torch.from_numpy(k).reshape(n) for k, n in zip(keys, shapes)))
        elif s.name == "sum":
            dims = sorted(d % len(shapes[0]) for d in s.attr[0]) if s.attr[0] else list(range(len(shapes[0])))
            if math.prod(shapes[0][d] for d in dims) < 2:
                return None
            shape, key = _sums(torch.from_numpy(keys[0]).reshape(shapes[0]), dims, s.attr[1])
        elif len(keys) == 1:
            shape, key = shapes[0], keys[0]
        else:
            shape = broadcast(*shapes)
            x, y = (torch.from_numpy(k).reshape(n).expand(shape).reshape(-1).numpy() for k, n in zip(keys, shapes))
            if s.name == "sub" and (x == y).any():
                return None
            key = _numbered(x) * (len(y) + 1) + _numbered(y)
        _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
        return *self.patterns.make(shape, np.full(len(key), s.slots, I32), first[inverse.reshape(-1)].astype(I64)), len(key)

    @staticmethod
    def _may_fold(name: str, p: Pattern) -> bool:
        """Whether constants in the pattern may make an operation fold: numbers that are neutral, or no numbers."""
        fixed = p.slot == CONSTANT
        if not fixed.any():
            return False
        return name not in ("add", "sub", "mul") or bool(np.isin(p.place[fixed], SPECIAL).any())

    @staticmethod
    def _extent(s: Signature, slot: int) -> int:
        """How many elements of a block the operation can see."""
        return 1 + max(int(p.place[p.slot == slots.index(slot)].max()) for p, slots in zip(s.patterns, s.maps) if slot in slots)

    def _classified(self, store: Store, ids: torch.Tensor, first: int, sizes: Sequence[int]) -> Outcome:
        flat, shape = ids.reshape(-1).numpy(), tuple(ids.shape)
        starts = first + np.cumsum([0, *sizes])
        slot, place = np.full(len(flat), len(sizes), I32), np.zeros(len(flat), I64)
        leaf = (flat >= first) & (flat < starts[-1])
        slot[leaf] = np.searchsorted(starts, flat[leaf], side="right") - 1
        place[leaf] = flat[leaf] - starts[slot[leaf]]
        rest = np.flatnonzero(~leaf)
        fixed, held = self.places(store, flat[rest])
        slot[rest[fixed]], place[rest[fixed]] = CONSTANT, held[fixed]
        new = np.flatnonzero(slot == len(sizes))
        _, where, inverse = np.unique(flat[new], return_index=True, return_inverse=True)
        place[new] = new[where][inverse.reshape(-1)]
        pattern, used = self.patterns.make(shape, slot, place)
        return Outcome(pattern, used, len(flat), bool(store.clean[flat[new]].all()), bool(len(new)))


def _keys(p: Pattern, slots: Blocks) -> np.ndarray:
    """A number per element of the pattern: equal elements have equal ones."""
    fixed = p.slot == CONSTANT
    key = (np.array([*slots, 0], I64)[p.slot] << 40) | p.place
    if fixed.any():
        key[fixed] = -1 - np.unique(p.place[fixed], return_inverse=True)[1].reshape(-1) if not fixed.all() else p.place[fixed]
    return key


def _numbered(x: np.ndarray) -> np.ndarray:
    """Equal entries have equal numbers, less than how many there are."""
    return np.unique(x, return_inverse=True)[1].reshape(-1)


def _rows(x: torch.Tensor) -> np.ndarray:
    """The number of each row of a matrix."""
    return np.unique(x.numpy(), axis=0, return_inverse=True)[1].reshape(-1)


def _products(a: torch.Tensor, b: torch.Tensor) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape of a product of matrices of keys, and a key for each element."""
    batch = broadcast(tuple(a.shape[:-2]), tuple(b.shape[:-2])) if a.dim() > 2 or b.dim() > 2 else ()
    x = torch.from_numpy(_rows(a.reshape(-1, a.shape[-1]))).reshape(*a.shape[:-1], 1)
    y = b.transpose(-1, -2)
    y = torch.from_numpy(_rows(y.reshape(-1, y.shape[-1]))).reshape(*y.shape[:-2], 1, y.shape[-2])
    shape = (*batch, a.shape[-2], b.shape[-1])
    return shape, (x * (1 << 31) + y).expand(shape).reshape(-1).numpy()


def _sums(x: torch.Tensor, dims: Sequence[int], keepdim: bool) -> tuple[tuple[int, ...], np.ndarray]:
    keep = [d for d in range(x.dim()) if d not in dims]
    shape = tuple(1 if d in dims else x.shape[d] for d in range(x.dim()) if keepdim or d not in dims)
    return shape, _rows(x.permute(*keep, *dims).reshape(math.prod(x.shape[d] for d in keep), -1))


def _constant(m: Algebra, num: torch.Tensor) -> V:
    """A constant as the algebra has it; its contents have been settled."""
    return TermValue(FieldValue(tuple(num.shape), num=num)) if isinstance(m, Terms) else m.data(num)


def prints_of(m: Terms, v: TermValue) -> np.ndarray:
    """Fingerprints of a flat value's elements."""
    return Prints(m.field, v.f).of(np.arange(v.shape[0]))
