"""Tries repairs: the recorded program is edited, compared again, and proved (not trusted to find one; what it calls verified has the proof).

A candidate is first replayed in the field alone, up to the end of the first wrong step. Only one under which everything that its
finding explains there is equal is replayed to the end, and then verified by the same analysis as the program itself. How much is
tried is counted, not timed: the same run gives the same repairs.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from trainverify.diagnose.candidates import Candidate, Maker
from trainverify.diagnose.edit import Edit, applied
from trainverify.diagnose.explain import Explanation
from trainverify.diagnostics import Fault
from trainverify.engine.analysis import Analysis, analyse
from trainverify.engine.prove import Lineages
from trainverify.ir.trace import Program
from trainverify.relate.compare import Comparison, Key
from trainverify.relate.symbols import Binder
from trainverify.replay.errors import ReplayError
from trainverify.replay.machine import Hooks
from trainverify.replay.run import replay
from trainverify.report.model import Finding, Repair

CANNOT_RUN = (ReplayError, RuntimeError, ValueError, LookupError, ArithmeticError, Fault)   # what an edit that does not fit the program makes of a replay
MOST_TRIALS = 12                              # field replays in one run, over all findings


@dataclass(slots=True)
class Job:
    """What is repaired: both programs, what their analysis found, and how it was asked for."""

    reference: Program
    parallel: Program
    analysis: Analysis
    told: Explanation
    seed: int = 0
    accept: tuple[str, ...] = ()
    extra_rows: tuple = ()
    jobs: int = 1
    progress: Callable = lambda *a, **k: None
    trials: int = 0


def repaired(job: Job) -> list[Finding]:
    """The findings, those with a repair of which everything that they explain becomes PROVED (or at least equal) with it."""
    wrong = {j.key for j in job.analysis.judgements if j.verdict == "REFUTED"}
    if not wrong or job.told.diagnosis is None or job.analysis.second is None:
        return job.told.findings
    concerned = _concerned(job, wrong)
    edit, chosen = _chosen(job, concerned, wrong)
    if not chosen:
        return job.told.findings
    verdicts = _verdicts(job, edit)
    out = list(job.told.findings)
    for i, candidate in chosen.items():
        keys = concerned[i]
        proved = sum(verdicts.get(k) == "PROVED" for k in keys)
        if all(verdicts.get(k) in ("PROVED", "equal") for k in keys) and not any(v == "REFUTED" for k, v in verdicts.items() if k not in wrong):
            out[i] = msgspec.structs.replace(out[i], repair=Repair(candidate.text, proved == len(keys), proved, len(keys)))
    return out


def _concerned(job: Job, wrong: set[Key]) -> dict[int, set[Key]]:
    """The outputs that each finding explains; one that is wrong in the first step already belongs to the same finding in later ones."""
    step = min(k[2] for k in wrong)
    out: dict[int, set[Key]] = {i: set() for i in range(len(job.told.findings))}
    for k in wrong:
        at = job.told.explained.get((*k[:2], step)) if (*k[:2], step) in wrong else None
        out[job.told.explained.get(k, 0) if at is None else at].add(k)
    return out


def _chosen(job: Job, concerned: dict[int, set[Key]], wrong: set[Key]) -> tuple[Edit, dict[int, Candidate]]:
    """For each finding the first candidate that makes its outputs equal, on top of those of the findings before it; or else the most
    likely candidates of all findings together (clipping makes every gradient wrong until the last cause is gone)."""
    maker = Maker(job.told.diagnosis)
    step = min(k[2] for k in wrong)
    edit, chosen, right = Edit(), {}, set()
    likely: dict[int, Candidate] = {}
    for i, cause in enumerate(job.told.causes):
        early = {k for k in concerned[i] if k[2] == step}
        if not early or early <= right or job.told.findings[i].diagnosis == "decision":
            continue                          # an earlier repair mends it too, or other numbers are compared than should be
        for candidate in maker.candidates(cause):
            likely.setdefault(i, candidate)
            both = edit.joined(candidate.edit)
            if both is None or job.trials >= MOST_TRIALS:
                continue
            still = _still_wrong(job, applied(job.parallel, both), wrong, step)
            if not still & early and not _still_wrong(job, applied(job.parallel, both), wrong, 0) & concerned[i]:
                edit, right, chosen[i] = both, wrong - still, candidate
                break
    if not chosen and len(likely) > 1:
        return _together(job, likely, wrong, step)
    return edit, chosen


def _together(job: Job, likely: dict[int, Candidate], wrong: set[Key], step: int) -> tuple[Edit, dict[int, Candidate]]:
    edit: Edit | None = Edit()
    for candidate in likely.values():
        edit = edit and edit.joined(candidate.edit)
    if edit is None or any(_still_wrong(job, applied(job.parallel, edit), wrong, until) for until in (step, 0)):
        return Edit(), {}
    return edit, likely


def _still_wrong(job: Job, program: Program, wrong: set[Key], step: int) -> set[Key]:
    """Which of these outputs (of this step; 0: of all) differ in the field when the edited program is replayed."""
    job.trials += 1
    job.progress("repair", f"candidate {job.trials}")
    watched, symbols = job.analysis.second, job.analysis.symbols
    binder = Binder(symbols, [watched.field])
    try:
        world = replay(_until(program, step) if step else program, [watched.field], job.analysis.table, Hooks(symbol=binder.symbol, bind=binder.bind))
        found = Lineages(watched.comparison.ref_lineage, watched.comparison.lineage)
        comparison = Comparison(symbols, [watched.field], watched.reference, world, found)
        comparison.run()
    except CANNOT_RUN:
        return set(wrong)
    held = {k: comparison.compared[k] for k in wrong if step in (0, k[2])}
    return {k for k, c in held.items() if not c.pieces or c.missing or c.problems or any(p.wrong("field") for p in c.pieces)}


def _until(program: Program, step: int) -> Program:
    """The program up to the end of a step."""
    traces = []
    for t in program.traces:
        end = next((c.index for c in t.ops if c.name == "tv.step" and c.args[0] > step), len(t.ops))
        traces.append(msgspec.structs.replace(t, ops=t.ops[:end]))
    return Program(traces, program.blobs)


def _verdicts(job: Job, edit: Edit) -> dict[Key, str]:
    """The verdicts on the edited program: PROVED, REFUTED, equal (all but the proof), or UNKNOWN."""
    try:
        again = analyse(job.reference, applied(job.parallel, edit), seed=job.seed, accept=job.accept, extra_rows=job.extra_rows, jobs=job.jobs,
                        progress=lambda phase, *a, **k: job.progress("repair", phase))
    except CANNOT_RUN:
        return {}
    return {j.key: "equal" if j.verdict == "UNKNOWN" and not j.code and j.reason.startswith("equal at") else j.verdict for j in again.judgements}
