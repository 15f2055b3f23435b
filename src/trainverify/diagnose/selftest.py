"""How good a spec is at showing bugs: plants bugs in the user's own program and looks which of them some compared output would have shown (not trusted).

No proofs are made: an output shows a bug if it differs in the field. For outputs that no planted bug reached, bugs are planted right before
them; those that remain cannot show anything in this spec. How much is tried is counted in replayed calls, not timed.
"""
from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from trainverify.diagnose.dataflow import Node
from trainverify.diagnose.edit import Edit, applied
from trainverify.diagnose.mutate import Mutation, Mutator
from trainverify.diagnose.repair import CANNOT_RUN
from trainverify.diagnose.trial import until
from trainverify.engine.analysis import Analysis
from trainverify.engine.proof import Lineages
from trainverify.engine.verdict import ROUNDED
from trainverify.ir.check import problems
from trainverify.ir.trace import OpCall, Program, TensorRef
from trainverify.relate.compare import Comparison, Key, Piece
from trainverify.relate.symbols import Binder
from trainverify.replay.digests import Digests
from trainverify.replay.machine import Hooks, Machine
from trainverify.replay.run import replay
from trainverify.report.model import PlantedBug, SelfTest

MOST, PATIENCE = 40, 120_000                  # mutations, and calls that are replayed for them (a thousand or two take a second)
FEWEST = 8                                    # mutations that are tried however long the program is
DIRECT, NEAR = 6, 12                          # bugs planted right before an output that none reached, and calls above it that are looked at
PROBED = 8                                    # results of one call that are looked at
LOCAL = {"other factor", "operands swapped", "other operation", "slice shifted", "update dropped"}


