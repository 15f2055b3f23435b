"""What a replay of both programs tells about every value of the parallel one: whether it is the reference's, and where in it (not trusted).

A value agrees if every element's fingerprint is a value of the reference, or is constant. Fingerprints of what agrees and values
of what does not are kept while there is room, as are the terms of gradients and scalars (terms.py) for a closer look.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import torch

from trainverify.algebra.base import Complex
from trainverify.algebra.fieldvalue import is_garbage
from trainverify.diagnose.dataflow import Dataflow, Node
from trainverify.diagnose.terms import Stage, Term, addends, siblings, stages
from trainverify.diagnose.words import Names, names_of
from trainverify.ir.trace import Program, TensorRef
from trainverify.replay.memory import is_float

GOOD, OPEN, CONSTANT = "good", "open", "constant"
MICRO = ("exp", "mul", "sum", "inv", "matmul", "log", "add", "sub", "sqrt", "div")
MOST_HOMES = 4
KEPT = 1 << 22                                # elements of each sort that are kept for a closer look


@dataclass(frozen=True, slots=True)
class Home:
    """Where the reference has a value first: the call and its target, or a symbol (call -1)."""

    call: int
    target: int


@dataclass(slots=True)
class Watch:
    """Hook target: the reference's values, then each parallel result's status: good; constant (no symbol in it, but no multiple of a
    constant of the reference either); "x c" (c times values of the reference); open (none of these, kept in `values`)."""

    reference: Program
    parallel: Program
    flow: Dataflow | None = None              # of the parallel program
    names: Names | None = None
    factors: tuple[Fraction, ...] = ()
    status: dict[Node, str] = field(default_factory=dict)
    values: dict[Node, object] = field(default_factory=dict)
    printed: dict[Node, list[tuple[TensorRef, np.ndarray]]] = field(default_factory=dict)
    numbers: dict[Node, float] = field(default_factory=dict)               # the largest absolute value of what holds no symbol
    nan: set[Node] = field(default_factory=set)
    garbage: set[Node] = field(default_factory=set)
    constant: dict[str, set[Node]] = field(default_factory=lambda: {"reference": set(), "parallel": set()})   # calls whose results hold no symbol
    terms: dict[Node, list[Term]] = field(default_factory=dict)            # of the value that a tv.output of the parallel program names
    others: dict[Node, list[Term]] = field(default_factory=dict)           # what might have been terms of it, too
    stages: dict[tuple[str, Node], list[Stage]] = field(default_factory=dict)   # (side, tv.output) -> the value before it was clipped
    regions: dict[tuple, dict[str, object]] = field(default_factory=dict)  # (side, rank, call, ref) -> a term's value per algebra
    zero: int = 0                             # the fingerprint of 0, which is everywhere
    _wanted: dict[tuple[str, Node], list[TensorRef]] = field(default_factory=dict)
    _homes: list[Home] = field(default_factory=list)
    _prints: list[np.ndarray] = field(default_factory=list)                # per home, then those of micro-operations
    _flats: list[np.ndarray] = field(default_factory=list)                 # per home: the flat position of each print
    _inside: list[np.ndarray] = field(default_factory=list)
    _table: np.ndarray | None = None
    _where: np.ndarray | None = None          # of each print in the table: its place among all that were noted
    _starts: np.ndarray | None = None         # per home: where its prints begin among them
    _inverses: object = None                  # of the factors, as a value of the field
    _room: list[int] = field(default_factory=lambda: [KEPT, KEPT, KEPT])   # for values, prints and terms

    # ---- hooks
    def begin(self, m, everything) -> None:
        """Before the reference is replayed. Its symbols are values of it, and so are the results of the micro-operations inside its
        rows: fused and composed forms meet there."""
        self._prepare()
        self.zero = int(m.fingerprint(m.const(0)))
        self._note(m, everything, Home(-1, 0))
        for name in MICRO:
            setattr(m, name, self._noted(m, getattr(m, name)))

    def end(self, m) -> None:
        """After the reference is replayed."""
        for name in MICRO:
            delattr(m, name)

    def value(self, side: str, machine, m, call, k: int, ref) -> None:
        """A float result k of a call stands in `ref`."""
        if not is_float(ref.dtype):
            return
        node = (machine.rank, call.index)
        for want in self._wanted.get((side, node), ()):
            self.regions.setdefault((side, *node, want), {})[m.name] = machine.memory[m.name].load(want)
        if side == "parallel":
            self._mark(machine, m, call, ref)
        if m.name != "field":
            return
        v = machine.memory["field"].load(ref)
        for part in (v.re, v.im) if isinstance(v, Complex) else (v,):
            if m.is_const(part):
                self.constant[side].add(node)
            if side == "reference":
                self._note(m, part, Home(call.index, k))
            else:
                self._judge(machine.rank, call.index, m, part, ref)

    def _prepare(self) -> None:
        self.flow = Dataflow(self.parallel)
        self.names = names_of(self.parallel)
        self.factors = self.names.factors()
        for side, program, flow in (("reference", self.reference, Dataflow(self.reference)), ("parallel", self.parallel, self.flow)):
            for trace in program.traces:
                for call in trace.ops:
                    if call.name == "tv.output" and call.args[0] in ("gradient", "scalar") and isinstance(call.args[3], TensorRef):
                        self._plan(side, flow, trace.rank, call)

    def _plan(self, side: str, flow: Dataflow, rank: int, call) -> None:
        """Keep this output's terms and what it was before clipping, if there is room and they can be named."""
        node = (rank, call.index)
        earlier = stages(flow, rank, call.args[3], call.index)
        if self._keep(side, [s.term for s in earlier]):
            self.stages[(side, node)] = earlier
        if side == "parallel" and self._keep(side, terms := addends(flow, rank, call.args[3], call.index)):
            self.terms[node] = terms
            others = siblings(flow, terms, [t.rank for t in self.parallel.traces])
            if others and self._keep(side, others):
                self.others[node] = others

    def _keep(self, side: str, terms: list[Term]) -> bool:
        """Have the replay keep these values, if there is room."""
        need = sum(t.ref.numel for t in terms)
        if need > self._room[2]:
            return False
        self._room[2] -= need
        for t in terms:
            wanted = self._wanted.setdefault((side, t.node), [])
            if t.ref not in wanted:
                wanted.append(t.ref)
        return True

    def unclipped(self, side: str, node: Node) -> Stage | None:
        """What an output was before it was multiplied by numbers that depend on symbols; None: nothing multiplied it."""
        last = None
        for stage in self.stages.get((side, node), ()):
            if any(f in self.constant[side] for f in stage.factors):
                break
            last = stage
        return last

    def kept(self, side: str, term: Term) -> dict[str, object] | None:
        """A term's value per algebra, if it was kept."""
        held = self.regions.get((side, *term.key))
        return held if held is not None and "field" in held and hasattr(held.get("real"), "t") else None

    # ---- the reference's values
    def _note(self, m, v, home: Home) -> None:
        prints, first = np.unique(m.fingerprint(v).reshape(-1).numpy(), return_index=True)
        self._homes.append(home)
        self._prints.append(prints)
        self._flats.append(first.astype(np.int32))

    def _noted(self, m, micro):
        def noted(*args, **kwargs):
            v = micro(*args, **kwargs)
            self._inside.append(np.unique(m.fingerprint(v).reshape(-1).numpy()))
            return v
        return noted

    def _finish(self) -> np.ndarray:
        if self._table is None:
            self._starts = np.cumsum([0, *(len(p) for p in self._prints)])
            every = [*self._prints, *self._inside]
            self._table, self._where = np.unique(np.concatenate(every), return_index=True) if every else (np.zeros(0, np.int64),) * 2
            self._inside.clear()
        return self._table

    def among(self, prints: np.ndarray) -> np.ndarray:
        """Which fingerprints are values of the reference."""
        return self._found(prints)[0]

    def _found(self, prints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        table = self._finish()
        if not len(table):
            return np.zeros(prints.shape, dtype=bool), np.zeros(prints.shape, dtype=np.int64)
        at = np.minimum(np.searchsorted(table, prints), len(table) - 1)
        return table[at] == prints, at

    def found(self, m, v) -> bool:
        return bool(self.among(m.fingerprint(v).reshape(-1).numpy()).all())

    def home(self, prints: np.ndarray) -> tuple[Home, np.ndarray] | None:
        """A result of the reference that holds all of these (zeros apart), and their flat positions in it (-1: a zero)."""
        counts = prints != self.zero
        wanted = prints[counts]
        hit, at = self._found(wanted)
        if not len(wanted) or not hit.all():
            return None
        homes, votes = np.unique(np.searchsorted(self._starts, self._where[at], side="right") - 1, return_counts=True)
        for h in homes[np.argsort(-votes, kind="stable")][:MOST_HOMES]:
            if h >= len(self._homes):
                continue                      # inside a row only
            here = self._prints[h]
            place = np.minimum(np.searchsorted(here, wanted), len(here) - 1)
            if (here[place] == wanted).all():
                flats = np.full(len(prints), -1, dtype=np.int64)
                flats[counts] = self._flats[h][place]
                return self._homes[h], flats
        return None

    # ---- the parallel program's
    def _mark(self, machine, m, call, ref) -> None:
        """Which results hold a NaN in float64, or uninitialised elements."""
        v = machine.memory[m.name].load(ref)
        for part in (v.re, v.im) if isinstance(v, Complex) else (v,):
            if m.name == "real" and bool(part.t.isnan().any()):
                self.nan.add((machine.rank, call.index))
            uninitialised = is_garbage(part) if m.name == "field" else None
            if uninitialised is not None and bool(uninitialised.any()):
                self.garbage.add((machine.rank, call.index))

    def _judge(self, rank: int, index: int, m, v, ref) -> None:
        node = (rank, index)
        old = self.status.get(node, GOOD)
        prints = m.fingerprint(v).reshape(-1).numpy()
        if len(prints) <= self._room[1]:
            self._room[1] -= len(prints)
            self.printed.setdefault(node, []).append((ref, prints))
        if m.is_const(v) and len(prints):
            self.numbers[node] = float(m.to_float(v).abs().max())
        if old not in (GOOD, CONSTANT):
            return
        status = GOOD
        if not self.among(prints).all():
            status = self._scale(m, v)
            if status == OPEN and m.is_const(v):
                status = CONSTANT
        if status == OPEN and len(prints) <= self._room[0]:
            self.values[node] = v
            self._room[0] -= len(prints)
        self.status[node] = old if status == GOOD else status

    def _scale(self, m, v) -> str:
        """"x c" if every element is c times a value of the reference; a few elements are tried with all factors at once first."""
        n = int(np.prod(v.shape, dtype=np.int64))
        sample = m.take([v], torch.arange(1, n + 1, max(1, n // 3))[:, None])
        if self._inverses is None:
            self._inverses = m.reshape(m.stack([m.const(1 / c) for c in self.factors]), (1, len(self.factors)))
        likely = self.among(m.fingerprint(m.mul(sample, self._inverses)).numpy()).all(0)
        for k in np.flatnonzero(likely):
            if self.found(m, m.scale(v, 1 / self.factors[k])):
                return f"x {self.factors[k]}"
        return OPEN
