"""Replay both programs, compare, and judge: from two captured programs to verdicts per output (the verdict rules are trusted)."""
from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from trainverify.algebra.field import Field
from trainverify.algebra.real import Real
from trainverify.diagnostics import Diagnostic
from trainverify.engine.beside import Beside, Lost
from trainverify.engine.facts import Facts
from trainverify.engine.inputs import elsewhere
from trainverify.engine.contracts import prove_by_contracts
from trainverify.engine.proof import Lineages, Proof
from trainverify.engine.prove import Prover, prove_programs
from trainverify.engine.slices import part
from trainverify.engine.verdict import BLOCKING, Judgement, at_other_inputs, judge
from trainverify.ir.trace import Program
from trainverify.ops.standard import standard_table
from trainverify.ops.table import OpTable
from trainverify.relate.compare import Comparison
from trainverify.relate.coverage import Batch, Coverage, Reads
from trainverify.relate.decisions import idle_accepts, match_decisions
from trainverify.relate.symbols import Binder, Symbols
from trainverify.replay.conform import Conformance
from trainverify.replay.digests import Digests
from trainverify.replay.machine import Hooks
from trainverify.replay.run import World, replay
from trainverify.report.model import Phase


DEEP = 20_000                                 # calls; smaller programs repeat too little for contracts to pay
WORTH_A_PROCESS = 1000                        # calls; a smaller proof takes less time than to start one


@dataclass(slots=True)
class Pass:
    """Both programs replayed in one field (one seed) and in the reals."""

    field: Field
    real: Real
    reference: World
    parallel: World
    comparison: Comparison


class Observers:
    """What is learnt besides values while one side is replayed."""

    def __init__(self, batch: Batch, check: Conformance):
        self.facts, self.digests, self.reads, self.check = Facts(), Digests(), Reads(batch), check

    def attach(self, hooks: Hooks) -> None:
        hooks.before = (self.check.before, self.facts.before, self.digests.before, self.reads.before)
        hooks.after = (self.check.after, self.digests.after, self.reads.after)
        hooks.waited = (self.digests.waited,)


@dataclass(slots=True)
class Analysis:
    table: OpTable
    symbols: Symbols
    first: Pass
    second: Pass | None
    proof: Proof
    judgements: list[Judgement]
    diagnostics: list[Diagnostic]
    facts: dict[str, Facts]
    coverage: Coverage
    steps: int
    accepted: tuple[str, ...] = ()            # places of decisions that the user takes as matched
    prover: Prover | None = None              # of a program that differs: for whoever wants to prove another one
    phases: list[Phase] = field(default_factory=list)


def replay_both(reference: Program, parallel: Program, table: OpTable, symbols: Symbols, seed: int,
                progress: Callable, observers: dict[str, Observers] | None = None, watch=None) -> Pass:
    """One pass. `observers` (per side) see every call, `watch` sees values."""
    fld, real = Field(seed), Real(symbols.real_values)
    algebras = [fld, real]
    worlds = []
    for side, program in (("reference", reference), ("parallel", parallel)):
        fld.begin_side(side)
        binder = Binder(symbols, algebras)
        hooks = Hooks(symbol=binder.symbol, bind=binder.bind)
        if observers is not None:
            observers[side].attach(hooks)
        if watch is not None:
            if side == "reference":
                watch.begin(fld, binder.all["field"])
            hooks.value = lambda machine, m, call, k, ref, side=side: watch.value(side, machine, m, call, k, ref)
        worlds.append(replay(program, algebras, table, hooks, lambda f, side=side: progress("replay", side, f)))
        if watch is not None and side == "reference":
            watch.end(fld)
    comparison = Comparison(symbols, algebras, worlds[0], worlds[1])
    comparison.run()
    return Pass(fld, real, worlds[0], worlds[1], comparison)


