"""The proof of one theorem as a task: plain data in, plain data out, so that any process can do it, in any order (trusted).

A task holds definitions only: operations of the reference and of the open block, down to symbols of its own. No theorem and no claim of the program is in
it, so a theorem rests on no other; that every operation is of what stands before it is checked where the task is read. What comes of a task
depends on nothing else: each has a store, constants and guesses of its own.
"""
from __future__ import annotations

import hashlib
import marshal
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch

from trainverify.algebra.constants import Constants, Entry
from trainverify.algebra.field import Field
from trainverify.algebra.terms import Prints, Terms, TermValue
from trainverify.contracts.evaluate import apply, fresh, is_fixed, number_of
from trainverify.contracts.graph import Graph, Index, Signature
from trainverify.contracts.patterns import CONSTANT, I32, I64, Blocks, Pattern, bits, contents
from trainverify.kernel.claims import Claims
from trainverify.kernel.store import GARBAGE, INF_ID, NINF_ID, ZERO_ID, Store
from trainverify.kernel.prove import prove as prove_obligation
from trainverify.kernel.terms import Obligation
from trainverify.relate.guess import Dictionary


Claim = tuple[np.ndarray, np.ndarray]         # per element the value (CONSTANT: zero or an infinity) and place (the bits of such a constant)
CLAIMED = {int(bits(torch.tensor([x], dtype=torch.float64))[0]): i for x, i in ((0.0, ZERO_ID), (math.inf, INF_ID), (-math.inf, NINF_ID))}

remembered = lru_cache(maxsize=1 << 9)(prove_obligation)        # a verdict depends on nothing else


@dataclass(frozen=True, slots=True)
class Operation:
    """A signature on values: operands by number. size: of the result."""

    signature: Signature
    operands: Blocks
    size: int


@dataclass(frozen=True, slots=True)
class Task:
    """Values are counted through: leaves (and other operands) of these sizes, then steps of the reference, then operations of the open block, the last
    of which is asked about. same: leaves that are a step's result, and that step. claim: what the block divided by the factor is said to be. constants: what is known of
    those in patterns."""

    seed: int
    factors: tuple[Fraction, ...]
    sizes: tuple[int, ...]
    steps: tuple[Operation, ...]
    same: tuple[tuple[int, int], ...]
    mine: tuple[Operation, ...]
    factor: Fraction
    claim: Claim | None
    constants: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """holds: the claim. Else (or without one) per element the value and place that it is proved to be; of a constant (slot CONSTANT) the place among `numbers`;
    hit: of which elements anything is. counts: of the work. tried: digests of obligations; proved: those that were."""

    holds: bool
    slot: np.ndarray
    place: np.ndarray
    hit: np.ndarray
    numbers: tuple[Fraction | float, ...]
    counts: Counter[str] = field(default_factory=Counter)
    tried: tuple[str, ...] = ()
    proved: tuple[tuple[str, Obligation], ...] = ()


# ---- as bytes
def operations(graph: Graph, blocks: Iterable[int], number: dict[int, int]) -> tuple[Operation, ...]:
    return tuple([Operation(graph.signatures[graph.signature[b]], tuple([number[x] for x in graph.operands[b]]), graph.size[b]) for b in blocks])


def constants_of(operations: Iterable[Operation], constants: Constants) -> tuple[Entry, ...]:
    """What is known of the constants in the operations' patterns."""
    patterns = {p.number: p for o in operations for p in o.signature.patterns}
    return tuple(constants.entries({v for p in patterns.values() for v in _fixed(p)}))


def _fixed(p: Pattern) -> list[float]:
    fixed = p.slot == CONSTANT
    return contents(np.unique(p.place[fixed])).tolist() if fixed.any() else []


def packed(task: Task) -> bytes:
    """Equal tasks are equal bytes."""
    patterns: dict[int, int] = {}
    table: list[tuple] = []

    def of(o: Operation) -> tuple:
        s = o.signature
        for p in s.patterns:
            if p.number not in patterns:
                patterns[p.number] = len(table)
                table.append((p.shape, p.slots, b"" if p.whole else p.slot.tobytes(), b"" if p.whole else p.place.tobytes()))
        return s.name, _attribute(s.attr), tuple([patterns[p.number] for p in s.patterns]), s.maps, s.slots, o.operands, o.size
    steps, mine = tuple(map(of, task.steps)), tuple(map(of, task.mine))
    claim = None if task.claim is None else tuple([a.tobytes() for a in task.claim])
    constants = tuple([(e.value, e.residues, e.odd, e.meaning and (_ratio(e.meaning[0]), e.meaning[1]), e.rational) for e in task.constants])
    factors = tuple(map(_ratio, task.factors))
    return marshal.dumps((task.seed, factors, task.sizes, steps, task.same, mine, _ratio(task.factor), claim, constants, tuple(table)), 2)


