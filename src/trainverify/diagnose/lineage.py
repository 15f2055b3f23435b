"""The lineage of every float result of the parallel program: which elements of which value of the reference it holds, and how (not trusted).

Told from one replay in the field that a `Watch` looks at: values are found by fingerprint. Replicate, shard, permuted, joined, partial and scaled
are statements about all elements; unaligned means that none of them was found to hold.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import permutations, product
from math import prod

import numpy as np

from trainverify.diagnose.dataflow import Dataflow, Node
from trainverify.diagnose.origin import Search
from trainverify.diagnose.terms import dense
from trainverify.diagnose.watch import CONSTANT, GOOD, OPEN, Home, Watch
from trainverify.diagnose.words import Names, index_map
from trainverify.engine.analysis import replay_both
from trainverify.ir.trace import Program, TensorRef, inputs
from trainverify.ops.standard import standard_table
from trainverify.relate.symbols import Symbols
from trainverify.report.model import Lineage

ROOM = 1 << 25                                # elements of results that are looked at
MOST_JOINED, MOST_DIMS, MOST_BOXES = 4, 4, 64


@dataclass(slots=True)
class Result:
    """One float result: its status, its fingerprints, and its value where these are not the reference's."""

    ref: TensorRef
    status: str
    prints: np.ndarray | None
    constant: bool = False
    value: object = None


@dataclass(slots=True)
class Watcher(Watch):
    """A watch that keeps each result apart, and the reference's fingerprints in order."""

    results: dict[Node, list[Result]] = field(default_factory=dict)
    whole: list[tuple[np.ndarray, tuple[int, ...]]] = field(default_factory=list)      # per home
    places: dict[Home, int] = field(default_factory=dict)

    def _note(self, m, v, home: Home) -> None:
        self.places.setdefault(home, len(self.whole))
        self.whole.append((m.fingerprint(v).reshape(-1).numpy(), tuple(v.shape)))
        Watch._note(self, m, v, home)

    def _judge(self, rank: int, index: int, m, v, ref) -> None:
        node = (rank, index)
        before, kept = self.status.pop(node, GOOD), len(self.printed.get(node, ()))
        Watch._judge(self, rank, index, m, v, ref)
        status = self.status[node]
        if before not in (GOOD, CONSTANT):
            self.status[node] = before
        printed = self.printed.get(node, ())
        its = self.results.setdefault(node, [])
        if all(r.ref != ref for r in its):    # a complex result is told by its real part
            its.append(Result(ref, status, printed[kept][1] if len(printed) > kept else None, bool(m.is_const(v)), v if status.startswith("x ") else None))

    def scale_of(self, m, v) -> str:
        return GOOD if self.found(m, v) else self._scale(m, v)

    def homes(self, prints: np.ndarray) -> list[Home] | None:
        """The reference's results that these are elements of, in order; None if one is inside of a row only, or there are too many."""
        hit, at = self._found(prints[prints != self.zero])
        if not len(hit) or not hit.all():
            return None
        which = np.searchsorted(self._starts, self._where[at], side="right") - 1
        found = which[np.sort(np.unique(which, return_index=True)[1])].tolist()
        return [self._homes[h] for h in found] if len(found) <= MOST_JOINED and max(found) < len(self._homes) else None


@dataclass(frozen=True, slots=True)
class Words:
    """A relation: its kind, dimensions and part of the reference's value, and which value that is."""

    kind: str
    home: Home | None = None
    name: str = ""                            # of a weight or an input, with home.call -1
    dims: tuple[int, ...] = ()
    part: str = ""
    order: tuple[int, ...] = ()               # of the reference's dimensions, where they stand otherwise


UNALIGNED = Words("unaligned")


def lineages(reference: Program, parallel: Program, extra_rows=(), seed: int = 0, progress: Callable = lambda *a: None) -> list[Lineage]:
    """Of every float result of every rank, in program order."""
    symbols = Symbols(reference)
    watch = Watcher(reference, parallel)
    watch._room[:] = [ROOM, ROOM, 0]          # no terms
    done = replay_both(reference, parallel, standard_table(extra_rows), symbols, 2 * seed + 1, progress, watch=watch)
    teller = Teller(done.field, watch, symbols, reference)
    return [teller.lineage(node, k) for node in sorted(watch.results, key=lambda n: (n[1], n[0])) for k in range(len(watch.results[node]))]