class Laps:
    """Phases of the work, each timed from the end of the one before."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self._clock = time.perf_counter()

    def end(self, name: str, detail: str = "") -> None:
        now = time.perf_counter()
        self.phases.append(Phase(name, now - self._clock, detail))
        self._clock = now


def analyse(reference: Program, parallel: Program, *, seed: int = 0, accept: tuple[str, ...] = (), extra_rows=(), jobs: int = 1,
            progress: Callable = lambda *a, **k: None, watch=None, proofs: bool = True) -> Analysis:
    """Replay, compare, prove and judge. A difference in the field is confirmed by a second seed before it counts; `watch` (for
    diagnosis) sees the values of that second pass. With two jobs the proof is made in a process of its own, beside all that; of a program that
    differs, only what comes before the last output that does not is looked at. Without proofs nothing is PROVED."""
    laps = Laps()
    table = standard_table(extra_rows)
    symbols = Symbols(reference)

    def prove(told: Callable[[], Lineages], report: Callable) -> Proof:
        if not proofs:
            return Proof()
        held = functools.cache(told)
        by_contracts = prove_by_contracts(reference, parallel, table, symbols, 2 * seed + 3, report, held) if calls > DEEP else None
        return by_contracts or prove_programs(reference, parallel, table, symbols, 2 * seed + 3, accept, report, held)
    calls = sum(len(t.ops) for p in (reference, parallel) for t in p.traces)

    def prover() -> Prover | None:
        return Prover(reference, parallel, table, symbols, 2 * seed + 3, progress) if proofs else None
    beside = Beside(prove) if proofs and jobs > 1 and calls > WORTH_A_PROCESS else None
    try:
        found = _analyse(reference, parallel, table, symbols, seed, accept, laps, progress, watch, prove, beside, prover)
    finally:
        if beside is not None:
            beside.close()

    def find(wanted: dict, rounded: bool) -> dict:
        witnesses = elsewhere(reference, parallel, table, symbols, found.first.comparison, wanted, rounded, progress)
        laps.end("other inputs")
        return witnesses
    if proofs:
        found.judgements = at_other_inputs(found.judgements, found.first, found.diagnostics, find)
    return found


def _analyse(reference: Program, parallel: Program, table: OpTable, symbols: Symbols, seed: int, accept: tuple[str, ...], laps: Laps,
             progress: Callable, watch, prove: Callable, beside: Beside | None, prover: Callable) -> Analysis:
    check, batch = Conformance(table), Batch(reference)
    observers = {side: Observers(batch, check) for side in ("reference", "parallel")}
    first = replay_both(reference, parallel, table, symbols, 2 * seed + 1, progress, observers)
    laps.end("replay", f"{sum(m.ops for w in (first.reference, first.parallel) for m in w.machines):,} calls")
    second = None
    if any(p.wrong("field") or p.undefined() for c in first.comparison.compared.values() for p in c.pieces):
        second = replay_both(reference, parallel, table, symbols, 2 * seed + 2, progress, watch=watch)
        laps.end("second seed")
        if beside is not None:
            beside.close()
    diagnostics = [*check.diagnostics, *_once(d for side in observers.values() for d in side.digests.diagnostics),
                   *_once(d for w in (first.reference, first.parallel) for m in w.machines for d in m.diagnostics)]
    unmatched, accepted = match_decisions(first.reference, first.parallel, first.field, first.real, accept)
    diagnostics += unmatched
    laps.end("compare")
    held = None
    if second is None:
        proof = _proof(first, diagnostics, prove, beside, progress)
    else:
        proof, held = _proof_of_the_rest(first, second, diagnostics, parallel, accept, prover, progress)
    accepted = tuple(dict.fromkeys([*accepted, *proof.accepted]))
    diagnostics += [*proof.diagnostics, *(idle_accepts(accept, accepted) if second is None else ())]     # of a program that differs not all is known
    laps.end("prove", _work(proof))
    judgements = judge(first, second, diagnostics, proof)
    return Analysis(table, symbols, first, second, proof, judgements, diagnostics, {side: o.facts for side, o in observers.items()},
                    Coverage(batch, observers["reference"].reads, observers["parallel"].reads), reference.traces[0].steps, accepted, held, laps.phases)


def _proof(first: Pass, diagnostics: list[Diagnostic], prove: Callable, beside: Beside | None, progress: Callable) -> Proof:
    """What is proved; nothing is tried where a diagnostic withholds every verdict."""
    if any(d.code in BLOCKING for d in diagnostics):
        return Proof()
    lineages = Lineages(first.comparison.ref_lineage, first.comparison.lineage)
    if beside is None:
        return prove(lambda: lineages, progress)
    progress("prove")
    try:
        return beside.answer(lineages, progress)
    except Lost as lost:
        return Proof(diagnostics=[Diagnostic("PROVE001", f"the process that proves was lost ({lost}): nothing is proved", "warning",
                                             fix="if memory ran out, verify with --jobs 1, fewer steps or smaller sizes")])


def _proof_of_the_rest(first: Pass, second: Pass, diagnostics: list[Diagnostic], parallel: Program, accept: tuple[str, ...], prover: Callable,
                       progress: Callable) -> tuple[Proof, Prover | None]:
    """What is proved of a program that differs: only of the outputs that do not, from what they are computed from."""
    equal = {j.key for j in judge(first, second, diagnostics, Proof()) if j.verdict == "UNKNOWN" and not j.code}
    held = prover() if equal else None
    if held is None:
        return Proof(), None
    outputs = {(p.rank, p.recorded.call.index) for key in equal for p in first.comparison.compared[key].pieces}
    scalars = {key[1:] for key in equal if key[0] == "scalar"}                # shares of one are several outputs
    outputs |= {(t.rank, c.index) for t in parallel.traces for c in t.ops if c.name == "tv.output" and c.args[0] == "scalar" and c.args[1:3] in scalars}
    lineages = Lineages(first.comparison.ref_lineage, first.comparison.lineage)
    return held.prove(part(parallel, outputs), accept, progress, lambda: lineages), held


def _work(proof: Proof) -> str:
    c = proof.counts
    return f"{len(proof.obligations):,} distinct obligations proved of {c.get('obligations', 0):,} tried, {c.get('rows', 0):,} elements" if c else ""


@dataclass(slots=True)
class Survey:
    """What a dry run finds: which reference elements parameters hold, and how the batch is read. Nothing is compared."""

    symbols: Symbols
    comparison: Comparison                    # its lineages; nothing in it was compared
    diagnostics: list[Diagnostic]
    facts: dict[str, Facts]
    coverage: Coverage
    phases: list[Phase]


def survey(reference: Program, parallel: Program, *, extra_rows=(), progress: Callable = lambda *a, **k: None) -> Survey:
    """Replay both programs in float64 only, for bindings and data coverage."""
    laps = Laps()
    table, symbols, batch = standard_table(extra_rows), Symbols(reference), Batch(reference)
    check = Conformance(table)
    observers, worlds = {}, []
    for side, program in (("reference", reference), ("parallel", parallel)):
        real = Real(symbols.real_values)
        hooks = Hooks(symbol=(binder := Binder(symbols, [real])).symbol, bind=binder.bind)
        observers[side] = Observers(batch, check)
        observers[side].attach(hooks)
        worlds.append(replay(program, [real], table, hooks, lambda f, side=side: progress("replay", side, f)))
    diagnostics = [*check.diagnostics, *_once(d for side in observers.values() for d in side.digests.diagnostics),
                   *_once(d for w in worlds for m in w.machines for d in m.diagnostics)]
    laps.end("replay", f"{sum(m.ops for w in worlds for m in w.machines):,} calls")
    return Survey(symbols, Comparison(symbols, [real], *worlds), diagnostics, {side: o.facts for side, o in observers.items()},
                  Coverage(batch, observers["reference"].reads, observers["parallel"].reads), laps.phases)


def _once(diagnostics) -> list[Diagnostic]:
    """The same message at the same place on several ranks is one diagnostic."""
    merged: dict[tuple, Diagnostic] = {}
    for d in diagnostics:
        key = (d.code, d.message, d.span and (d.span.file, d.span.line))
        old = merged.get(key)
        merged[key] = d if old is None else Diagnostic(d.code, d.message, d.severity, old.span, tuple(sorted({*old.ranks, *d.ranks})), old.notes, d.fix)
    return list(merged.values())