def address(task: bytes) -> bytes:
    return hashlib.blake2b(task, digest_size=20).digest()


def unpacked(data: bytes) -> Task:
    """Raises ValueError unless every operation is of what stands before it."""
    seed, factors, sizes, steps, same, mine, factor, claim, constants, table = marshal.loads(data)
    patterns = [_pattern(i, *row) for i, row in enumerate(table)]

    def to(row: tuple) -> Operation:
        name, attr, which, maps, slots, operands, size = row
        return Operation(Signature(name, _attribute_of(attr), tuple([patterns[i] for i in which]), maps, slots), operands, size)
    task = Task(seed, tuple(Fraction(*f) for f in factors), sizes, tuple(map(to, steps)), same, tuple(map(to, mine)), Fraction(*factor),
                None if claim is None else (np.frombuffer(claim[0], I32), np.frombuffer(claim[1], I64)),
                tuple([Entry(v, r, odd, m and (Fraction(*m[0]), m[1]), rational) for v, r, odd, m, rational in constants]))
    _check(task)
    return task


def _check(task: Task) -> None:
    """The order of definitions is well-founded: symbols, then what is computed from what stands before it."""
    symbols = set(range(len(task.sizes))) - {leaf for leaf, _ in task.same}
    known = set(symbols)
    for n, o in enumerate((*task.steps, *task.mine), len(task.sizes)):
        if not known.issuperset(o.operands):
            raise ValueError(f"operation {n} ({o.signature.name}) of a task is of what does not stand before it: {o.operands}")
        known.add(n)
    steps = range(len(task.sizes), len(task.sizes) + len(task.steps))
    if not task.mine or any(step not in steps for _, step in task.same):
        raise ValueError("a task asks about nothing, or has a leaf that is no step of the reference")


def _pattern(number: int, shape: tuple[int, ...], slots: int, slot: bytes, place: bytes) -> Pattern:
    if not slot and slots:
        n = int(np.prod(shape, dtype=I64))
        return Pattern(number, shape, np.zeros(n, I32), np.arange(n, dtype=I64), slots)
    return Pattern(number, shape, np.frombuffer(slot, I32), np.frombuffer(place, I64), slots)


def _ratio(q: Fraction) -> tuple[int, int]:
    return q.numerator, q.denominator


def _attribute(attr: object) -> object:
    if isinstance(attr, Index):
        return "positions", tuple(attr.tensor.shape), attr.tensor.contiguous().numpy().tobytes()
    if isinstance(attr, Fraction):
        return "ratio", *_ratio(attr)
    if attr is None or isinstance(attr, (str, int, float)):
        return "plain", attr
    if isinstance(attr, tuple):
        return "tuple", tuple([_attribute(a) for a in attr])
    raise TypeError(f"an attribute that no task can hold: {attr!r}")


def _attribute_of(held: tuple) -> object:
    kind, *content = held
    if kind == "positions":
        shape, data = content
        return Index(torch.frombuffer(bytearray(data), dtype=torch.int64).reshape(shape) if data else torch.zeros(shape, dtype=torch.int64))
    if kind == "ratio":
        return Fraction(*content)
    return content[0] if kind == "plain" else tuple([_attribute_of(a) for a in content[0]])


# ---- the proof
def prove(task: Task) -> Result:
    """What the block is, for all values of the leaves."""
    constants = Constants(task.seed)
    constants.adopt(task.constants)
    store = Store()
    store.parallel = True                     # constants are no guesses
    m = Terms(Field(task.seed, constants), claims := Claims(store, Dictionary(store, task.factors), remembered), 0)
    values = _reference(m, task)
    store.parallel = True
    m.begin_side("parallel")
    for o in task.mine:
        values.append(_evaluated(m, o, values))
    mine, whole = m.ids(values[-1]).reshape(-1).numpy(), np.ones(task.mine[-1].size, bool)
    if task.factor != 1:
        mine, whole = _divided(store, mine, task.factor)
    parts = [m.ids(v).reshape(-1).numpy() for v in values[:len(task.sizes) + len(task.steps)]]
    found = _found(store, mine, whole, parts)
    return Result(*(_claimed(store, mine, whole, parts, task.claim, found[2]) or (False, *found)),
                  Counter({**claims.counts, "identifiers": store.n}), claims.tried, tuple([(k, p.obligation) for k, p in claims.proofs.items()]))