class Teller:
    def __init__(self, m, watch: Watcher, symbols: Symbols, reference: Program):
        self.m, self.watch, self.symbols, self.names = m, watch, symbols, watch.names
        self.flow: Dataflow = watch.flow
        self.search = Search(watch.flow, watch)
        self.reference, self.rank = Dataflow(reference), reference.traces[0].rank
        self.groups = sorted((g for g in self.names.groups if len(g) > 1), key=len)

    def lineage(self, node: Node, k: int) -> Lineage:
        r, call, span = self.watch.results[node][k], self.flow.call(node), self.flow.span(node)
        words, factor, group = self._of(node, r)
        there = self._reference(words)
        text = _text(words, factor, group, self.names, there)
        return Lineage(node[0], node[1], call.name if call.collective is None else f"{call.collective.kind}", "" if span is None or not span.file else str(span),
                       "" if span is None else span.phase, 0 if span is None else span.step, r.ref.size, r.ref.dtype, "partial" if group else "scaled" if factor != 1 else words.kind,
                       words.dims, words.part, group, str(factor), *there, text)

    def _of(self, node: Node, r: Result) -> tuple[Words, Fraction, tuple[int, ...]]:
        """(relation, factor, group that it is a part of the sum over)."""
        if r.prints is None:
            return Words("unknown"), Fraction(1), ()
        if r.constant:
            return Words("constant"), Fraction(1), ()
        if r.status == GOOD:
            return self.relation(r.prints, r.ref.size), Fraction(1), ()
        if r.status.startswith("x "):
            c = Fraction(r.status[2:])
            return self.relation(self._prints(self.m.scale(r.value, 1 / c)), r.ref.size), c, ()
        return self._share(node, r)

    def _share(self, node: Node, r: Result) -> tuple[Words, Fraction, tuple[int, ...]]:
        """Whether the same call's results sum over a group to (a multiple of) values of the reference."""
        for group in (g for g in self.groups if node[0] in g):
            parts = [self.watch.values.get(self.flow.twin(node, rank)) for rank in group]
            if any(v is None or tuple(v.shape) != r.ref.size for v in parts):
                continue
            total = parts[0]
            for v in parts[1:]:
                total = self.m.add(total, v)
            status = self.watch.scale_of(self.m, total)
            if status != OPEN:
                c = Fraction(1) if status == GOOD else Fraction(status[2:])
                return self.relation(self._prints(self.m.scale(total, 1 / c)), r.ref.size), c, group
        return UNALIGNED, Fraction(1), ()

    def _prints(self, v) -> np.ndarray:
        return self.m.fingerprint(v).reshape(-1).numpy()

    # ---- one relation
    def relation(self, prints: np.ndarray, shape: tuple[int, ...]) -> Words:
        """How these elements stand in a value of the reference."""
        if not len(prints):
            return Words("empty")
        if not (prints != self.watch.zero).any():
            return Words("constant")
        found = self.watch.home(prints)
        if found is None:
            return self._joined(prints)
        home, flats = found
        held, size = self.watch.whole[self.watch.places[home]]
        if home.call >= 0:
            told = [placed(prints, shape, held, s, flats) for s in (size, *self._views(home, size))]
            return replace(next((w for w in told if w.kind != "permuted" or w.order), told[0]), home=home)
        return self._of_symbols(prints, shape, held, flats)

    def _views(self, home: Home, size: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Other shapes in which the reference reads a result as a whole."""
        call = self.reference.call((self.rank, home.call))
        wrote = call.collective.outputs if call.collective is not None else call.targets()
        if home.target >= len(wrote):
            return []
        own = wrote[home.target]
        readers = [self.reference.call(n) for n in self.reference.readers((self.rank, home.call))]
        seen = [r.size for c in readers for r in inputs(c) if (r.storage, r.offset, r.numel) == (own.storage, own.offset, own.numel) and dense(r)]
        return [s for s in dict.fromkeys(seen) if s != size]

    def _of_symbols(self, prints: np.ndarray, shape: tuple[int, ...], held: np.ndarray, flats: np.ndarray) -> Words:
        """Of weights and inputs, each of which is a value of its own."""
        owners = np.unique(self.symbols.owner(flats[flats >= 0]))
        blocks = [self.symbols.blocks_in_order[int(b)] for b in owners]
        if len(blocks) > 1:
            return Words("joined", Home(-1, 0), " and ".join(b.name for b in blocks[:MOST_JOINED]) + (" and more" if len(blocks) > MOST_JOINED else ""))
        b = blocks[0]
        own = np.where(flats >= 0, flats - b.first, -1)
        return replace(placed(prints, shape, held[b.first:b.first + b.n], b.shape, own), home=Home(-1, 0), name=b.name)

    def _joined(self, prints: np.ndarray) -> Words:
        homes = self.watch.homes(prints)
        if not homes:
            return Words("inner")
        return Words("joined", homes[0], " and ".join(dict.fromkeys(" at ".join(p for p in self._home(h) if p) for h in homes)))

    def _home(self, home: Home) -> tuple[str, str]:
        if home.call < 0:
            return "inputs", ""
        node = (self.rank, home.call)
        call, span = self.reference.call(node), self.reference.span(node)
        return call.name if call.collective is None else call.collective.kind, str(span) if span is not None and span.file else ""

    def _reference(self, words: Words) -> tuple[str, str]:
        """(operation or name, line) of what a relation is to."""
        if words.home is None:
            return "", ""
        return (words.name, "") if words.name else self._home(words.home)


def placed(prints: np.ndarray, shape: tuple[int, ...], held: np.ndarray, size: tuple[int, ...], flats: np.ndarray) -> Words:
    """The relation of elements to one value: fingerprints `held` of that size. `flats`: a place of each in it (-1: a zero)."""
    if len(prints) == len(held) and (prints == held).all():
        return Words("replicate")
    for order in _orders(shape, size):
        turned = tuple(size[d] for d in order)
        for lows, sizes in _boxes(shape, size, flats, order):
            if int(np.prod(sizes)) == len(prints):
                box = held.reshape(size).transpose(order)[tuple(slice(a, a + n) for a, n in zip(lows, sizes))]
                if (box.reshape(-1) == prints).all():
                    return _box(order, lows, sizes, turned, size)
    if (run := _run(prints, held, flats)) is not None:
        return Words("shard", part=f"elements {run[0]}:{run[1]} of {len(held)}")
    if _is_expanded(prints, shape, held, size):
        return Words("replicate", part="expanded")
    if len(prints) == len(held) and (np.sort(prints) == np.sort(held)).all():
        return Words("permuted", part=index_map(flats, np.arange(len(held)), size) if (flats >= 0).all() else "")
    return Words("permuted", part=f"{len(prints)} of its {len(held)} elements" if len(prints) < len(held) else "some of them several times")


def _orders(shape: tuple[int, ...], size: tuple[int, ...]):
    """Orders of the reference's dimensions in which the result may be a part of it, as it is first."""
    own = tuple(range(len(size)))
    yield own
    if len(shape) == len(size) <= MOST_DIMS:
        yield from (o for o in permutations(own) if o != own and all(n <= size[d] for n, d in zip(shape, o)))


def _box(order: tuple[int, ...], lows: list[int], sizes: list[int], turned: tuple[int, ...], size: tuple[int, ...]) -> Words:
    """A part, its dimensions in this order."""
    dims = tuple(sorted(order[k] for k, (n, whole) in enumerate(zip(sizes, turned)) if n != whole))
    at = {order[k]: (lows[k], sizes[k]) for k in range(len(order))}
    part = _part([at[d][0] for d in range(len(order))], [at[d][1] for d in range(len(order))], size)
    moved = order != tuple(range(len(order)))
    return Words("shard" if dims else "permuted", dims=dims, part=part if dims else "", order=order if moved else ())


def _boxes(shape: tuple[int, ...], size: tuple[int, ...], flats: np.ndarray, order: tuple[int, ...]):
    """Boxes that these places may fill: of the result's own shape at a multiple of it, and the one that they span."""
    if not size or not (flats >= 0).any():
        return
    index = np.unravel_index(flats[flats >= 0], size)
    index, size = [index[d] for d in order], tuple(size[d] for d in order)
    lows, highs = [int(i.min()) for i in index], [int(i.max()) + 1 for i in index]
    if len(shape) == len(size) and all(n <= whole for n, whole in zip(shape, size)):
        starts = [range(0, whole - n + 1, n) if n else range(1) for n, whole in zip(shape, size)]
        likely = [a // n * n if n else 0 for a, n in zip(lows, shape)]
        if prod(map(len, starts)) <= MOST_BOXES:    # an element that occurs twice has the place of the first
            yield from ((list(at), list(shape)) for at in sorted(product(*starts), key=lambda at: list(at) != likely))
    yield lows, [b - a for a, b in zip(lows, highs)]


def _run(prints: np.ndarray, held: np.ndarray, flats: np.ndarray) -> tuple[int, int] | None:
    """Successive elements, as flat parameters hold them, padded or not."""
    first = int(np.flatnonzero(flats >= 0)[0])
    start = int(flats[first]) - first
    n = min(len(prints), len(held) - start)
    if start >= 0 and n > 1 and (held[start:start + n] == prints[:n]).all() and (flats[n:] < 0).all():
        return start, start + n
    return None


def _is_expanded(prints: np.ndarray, shape: tuple[int, ...], held: np.ndarray, size: tuple[int, ...]) -> bool:
    if len(shape) < len(size) or any(n not in (1, m) for n, m in zip(size[::-1], shape[::-1])):
        return False
    return bool((np.broadcast_to(held.reshape(size), shape).reshape(-1) == prints).all())


def _part(lows: list[int], sizes: list[int], size: tuple[int, ...]) -> str:
    return "[" + ", ".join(":" if n == whole else f"{a}:{a + n}" for a, n, whole in zip(lows, sizes, size)) + f"] of {list(size)}"


def _text(words: Words, factor: Fraction, group: tuple[int, ...], names: Names, there: tuple[str, str]) -> str:
    """The relation as one sentence without a rank's own numbers, so that ranks that hold the same can be told together."""
    kind = words.kind
    if kind == "joined":
        kind = "joined from parts"
    if kind == "shard":
        kind = f"shard of dim {' and '.join(map(str, words.dims))}" if words.dims else "shard of the flat elements"
    if words.order:
        kind = f"{kind}, its dimensions in the order {list(words.order)},"
    elif kind == "permuted" and words.part:
        kind = f"permuted ({words.part})"
    elif words.part == "expanded":
        kind = "replicate, expanded"
    elif kind == "inner":
        kind = "an intermediate value inside an operation of the reference"
    what = f"{kind} of {' at '.join(p for p in there if p)}" if there[0] else kind
    if factor != 1:
        what = f"{factor} x {what}"
    return f"partial over {names.over(group)}: the sum is {what}" if group else what
