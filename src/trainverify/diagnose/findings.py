"""Puts one cause into words: the line to look at first, what is wrong there, and where it goes from there (not trusted)."""
from __future__ import annotations

import math
from fractions import Fraction

import msgspec

from trainverify.diagnose.dataflow import Dataflow, Node
from trainverify.diagnose.evidence import operands, witnesses
from trainverify.diagnose.origin import Origin, Search
from trainverify.diagnose.relation import OTHER, Relation, Relations, partial, scaled
from trainverify.diagnose.terms import COPIED, SAME, SUMS
from trainverify.diagnostics import Diagnostic, Span
from trainverify.engine.verdict import Judgement
from trainverify.ir.trace import TensorRef
from trainverify.report.model import Finding

NOUNS = {"gradient": "gradient", "parameter": "updated parameter", "state": "optimizer state", "buffer": "buffer"}
FIRST = "first operation whose inputs agree with the reference and whose result does not"
FIRST_CONSTANT = "a number that the reference does not have meets right values: the first operation that brings it in"
MISSING = "right gradients come from the same calls, and lose this factor later: here a division, or a reduction that averages, is missing before this line"
SAID = {                                      # class of the finding -> what is said of the outputs
    "partial sum": lambda what, r: f"{what} is a part of the sum: {r.detail} is missing" if r.same else
                                   f"{what} is one rank's share: the sum over {r.detail} is missing",
    "wrong group": lambda what, r: f"{what} is summed over the wrong ranks: over {r.detail}",
    "never updated": lambda what, r: f"{what} is never updated on these ranks",
    "stale": lambda what, r: f"{what} is stale: the reference's {r.detail}" if not r.same else f"{what} is stale: {r.detail}",
    "permutation": lambda what, r: f"{what} holds the reference's elements {r.detail}",
    "other tensor": lambda what, r: f"{what} is another value of the reference: {r.detail.removeprefix('of ')}",
    "reweighted": lambda what, r: f"{what} is a sum whose shares are weighed differently from the reference's",
    "additive term": lambda what, r: f"{what} is a sum {'with' if r.detail.startswith('a term too many') else 'of which'} {r.detail}",
    "uninitialised": lambda what, r: "uninitialised memory reaches an output",
}
THROUGH = SUMS | SAME | COPIED | {"t", "transpose", "permute", "select", "slice", "split", "cat", "_chunk_cat", "unsqueeze", "squeeze"}
MOST_HOPS, MOST_PLACES = 12, 4


def unsure(judgements: list[Judgement]) -> Relation:
    """What is said of outputs that differ without a witness."""
    code = judgements[0].code
    return Relation("uninitialised" if code == "REL009" else "other", code)


def _shown(judgements: list[Judgement], sure: bool) -> tuple[str, ...]:
    """What there is to say of the witness."""
    if not sure:
        return ("no float64 witness was found",)
    other = next((j.reason for j in judgements if j.inputs is not None), "")
    return (f"the recorded inputs do not show it: {other}",) if other else ()


