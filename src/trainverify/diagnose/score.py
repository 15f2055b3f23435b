"""How many planted bugs a whole verification finds, proofs and all: the check of the checker (not trusted, and no part of a verdict).

Of a mutant whose output is changed, as the oracle says, that output must be REFUTED or UNKNOWN. One that is PROVED, or that the kernel alone would
have proved (the comparison in the field stands before it), shows that a trusted part is wrong.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from trainverify.diagnose.edit import applied
from trainverify.diagnose.mutate import Mutation, Mutator
from trainverify.diagnose.oracle import Oracle
from trainverify.diagnose.repair import CANNOT_RUN
from trainverify.engine.analysis import analyse
from trainverify.engine.proof import Lineages
from trainverify.engine.prove import Prover
from trainverify.engine.verdict import BLOCKING
from trainverify.ir.check import problems
from trainverify.ir.trace import Program
from trainverify.relate.compare import Comparison, Key


@dataclass(frozen=True, slots=True)
class Scored:
    """One mutant. result: invalid (it cannot run), same (no output changes), REFUTED, UNKNOWN or PROVED (the best of any that changed).

    verdict: of the whole program; wrongly: outputs that are changed and PROVED, or proved by the kernel though another part objects.
    """

    mutation: Mutation
    result: str
    verdict: str = ""
    changed: int = 0
    wrongly: tuple[Key, ...] = ()


class NotEqual(ValueError):
    """The program that bugs were to be planted in is not equal to its reference in the first place."""


def scored(reference: Program, parallel: Program, seed: int, most: int, kinds: tuple[str, ...] = (), extra_rows: tuple = (), kernel: bool = True,
           begin: Callable[[Mutation], None] = lambda m: None) -> Iterator[Scored]:
    """Plant bugs in a program that equals its reference, and verify each mutant. kernel: prove also where every changed output differs in the
    field already, so that the kernel is tried alone; else a proof is made only where it could decide."""
    base = analyse(reference, parallel, extra_rows=extra_rows)
    unequal = [j.key for j in base.judgements if j.verdict != "PROVED" and not j.reason.startswith("equal at")]
    if unequal or not base.judgements:
        raise NotEqual(f"{len(unequal)} outputs are not equal, such as {unequal[:1]}")
    oracle = Oracle(reference, parallel, base, seed)
    prover = Prover(reference, parallel, base.table, base.symbols, 2 * seed + 3, _quiet)
    for mutation in Mutator(parallel).mutations(seed, most, kinds):
        begin(mutation)
        yield _scored(reference, parallel, mutation, oracle, extra_rows, prover, kernel)


def _scored(reference: Program, parallel: Program, mutation: Mutation, oracle: Oracle, extra_rows: tuple, prover: Prover, kernel: bool) -> Scored:
    edited = applied(parallel, mutation.edit)
    if problems(edited):
        return Scored(mutation, "invalid")
    try:
        changed = oracle.changed(edited)
        found = analyse(reference, edited, extra_rows=extra_rows, proofs=False)
        equal = {j.key for j in found.judgements if j.reason.startswith("equal at")}
        blocked = any(d.code in BLOCKING for d in found.diagnostics)
        proved = _proved(prover, edited, found.first.comparison) if not blocked and (kernel or changed & equal) else frozenset()
    except CANNOT_RUN:
        return Scored(mutation, "invalid")
    verdicts = {j.key: "PROVED" if j.key in equal & proved else j.verdict for j in found.judgements}
    overall = next((v for v in ("REFUTED", "UNKNOWN") if v in verdicts.values()), "PROVED")
    if not changed:
        return Scored(mutation, "same", overall)
    wrongly = tuple(sorted(changed & proved))
    return Scored(mutation, "PROVED" if wrongly else "REFUTED" if overall == "REFUTED" else "UNKNOWN", overall, len(changed), wrongly)


def _proved(prover: Prover, edited: Program, comparison: Comparison) -> frozenset[Key]:
    """What the kernel alone proves of a mutant, whatever the field says of it; the store is that of all mutants before it."""
    return prover.prove(edited, (), _quiet, lambda: Lineages(comparison.ref_lineage, comparison.lineage)).proved


def _quiet(*args, **kwargs) -> None:
    """Progress that nobody watches."""
