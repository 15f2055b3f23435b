"""From wrong outputs to findings: each names the operation where a difference arises, says what it is in algebra, and which outputs it
explains. Nothing here decides a verdict."""
from __future__ import annotations

from dataclasses import dataclass, replace

import msgspec

from trainverify.diagnose import decisions
from trainverify.diagnose.additive import Sums
from trainverify.diagnose.dataflow import Node
from trainverify.diagnose.evidence import witnesses
from trainverify.diagnose.findings import Writer, unsure
from trainverify.diagnose.norms import Norms
from trainverify.diagnose.origin import Origin, Search, rank_origins
from trainverify.diagnose.relation import OTHER, Relation, Relations
from trainverify.diagnose.watch import Watch
from trainverify.diagnostics import Diagnostic
from trainverify.engine.verdict import Judgement
from trainverify.ir.trace import TensorRef
from trainverify.relate.compare import Compared, Piece
from trainverify.report.model import Finding

ORDER = {"gradient": 0, "scalar": 1, "parameter": 2, "buffer": 3, "state": 4}
MOST_FINDINGS, MOST_SEARCHED, MOST_RELATED = 3, 48, 12


@dataclass(frozen=True, slots=True)
class Cause:
    """What a finding rests on, for whoever wants to mend it: the relation, the outputs that it was found on, the calls where the
    difference arises, the calls after which something is missing, and those that bring in constants which the reference lacks."""

    relation: Relation
    keys: tuple = ()
    nodes: tuple[Node, ...] = ()
    late: tuple[Node, ...] = ()
    brought: tuple[Node, ...] = ()


@dataclass(slots=True)
class Explanation:
    """Findings, best first, with their causes; the index of the finding that explains each wrong output's key; and the run's diagnostics,
    of which those that merely follow from the findings are now notes. `diagnosis`: the work, for what comes after it."""

    findings: list[Finding]
    explained: dict
    diagnostics: list[Diagnostic]
    causes: tuple[Cause, ...] = ()
    diagnosis: Diagnosis | None = None


def explain(watched, watch: Watch, judgements: list[Judgement], diagnostics: list[Diagnostic]) -> Explanation:
    """`watched`: the engine's Pass in which `watch` saw the values."""
    wrong = [_in_pass(j, watched.comparison) for j in judgements if j.verdict == "REFUTED"]
    sure = bool(wrong)
    wrong = wrong or [_in_pass(j, watched.comparison) for j in judgements if j.unsure]
    if not wrong:
        return Explanation([], {}, diagnostics)
    return Diagnosis(watched, watch, wrong, diagnostics, sure).explanation()


def _in_pass(j: Judgement, comparison) -> Judgement:
    """The judgement with the pieces of another pass over the same traces."""
    fresh = comparison.compared[j.key]
    twin = {id(old): new for old, new in zip(j.compared.pieces, fresh.pieces, strict=True)}
    return replace(j, compared=fresh, wrong=[replace(w, piece=twin[id(w.piece)]) for w in j.wrong], unsure=[twin[id(p)] for p in j.unsure])


