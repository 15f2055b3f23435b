"""Replay both programs, compare, and judge: from two captured programs to verdicts per output (the verdict rules are trusted)."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from trainverify.algebra.constants import Rounding
from trainverify.diagnostics import Diagnostic
from trainverify.engine.beside import Beside, Lost
from trainverify.engine.facts import Facts
from trainverify.engine.inputs import elsewhere
from trainverify.engine.contracts import prove_by_contracts
from trainverify.engine.executor import executor
from trainverify.engine.passes import Laps, Pass, Seen, replay_both
from trainverify.engine.proof import Lineages, Proof
from trainverify.engine.prove import Prover, prove_programs
from trainverify.engine.slices import part
from trainverify.engine.verdict import BLOCKING, Judgement, agrees, at_other_inputs, judge, judge_by_numbers
from trainverify.ir.trace import Program
from trainverify.ops.standard import standard_table
from trainverify.ops.table import OpTable
from trainverify.relate.compare import Comparison
from trainverify.relate.coverage import Coverage
from trainverify.relate.decisions import idle_accepts, match_decisions
from trainverify.relate.symbols import Symbols
from trainverify.report.model import Phase


DEEP = 20_000                                 # calls; smaller programs repeat too little for contracts to pay
DEEPER = 100_000                              # calls; of larger programs a field is not asked what float64 shows at once
WORTH_A_PROCESS = 1000                        # calls; a smaller proof takes less time than to start one


@dataclass(slots=True)
class Analysis:
    """What was found. first: in the field and float64, or in float64 alone where every output was proved without a field."""

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

    @property
    def rounding(self) -> list[Rounding]:
        """Constants of the parallel side that were taken for the reference's."""
        return self.proof.rounding if self.first.field is None else self.first.field.rounding

    @property
    def evidence(self) -> str:
        if self.first.field is None:
            return "proved without a field" if self.proof.proved else "in float64"
        return f"equal at {2 if self.second is None else 4} field points, error <= 2^-{self.first.field.error_bits}"


def is_deep(reference: Program, parallel: Program) -> bool:
    """Whether contracts are tried first, and nothing is replayed in a field if they prove all."""
    return _calls(reference, parallel) > DEEP


def _calls(reference: Program, parallel: Program) -> int:
    return sum(len(t.ops) for p in (reference, parallel) for t in p.traces)


def analyse(reference: Program, parallel: Program, *, seed: int = 0, accept: tuple[str, ...] = (), extra_rows=(), jobs: int = 1, ray: str = "",
            progress: Callable = lambda *a, **k: None, watch=None, proofs: bool = True, in_field: bool = False) -> Analysis:
    """Replay, compare, prove and judge. A difference in the field is confirmed by a second seed before it counts; `watch` (for
    diagnosis) sees the values of that second pass. With two jobs or more the proof is made in a process of its own, beside all that, and theorems in
    further ones (ray: in a cluster with this address); of a program that differs, only what comes before the last output that does not is looked at.
    Without proofs nothing is PROVED. A program of many calls that
    contracts prove is not replayed in the field, but where that is asked for (in_field)."""
    laps, table, symbols = Laps(), standard_table(extra_rows), Symbols(reference)
    lost: list[Diagnostic] = []
    if proofs and is_deep(reference, parallel) and not in_field:
        outright = _outright(reference, parallel, table, symbols, seed, accept, (jobs, ray), laps, progress, lost)
        if outright is not None:
            return outright

    def prove(told: Callable[[], Lineages], report: Callable) -> Proof:
        return prove_programs(reference, parallel, table, symbols, 2 * seed + 3, accept, report, told) if proofs else Proof()

    def prover() -> Prover | None:
        return Prover(reference, parallel, table, symbols, 2 * seed + 3, progress) if proofs else None
    beside = Beside(prove) if proofs and jobs > 1 and _calls(reference, parallel) > WORTH_A_PROCESS else None
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
    found.diagnostics += lost
    return found


