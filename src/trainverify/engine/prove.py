"""The proof: both programs replayed in the kernel's terms, and the reference's outputs compared by identifier.

What is merged, the kernel has proved; an output whose elements have the reference's identifiers is proved. Trusted: that the
comparison looks at the right elements, that every decision follows from the reference's, and that the reference is defined at the
recorded inputs (else the theorem would say nothing). Not trusted: which equalities are tried.
"""
from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable

import numpy as np

from trainverify.algebra.field import Field
from trainverify.algebra.terms import Terms
from trainverify.diagnostics import Diagnostic
from trainverify.engine.proof import Lineages, Proof, Vacuity, is_proved, replayed_side
from trainverify.ir.trace import Program
from trainverify.kernel.claims import Claims
from trainverify.kernel.store import GARBAGE, Store
from trainverify.ops.table import OpTable
from trainverify.relate.choices import undecided
from trainverify.relate.compare import Comparison, Key
from trainverify.relate.decisions import is_accepted, words_of
from trainverify.relate.guess import Dictionary, likely_factors
from trainverify.relate.symbols import Symbols
from trainverify.replay.run import World


def prove_programs(reference: Program, parallel: Program, table: OpTable, symbols: Symbols, seed: int, accept: tuple[str, ...],
                   progress: Callable, lineages: Callable[[], Lineages]) -> Proof:
    """Replay both sides in terms, with a field of this seed; `lineages` is asked when both are done."""
    return Prover(reference, parallel, table, symbols, seed, progress).prove(parallel, accept, progress, lineages)


class Prover:
    """The reference in terms, and parallel programs that are proved to equal it, one after the other: what was proved of one holds for all."""

    def __init__(self, reference: Program, like: Program, table: OpTable, symbols: Symbols, seed: int, progress: Callable):
        """like: a parallel program, for the factors that are tried."""
        self.table, self.symbols = table, symbols
        store = Store()
        self.claims = Claims(store, Dictionary(store, likely_factors(like)))
        self.terms = Terms(Field(seed), self.claims, symbols.total)
        self.vacuity = Vacuity()
        self.places = Places(self.terms, reference)
        self.reference = replayed_side("reference", reference, self.terms, table, symbols, progress, self.vacuity)

    def prove(self, parallel: Program, accept: tuple[str, ...], progress: Callable, lineages: Callable[[], Lineages], patient: bool = True) -> Proof:
        """What is proved of this program; counts, obligations and failures are those of all programs so far. patient: whether claims that fail
        may cost as much as they may in a program of which all should be proved."""
        claims, terms, places = self.claims, self.terms, self.places
        places.begin(parallel)
        claims.begin_program(patient)
        world = replayed_side("parallel", parallel, terms, self.table, self.symbols, progress, self.vacuity)
        comparison = Comparison(self.symbols, [terms], self.reference, world, lineages())
        comparison.run()
        unmatched, accepted = _undecided(self.reference, world, terms, accept)
        diagnostics = [*self.vacuity.found, *unmatched]
        proved = frozenset(key for key in comparison.compared if is_proved(comparison, key))
        reasons = {key: places.reason(comparison, key) for key in comparison.compared if key not in proved}
        counts = {**claims.counts, "identifiers": claims.store.n, "failures": len(claims.failures)}
        failures = [(f.obligation, places.words(f.origin), f.reason) for f in claims.failures if f.obligation is not None]
        return Proof(frozenset() if diagnostics else proved, reasons, diagnostics, accepted, counts, [p.obligation for p in claims.proofs.values()], failures)


def _undecided(reference: World, parallel: World, terms: Terms, accept: tuple[str, ...]) -> tuple[list[Diagnostic], tuple[str, ...]]:
    """A diagnostic for each place of decisions that do not follow from the reference's, and the places of those that are accepted."""
    machines = {m.rank: m for m in parallel.machines}
    places: dict[tuple[str, str], tuple[set[int], object]] = {}
    accepted: dict[str, None] = {}
    for rank, d in undecided(reference, parallel, terms):
        span = machines[rank].span(d.call)
        place = f"{span.file}:{span.line}" if span else ""
        if is_accepted(place, accept):
            accepted[place] = None
        else:
            places.setdefault((d.kind, place), (set(), span))[0].add(rank)
    return [Diagnostic("REL017", f"a {words_of(kind)} is not proved to follow from the reference's decisions", "warning", span, tuple(sorted(ranks)),
                       fix=f"make both sides decide by the same values, or accept it: --accept {place}")
            for (kind, place), (ranks, span) in places.items()], tuple(accepted)


class Places:
    """Says where a proof stops."""

    def __init__(self, terms: Terms, reference: Program):
        self._terms, self._starts, self._programs = terms, [0], [reference]

    def begin(self, program: Program) -> None:
        """What comes from here on is of this program."""
        self._starts.append(len(self._terms.places))
        self._programs.append(program)

    def reason(self, comparison: Comparison, key: Key) -> str:
        for piece in comparison.compared[key].pieces:
            open_ = np.flatnonzero(~piece.equal["terms"].numpy())
            if open_.size:
                return self._stop(int(self._terms.ids(piece.parallel["terms"]).reshape(-1)[open_[0]]))
        return "no rank has all of it"

    def _stop(self, i: int) -> str:
        """The oldest operation below an identifier that is not known to be the reference's."""
        store = self._terms.nodes
        if i == GARBAGE:
            return "its value has no meaning"
        seen = {i}
        while True:
            code = int(store.code[i])
            below = store.operands(code, store.definition(np.array([i]), code))[0] if code else np.zeros(0, np.int64)
            below = below[store.is_open[below]]
            below = below[[store.ops[store.code[j]][0][0] != "max" for j in below.tolist()]]     # open on purpose
            if not below.size or int(below.min()) in seen:
                break
            i = int(below.min())
            seen.add(i)
        if not store.is_open[i]:
            return "it is another value of the reference's"
        return f"no proof that {self.words(int(store.origin[i]))} is the reference's"

    def words(self, origin: int) -> str:
        """The call that made an identifier."""
        rank, index, span = self._terms.places[origin]
        if rank < 0:
            return "the start"
        k = bisect_right(self._starts, origin) - 1
        trace = self._programs[k].traces[rank]
        name = trace.ops[bisect_left(trace.ops, index, key=lambda call: call.index)].name
        where = f" ({trace.spans[span]})" if 0 <= span < len(trace.spans) else ""
        return f"{name} on rank {rank}{where}" if k else f"{name} of the reference{where}"
