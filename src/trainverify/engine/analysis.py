"""Replay both programs, compare, and judge: from two captured programs to verdicts per output (the verdict rules are trusted)."""
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from trainverify.algebra.field import Field
from trainverify.algebra.real import Real
from trainverify.diagnostics import Diagnostic
from trainverify.engine.facts import Facts
from trainverify.engine.verdict import Judgement, judge
from trainverify.ir.trace import Program
from trainverify.ops.table import OpTable, standard_table
from trainverify.relate.compare import Comparison
from trainverify.relate.decisions import match_decisions
from trainverify.relate.symbols import Binder, Symbols
from trainverify.replay.conform import Conformance
from trainverify.replay.digests import Digests
from trainverify.replay.machine import Hooks
from trainverify.replay.run import World, replay
from trainverify.report.model import Phase


@dataclass(slots=True)
class Pass:
    """Both programs replayed in one field (one seed) and in the reals."""

    field: Field
    real: Real
    reference: World
    parallel: World
    comparison: Comparison


@dataclass(slots=True)
class Analysis:
    table: OpTable
    symbols: Symbols
    first: Pass
    second: Pass | None
    judgements: list[Judgement]
    diagnostics: list[Diagnostic]
    facts: dict[str, Facts]
    steps: int
    accepted: tuple[str, ...] = ()            # places of decisions that the user takes as matched
    phases: list[Phase] = field(default_factory=list)


def replay_both(reference: Program, parallel: Program, table: OpTable, symbols: Symbols, seed: int,
                progress: Callable, check: Conformance | None = None, facts: dict[str, Facts] | None = None,
                digests: dict[str, Digests] | None = None, watch=None) -> Pass:
    """One pass. `check` looks for rows that disagree with torch, `facts` (per side) for weaknesses of the input, `digests` (per side)
    for hidden writes; `watch` sees values."""
    fld, real = Field(seed), Real(symbols.real_values)
    algebras = [fld, real]
    worlds = []
    for side, program in (("reference", reference), ("parallel", parallel)):
        fld.begin_side(side)
        binder = Binder(symbols, algebras)
        hooks = Hooks(symbol=binder.symbol, bind=binder.bind)
        if check is not None:
            hooks.before = (check.before, facts[side].before, digests[side].before)
            hooks.after = (check.after, digests[side].after)
            hooks.waited = (digests[side].waited,)
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


def analyse(reference: Program, parallel: Program, *, seed: int = 0, accept: tuple[str, ...] = (), extra_rows=(),
            progress: Callable = lambda *a, **k: None, watch=None) -> Analysis:
    """Replay, compare and judge. A difference in the field is confirmed by a second seed before it counts; `watch` (for diagnosis)
    sees the values of that second pass."""
    clock = time.perf_counter()
    phases: list[Phase] = []

    def lap(name: str, detail: str = "") -> None:
        nonlocal clock
        now = time.perf_counter()
        phases.append(Phase(name, now - clock, detail))
        clock = now

    table = standard_table(extra_rows)
    symbols = Symbols(reference)
    check = Conformance(table)
    facts = {"reference": Facts(), "parallel": Facts()}
    digests = {"reference": Digests(), "parallel": Digests()}
    first = replay_both(reference, parallel, table, symbols, 2 * seed + 1, progress, check, facts, digests)
    lap("replay", f"{sum(m.ops for w in (first.reference, first.parallel) for m in w.machines)} ops")
    second = None
    if any(p.wrong("field") or p.undefined() for c in first.comparison.compared.values() for p in c.pieces):
        second = replay_both(reference, parallel, table, symbols, 2 * seed + 2, progress, watch=watch)
        lap("second seed")
    diagnostics = [*check.diagnostics, *_once(d for side in digests.values() for d in side.diagnostics),
                   *_once(d for w in (first.reference, first.parallel) for m in w.machines for d in m.diagnostics)]
    unmatched, accepted = match_decisions(first.reference, first.parallel, first.field, first.real, accept)
    diagnostics += unmatched
    judgements = judge(first, second, diagnostics)
    lap("compare")
    return Analysis(table, symbols, first, second, judgements, diagnostics, facts, reference.traces[0].steps, accepted, phases)


def _once(diagnostics) -> list[Diagnostic]:
    """The same message at the same place on several ranks is one diagnostic."""
    merged: dict[tuple, Diagnostic] = {}
    for d in diagnostics:
        key = (d.code, d.message, d.span and (d.span.file, d.span.line))
        old = merged.get(key)
        merged[key] = d if old is None else Diagnostic(d.code, d.message, d.severity, old.span, tuple(sorted({*old.ranks, *d.ranks})), old.notes, d.fix)
    return list(merged.values())
