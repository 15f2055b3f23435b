"""Which reference elements each parallel output must equal, and whether it does, in each algebra.

The reference fixes the list of outputs. A parallel parameter's lineage is the symbol number of each of its elements when it
was handed over (or first stepped); gradients, updates and optimizer state are compared at the places that this lineage
gives, never by finding an equal value somewhere.
"""
from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
import torch

from trainverify.algebra.base import Algebra, V
from trainverify.relate.symbols import Symbols
from trainverify.replay.machine import Recorded
from trainverify.replay.run import World

Key = tuple[str, str, int]                    # kind, reference name, step


@dataclass(frozen=True, slots=True)
class Lineage:
    """One rank's parameter: symbol number of each element (-1: none), in the shape of its local tensor."""

    rank: int
    name: str
    numbers: np.ndarray

    @property
    def bound(self) -> int:
        return int((self.numbers >= 0).sum())


@dataclass(frozen=True, slots=True)
class Part:
    """Some elements (index counts from 1) of a recorded value, taken when asked for: most are compared once and never looked at again."""

    algebras: dict[str, Algebra]
    values: dict[str, V]
    index: torch.Tensor

    def __getitem__(self, algebra: str) -> V:
        return self.algebras[algebra].take([self.values[algebra]], self.index)


@dataclass(slots=True)
class Piece:
    """One rank's part of one reference output: both sides' values per algebra, and where they differ.

    equal: per algebra a flat boolean tensor over the compared elements; at: their flat positions in the parallel tensor;
    numbers: their symbol numbers (empty for scalars and for outputs matched by name).
    """

    rank: int
    recorded: Recorded
    at: np.ndarray
    numbers: np.ndarray
    reference: Part | dict[str, V]
    parallel: Part | dict[str, V]
    equal: dict[str, torch.Tensor] = field(default_factory=dict)

    def wrong(self, algebra: str) -> bool:
        return not bool(self.equal[algebra].all())

    def undefined(self) -> bool:
        """Whether float64 has a NaN that the reference lacks."""
        a, b = self.reference["real"].t, self.parallel["real"].t
        return bool((torch.isnan(b) & torch.isfinite(a)).any())


@dataclass(slots=True)
class Compared:
    """One output of the reference: the pieces that ranks hold, and what is missing of it."""

    key: Key
    reference: Recorded
    pieces: list[Piece] = field(default_factory=list)
    missing: int = 0                          # elements that no rank holds
    problems: list[str] = field(default_factory=list)
    covered: np.ndarray | None = None