class Writer:
    def __init__(self, flow: Dataflow, search: Search, relations: Relations):
        self.flow, self.search, self.relations, self.names = flow, search, relations, relations.names

    def at_origin(self, origin: Origin, relation: Relation, judgements: list[Judgement], late: list[Node] = ()) -> Finding:
        """A finding for an operation where a difference arises; `late`: the calls after which something is missing, where that is known."""
        sure = any(j.wrong for j in judgements)
        if sure and all(w.nan for j in judgements for w in j.wrong):
            relation = Relation("other", "REL010", "parallel is not a number where the reference is")
        elif sure and relation.kind == "other":
            relation = self._at(origin) or OTHER
        node = origin.node
        brought = self.constants(origin, relation) if relation.kind in ("other", "reweighted", "multiple") else []
        message = self._message(relation, judgements)
        if brought:
            message = FIRST_CONSTANT if relation is OTHER else message
        used = self._used_whole(late or [node])
        place = used[0] if late and used else brought[0] if brought else relation.at or node
        if late and used or relation.at is not None:
            node = place
        after = [self.flow.span(n) for n in (*brought[1:2], *([origin.node] if place != origin.node else []),
                                              *([self.search.mixed[node]] if node in self.search.mixed else []), *used)]
        span = self.flow.span(place)
        return Finding(
            Diagnostic(relation.code, message, "error" if sure else "warning", span, tuple(sorted(origin.ranks)),
                       (*((MISSING,) if late and used else self._arrived(origin)), *_shown(judgements, sure)), relation.fix),
            self.flow.call(place).name, self._modules(origin, place),
            self._places([*after, *self._used_at(judgements)], span), relation.text, operands(self.search, self.relations, node),
            len(judgements), witnesses(judgements), relation.kind)

    def instead(self, finding: Finding, relation: Relation, node: Node, judgements: list[Judgement]) -> Finding:
        """The finding told by another relation, at the call that it is about; where it was told before is one of the places that are named."""
        old, span = finding.diagnostic, self.flow.span(node)
        diagnostic = msgspec.structs.replace(old, code=relation.code, message=self._message(relation, judgements), span=span, notes=(), fix=relation.fix)
        return msgspec.structs.replace(finding, diagnostic=diagnostic, op=self.flow.call(node).name, algebra=relation.text, diagnosis=relation.kind,
                                       modules=tuple(m for m in (span.module if span is not None else "",) if m),
                                       operands=operands(self.search, self.relations, node), used_at=self._places([old.span, *finding.used_at], span))

    def bare(self, relation: Relation, judgements: list[Judgement], last: list[Node] = ()) -> Finding:
        """No operation could be singled out: name where ranks that are right last wrote the value, and where the wrong one was read.
        last: the calls that wrote the wrong ones, where they were wrong already."""
        wrong = {w.piece.rank for j in judgements for w in j.wrong}
        right = [p.recorded for j in judgements[:4] for p in j.compared.pieces if p.rank not in wrong and isinstance(p.recorded.ref, TensorRef)]
        writers = [self.flow.span(n) for rec in right[:4] for n in self.flow.writer(rec.rank, rec.ref, rec.call.index)[:1]]
        own = [self.flow.span(n) for j in judgements[:4] for w in j.wrong[:1] if isinstance(w.piece.recorded.ref, TensorRef)
               for n in self.flow.writer(w.piece.rank, w.piece.recorded.ref, w.piece.recorded.call.index)[:1]]
        places = self._places([*(self.flow.span(n) for n in last), *writers, *own, *self._used_at(judgements)], None)
        severity = "error" if any(j.wrong for j in judgements) else "warning"
        return Finding(Diagnostic(relation.code, self._message(relation, judgements), severity, places[0] if places else None, tuple(sorted(wrong)), fix=relation.fix),
                       "", (), places[1:], relation.text, (), len(judgements), witnesses(judgements), relation.kind)

    def _modules(self, origin: Origin, place: Node) -> tuple[str, ...]:
        spans = [self.flow.span(n) for n in ([place] if place not in origin.nodes else sorted(origin.nodes, key=lambda n: n[::-1]))]
        return tuple(dict.fromkeys(s.module for s in spans if s is not None and s.module))

    # ---- words
    def _message(self, relation: Relation, judgements: list[Judgement]) -> str:
        kinds = [j.key[0] for j in judgements]
        what = next((NOUNS.get(k, "value") for k in ("gradient", "parameter", "buffer", "state") if k in kinds), judgements[0].key[1])
        if relation.kind == "multiple":
            own = "a value of the reference" in relation.text         # said of the operation's own result, not of the outputs
            named = f" ({relation.factor} = {relation.detail})" if relation.detail else ""
            if relation.factor == 0:
                return f"{what} is zero where the reference's is not"
            return f"{'result' if own else what} is {relation.factor} x the reference" + ("'s" if own else "") + named
        if relation.same[:1] == ("norm",):
            return f"gradient norm is a sum with wrong counts: {relation.detail}"
        if relation.code == "REL010":
            return "value is not a number where the reference is finite"
        return SAID.get(relation.kind, lambda what, r: FIRST)(what, relation)

    # ---- at the origin
    def _at(self, origin: Origin) -> Relation | None:
        """What the operation's own result is, where nothing simple holds for the outputs."""
        field = self.relations.field
        if origin.status.startswith("x "):
            return scaled(self.names, Fraction(origin.status[2:]), "a value of the reference")
        group = self.search.share(field, origin.node, list(self.names.groups))
        return partial(self.names, Fraction(1), group) if group is not None else None

    def constants(self, origin: Origin, relation: Relation) -> list[Node]:
        """Where a constant that the reference lacks comes from: the one by which shares are weighed wrongly, or one that the operations
        of this origin combine with right values."""
        if relation.kind == "reweighted":
            return self._weight(dict(relation.ratio))
        own = self.flow.span(origin.node)
        out = []
        for n in self.search.constants(origin.nodes):
            span = self.flow.span(n)
            if span is not None and span.file and span.phase != "setup" and (own is None or (span.file, span.line) != (own.file, own.line)):
                out.append(n)
        return out[:2]

    def _weight(self, ratio: dict[tuple[int, int], Fraction]) -> list[Node]:
        """The first place whose constants, one for each term, are off by just the factors by which the terms are."""
        places: dict[tuple, list[Node]] = {}
        for n in sorted(self.search.watch.numbers, key=lambda n: (n[1], n[0])):
            span = self.flow.span(n)
            if span is not None and span.file and span.phase != "setup":
                places.setdefault((span.file, span.line, span.step, self.flow.call(n).name), []).append(n)
        for nodes in places.values():
            number: dict[int, int] = {}
            products = []
            for rank, index in sorted(nodes):
                label = (rank, number.get(rank, 0))
                number[rank] = label[1] + 1
                if label in ratio:
                    products.append(self.search.watch.numbers[(rank, index)] * float(ratio[label]))
            if len(products) == len(ratio) and 0 < min(products) < math.inf and max(products) <= min(products) * (1 + 1e-9):
                return [nodes[0]]
        return []

    def _arrived(self, origin: Origin) -> tuple[str, ...]:
        """The last communication that an operand of a wrong result of right values came through: it may have brought the wrong part."""
        sent = next((s for n in sorted(origin.nodes, key=lambda n: n[::-1]) if (s := self.search.through(n)) is not None), None)
        if sent is None:
            return ()
        span, c = self.flow.span(sent), self.flow.call(self.flow.delivered(sent)).collective
        place = f" at {span}" + (f" in {span.function}" if span.function else "") if span is not None and span.file else ""
        return (f"its operands came through a {c.kind}" + (f" from rank {c.peer}" if c.kind == "recv" else f" over {self.names.over(c.group)}") + place,)

    def _used_whole(self, nodes: list[Node]) -> list[Node]:
        """Where the value is first used as if it were whole: the first reader that is no sum, copy or multiplication by a number."""
        stack, hops = list(nodes), 0
        while stack and hops < MOST_HOPS:
            node, hops = stack.pop(0), hops + 1
            for reader in self.flow.readers(node):
                call = self.flow.call(reader)
                base = call.name.split(".")[1] if call.name.startswith("aten.") else ""
                if call.collective is not None or base in THROUGH:
                    stack.append(reader)
                elif not call.name.startswith("tv."):
                    return [reader]
        return []

    def _used_at(self, judgements: list[Judgement]) -> list[Span | None]:
        """Where the wrong values are used as if they were right: the first reader after their last write, and the optimizer's step."""
        out: list[Span | None] = []
        for j in judgements[:8]:
            for w in j.wrong[:1]:
                rec = w.piece.recorded
                if isinstance(rec.ref, TensorRef):
                    last = self.flow.writer(rec.rank, rec.ref, rec.call.index)[:1]
                    reader = self.flow.first_reader(last[0]) if last else None
                    out.append(self.flow.span(reader) if reader else None)
                out.append(self.flow.span((rec.rank, rec.call.index)))
        return out

    def _places(self, spans: list[Span | None], own: Span | None) -> tuple[Span, ...]:
        found = {(s.file, s.line): s for s in reversed(spans) if s is not None and s.file}
        if own is not None:
            found.pop((own.file, own.line), None)
        return tuple(found.values())[::-1][:MOST_PLACES]

