"""A counterexample that a person can follow: few nonzero inputs, small integers, and both sides' values up to the first difference (not trusted).

Everything shown comes from a replay in float64 of both programs, up to the end of the step of one wrong output. Inputs are made simpler only
while that output still differs, the named operation's result does, and every decision falls as it was recorded.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from trainverify.diagnose.dataflow import Node
from trainverify.diagnose.expected import Expectations, Expected, chosen, differ, value, where
from trainverify.diagnose.explain import ORDER, Cause, Diagnosis, Explanation
from trainverify.diagnose.minimise import Minimiser
from trainverify.diagnose.trial import Outcome, Place, Trials, result_of, same_decisions
from trainverify.diagnose.words import at_text, number_text
from trainverify.engine.verdict import Judgement
from trainverify.ir.trace import Program
from trainverify.relate.compare import Key, Piece
from trainverify.replay.errors import ReplayError
from trainverify.report.model import Counterexample, Finding, Step

MOST_TRIALS, FEWEST_TRIALS = 150, 8
MOST_WORK = 300_000                           # calls of all trials together, a thousand elements counting as one
LEAST, CLEAR = 1e-9, 0.1                      # a relative difference that counts at all; the part of the recorded difference that is to remain
MOST_STEPS, MOST_VALUES, MOST_INPUTS = 4, 4, 24
SLICE_LACKS = (ReplayError, RuntimeError, KeyError, ValueError)   # what a call that was left out and is needed makes of a replay
MOST_TARGETS, MOST_PATHS = 24, 8


@dataclass(slots=True)
class Found:
    """A counterexample with what a script needs to reproduce it: the first trial on its inputs, and the wrong operation on each rank
    with what the reference has in its place."""

    told: Counterexample
    finding: Finding
    key: Key
    outcome: Outcome
    values: torch.Tensor
    nodes: list[Node]
    expected: dict[int, Expected]             # by rank; empty where the reference has nothing to compare with
    expectations: Expectations
    pieces: list[Piece]


def counterexample(analysis, explanation: Explanation, reference: Program, parallel: Program, progress: Callable = lambda *a: None) -> Found | str:
    """Of the first finding; a sentence where there is none to give."""
    wrong = [j for j in analysis.judgements if j.verdict == "REFUTED" and explanation.explained.get(j.key, 0) == 0]
    if not wrong or not explanation.causes or explanation.diagnosis is None:
        return "no output is refuted"
    if any(d.code == "REL007" for d in analysis.diagnostics):
        return "what was read before its wait is arbitrary: no inputs decide it"
    cause = explanation.causes[0]
    target, nodes = _target(wrong, cause, explanation.diagnosis)
    return Search(analysis, explanation, target, nodes, reference, parallel, progress).found()


def _target(wrong: list[Judgement], cause: Cause, diagnosis: Diagnosis) -> tuple[Judgement, list[Node]]:
    """The wrong output to show, with the finding's calls in the order in which they are to be shown: of those that the finding rests on the
    one whose difference arises first, and that first."""
    by_key = {j.key: j for j in wrong if j.key in cause.keys}
    found: dict[Key, list[Node]] = {}
    for key, rank, ref, before in diagnosis.starts():
        if key in by_key and len(found) < MOST_TARGETS:
            its = diagnosis.search.origins(rank, ref, before) & set(cause.nodes)
            found[key] = sorted({*found.get(key, ()), *its}, key=lambda n: n[::-1])
    key = min(found, key=lambda k: (found[k][0][1] if found[k] else 1 << 60, ORDER.get(k[0], 9), sum(len(p.at) for p in by_key[k].compared.pieces)), default=None)
    if key is None:
        return min(wrong, key=lambda j: (j.key[2], ORDER.get(j.key[0], 9))), list(cause.nodes)
    return by_key[key], list(dict.fromkeys([*found[key], *cause.nodes]))


class Search:
    """The work on one finding and one output."""

    def __init__(self, analysis, explanation: Explanation, target: Judgement, nodes: list[Node], reference: Program, parallel: Program, progress: Callable):
        self.target, self.finding, self.progress = target, explanation.findings[0], progress
        self.search = explanation.diagnosis.search
        self.watch, self.flow = self.search.watch, self.search.flow
        self.symbols = analysis.symbols
        self.trials = Trials(reference, parallel, analysis.table, analysis.symbols, analysis.first.comparison, target.key)
        self.ranks = sorted({w.piece.rank for w in target.wrong})
        groups = [g for g in self.watch.names.groups if len(g) > 1]
        self.expectations = Expectations(self.search, analysis.second.field, self.trials.programs["reference"], groups)
        self.nodes = self._nodes(nodes, [t.rank for t in parallel.traces])
        self.expected: dict[int, Expected] = {}
        self.paths = {n: self._path(n) for n in self.nodes[:MOST_PATHS]}
        self.base: Outcome | None = None
        self.clear = [0.0, 0.0]               # differences that have to remain: of the output, of the operation

    def _nodes(self, nodes: list[Node], ranks: list[int]) -> list[Node]:
        """The first call where the difference arises, on each rank where it does, within the steps that are replayed."""
        its = [n for n in nodes if self._is_replayed(n)]
        if not its:
            return []
        found = {its[0][0]: its[0]}
        for rank in ranks:
            twin = self.flow.twin(its[0], rank)
            if twin is not None and twin in nodes:
                found.setdefault(rank, twin)
        return [found[r] for r in sorted(found)]

    def _is_replayed(self, node: Node) -> bool:
        calls = self.trials.programs["parallel"].traces
        return any(t.rank == node[0] and node[1] < len(t.ops) for t in calls)

    def found(self) -> Found | str:
        candidates = {n: self.expectations.candidates(n) for n in self.nodes}
        members = [m for n in self.nodes if self.flow.call(n).collective is not None and self.flow.call(n).collective.kind not in ("send", "recv")
                   for m in self.flow.members(n)]
        above = [step for path in self.paths.values() for step in path]
        wanted = {("parallel", *n) for n in (*self.nodes, *members, *(n for n, _ in above))}
        wanted |= {e.place for e in (*(e for es in candidates.values() for e in es), *(e for _, e in above)) if e.place is not None}
        self.wanted: set[Place] = wanted
        recorded = torch.from_numpy(self.symbols.values).clone() if self.target.inputs is None else self.target.inputs
        try:
            self.base = self._first(recorded)
        except ReplayError as e:
            return f"the programs cannot be replayed on other inputs: {e}"
        self.expected = {n[0]: e for n, es in candidates.items() if (e := chosen(self.search, n, es, self.base, recorded)) is not None}
        if not self._differs(self.base, recorded):
            return "the output is equal in a replay in which masks follow the inputs"
        return self._told(*self._minimised(recorded))

    def _first(self, recorded: torch.Tensor) -> Outcome:
        """The recorded inputs replayed: only what the output depends on, if that gives what the whole gave."""
        whole = self.trials.programs
        self.trials.narrow(self.wanted)
        try:
            outcome = self.trials.run(recorded, self.wanted)
            if self._is_recorded(outcome):
                return outcome
        except SLICE_LACKS:
            pass                              # something that memory holds: the whole has it
        self.trials.programs = whole
        return self.trials.run(recorded, self.wanted)

    def _is_recorded(self, outcome: Outcome) -> bool:
        old = [p for p in self.target.compared.pieces if p.rank in self.ranks]
        new = self._pieces(outcome)
        return len(old) == len(new) and all(
            torch.allclose(getattr(a, side)["real"].t, getattr(b, side)["trial"].t, rtol=1e-9, atol=1e-15, equal_nan=True)
            for a, b in zip(old, new) for side in ("reference", "parallel"))

    def _minimised(self, recorded: torch.Tensor) -> tuple[torch.Tensor, int, str]:
        """(inputs, trials, why the recorded ones were kept)."""
        allowed = min(MOST_TRIALS, MOST_WORK // (self.base.calls + self.base.elements // 1000 + 1))
        if self.base.faults:
            return recorded, 1, "an operation has no known meaning: the recorded inputs were kept"
        if allowed < FEWEST_TRIALS:
            return recorded, 1, "the run is too large to be replayed many times: the recorded inputs were kept"
        self.clear = [CLEAR * g for g in self._gaps(self.base, recorded)]
        blocks = [(b.first, b.n) for b in self.symbols.blocks_in_order]
        work = Minimiser(recorded, blocks, lambda v: self._shows(v, work, allowed), allowed)
        values = work.run()
        kept = "" if not torch.equal(values, recorded) else "no simpler inputs show it with the decisions of the recorded run"
        return values, work.tried + 1, kept

    def _shows(self, values: torch.Tensor, work: Minimiser, allowed: int) -> bool:
        self.progress("counterexample", "", work.tried / allowed)
        try:
            new = self.trials.run(values, self.wanted)
        except (ReplayError, RuntimeError):   # torch refuses, say, to invert a singular matrix
            return False
        return same_decisions(self.base, new) and self._differs(new, values) and all(g >= c for g, c in zip(self._gaps(new, values), self.clear))

    def _no_number(self, outcome: Outcome) -> bool:
        return any(bool(p.parallel["trial"].t.isnan().any()) for p in self._pieces(outcome))

    def _pieces(self, outcome: Outcome) -> list[Piece]:
        return [p for p in outcome.compared.pieces if p.rank in self.ranks] if outcome.compared is not None else []

    def _differs(self, outcome: Outcome, values: torch.Tensor) -> bool:
        """Whether the output still differs on a rank where it did, and the named operation's result on a rank."""
        pieces = self._pieces(outcome)
        if not any(differ(p.reference["trial"].t.reshape(-1), p.parallel["trial"].t.reshape(-1), LEAST) for p in pieces):
            return False
        if not self._no_number(self.base) and not all(bool(p.parallel["trial"].t.isfinite().all()) for p in pieces):
            return False
        its = self._results(outcome, values)
        return not its or any(differ(theirs, ours, LEAST) for theirs, ours in its)

    def _results(self, outcome: Outcome, values: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The named operation's results with what the reference has in their place, where it has something."""
        its = [(value(e, outcome, values), result_of(outcome, "parallel", n)) for n in self.nodes if (e := self.expected.get(n[0])) is not None]
        return [(a, b.reshape(-1)) for a, b in its if a is not None and b is not None]

    def _gaps(self, outcome: Outcome, values: torch.Tensor) -> tuple[float, float]:
        """The largest differences of the output and of the operation's results, 0 for one that is no number."""
        pairs = [(p.reference["trial"].t.reshape(-1), p.parallel["trial"].t.reshape(-1)) for p in self._pieces(outcome)]
        return _gap(pairs), _gap(self._results(outcome, values))

    # ---- telling
    def _path(self, node: Node | None) -> list[tuple[Node, Expected]]:
        """Calls above a wrong one whose results the reference has, the earliest first."""
        out: list[tuple[Node, Expected]] = []
        while node is not None and len(out) < MOST_STEPS:
            above = [(p, e) for p in map(self.flow.delivered, self.flow.producers(node)) if self._is_replayed(p) and p not in self.watch.constant["parallel"]
                     and (e := self.expectations.result(p)) is not None and e.home.call >= 0]
            node = above[0][0] if above else None
            out += above[:1]
        return out[::-1]

    def _clearest(self, outcome: Outcome, values: torch.Tensor) -> list[tuple[Node, Expected]]:
        """The path above the call whose result is wrong by most."""
        def gap(node: Node) -> float:
            e, ours = self.expected.get(node[0]), result_of(outcome, "parallel", node)
            theirs = None if e is None else value(e, outcome, values)
            return 0.0 if theirs is None or ours is None else _gap([(theirs, ours.reshape(-1))])
        return self.paths[max(self.paths, key=gap)] if self.paths else []

    def _told(self, values: torch.Tensor, trials: int, note: str) -> Found:
        outcome = self.trials.run(values, self.wanted)
        steps = [s for n, e in self._clearest(outcome, values) if (s := self._step([n], {n[0]: e}, outcome, values)) is not None]
        steps += [s for s in [self._step(self.nodes, self.expected, outcome, values)] if s is not None]
        steps.append(self._output(outcome))
        at = torch.nonzero(values).reshape(-1)
        told = Counterexample(tuple((self._name(int(i)), number_text(float(values[i]))) for i in at[:MOST_INPUTS]), len(at), len(values), trials, not note, note, tuple(steps))
        return Found(told, self.finding, self.target.key, outcome, values, self.nodes, self.expected, self.expectations, self._pieces(outcome))

    def _name(self, symbol: int) -> str:
        return symbol_name(self.symbols, symbol)

    def _step(self, nodes: list[Node], expected: dict[int, Expected], outcome: Outcome, values: torch.Tensor) -> Step | None:
        ours = {n[0]: v.reshape(-1) for n in nodes if (v := result_of(outcome, "parallel", n)) is not None}
        if not ours:
            return None
        shape = next(v.shape for n in nodes if (v := result_of(outcome, "parallel", n)) is not None)
        theirs = {r: v for r in ours if r in expected and (v := value(expected[r], outcome, values)) is not None and len(v) == len(ours[r])}
        home = next((expected[r].home for r in theirs), None)
        call = self.flow.call(nodes[0])
        there = "" if home is None or home.call < 0 else self._reference_place(home.call)
        return _shown(call.name if call.collective is None else call.collective.kind, _place(self.flow.span(nodes[0])), there, shape, theirs, ours)

    def _reference_place(self, index: int) -> str:
        return _place(self.expectations.reference.span((self.expectations.rank, index)))

    def _output(self, outcome: Outcome) -> Step:
        pieces = self._pieces(outcome)
        ours = {p.rank: p.parallel["trial"].t.reshape(-1) for p in pieces}
        theirs = {p.rank: p.reference["trial"].t.reshape(-1) for p in pieces}
        shape = pieces[0].recorded.ref.size if pieces[0].recorded.ref is not None and pieces[0].recorded.ref.numel == len(ours[pieces[0].rank]) else (len(ours[pieces[0].rank]),)
        return _shown(output_text(self.target.key), "", "", shape, theirs, ours)


def _gap(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    gaps = [(a - b).abs() for a, b in pairs if len(a)]
    return max((float(torch.where(g.isfinite(), g, 0.0).max()) for g in gaps), default=0.0)


def output_text(key: Key) -> str:
    kind, name, step = key
    return f"{name}{'.grad' if kind == 'gradient' else ''}, step {step}".replace("::", ".")


def symbol_name(symbols, number_: int) -> str:
    block = symbols.blocks_in_order[int(symbols.owner(number_))]
    at = torch.unravel_index(torch.tensor(number_ - block.first), block.shape)
    return block.name + (at_text(at) if block.shape else "")


def _place(span) -> str:
    return "" if span is None or not span.file else f"{span}" + (" (backward)" if span.phase == "backward" else "")


def _shown(what: str, place: str, there: str, shape, theirs: dict[int, torch.Tensor], ours: dict[int, torch.Tensor]) -> Step:
    """The elements that tell most: where the sides differ, then what is not zero."""
    n = min(len(v) for v in ours.values())
    weight = torch.zeros(n, dtype=torch.float64)
    for rank, v in ours.items():
        weight += (v[:n] != 0).double()
        if rank in theirs:
            weight += 4 * where(theirs[rank][:n], v[:n], LEAST).double() + (theirs[rank][:n] != 0).double()
    at = weight.argsort(stable=True, descending=True)[:MOST_VALUES].sort().values
    told = lambda v: tuple(number_text(float(x)) for x in v[at])  # noqa: E731
    names = tuple(at_text(torch.unravel_index(i, tuple(shape))) if len(shape) else "" for i in at)
    same = bool(theirs) and all(r in theirs and not differ(theirs[r], v, LEAST) for r, v in ours.items())
    return Step(what, place, there, names, tuple((r, told(v)) for r, v in theirs.items()), tuple((r, told(v)) for r, v in ours.items()), same)
