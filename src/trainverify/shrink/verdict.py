"""Verifies the reduced programs, and says what that shows about the recorded ones (trusted).

What the proof needs of the sizes is known only when it is there: where a class is smaller than its obligations have index variables,
the programs are reduced again, to larger sizes. If that does not end, nothing is proved.
"""
from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec

from trainverify.diagnostics import Diagnostic
from trainverify.engine.analysis import is_deep
from trainverify.engine.beside import Beside, Lost
from trainverify.engine.build import overall
from trainverify.engine.passes import replay_both
from trainverify.engine.verdict import EXACT, ROUNDED, agrees
from trainverify.ir.trace import Program
from trainverify.ops.standard import standard_table
from trainverify.ops.table import OpTable
from trainverify.relate.compare import Key
from trainverify.relate.symbols import Symbols
from trainverify.report.model import Assumption, Phase, Report
from trainverify.shrink.describe import criterion, describe
from trainverify.shrink.integers import VALUELESS
from trainverify.shrink.reduce import Reduced, Reducer
from trainverify.shrink.solve import LEAST
from trainverify.shrink.values import fill

ATTEMPTS = 3
REPLAYED = 1 << 31                             # bytes of all storages up to which both programs are replayed at the recorded sizes
APART = 2                                     # how much larger the least size is at which a cross-check verifies


class Runs:
    """analyse(report, reference, parallel) fills a report with the verdict on two programs and returns what it found. jobs: processes."""

    def __init__(self, report: Report, analyse: Callable, cross_check: bool, jobs: int, progress: Callable):
        self.report, self.analyse, self.cross_check, self.jobs, self.progress = report, analyse, cross_check, jobs, progress

    def run(self, reference: Program, parallel: Program, extra_rows=()) -> None:
        table, blank, least = standard_table(extra_rows), copy.deepcopy(self.report), LEAST
        clock = time.perf_counter()
        reducer = Reducer(reference, parallel, table, self.progress)
        read = time.perf_counter() - clock
        for attempt in range(ATTEMPTS):
            _restore(self.report, blank)
            self.report.phases.append(Phase("classes", read))
            small = self._reduced(reducer, least)
            with self._beside(reducer, least, small) as other:
                analysis = self.analyse(self.report, small.reference, small.parallel)
                needed, short = criterion(small.classes, small.kept, analysis.proof.obligations) if analysis is not None else (0, 0)
                is_done = not short or not self.report.count("PROVED")
                if is_done or attempt == ATTEMPTS - 1:
                    self._conclude(small, needed, short)
                    if self.report.count("PROVED"):
                        self._elsewhere(reducer, least, small, analysis is None or analysis.first.field is not None, other)
            if is_done:
                break
            least = needed
        if analysis is not None and self.report.count("REFUTED"):
            self._at_recorded_sizes(reference, parallel, table, {j.key for j in analysis.judgements if j.verdict == "REFUTED" and j.inputs is None})
        if self.cross_check and self.report.count("PROVED"):
            self._again(reducer, least + APART, blank)

    def _reduced(self, reducer: Reducer, least: int) -> Reduced:
        clock = time.perf_counter()
        small = reducer.reduced(least)
        self.report.phases.append(Phase("reduce", time.perf_counter() - clock, f"sizes of at least {least} where they are reduced"))
        return small

    def _conclude(self, small: Reduced, needed: int, short: int) -> None:
        report = self.report
        report.reduction = msgspec.structs.replace(describe(small.classes, small.kept, small.replaced), needed=needed)
        if short:
            why = f"equal at the reduced sizes, but {short} reduced classes are smaller than the {needed} that the proof needs"
            report.outputs = [msgspec.structs.replace(o, verdict="UNKNOWN", reason=why) if o.verdict == "PROVED" else o for o in report.outputs]
            report.diagnostics.append(Diagnostic("SHAPE004", f"the criterion of shape reduction does not hold: {why}", "warning",
                                                 fix="verify without --reduce, or with sizes that are smaller from the start"))
        report.assumptions = [*report.assumptions, Assumption(
            f"A{6 + sum(a.code[1:].isdigit() and int(a.code[1:]) > 5 for a in report.assumptions)}",
            "what is proved at the reduced sizes holds at the recorded ones (docs/shape-reduction.md; an argument, not checked by the kernel)")]
        if report.outputs:
            report.verdict = overall(report)

    @contextmanager
    def _beside(self, reducer: Reducer, least: int, small: Reduced) -> Iterator[Beside | None]:
        """A process that replays deep programs at other sizes in float64 while they are proved: it takes as long as a quarter of the proof."""
        if self.jobs < 2 or not is_deep(small.reference, small.parallel):
            yield None
            return

        def work(told: Callable, progress: Callable) -> tuple[list[Phase], set[Key]]:
            reducer.progress = progress
            return _at_other_sizes(reducer, least, small, None, progress)
        beside = Beside(work)
        try:
            yield beside
        finally:
            beside.close()

    def _elsewhere(self, reducer: Reducer, least: int, first: Reduced, in_field: bool, beside: Beside | None) -> None:
        """Equality where every size is another one: what is equal at one choice alone (a literal that happens to be a reduced count) is not. In the
        field, or in float64 where the proof did without a field, too (which a process beside may have done already)."""
        try:
            found = None if in_field or beside is None else beside.answer(None, self.progress)
        except Lost:
            found = None
        phases, differing = found or _at_other_sizes(reducer, least, first, 2 * self.report.seed + 5 if in_field else None, self.progress)
        self.report.phases += phases
        self._withdraw([o for o in self.report.outputs if (o.kind, o.name, o.step) in differing], "proved at one choice of sizes, and different at another")

    def _withdraw(self, outputs: list, why: str) -> None:
        """These outputs are not PROVED after all."""
        gone = [o for o in outputs if o.verdict == "PROVED"]
        if not gone:
            return
        self.report.outputs = [msgspec.structs.replace(o, verdict="UNKNOWN", reason=why) if o in gone else o for o in self.report.outputs]
        self.report.diagnostics.append(Diagnostic("SHAPE004", f"{len(gone)} outputs are {why}, such as {gone[0].kind} {gone[0].name}", "warning",
                                                  fix="verify without --reduce, at sizes that are small from the start"))
        self.report.verdict = overall(self.report)

    def _at_recorded_sizes(self, reference: Program, parallel: Program, table: OpTable, refuted: set[Key]) -> None:
        """What differs must do so at the recorded sizes too, where there are values: counts that no literal says (the mean of x + 1) are other ones here."""
        clock = time.perf_counter()
        differing = _differing(reference, parallel, table, self.progress)
        if differing is None:
            self.report.diagnostics.append(Diagnostic("SHAPE004", "what differs at the reduced sizes could not be looked at at the recorded ones, which are too large, or without "
                                                      "values: a count that no literal says (the sum of x + 1) would differ here, too", "note"))
            return
        self.report.phases.append(Phase("replay at the recorded sizes", time.perf_counter() - clock))
        gone = [o for o in self.report.outputs if o.verdict == "REFUTED" and (key := (o.kind, o.name, o.step)) in refuted and key not in differing]
        if not gone:
            return
        why = "different at the reduced sizes, and equal at the recorded ones"
        self.report.outputs = [msgspec.structs.replace(o, verdict="UNKNOWN", reason=why, finding=-1) if o in gone else o for o in self.report.outputs]
        self.report.diagnostics.append(Diagnostic("SHAPE004", f"{len(gone)} outputs are {why}, such as {gone[0].kind} {gone[0].name}", "warning",
                                                  fix="verify without --reduce, at sizes that are small from the start"))
        if not self.report.count("REFUTED"):
            self.report.findings, self.report.counterexample = [], None
        self.report.verdict = overall(self.report)

    def _again(self, reducer: Reducer, least: int, blank: Report) -> None:
        """The same at other sizes: a regression check of the reduction itself."""
        other = copy.deepcopy(blank)
        small = self._reduced(reducer, least)
        self.analyse(other, small.reference, small.parallel)
        there = {(o.kind, o.name, o.step): o.verdict for o in other.outputs}
        differing = [o for o in self.report.outputs if o.verdict == "PROVED" and there.get((o.kind, o.name, o.step)) != "PROVED"]
        if differing:
            self._withdraw(differing, "proved at one choice of sizes, and not at another")
        else:
            self.report.reduction = msgspec.structs.replace(self.report.reduction, cross_checked=True)


