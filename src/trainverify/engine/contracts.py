"""A first proof, by contracts: equal operations are looked up, and what differs is proved once (trusted as `prove` is).

It proves all or nothing: whatever stays open, undecided or undefined is left to the proof that looks at every element (engine/prove.py).
"""
from __future__ import annotations

from collections.abc import Callable
from functools import cache

from trainverify.contracts.algebra import Contracts
from trainverify.contracts.docket import Again, Docket, Executor, Here, TooMuch
from trainverify.diagnostics import Diagnostic
from trainverify.engine.proof import Lineages, Proof, is_proved, replayed
from trainverify.ir.trace import Program
from trainverify.ops.table import OpTable
from trainverify.relate.choices import undecided
from trainverify.relate.compare import Comparison
from trainverify.relate.guess import likely_factors
from trainverify.relate.symbols import Symbols


def prove_by_contracts(reference: Program, parallel: Program, table: OpTable, symbols: Symbols, seed: int,
                       progress: Callable, lineages: Callable[[], Lineages], executor: Executor | None = None) -> Proof | None:
    """The proof of all outputs, or None. executor: who proves theorems (default: this process), which changes nothing in what is found."""
    docket, lineages = Docket(executor or Here()), cache(lineages)        # who is asked answers once
    while True:
        docket.begin()
        try:
            proof = _discharged(reference, parallel, table, symbols, seed, progress, lineages, docket)
        except Again:
            continue
        except TooMuch:
            proof = None
        return _with_what_was_lost(proof, docket)


def _with_what_was_lost(proof: Proof | None, docket: Docket) -> Proof | None:
    if not docket.lost:
        return proof
    proof = proof or Proof()
    proof.diagnostics.append(Diagnostic("PROVE002", f"theorems of this program were tried twice and have no proof: {'; '.join(docket.lost)}", "warning",
                                        fix="give the proof more memory, fewer --jobs at a time, or smaller sizes"))
    return proof


def _discharged(reference: Program, parallel: Program, table: OpTable, symbols: Symbols, seed: int,
                progress: Callable, lineages: Callable[[], Lineages], docket: Docket) -> Proof | None:
    """What one replay finds, once all that it assumed is proved."""
    try:
        proof = _proved(reference, parallel, table, symbols, seed, progress, lineages, docket)
    except (Again, TooMuch):
        raise
    except Exception:
        docket.close()                        # what was assumed may have led there
        raise
    docket.close()
    if proof is not None:
        counts, proof.obligations = docket.totals()
        proof.counts.update(counts)
    return proof


def _proved(reference: Program, parallel: Program, table: OpTable, symbols: Symbols, seed: int,
            progress: Callable, lineages: Callable[[], Lineages], docket: Docket) -> Proof | None:
    m = Contracts(seed, [b.first for b in symbols.blocks_in_order], symbols.values, likely_factors(parallel), docket)
    *worlds, vacuity = replayed(reference, parallel, m, table, symbols, progress)
    comparison = Comparison(symbols, [m], *worlds, lineages())
    comparison.run()
    if vacuity.found or any(machine.diagnostics for w in worlds for machine in w.machines) or undecided(*worlds, m) or not all(is_proved(comparison, key) for key in comparison.compared):
        return None
    counts = {"failures": 0, "evaluated": docket.evaluated, **m.theorems.counts}
    return Proof(frozenset(comparison.compared), {}, [], (), counts, [], [], m.evaluator.field.rounding)
