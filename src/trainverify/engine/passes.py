"""Both programs replayed once, in a field and in float64 or in float64 alone, with what is learnt besides values (trusted)."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from trainverify.algebra.field import Field
from trainverify.algebra.real import Real
from trainverify.diagnostics import Diagnostic
from trainverify.engine.facts import Facts
from trainverify.ir.trace import Program
from trainverify.ops.table import OpTable
from trainverify.relate.compare import Comparison
from trainverify.relate.coverage import Batch, Coverage, Reads
from trainverify.relate.symbols import Binder, Symbols
from trainverify.replay.conform import Conformance
from trainverify.replay.digests import Digests
from trainverify.replay.machine import Hooks
from trainverify.replay.run import World, replay
from trainverify.report.model import Phase

SIDES = ("reference", "parallel")


@dataclass(slots=True)
class Pass:
    """Both programs replayed in one field (one seed; None: in none) and in the reals."""

    field: Field | None
    real: Real
    reference: World
    parallel: World
    comparison: Comparison

    @property
    def calls(self) -> str:
        return f"{sum(m.ops for w in (self.reference, self.parallel) for m in w.machines):,} calls"


class Observers:
    """What is learnt besides values while one side is replayed."""

    def __init__(self, batch: Batch, check: Conformance):
        self.facts, self.digests, self.reads, self.check = Facts(), Digests(), Reads(batch), check

    def attach(self, hooks: Hooks) -> None:
        hooks.before = (self.check.before, self.facts.before, self.digests.before, self.reads.before)
        hooks.after = (self.check.after, self.digests.after, self.reads.after)
        hooks.waited = (self.digests.waited,)


class Seen:
    """The observers of both sides."""

    def __init__(self, reference: Program, table: OpTable):
        self.check, self._batch = Conformance(table), Batch(reference)
        self.observers = {side: Observers(self._batch, self.check) for side in SIDES}

    @property
    def facts(self) -> dict[str, Facts]:
        return {side: o.facts for side, o in self.observers.items()}

    @property
    def coverage(self) -> Coverage:
        return Coverage(self._batch, *(self.observers[side].reads for side in SIDES))

    def diagnostics(self, done: Pass) -> list[Diagnostic]:
        return [*self.check.diagnostics, *_once(d for o in self.observers.values() for d in o.digests.diagnostics),
                *_once(d for w in (done.reference, done.parallel) for m in w.machines for d in m.diagnostics)]


class Laps:
    """Phases of the work, each timed from the end of the one before."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self._clock = time.perf_counter()

    def end(self, name: str, detail: str = "") -> None:
        now = time.perf_counter()
        self.phases.append(Phase(name, now - self._clock, detail))
        self._clock = now


def replay_both(reference: Program, parallel: Program, table: OpTable, symbols: Symbols, seed: int | None,
                progress: Callable, seen: Seen | None = None, watch=None) -> Pass:
    """One pass; seed None: in float64 only. `seen` sees every call, `watch` sees values."""
    fld, real = None if seed is None else Field(seed), Real(symbols.real_values)
    algebras = [real] if fld is None else [fld, real]
    worlds = []
    for side, program in zip(SIDES, (reference, parallel)):
        if fld is not None:
            fld.begin_side(side)
        binder = Binder(symbols, algebras)
        hooks = Hooks(symbol=binder.symbol, bind=binder.bind)
        if seen is not None:
            seen.observers[side].attach(hooks)
        if watch is not None:
            if side == "reference":
                watch.begin(fld, binder.all["field"])
            hooks.value = lambda machine, m, call, k, ref, side=side: watch.value(side, machine, m, call, k, ref)
        worlds.append(replay(program, algebras, table, hooks, lambda f, side=side: progress("replay", side, f)))
        if watch is not None and side == "reference":
            watch.end(fld)
    comparison = Comparison(symbols, algebras, *worlds)
    comparison.run()
    return Pass(fld, real, *worlds, comparison)


def _once(diagnostics: Iterable[Diagnostic]) -> list[Diagnostic]:
    """The same message at the same place on several ranks is one diagnostic."""
    merged: dict[tuple, Diagnostic] = {}
    for d in diagnostics:
        key = (d.code, d.message, d.span and (d.span.file, d.span.line))
        old = merged.get(key)
        merged[key] = d if old is None else Diagnostic(d.code, d.message, d.severity, old.span, tuple(sorted({*old.ranks, *d.ranks})), old.notes, d.fix)
    return list(merged.values())
