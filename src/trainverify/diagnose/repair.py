"""Tries repairs: the recorded program is edited, compared again, and proved (not trusted to find one; what it calls verified has the proof).

A candidate is first replayed in the field alone, up to the end of the first wrong step. Only one under which everything that its
finding explains there is equal is replayed to the end, and then proved by the same prover as the program itself. How much is
tried is counted, not timed: the same run gives the same repairs.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from trainverify.diagnose.candidate import Candidate
from trainverify.diagnose.candidates import Maker
from trainverify.diagnose.edit import Edit, applied
from trainverify.diagnose.explain import Explanation
from trainverify.diagnostics import Fault
from trainverify.diagnose.probe import PROBE, Probes
from trainverify.diagnose.trial import needed
from trainverify.engine.analysis import Analysis
from trainverify.engine.proof import Lineages
from trainverify.engine.prove import Prover
from trainverify.engine.verdict import BLOCKING
from trainverify.ir.trace import Program
from trainverify.relate.compare import Comparison, Key
from trainverify.relate.symbols import Binder
from trainverify.replay.errors import ReplayError
from trainverify.replay.machine import Hooks
from trainverify.replay.run import World, replay
from trainverify.report.model import Finding, Repair

CANNOT_RUN = (ReplayError, RuntimeError, ValueError, LookupError, ArithmeticError, Fault)   # what an edit that does not fit the program makes of a replay
EARLY = {"gradient", "scalar"}                # outputs that a step has before its updates
MOST_TRIALS = 24                              # field replays in one run, over all findings
LITTLE = 0.7                                  # of the calls: what is worth a look before all of them are replayed


@dataclass(slots=True)
class Job:
    """What is repaired: both programs, what their analysis found, and how it was asked for."""

    reference: Program
    parallel: Program
    analysis: Analysis
    told: Explanation
    seed: int = 0
    accept: tuple[str, ...] = ()
    progress: Callable = lambda *a, **k: None
    trials: int = 0


@dataclass(frozen=True, slots=True)
class Trial:
    """An edited program, replayed in the field."""

    program: Program
    world: World
    comparison: Comparison

    def still_wrong(self, keys: Iterable[Key]) -> set[Key]:
        """Those of these outputs that differ, or that no rank holds."""
        return _wrong(self.comparison, keys)


def _wrong(comparison: Comparison, keys: Iterable[Key]) -> set[Key]:
    held = {k: comparison.compared[k] for k in keys}
    return {k for k, c in held.items() if not c.pieces or c.missing or c.problems or any(p.wrong("field") for p in c.pieces)}


def repaired(job: Job) -> list[Finding]:
    """The findings, those with a repair of which everything that they explain becomes PROVED (or at least equal) with it."""
    shares = {j.key[1] for j in job.analysis.judgements if j.code == "REL006"}    # a rank's own: no repair makes it the reference's
    wrong = {j.key for j in job.analysis.judgements if j.verdict == "REFUTED" and not (j.key[0] == "scalar" and j.key[1] in shares)}
    if not wrong or job.told.diagnosis is None or job.analysis.second is None:
        return job.told.findings
    concerned = _concerned(job, wrong)
    chosen, trial = _chosen(job, concerned, wrong)
    if trial is None:
        return job.told.findings
    proved, broken = _verdicts(job, trial)
    out = list(job.told.findings)
    before = _wrong(job.analysis.second.comparison, job.analysis.second.comparison.compared)
    for i, candidate in chosen.items():
        keys = concerned[i]
        if not broken & keys and broken <= before:
            n = len(keys & proved)
            told = _told(job, i, candidate)
            out[i] = msgspec.structs.replace(told, repair=Repair(candidate.text, n == len(keys), n, len(keys)),
                                             diagnostic=msgspec.structs.replace(told.diagnostic, fix=""))      # the repair says what to do
    return out


def _told(job: Job, index: int, candidate: Candidate) -> Finding:
    """The finding; what mends it may say more of it than its values do."""
    finding, d = job.told.findings[index], job.told.diagnosis
    if candidate.means is None or finding.diagnosis not in ("other", "partial sum"):
        return finding
    return d.writer.instead(finding, candidate.means, candidate.at, [d.by_key[k] for k in job.told.causes[index].keys])


def _concerned(job: Job, wrong: set[Key]) -> dict[int, set[Key]]:
    """The outputs that each finding explains; one that is wrong in the first step already belongs to the same finding in later ones."""
    step = min(k[2] for k in wrong)
    out: dict[int, set[Key]] = {i: set() for i in range(len(job.told.findings))}
    for k in wrong:
        at = job.told.explained.get((*k[:2], step)) if (*k[:2], step) in wrong else None
        out[job.told.explained.get(k, 0) if at is None else at].add(k)
    return out


def _chosen(job: Job, concerned: dict[int, set[Key]], wrong: set[Key]) -> tuple[dict[int, Candidate], Trial | None]:
    """For each finding the first candidate that makes its outputs equal, on top of those of the findings before it; or else the most
    likely candidates of all findings together (clipping makes every gradient wrong until the last cause is gone). With the whole program so edited."""
    maker = Maker(job.told.diagnosis)
    step = min(k[2] for k in wrong)
    first = {k for k in wrong if k[2] == step}
    first = {k for k in first if k[0] in EARLY} or first
    before = _wrong(job.analysis.second.comparison, job.analysis.second.comparison.compared)
    sound = {k for k in job.analysis.second.comparison.compared if k[2] == step and k[0] in EARLY and k not in before}
    quick, edit, chosen, right, whole = _Quick(job.parallel, step), Edit(), {}, set(), None
    likely: dict[int, Candidate] = {}
    for i, cause in enumerate(job.told.causes):
        early = {k for k in concerned[i] if k[2] == step}
        early = {k for k in early if k[0] in EARLY} or early
        if not early or early <= right or job.told.findings[i].diagnosis == "decision":
            continue                          # an earlier repair mends it too, or other numbers are compared than should be
        updates_later = {k[0] for k in early} <= EARLY
        probes = Probes(job.told.diagnosis, maker.places, lambda e: _doubled(job, edit, e)) if updates_later else None
        for candidate in maker.candidates(cause, probes.candidates(cause) if probes is not None else ()):
            likely.setdefault(i, candidate)
            both = edit.joined(candidate.edit)
            if both is None or job.trials >= MOST_TRIALS * (i + 1) // len(job.told.causes):
                continue                      # the next finding may be the one that a repair is found for
            edited = applied(job.parallel, both)
            tried = _tried(job, edited, step, updates_later, quick.among(early) if updates_later else None)
            if tried is None or (still := tried.still_wrong(first)) & early or tried.still_wrong(sound):
                continue
            tried = _tried(job, edited)
            if tried is not None and not (broken := tried.still_wrong(tried.comparison.compared)) & concerned[i] and broken <= before:
                edit, right, whole, chosen[i] = both, first - still, tried, candidate
                break
    if not chosen and len(likely) > 1:
        return _together(job, likely, first, wrong, step)
    return chosen, whole


def _together(job: Job, likely: dict[int, Candidate], first: set[Key], wrong: set[Key], step: int) -> tuple[dict[int, Candidate], Trial | None]:
    edit: Edit | None = Edit()
    for candidate in likely.values():
        edit = edit and edit.joined(candidate.edit)
    if edit is None:
        return {}, None
    edited = applied(job.parallel, edit)
    tried = _tried(job, edited, step)
    if tried is None or tried.still_wrong(first):
        return {}, None
    tried = _tried(job, edited)
    return ({}, None) if tried is None or tried.still_wrong(wrong) else (likely, tried)


def _tried(job: Job, program: Program, step: int = 0, updates_later: bool = False, first: Key | None = None) -> Trial | None:
    """The edited program replayed in the field, up to the end of a step (0: to its own end), or of it only what precedes updates; None if it cannot run,
    or if an output that takes little work (first) is still wrong."""
    job.trials += 1
    job.progress("repair", f"candidate {job.trials}")
    if first is not None:
        alone = _replayed(job, program, lambda: _only(program, first))
        if alone is None or alone.still_wrong({first}):
            return None
    return _replayed(job, program, lambda: program if not step else _before_updates(program, step) if updates_later else _until(program, step))


def _replayed(job: Job, program: Program, cut: Callable[[], Program]) -> Trial | None:
    """A part of the edited program, replayed in the field; None if it cannot run."""
    watched, symbols = job.analysis.second, job.analysis.symbols
    binder = Binder(symbols, [watched.field])
    try:
        world = replay(cut(), [watched.field], job.analysis.table, Hooks(symbol=binder.symbol, bind=binder.bind))
        found = Lineages(watched.comparison.ref_lineage, watched.comparison.lineage)
        comparison = Comparison(symbols, [watched.field], watched.reference, world, found)
        comparison.run()
    except CANNOT_RUN:
        return None
    return Trial(program, world, comparison)


def _doubled(job: Job, edit: Edit, probe: Edit) -> World | None:
    """The program with an edit and a probe, replayed in the field and in float64 up to what the probe adds; None if it cannot run."""
    both = edit.joined(probe)
    if both is None or job.trials >= MOST_TRIALS:
        return None
    job.trials += 1
    job.progress("repair", f"candidate {job.trials}")
    watched = job.analysis.second
    algebras = [watched.field, watched.real]
    binder = Binder(job.analysis.symbols, algebras)
    edited = applied(job.parallel, both)
    try:
        cut = needed(edited, [(t.rank, c.index) for t in edited.traces for c in t.ops if c.name == "tv.output" and c.args[0] == PROBE])
        return replay(cut, algebras, job.analysis.table, Hooks(symbol=binder.symbol, bind=binder.bind))
    except CANNOT_RUN:
        return None


class _Quick:
    """Which scalar of a step takes little work: a loss needs no backward. A candidate that does not mend it need not be replayed further."""

    def __init__(self, program: Program, step: int):
        self._program, self._step = program, step
        self._found: dict[Key, bool] = {}

    def among(self, keys: Iterable[Key]) -> Key | None:
        """The first of these outputs that takes less than most of what all outputs before the updates take."""
        return next((k for k in sorted(keys) if k[0] == "scalar" and self._takes_little(k)), None)

    def _takes_little(self, key: Key) -> bool:
        if key not in self._found:
            part, whole = (sum(len(t.ops) for t in p.traces) for p in (_only(self._program, key), _before_updates(self._program, self._step)))
            self._found[key] = part < LITTLE * whole
        return self._found[key]


def _only(program: Program, key: Key) -> Program:
    """What one output is computed from."""
    return needed(program, [(t.rank, c.index) for t in program.traces for c in t.ops if c.name == "tv.output" and tuple(c.args[:3]) == key], False)


def _until(program: Program, step: int) -> Program:
    """The program up to the end of a step."""
    traces = []
    for t in program.traces:
        end = next((c.index for c in t.ops if c.name == "tv.step" and c.args[0] > step), len(t.ops))
        traces.append(msgspec.structs.replace(t, ops=t.ops[:end]))
    return Program(traces, program.blobs)


def _before_updates(program: Program, step: int) -> Program:
    """What the gradients and scalars of a step are computed from."""
    return needed(program, [(t.rank, c.index) for t in program.traces for c in t.ops if c.name == "tv.output" and c.args[0] in EARLY and c.args[2] == step])


def _verdicts(job: Job, trial: Trial) -> tuple[set[Key], set[Key]]:
    """The outputs of the edited program that are proved, and those that are wrong."""
    compared = set(trial.comparison.compared)
    broken = trial.still_wrong(compared)
    if any(d.code in BLOCKING for m in trial.world.machines for d in m.diagnostics):
        return set(), compared
    analysis, lineages = job.analysis, Lineages(trial.comparison.ref_lineage, trial.comparison.lineage)

    def said(phase: str, *args, **kwargs) -> None:
        job.progress("repair", phase)
    try:
        prover = analysis.prover or Prover(job.reference, job.parallel, analysis.table, analysis.symbols, 2 * job.seed + 3, said)
        proof = prover.prove(trial.program, job.accept, said, lambda: lineages)
    except CANNOT_RUN:
        return set(), compared
    return set(proof.proved) - broken, broken
