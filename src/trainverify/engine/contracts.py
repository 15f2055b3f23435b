"""A first proof, by contracts: equal operations are looked up, and what differs is proved once (trusted as `prove` is).

It proves all or nothing: whatever stays open, undecided or undefined is left to the proof that looks at every element (engine/prove.py).
"""
from __future__ import annotations

from collections.abc import Callable

from trainverify.contracts.algebra import Contracts
from trainverify.contracts.theorems import TooMuch
from trainverify.engine.proof import Lineages, Proof, is_proved, replayed
from trainverify.ir.trace import Program
from trainverify.ops.table import OpTable
from trainverify.relate.choices import undecided
from trainverify.relate.compare import Comparison
from trainverify.relate.guess import likely_factors
from trainverify.relate.symbols import Symbols


def prove_by_contracts(reference: Program, parallel: Program, table: OpTable, symbols: Symbols, seed: int,
                       progress: Callable, lineages: Callable[[], Lineages]) -> Proof | None:
    """The proof of all outputs, or None."""
    try:
        return _proved(reference, parallel, table, symbols, seed, progress, lineages)
    except TooMuch:
        return None


def _proved(reference: Program, parallel: Program, table: OpTable, symbols: Symbols, seed: int,
            progress: Callable, lineages: Callable[[], Lineages]) -> Proof | None:
    m = Contracts(seed, [b.first for b in symbols.blocks_in_order], symbols.values, likely_factors(parallel))
    *worlds, vacuity = replayed(reference, parallel, m, table, symbols, progress)
    comparison = Comparison(symbols, [m], *worlds, lineages())
    comparison.run()
    if vacuity.found or any(machine.diagnostics for w in worlds for machine in w.machines) or undecided(*worlds, m) or not all(is_proved(comparison, key) for key in comparison.compared):
        return None
    claims = m.evaluator.claims
    counts = {**claims.counts, "identifiers": m.evaluator.identifiers, "failures": 0, **m.theorems.counts}
    return Proof(frozenset(comparison.compared), {}, [], (), counts, [p.obligation for p in claims.proofs.values()], [], m.evaluator.field.rounding)
