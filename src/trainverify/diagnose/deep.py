"""Where a deep program's difference arises, looked up by numbers: one replay in float64 of what one wrong output is computed from (not trusted).

A field costs ten times what float64 does, and what is kept of every value too much memory where layers are many. Here a value agrees if the reference
has all of its numbers somewhere, up to rounding; so what is said is the line, and no algebra. Nothing here decides a verdict.
"""
from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from trainverify.diagnose.dataflow import Dataflow, Node
from trainverify.diagnose.explain import ORDER, Explanation
from trainverify.diagnose.findings import Writer
from trainverify.diagnose.origin import Search, rank_origins
from trainverify.diagnose.relation import OTHER, Relations
from trainverify.diagnose.watch import GOOD, OPEN
from trainverify.diagnose.words import names_of
from trainverify.algebra.real import Real
from trainverify.engine.analysis import Analysis
from trainverify.engine.slices import part
from trainverify.engine.verdict import Judgement
from trainverify.ir.trace import Program, TensorRef
from trainverify.relate.symbols import Binder
from trainverify.replay.machine import Hooks
from trainverify.replay.memory import is_float
from trainverify.replay.run import replay

SAME = 1e-11                                  # of a value's largest number: numbers that are equal up to rounding
TRIED = 4                                     # outputs of which the one is taken that is computed from the fewest calls


@dataclass(slots=True)
class Numbers:
    """The reference's numbers, and which results of the parallel program consist of them. What the search asks of a watch that saw a field is here too,
    and empty."""

    status: dict[Node, str] = field(default_factory=dict)
    garbage: set[Node] = field(default_factory=set)
    values: dict = field(default_factory=dict)
    printed: dict = field(default_factory=dict)
    numbers: dict = field(default_factory=dict)
    names: object = None
    _held: list[np.ndarray] = field(default_factory=list)
    _table: np.ndarray | None = None

    def note(self, numbers: np.ndarray) -> None:
        self._held.append(np.unique(numbers[np.isfinite(numbers)]))

    def value(self, machine, m, call, k: int, ref: TensorRef) -> None:
        """Hook: a float result of a call."""
        if not is_float(ref.dtype) or ref.dtype.startswith("complex"):
            return
        numbers = machine.memory[m.name].load(ref).t.reshape(-1).numpy()
        if machine.trace.side == "reference":
            self.note(numbers)
        elif self.status.get((machine.rank, call.index), GOOD) == GOOD:
            self.status[machine.rank, call.index] = GOOD if self._has(numbers) else OPEN

    def _has(self, numbers: np.ndarray) -> bool:
        if self._table is None:
            self._table = np.unique(np.concatenate(self._held))
            self._held.clear()
        if not np.isfinite(numbers).all():
            return False
        room = SAME * np.abs(numbers).max(initial=0.0)
        wanted = np.unique(numbers[np.abs(numbers) > room])
        at = np.minimum(np.searchsorted(self._table, wanted - room), len(self._table) - 1)
        return bool((np.abs(self._table[at] - wanted) <= room).all())


def explain_deep(analysis: Analysis, reference: Program, parallel: Program) -> Explanation:
    """Findings on a program that float64 alone showed to differ."""
    wrong = [j for j in analysis.judgements if j.verdict == "REFUTED"]
    first, programs = _cheapest(wrong, reference, parallel)
    seen = Numbers(names=names_of(parallel))
    real = Real(analysis.symbols.real_values)
    for program in programs:
        binder = Binder(analysis.symbols, [real])
        if program.traces[0].side == "reference":
            seen.note(binder.all["real"].t.numpy())
        replay(program, [real], analysis.table, Hooks(symbol=binder.symbol, bind=binder.bind, value=seen.value))
    flow = Dataflow(parallel)
    search, comparison = Search(flow, seen), analysis.first.comparison
    writer = Writer(flow, search, Relations(real, comparison, seen))
    starts = [(first.key, w.piece.rank, _start(w.piece.recorded), w.piece.recorded.call.index) for w in first.wrong]
    origins = rank_origins(search, [s for s in starts if s[2] is not None])
    finding = writer.at_origin(origins[0], OTHER, wrong) if origins else writer.bare(OTHER, wrong)
    return Explanation([finding], {j.key: 0 for j in wrong}, analysis.diagnostics)


def _start(recorded):
    value = recorded.call.args[3]
    return recorded.ref if recorded.ref is not None else value if hasattr(value, "id") else None


def _cheapest(wrong: list[Judgement], reference: Program, parallel: Program) -> tuple[Judgement, tuple[Program, Program]]:
    """A wrong output of the first step that differs, and what is left of both programs if only that is computed."""
    step = min(j.key[2] for j in wrong)
    early = sorted((j for j in wrong if j.key[2] == step), key=lambda j: (ORDER.get(j.key[0], 9), j.compared.reference.call.index))
    scalars = [j for j in early if j.key[0] == "scalar"][:1]
    others = [j for j in early if j.key[0] == early[0].key[0]] if early[0].key[0] != "scalar" else []
    picked = [others[int(i)] for i in np.unique(np.linspace(0, len(others) - 1, TRIED - 1).astype(int))] if others else []
    best = None
    for j in [*scalars, *picked] or early[:1]:
        ranks = {w.piece.rank: w.piece.recorded.call.index for w in j.wrong}
        of = part(reference, [(0, j.compared.reference.call.index)]), part(parallel, ranks.items())
        size = sum(len(t.ops) for p in of for t in p.traces)
        if best is None or size < best[0]:
            best = size, j, of
    return best[1], best[2]