def _claimed(store: Store, mine: np.ndarray, whole: np.ndarray, parts: Sequence[np.ndarray], claim: Claim | None, hit: np.ndarray) -> tuple | None:
    """That the claim holds (None: no). A claim about elements that are not proved to be anything does not, whatever it says."""
    if claim is None or not hit.all():
        return None
    slot, place = claim
    fixed, starts, sizes = slot == CONSTANT, np.cumsum([0, *map(len, parts)]), np.array([*map(len, parts), 0])
    if (~fixed & ((slot < 0) | (slot >= len(parts)) | (place < 0) | (place >= sizes[np.clip(slot, 0, len(parts))]))).any():
        return None
    said = np.full(len(mine), GARBAGE, I64)
    said[~fixed] = np.concatenate([*parts, np.zeros(0, I64)])[starts[slot[~fixed]] + place[~fixed]]
    for content, i in CLAIMED.items():
        said[fixed & (place == content)] = i
    if not ((said == mine) & (mine != GARBAGE) & (fixed | store.clean[mine]) & whole).all():
        return None
    return True, *(np.zeros(0, t) for t in (I32, I64, bool)), ()


def _found(store: Store, mine: np.ndarray, whole: np.ndarray, parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple]:
    """Per element of the block the part and place, or the constant, that it is proved to be."""
    ids = np.concatenate([*parts, np.zeros(0, I64)])
    owner = np.repeat(np.arange(len(parts)), [len(p) for p in parts])
    places = np.concatenate([*(np.arange(len(p)) for p in parts), np.zeros(0, I64)])
    known, first = np.unique(ids, return_index=True)
    slot, place = np.full(len(mine), CONSTANT, I32), np.zeros(len(mine), I64)
    at = np.minimum(np.searchsorted(known, mine), max(len(known) - 1, 0))
    hit = (known[at] == mine) & store.clean[mine] & whole if len(known) else np.zeros(len(mine), bool)
    slot[hit], place[hit] = owner[first[at[hit]]], places[first[at[hit]]]
    fixed = is_fixed(store, mine) & whole
    values, inverse = np.unique(mine[fixed], return_inverse=True)
    slot[fixed], place[fixed] = CONSTANT, inverse.reshape(-1)
    return slot, place, hit | fixed, tuple([number_of(store, i) for i in values.tolist()])


def _reference(m: Terms, task: Task) -> list[TermValue]:
    """Flat values of the leaves (fresh symbols) and of what the reference computes from them."""
    m.nodes.parallel = False
    step_of = dict(task.same)
    free = [i for i in range(len(task.sizes)) if i not in step_of]
    symbols = fresh(m, [task.sizes[i] for i in free])[1]
    for v in symbols:
        m.claims.guesses.learn(Prints(m.field, v.f).of(np.arange(v.shape[0])), v.ids.numpy())
    values: list = [None] * len(task.sizes)
    for i, v in zip(free, symbols):
        values[i] = v
    for o in task.steps:
        values.append(_evaluated(m, o, values))
    for i, step in step_of.items():
        values[i] = values[step]
    return values


def _evaluated(m: Terms, o: Operation, values: Sequence[TermValue]) -> TermValue:
    return m.reshape(apply(m, o.signature, [values[x] for x in o.operands]), (o.size,))


def _divided(store: Store, ids: np.ndarray, factor: Fraction) -> tuple[np.ndarray, np.ndarray]:
    """What the identifiers are the factor times of, and where that is seen."""
    out, seen = np.full(len(ids), ZERO_ID, I64), ids == ZERO_ID
    for code in np.unique(store.code[ids]).tolist():
        at = np.flatnonzero(store.code[ids] == code)
        if store.ops[code][0] == ("neg", None) and factor == -1:
            out[at], seen[at] = store.definition(ids[at], code)[:, 0], True
        elif store.ops[code][0] == ("mul", None):
            rows = store.definition(ids[at], code)
            is_factor = rows == store.constant(factor)
            some = is_factor.any(1)
            out[at[some]], seen[at[some]] = np.where(is_factor[some, 0], rows[some, 1], rows[some, 0]), True
    return out, seen