def _analyse(reference: Program, parallel: Program, table: OpTable, symbols: Symbols, seed: int, accept: tuple[str, ...], laps: Laps,
             progress: Callable, watch, prove: Callable, beside: Beside | None, prover: Callable) -> Analysis:
    seen = Seen(reference, table)
    first = replay_both(reference, parallel, table, symbols, 2 * seed + 1, progress, seen)
    laps.end("replay", first.calls)
    second = None
    if any(p.wrong("field") or p.undefined() for c in first.comparison.compared.values() for p in c.pieces):
        second = replay_both(reference, parallel, table, symbols, 2 * seed + 2, progress, watch=watch)
        laps.end("second seed")
        if beside is not None:
            beside.close()
    diagnostics = seen.diagnostics(first)
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
    return Analysis(table, symbols, first, second, proof, judgements, diagnostics, seen.facts, seen.coverage, reference.traces[0].steps, accepted, held, laps.phases)


def _outright(reference: Program, parallel: Program, table: OpTable, symbols: Symbols, seed: int, accept: tuple[str, ...], where: tuple[int, str],
              laps: Laps, progress: Callable, lost: list[Diagnostic]) -> Analysis | None:
    """All outputs proved by contracts, beside a replay in float64, or some refuted by that of very many calls; None: something is not, or float64 or a
    diagnostic says otherwise. where: processes, and the address of a cluster; lost: gets what the other proof's report should say of this one."""
    def prove(told: Callable[[], Lineages], report: Callable) -> Proof | None:
        with executor(*where) as theorems:
            return prove_by_contracts(reference, parallel, table, symbols, 2 * seed + 3, report, told, theorems)
    beside = Beside(prove) if where[0] > 1 else None
    try:
        seen = Seen(reference, table)
        first = replay_both(reference, parallel, table, symbols, None, progress, seen)
        laps.end("replay", first.calls)
        compared, diagnostics = first.comparison.compared, seen.diagnostics(first)
        if any(d.code in BLOCKING for d in diagnostics):
            return None
        if not all(c.pieces and all(map(agrees, c.pieces)) for c in compared.values()):
            found = judge_by_numbers(first) if sum(m.ops for w in (first.reference, first.parallel) for m in w.machines) > DEEPER else []
            return Analysis(table, symbols, first, None, Proof(), found, diagnostics, seen.facts, seen.coverage, reference.traces[0].steps, phases=laps.phases) if found else None
        proof = _told(first, prove, beside, progress)
    finally:
        if beside is not None:
            beside.close()
    laps.end("prove", _work(proof) if proof else "not by contracts")
    lost += [d for d in proof.diagnostics if d.code == "PROVE002"] if proof is not None else ()
    if proof is None or not proof.proved.issuperset(compared):
        return None
    diagnostics += [*idle_accepts(accept, ()), *lost]
    judgements = [Judgement(c, "PROVED") for c in compared.values()]
    return Analysis(table, symbols, first, None, proof, judgements, diagnostics, seen.facts, seen.coverage, reference.traces[0].steps, phases=laps.phases)


def _told(first: Pass, prove: Callable, beside: Beside | None, progress: Callable) -> Proof | None:
    """What a prover, beside or here, answers when it is told the lineages."""
    lineages = Lineages(first.comparison.ref_lineage, first.comparison.lineage)
    if beside is None:
        return prove(lambda: lineages, progress)
    progress("prove")
    try:
        return beside.answer(lineages, progress)
    except Lost:
        again = Beside(prove)
    try:
        return again.answer(lineages, progress)
    except Lost as lost:
        return Proof(diagnostics=[Diagnostic("PROVE001", f"the process that proves was lost twice ({lost}): nothing is proved", "warning",
                                             fix="if memory ran out, verify with --jobs 1, fewer steps or smaller sizes")])


def _proof(first: Pass, diagnostics: list[Diagnostic], prove: Callable, beside: Beside | None, progress: Callable) -> Proof:
    """What is proved; nothing is tried where a diagnostic withholds every verdict."""
    if any(d.code in BLOCKING for d in diagnostics):
        return Proof()
    return _told(first, prove, beside, progress)


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
    return held.prove(part(parallel, outputs), accept, progress, lambda: lineages, patient=False), held


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
    laps, table, symbols = Laps(), standard_table(extra_rows), Symbols(reference)
    seen = Seen(reference, table)
    done = replay_both(reference, parallel, table, symbols, None, progress, seen)
    laps.end("replay", done.calls)
    return Survey(symbols, done.comparison, seen.diagnostics(done), seen.facts, seen.coverage, laps.phases)