class Diagnosis:
    """The work on one run."""

    def __init__(self, watched, watch: Watch, wrong: list[Judgement], diagnostics: list[Diagnostic], sure: bool):
        self.watched, self.watch, self.flow, self.sure = watched, watch, watch.flow, sure
        self.wrong, self.diagnostics = wrong, diagnostics
        self.by_key = {j.key: j for j in wrong}
        self.step = min(j.key[2] for j in wrong)
        self.relations = Relations(watched.field, watched.comparison, watch)
        self.sums = Sums(self.relations)
        self.search = Search(watch.flow, watch)
        self.writer = Writer(watch.flow, self.search, self.relations)
        self.raw = {j.key: raw for j in wrong if j.key[0] == "gradient" and j.key[2] == self.step
                    and (raw := self.relations.unclipped(j.compared)) is not None}
        self.first = self._primary()
        self.norms: Norms | None = None
        self.findings: list[Finding] = []
        self.causes: list[Cause] = []         # of each finding
        self.explained: dict = {}
        self.sources: list[set[Node]] = []    # of each finding: where its differences arise

    def explanation(self) -> Explanation:
        early = [d for d in self.diagnostics if d.code == "REL007"]
        if early:                             # what was read before a wait is arbitrary: the cause of all
            self.sources = [{(r, c.index) for d in early for r in d.ranks for c in self.flow.calls[r] if self._is_at((r, c.index), d)}]
            self._add(Finding(early[0], witnesses=witnesses(self.first), diagnosis="uninitialised"), Cause(OTHER, tuple(self.by_key)))
        else:
            self._search()
        found = decisions.places(self.watched.parallel, self.diagnostics)
        consequences = [p.diagnostic for p in found if self.sure and (self._is_later(p) or decisions.follows(p, self.flow, set().union(*self.sources)))]
        if not early:
            self._decided([p for p in found if p.diagnostic not in consequences])
        for j in self.wrong:                  # later steps and updates follow from the first cause
            self.explained.setdefault(j.key, 0)
        counts = [list(self.explained.values()).count(i) for i in range(len(self.findings))]
        findings = [msgspec.structs.replace(f, explains=n) for f, n in zip(self.findings, counts)]
        return Explanation(findings, self.explained, decisions.told(self.diagnostics, consequences), tuple(self.causes), self)

    def _add(self, finding: Finding, cause: Cause) -> None:
        self.findings.append(finding)
        self.causes.append(cause)
        self.explained.update(dict.fromkeys(cause.keys, len(self.findings) - 1))

    def _is_at(self, node: Node, d: Diagnostic) -> bool:
        span = self.flow.span(node)
        return span is not None and d.span is not None and (span.file, span.line, span.step) == (d.span.file, d.span.line, d.span.step)

    # ---- what to start from
    def _primary(self) -> list[Judgement]:
        """The wrong outputs that come first: earliest step, and its scalars and gradients before what follows from them; of gradients
        those that were wrong before they were clipped, if any were."""
        early = sorted((j for j in self.wrong if j.key[2] == self.step), key=lambda j: ORDER.get(j.key[0], 9))
        gradients = [j for j in early if j.key[0] == "gradient"]
        before = [j for j in gradients if j.key not in self.raw or any(p.wrong("field") for p in self.raw[j.key].pieces)]
        losses = [j for j in early if j.key[0] == "scalar"]
        return (before or gradients) + losses or early

    def starts(self) -> list[tuple]:
        """(key, rank, region, before which call) of every wrong piece of the first outputs; before clipping, where it was wrong already."""
        out = []
        for j in self.first[:MOST_SEARCHED]:
            raw = {id(p.recorded): p for p in self.raw[j.key].pieces} if j.key in self.raw else {}
            for p in j.compared.pieces:
                ref, before = _read_ref(p.recorded), p.recorded.call.index
                if ref is None or not (p.wrong("field") or p.undefined()):
                    continue
                if id(p.recorded) in raw and raw[id(p.recorded)].wrong("field"):
                    ref, before = self.before_clipping(p)
                out.append((j.key, p.rank, ref, before))
        return out

    def before_clipping(self, p: Piece) -> tuple[TensorRef, int]:
        """The region of a piece, and the call before which it holds what has not been clipped yet."""
        stage = self.watch.unclipped("parallel", (p.rank, p.recorded.call.index))
        return (p.recorded.ref, p.recorded.call.index) if stage is None else (stage.term.ref, stage.before)

    def _mark(self):
        """What to follow upwards: values that are not a number or uninitialised, or (None) values that are not the reference's."""
        if all(j.code == "REL010" for j in self.first):
            return self.watch.nan
        return self.watch.garbage if all(j.code == "REL009" for j in self.first) else None

    # ---- causes
    def _search(self) -> None:
        origins = rank_origins(self.search, self.starts(), self._mark())
        self._shares(set().union(*(o.outputs for o in origins)))
        for origin in origins:
            fresh = [k for k in self.by_key if k in origin.outputs and k not in self.explained]   # not the set's order: it differs between runs
            if not fresh or len(self.findings) == MOST_FINDINGS:
                continue
            known = next((i for i, c in enumerate(self.causes) if self._explains(i, c.relation, origin, fresh)), None)
            if known is not None:
                self.explained.update(dict.fromkeys(fresh, known))
                continue
            relation = self._relation(fresh) if self.sure else unsure([self.by_key[k] for k in fresh])
            twin = next((i for i, c in enumerate(self.causes) if relation.same and c.relation.same == relation.same), None)
            if twin is not None:
                self.explained.update(dict.fromkeys(fresh, twin))
                continue
            self.sources.append(set(origin.nodes))
            late = self._late(origin, relation, fresh)
            nodes = tuple(sorted(origin.nodes, key=lambda n: n[::-1]))
            self._add(self.writer.at_origin(origin, relation, [self.by_key[k] for k in fresh], late),
                      Cause(relation, tuple(fresh), nodes, tuple(late), tuple(self.writer.constants(origin, relation))))
        if not self.findings:
            keys = [j.key for j in self.first]
            relation = self._relation(keys) if self.sure else unsure(self.first)
            self._add(self.writer.bare(relation, self.first), Cause(relation, tuple(keys)))

    def _shares(self, reached: set) -> None:
        """Outputs that are wrong although all they are made of is the reference's: one of the values that it adds up, for example."""
        keys = [j.key for j in self.first[:MOST_SEARCHED] if j.key not in reached] if self.sure else []
        relation = self._relation(keys) if keys else OTHER
        if relation.kind == "other":
            return
        late = {n for key, rank, ref, before in self.starts() if key in keys and isinstance(ref, TensorRef) for n in self.flow.writer(rank, ref, before)[:1]}
        self.sources.append(late)
        self._add(self.writer.bare(relation, [self.by_key[k] for k in keys], sorted(late)), Cause(relation, tuple(keys)))

    def _late(self, origin: Origin, relation: Relation, keys: list) -> list[Node]:
        """If gradients that are right come from the same calls (every backward is scaled, and a division makes up for it later), what is
        missing is missing afterwards: the last writers of the wrong ones, else []."""
        if relation.kind != "multiple":
            return []
        right = [p for k, c in self.watched.comparison.compared.items() if k[0] == "gradient" and k[2] == self.step
                 and (k not in self.by_key or k in self.raw and not any(p.wrong("field") for p in self.raw[k].pieces)) for p in c.pieces[:1]]
        ends = [n for p in right[:4] if p.recorded.ref is not None for n in self.flow.writer(p.rank, *self.before_clipping(p))[:1]]
        if not decisions.above(self.flow, ends, set(origin.nodes)):
            return []
        return [n for key, rank, ref, before in self.starts() if key in keys and rank == origin.node[0] and not hasattr(ref, "id")
                for n in self.flow.writer(rank, ref, before)[:1]]

    def _explains(self, index: int, relation: Relation, origin: Origin, keys: list) -> bool:
        """Whether a finding explains these outputs too: their origin lies below its own, or they are wrong by the same weights."""
        if self.search.above(origin.nodes) & self.sources[index] or not self.causes[index].nodes and decisions.above(self.flow, sorted(origin.nodes), self.sources[index]):
            return True
        return bool(relation.ratio) and all(self.sums.explained_by(self.by_key[k].compared, relation) for k in keys)

    def _relation(self, keys: list) -> Relation:
        """The simplest relation that holds for one of these outputs, before clipping where that is known."""
        order = sorted(keys, key=lambda k: (ORDER.get(k[0], 9), k[2], k[1]))
        scalars = [k for k in order if k[0] == "scalar"]
        seen = [c for k in dict.fromkeys([*order[:MOST_RELATED], *scalars]) for c in (self.raw.get(k), self.by_key[k].compared) if c is not None]
        for find in (self.relations.simple, self.sums.of, self._norm, self.relations.inside):
            for c in seen:
                got = find(c)
                if got is not None and got.kind != "other":
                    return got
        return OTHER

    def _norm(self, c: Compared) -> Relation | None:
        """Of a scalar that is the norm of gradients which are right."""
        if self.norms is None:
            every = {k: c for k, c in self.watched.comparison.compared.items() if k[0] == "gradient" and k[2] == self.step and c.pieces}
            raw = {k: self.relations.unclipped(c) or c for k, c in every.items()}
            right = all(not p.wrong("field") for c in raw.values() for p in c.pieces)
            self.norms = Norms(self.relations, raw if right else {})
        return self.norms.of(c)

    # ---- decisions
    def _is_later(self, place: decisions.Place) -> bool:
        """Whether all of it happens after a step whose updates were wrong already."""
        spans = [self.flow.span(n) for n in place.nodes]
        return bool(spans) and all(s is not None and s.step > self.step for s in spans)

    def _decided(self, places: list[decisions.Place]) -> None:
        """An unmatched decision above a finding's operation, itself of values that no finding explains, is its cause: it is told first."""
        for place in places:
            if self.sources and place.nodes and decisions.above(self.flow, sorted(self.sources[0]), set(place.first)):
                old = self.findings[0]
                span = old.diagnostic.span
                self.findings[0] = msgspec.structs.replace(
                    old, diagnostic=place.diagnostic, op=self.flow.call(place.first[0]).name, modules=(), operands=(), algebra="", diagnosis="decision",
                    used_at=tuple(s for s in (span, *old.used_at) if s is not None))
                return


def _read_ref(recorded):
    """Where to start from: the output's tensor, or for a tracked scalar the call that made it."""
    if recorded.ref is not None:
        return recorded.ref
    value = recorded.call.args[3]
    return value if hasattr(value, "id") else None
