"""The proof: both programs replayed in the kernel's terms, and the reference's outputs compared by identifier.

What is merged, the kernel has proved; an output whose elements have the reference's identifiers is proved (trusted: that the
comparison looks at the right elements; not trusted: which equalities are tried).
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trainverify.algebra.field import Field
from trainverify.algebra.terms import Terms
from trainverify.ir.trace import Program
from trainverify.kernel.claims import Claims
from trainverify.kernel.store import Store
from trainverify.ops.table import OpTable
from trainverify.relate.compare import Comparison, Key
from trainverify.relate.guess import Dictionary, likely_factors
from trainverify.relate.symbols import Binder, Symbols
from trainverify.replay.machine import Hooks
from trainverify.replay.run import World, replay


@dataclass(slots=True)
class Proof:
    """What was proved: per output of the reference the pieces' elements that are (in the order of `comparison`)."""

    terms: Terms
    reference: World
    parallel: World
    comparison: Comparison
    ref_n: int = 0
    ref_o: int = 0

    def proved(self, key: Key) -> bool:
        """Whether all that the ranks hold of an output is proved, and all of it is held."""
        c = self.comparison.compared[key]
        return bool(c.pieces) and not c.missing and not c.problems and all(bool(p.equal["terms"].all()) for p in c.pieces)


def prove_programs(reference: Program, parallel: Program, table: OpTable, symbols: Symbols, first: Comparison, seed: int,
                   progress: Callable) -> Proof:
    """Replay both sides in terms (with a field of another seed); `first`: the comparison in the field, whose lineages are confirmed."""
    claims = Claims(Store(), Dictionary(likely_factors(parallel)))
    terms = Terms(Field(seed), claims, symbols.total)
    worlds = []
    for side, program in (("reference", reference), ("parallel", parallel)):
        terms.begin_side(side)
        ref_n, ref_o = claims.store.n, len(terms.places)
        binder = Binder(symbols, [terms])
        hooks = Hooks(symbol=binder.symbol, bind=binder.bind)
        worlds.append(replay(program, [terms], table, hooks, lambda f, side=side: progress("prove", side, f)))
    comparison = Comparison(symbols, [terms], worlds[0], worlds[1], first)
    comparison.run()
    return Proof(terms, worlds[0], worlds[1], comparison, ref_n, ref_o)