def _at_other_sizes(reducer: Reducer, least: int, first: Reduced, seed: int | None, progress: Callable) -> tuple[list[Phase], set[Key]]:
    """The outputs that differ where every size is another one, in a field or (seed None) in float64."""
    clock = time.perf_counter()
    small = reducer.reduced(least, first.kept)
    reduced = time.perf_counter()
    found = replay_both(small.reference, small.parallel, reducer.table, Symbols(small.reference), seed, progress).comparison.compared
    phases = [Phase("reduce", reduced - clock, f"sizes of at least {least} where they are reduced"), Phase("replay at other sizes", time.perf_counter() - reduced)]
    return phases, {key for key, c in found.items() if any(not agrees(p) if seed is None else p.wrong("field") or p.undefined() for p in c.pieces)}


def _differing(reference: Program, parallel: Program, table: OpTable, progress: Callable) -> set[Key] | None:
    """The outputs that differ in float64 at the recorded sizes and inputs; None: that is not known."""
    traces = [*reference.traces, *parallel.traces]
    if sum(s.nbytes for t in traces for s in t.storages) > REPLAYED:
        return None
    if any(VALUELESS in t.meta.items() for t in traces):
        if any(c.name == "tv.scalar.item" for t in traces for c in t.ops):
            return None                       # what Python took out of tensors was recorded without a value
        reference, parallel = _valued(reference, parallel)
    done = replay_both(reference, parallel, table, Symbols(reference), None, progress)
    within = ROUNDED if any(m.memory["real"].rounded for w in (done.reference, done.parallel) for m in w.machines) else EXACT
    return {key for key, c in done.comparison.compared.items() if c.problems or c.missing or not all(agrees(p, within) for p in c.pieces)}


def _valued(reference: Program, parallel: Program) -> tuple[Program, Program]:
    """Copies of programs that were captured without values, with some for their symbols."""
    copies = [Program([msgspec.structs.replace(t, storages=list(t.storages), meta=dict({*t.meta.items()} - {VALUELESS})) for t in p.traces], [dict(b) for b in p.blobs])
              for p in (reference, parallel)]
    fill(*copies, reference)
    return copies[0], copies[1]


def _restore(report: Report, blank: Report) -> None:
    for name in Report.__struct_fields__:
        setattr(report, name, copy.deepcopy(getattr(blank, name)))