@dataclass(slots=True)
class Probes:
    """What the changed calls gave before and after the change, seen where the next call of the rank begins."""

    wanted: dict[Node, list[TensorRef]]
    seen: dict[tuple[Node, int], object] = field(default_factory=dict)
    zero: set[tuple[Node, int]] = field(default_factory=set)

    def before(self, machine: Machine, call: OpCall) -> None:
        node = (machine.rank, call.index)
        for k, ref in enumerate(self.wanted.get(node, ())):
            if ref.storage not in machine.native.storages:
                continue                      # nobody reads it any more
            self.seen[node, k] = machine.value(machine.algebras[0], ref)
            if not bool(machine.native.tensor(ref).any()):
                self.zero.add((node, k))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a mutant shows: outputs that differ in the field or are missing, those of them that do by their value, whether float64 shows it too, and what
    of the changed calls. (NaN times 0 is NaN still: that shows, and yet the output cannot show another value.)"""

    wrong: frozenset[Key]
    by_value: frozenset[Key]
    witnessed: bool
    probes: Probes


class SelfTester:
    def __init__(self, reference: Program, parallel: Program, analysis: Analysis, seed: int, progress: Callable = lambda *a, **k: None):
        self.parallel, self.analysis, self.progress = parallel, analysis, progress
        self.mutator, self.rng, self.seed = Mutator(parallel), random.Random(seed), seed
        self.algebras = [analysis.first.field, analysis.first.real]
        self.replayed = 0
        self.reached: set[tuple[str, str]] = set()
        compared = analysis.first.comparison.compared
        self.outputs = sorted({k[:2] for k in compared})
        self.undecided = {k for k, c in compared.items() if c.problems or c.missing or not c.pieces}      # without any planted bug

    # ---- planting
    def run(self) -> SelfTest:
        plans = self._plans()
        base = self._seen_before(plans)
        planted, revealed, kinds, hidden, witnessed = 0, 0, {}, [], 0
        for i, m in enumerate(plans):
            if planted >= FEWEST and self.replayed > PATIENCE:
                break
            self.progress("self-test", m.kind, i / len(plans))
            found = self._outcome(m)
            if found is None:
                continue
            planted += 1
            counts = kinds.setdefault(m.kind, Counter())
            counts["planted"] += 1
            if found.wrong:
                revealed, witnessed = revealed + 1, witnessed + found.witnessed
                counts["revealed"] += 1
                self.reached |= {k[:2] for k in found.by_value}
            else:
                hidden.append(PlantedBug(m.kind, m.text, str(m.span or ""), m.ranks, self._why(m, base, found.probes)))
        self._reach_the_rest()
        unreached = tuple(f"{kind} {name}" for kind, name in self.outputs if (kind, name) not in self.reached)
        return SelfTest(planted, revealed, witnessed, tuple((k, c["planted"], c["revealed"]) for k, c in kinds.items()), tuple(hidden), unreached,
                        len(self.outputs), self.replayed)

    def _plans(self) -> list[Mutation]:
        """Mutations of which the programs are well formed."""
        out = []
        for m in self.mutator.mutations(self.seed, 2 * MOST):
            if len(out) < MOST and not problems(applied(self.parallel, m.edit)):
                out.append(m)
        return out

    def _outcome(self, m: Mutation) -> Outcome | None:
        """Of the mutated program up to the end of its first changed step, and if nothing is wrong there, of all of it; None: it cannot run."""
        step = min((span.step for n in m.nodes if (span := self.mutator.flow.span(n)) is not None), default=0)
        for last in (step, 0) if 0 < step < self.analysis.steps else (0,):
            found = self._replayed(m.edit, last, self._probes(m, moved=True))
            if found is None or found.wrong:
                return found
        return found

    def _replayed(self, edit: Edit, last: int, probes: Probes) -> Outcome | None:
        program = applied(self.parallel, edit)
        program = until(program, last) if last else program
        first, symbols = self.analysis.first, self.analysis.symbols
        self.replayed += sum(len(t.ops) for t in program.traces)
        binder, left = Binder(symbols, self.algebras), Digests()
        hooks = Hooks(symbol=binder.symbol, bind=binder.bind, before=(probes.before, left.before), after=(left.after,), waited=(left.waited,))
        try:
            world = replay(program, self.algebras, self.analysis.table, hooks)
            comparison = Comparison(symbols, self.algebras, first.reference, world, Lineages(first.comparison.ref_lineage, first.comparison.lineage))
            comparison.run()
        except CANNOT_RUN:
            return None
        if left.diagnostics:
            return None                       # Python would have had other numbers than the recorded ones: what then is not known
        wrong, by_value, witnessed = set(), set(), False
        for key, c in comparison.compared.items():
            if key in self.undecided or last and key[2] > last:
                continue
            differ = [p for p in c.pieces if p.wrong("field")]
            witnessed |= any(_is_witness(p) for p in differ)
            if differ or c.problems or c.missing or not c.pieces:
                wrong.add(key)
            if any(not _is_special(p) for p in differ):
                by_value.add(key)
        return Outcome(frozenset(wrong), frozenset(by_value), witnessed, probes)

    # ---- outputs that nothing reached
    def _reach_the_rest(self) -> None:
        """Plant bugs right before the outputs that are left, one for each of them at a time, all of them together."""
        queues: dict[tuple[str, str], list[Mutation]] = {}
        for k in range(DIRECT):
            left = [name for name in self.outputs if name not in self.reached]
            for name in left:
                if name not in queues:
                    queues[name] = list(self._before(name))
            chosen = [queues[name][k] for name in left if k < len(queues[name])]
            if not chosen:
                return
            self._plant_together(chosen)

    def _plant_together(self, chosen: list[Mutation]) -> None:
        edit = Edit()
        for m in chosen:
            edit = edit.joined(m.edit) or edit    # of two that change one call the first is made
        self.progress("self-test", f"{len(chosen)} together")
        found = None if problems(applied(self.parallel, edit)) else self._replayed(edit, 0, Probes({}))
        if found is not None:
            self.reached |= {k[:2] for k in found.by_value}
        elif len(chosen) > 1:                  # one of them cannot run
            half = len(chosen) // 2
            self._plant_together(chosen[:half])
            self._plant_together(chosen[half:])

    def _before(self, name: tuple[str, str]) -> Iterator[Mutation]:
        """Bugs in the nearest calls above an output."""
        ends = []
        for p in (p for key, c in self.analysis.first.comparison.compared.items() if key[:2] == name for p in c.pieces):
            if isinstance(p.recorded.ref, TensorRef):
                ends += self.mutator.flow.writer(p.rank, p.recorded.ref, p.recorded.call.index)
            else:
                ends += self.mutator.flow.producers((p.rank, p.recorded.call.index))
        for node in self.mutator.places.above(dict.fromkeys(ends))[:NEAR]:
            yield from (m for m in self.mutator.at(node, self.rng) if m.kind in LOCAL)

    # ---- why a bug stays hidden
    def _seen_before(self, plans: Iterable[Mutation]) -> Probes:
        """What the calls that are going to be changed give in the program as it is."""
        wanted: dict[Node, list[TensorRef]] = {}
        for m in plans:
            for node, refs in self._probes(m, moved=False).wanted.items():
                wanted[node] = list(dict.fromkeys([*wanted.get(node, ()), *refs]))
        probes = Probes(wanted)
        binder = Binder(self.analysis.symbols, self.algebras)
        replay(self.parallel, self.algebras, self.analysis.table, Hooks(symbol=binder.symbol, bind=binder.bind, before=(probes.before,)))
        return probes

    def _probes(self, m: Mutation, moved: bool) -> Probes:
        """Where to look at what changed calls give: the next operation of the rank; moved: by its number in the mutated program."""
        wanted: dict[Node, list[TensorRef]] = {}
        for rank, index in m.nodes:
            call = self.mutator.flow.call((rank, index))
            refs = [r for r in (call.targets() if call.collective is None else call.collective.outputs) if r.numel][:PROBED]
            later = self.mutator.flow.calls[rank][self.mutator.places.settled((rank, index))[1] + 1:]
            at = next((c.index for c in later if not c.name.startswith("tv.")), None)
            if not refs or at is None:
                continue
            shift = 0
            if moved:
                shift = sum(len(calls) for (r, i), calls in m.edit.after.items() if r == rank and i < at)
                shift -= sum(new is None for (r, i), new in m.edit.calls.items() if r == rank and i < at)
            wanted.setdefault((rank, at + shift), []).extend(refs)
        return Probes(wanted)

    def _why(self, m: Mutation, base: Probes, now: Probes) -> str:
        """What is known of a bug that no output shows."""
        field_, same, zero, n = self.algebras[0], 0, 0, 0
        for (node, refs), (new, _) in zip(self._probes(m, moved=False).wanted.items(), self._probes(m, moved=True).wanted.items()):
            for k, ref in enumerate(refs):
                at = base.wanted[node].index(ref)
                old, got = base.seen.get((node, at)), now.seen.get((new, k))
                if old is not None and got is not None:
                    n += 1
                    same += _alike(field_, old, got)
                    zero += (node, at) in base.zero
        if not n:
            return "no output differs"
        if same == n:
            return "it changes a value that is zero here" if zero == n else "its result is the same here"
        return "its result differs, and no output shows it"


def _alike(m, a, b) -> bool:
    """Whether two values of the field, or of integers, are the same."""
    if type(a) is not type(b) or tuple(a.shape) != tuple(b.shape):
        return False
    return bool((a == b).all()) if hasattr(a, "numel") else bool(m.equal(a, b).all())


def _is_special(p: Piece) -> bool:
    """Whether every element that differs is no number: infinite, undefined, or memory that nobody wrote."""
    special = getattr(p.parallel["field"], "sp", None)
    return special is not None and bool((special.reshape(-1)[~p.equal["field"]] != 0).all())


def _is_witness(p: Piece) -> bool:
    """Whether float64 shows the difference too."""
    a, b = p.reference["real"].t.reshape(-1), p.parallel["real"].t.reshape(-1)
    scale = float(a.abs().max()) if a.numel() else 0.0
    return not bool(((a - b).abs() <= ROUNDED * max(scale, 1e-30)).all())


def self_test(reference: Program, parallel: Program, analysis: Analysis, seed: int, progress: Callable) -> SelfTest:
    """Bugs planted in a program that equals its reference. One that does not has shown what it can show already."""
    if any(p.wrong("field") for c in analysis.first.comparison.compared.values() for p in c.pieces):
        return SelfTest(note="the program itself differs from its reference: mend it first")
    if not any(c.pieces for c in analysis.first.comparison.compared.values()):
        return SelfTest(note="no output is compared")
    return SelfTester(reference, parallel, analysis, seed, progress).run()