class Comparison:
    """Compares the outputs of two replayed programs in every algebra that both were replayed in."""

    def __init__(self, symbols: Symbols, algebras: list[Algebra], reference: World, parallel: World, like=None):
        """like: whose lineages (`ref_lineage`, `lineage`, of the same programs) are to be confirmed here instead of found."""
        self.symbols, self.algebras = symbols, algebras
        self.reference, self.parallel = reference, parallel
        self.every = {m.name: m.symbols("all", 0, symbols.total) for m in algebras}
        self.ref_lineage = self._lineages(reference, like and like.ref_lineage)
        self.lineage = self._lineages(parallel, like and like.lineage)
        self._names = self._names_by_first()
        self.compared: dict[Key, Compared] = {}
        self.surplus: list[Recorded] = []     # parallel outputs that the reference does not have
        self._list_outputs()

    # ---- lineage
    def _lineages(self, world: World, proposed: dict[tuple[int, str, str], Lineage] | None) -> dict[tuple[int, str, str], Lineage]:
        out = {}
        for machine in world.machines:
            for how, name, ref, values in machine.params:
                key = (machine.rank, how, name)
                if key not in out:
                    numbers = self._by_tag(values) if proposed is None else proposed[key].numbers.reshape(-1).copy()
                    out[key] = Lineage(machine.rank, name, self._agreed(numbers, values, ref.size))
        return out

    def _by_tag(self, values: dict[str, V]) -> np.ndarray:
        """Symbol numbers by tagged value."""
        real = next(m for m in self.algebras if m.name == "real")
        return self.symbols.look_up(real.to_float(values["real"]).reshape(-1).numpy())

    def _agreed(self, numbers: np.ndarray, values: dict[str, V], size: tuple[int, ...]) -> np.ndarray:
        """Symbol numbers, kept only where every algebra agrees that the value is that symbol."""
        hit = np.nonzero(numbers >= 0)[0]
        if len(hit):
            where = torch.from_numpy(hit)
            for m in self.algebras:
                mine = m.take([values[m.name]], where + 1)
                same = m.equal(mine, m.take([self.every[m.name]], torch.from_numpy(numbers[hit]) + 1))
                numbers[hit[~same.numpy()]] = -1
                keep = same.numpy()
                hit, where = hit[keep], where[torch.from_numpy(keep)]
        return numbers.reshape(size)

    def lineage_of(self, rank: int, kind: str, name: str, world_ref: bool = False) -> Lineage | None:
        table = self.ref_lineage if world_ref else self.lineage
        base = name.split("::")[0]
        order = ("stepped", "param") if kind in ("gradient", "state") else ("param", "stepped")
        for how in order:
            got = table.get((rank, how, base))
            if got is not None:
                return got
        return None

    # ---- reference outputs, flat over symbol numbers
    def _list_outputs(self) -> None:
        self.by_symbol: dict[tuple[str, str, int], list[tuple[Recorded, Lineage]]] = defaultdict(list)
        for rec in self.reference.machines[0].outputs:
            key = (rec.kind, rec.name, rec.step)
            if rec.values or rec.native is not None:
                self.compared[key] = Compared(key, rec)
            line = self.lineage_of(self.reference.machines[0].rank, rec.kind, rec.name, world_ref=True)
            if rec.values and line is not None and rec.ref is not None and line.numbers.shape == rec.ref.size and line.bound:
                self.by_symbol[(rec.kind, _state_key(rec), rec.step)].append((rec, line))
        self._plans = {}

    def _plan(self, group: tuple[str, str, int]):
        """For one kind, state key and step: its records with their lineages, and per symbol number the index of its record (-1: none)
        and its position + 1 in it."""
        if group not in self._plans:
            recs = self.by_symbol.get(group, [])
            place = np.zeros(self.symbols.total, dtype=np.int64)
            owner = np.full(self.symbols.total, -1, dtype=np.int64)
            for i, (rec, line) in enumerate(recs):
                flat = line.numbers.reshape(-1)
                ok = flat >= 0
                place[flat[ok]] = 1 + np.nonzero(ok)[0]
                owner[flat[ok]] = i
            self._plans[group] = (recs, place, owner)
        return self._plans[group]

    # ---- comparing
    def run(self) -> list[Compared]:
        shares: dict[tuple, list[Recorded]] = defaultdict(list)
        for machine in self.parallel.machines:
            for rec in machine.outputs:
                if rec.kind == "scalar" and rec.declare:
                    shares[(rec.name, rec.step, rec.declare, rec.group)].append(rec)
                else:
                    self._match(rec)
        for (_, _, how, group), recs in shares.items():
            self._by_name(self._combine(how, group, recs))
        for c in self.compared.values():
            self._coverage(c)
        return list(self.compared.values())

    def _match(self, rec: Recorded) -> None:
        if rec.kind == "scalar":
            return self._by_name(rec)
        if rec.ref is not None and rec.ref.numel == 0:
            return                            # an empty shard holds nothing
        line = self.lineage_of(rec.rank, rec.kind, rec.name)
        if not rec.values:
            return self._absent(rec, line)
        if line is not None and line.bound and rec.ref is not None and line.numbers.shape == rec.ref.size:
            return self._by_lineage(rec, line)
        if rec.kind == "state" and line is not None and line.bound:
            return self._state_number(rec, line)
        if (rec.kind, rec.name, rec.step) in self.compared:
            return self._by_name(rec)
        self.surplus.append(rec)

    def _combine(self, how: str, group: tuple[int, ...], recs: list[Recorded]) -> Recorded:
        """The declared mean or sum of the ranks' shares of a scalar, over the group or all ranks that report it."""
        held = {r.rank: r for r in recs}
        missing = [r for r in group if r not in held]
        first = recs[0]
        values: dict[str, V] = {}
        for m in self.algebras if not missing else ():
            total = None
            for rank in group or sorted(held):
                v = m.reshape(held[rank].values[m.name], ())
                total = v if total is None else m.add(total, v)
            values[m.name] = total if how == "sum" else m.scale(total, Fraction(1, len(group or held)))
        if missing:
            self.compared[("scalar", first.name, first.step)].problems.append(f"ranks {missing} of the declared group do not report it")
        return replace(first, values=values)

    def _absent(self, rec: Recorded, line: Lineage | None) -> None:
        if line is None or not line.bound:
            return
        for key in self._owners(rec, line):
            self.compared[key].problems.append(f"rank {rec.rank} has none")

    def _owners(self, rec: Recorded, line: Lineage) -> list[Key]:
        recs, _, owner = self._plan((rec.kind, _state_key(rec), rec.step))
        flat = line.numbers.reshape(-1)
        return [(recs[i][0].kind, recs[i][0].name, recs[i][0].step) for i in _distinct(owner[flat[flat >= 0]]) if i >= 0]

    def _by_lineage(self, rec: Recorded, line: Lineage) -> None:
        recs, place, owner = self._plan((rec.kind, _state_key(rec), rec.step))
        flat = line.numbers.reshape(-1)
        held = np.nonzero(flat >= 0)[0]
        held = held[place[flat[held]] > 0]
        if not len(held):
            self.surplus.append(rec)
            return
        owners = owner[flat[held]]
        for i in _distinct(owners):
            at = held[owners == i]
            ref_rec, ref_line = recs[i]
            c = self.compared[(ref_rec.kind, ref_rec.name, ref_rec.step)]
            there = place[flat[at]]
            piece = Piece(rec.rank, rec, at, flat[at], self._part(ref_rec, there), self._part(rec, at + 1))
            self._judge(c, piece)
            if c.covered is None:
                c.covered = ref_line.numbers.reshape(-1) < 0
            c.covered[there - 1] = True

    def _part(self, rec: Recorded, index: np.ndarray) -> Part:
        return Part({m.name: m for m in self.algebras}, rec.values, torch.from_numpy(index))

    def _state_number(self, rec: Recorded, line: Lineage) -> None:
        """Optimizer state that is one number per parameter (step): the same on every owning parameter."""
        key = rec.name.split("::", 1)[1]
        flat = line.numbers.reshape(-1)
        found = False
        for b in _distinct(self.symbols.owner(flat[flat >= 0])):
            for name in self._ref_names(int(b)):
                c = self.compared.get(("state", f"{name}::{key}", rec.step))
                if c is not None:
                    found = True
                    self._whole(c, rec)
        if not found:
            self.surplus.append(rec)

    def _names_by_first(self) -> dict[int, list[str]]:
        """The reference's parameters that hold a block's first symbol, by its number."""
        is_first = np.zeros(self.symbols.total, dtype=bool)
        is_first[[b.first for b in self.symbols.blocks_in_order if b.first < self.symbols.total]] = True
        names: dict[int, set[str]] = defaultdict(set)
        for (_, _, name), line in self.ref_lineage.items():
            held = line.numbers[line.numbers >= 0]
            for first in held[is_first[held]].tolist():
                names[first].add(name)
        return {first: sorted(held) for first, held in names.items()}

    def _ref_names(self, block: int) -> list[str]:
        return self._names.get(self.symbols.blocks_in_order[block].first, [])

    def _by_name(self, rec: Recorded) -> None:
        c = self.compared.get((rec.kind, rec.name, rec.step))
        if c is None:
            self.surplus.append(rec)
        elif rec.values:
            self._whole(c, rec)

    def _whole(self, c: Compared, rec: Recorded) -> None:
        """Compare one value with the reference's as it is (shapes must agree up to broadcasting of scalars)."""
        a, b = c.reference.values, rec.values
        shapes = {tuple(v.shape) for v in (*a.values(), *b.values())}
        if len(shapes) > 1 and any(np.prod(s, dtype=int) != 1 for s in shapes):
            c.problems.append(f"rank {rec.rank} has shape {tuple(next(iter(b.values())).shape)}")
            return
        n = int(np.prod(next(iter(shapes)), dtype=int))
        at = np.arange(n)
        flat = {k: {m.name: m.reshape(v[m.name], (n,)) for m in self.algebras} for k, v in (("a", a), ("b", b))}
        self._judge(c, Piece(rec.rank, rec, at, np.zeros(0, dtype=np.int64), flat["a"], flat["b"]))
        c.covered = np.ones(1, dtype=bool)

    def _judge(self, c: Compared, piece: Piece) -> None:
        for m in self.algebras:
            piece.equal[m.name] = m.equal(piece.parallel[m.name], piece.reference[m.name])
        c.pieces.append(piece)

    def _coverage(self, c: Compared) -> None:
        if c.covered is None:
            c.missing = -1
        else:
            c.missing = int((~c.covered).sum())


def _distinct(x: np.ndarray) -> np.ndarray:
    """The different entries, ascending; most often there is one."""
    return x[:1] if len(x) and (x == x[0]).all() else np.unique(x)


def _state_key(rec: Recorded) -> str:
    return rec.name.split("::", 1)[1] if rec.kind == "state" else ""
