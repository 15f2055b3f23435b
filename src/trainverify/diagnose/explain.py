"""From wrong outputs to findings: each names the operation where a difference arises, says what it is in algebra, and which outputs it explains."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import torch

from trainverify.diagnose.dataflow import Dataflow
from trainverify.diagnose.origin import Origin, Search, Watch, rank_origins
from trainverify.diagnose.relation import Relation, relate
from trainverify.diagnostics import Diagnostic, Span
from trainverify.engine.verdict import Judgement
from trainverify.ir.trace import OpCall, Program, TensorRef, inputs
from trainverify.report.model import Finding, Operand, Witness

ORDER = {"scalar": 0, "gradient": 1, "parameter": 2, "buffer": 3, "state": 4}
MOST_FINDINGS, MOST_SEARCHED = 3, 48
MESSAGES = {
    "REL001": "first operation whose inputs agree with the reference and whose result does not",
    "REL002": "value is one rank's share: a sum over ranks is missing",
    "REL003": "value is {factor} x the reference",
    "REL004": "parameter is never updated on these ranks",
    "REL009": "uninitialised memory reaches an output",
    "REL010": "value is not a number where the reference is finite",
}


def explain(program: Program, watched, watch: Watch, judgements: list[Judgement],
            groups: dict[tuple[int, ...], str], early: Sequence[Diagnostic] = ()) -> tuple[list[Finding], dict]:
    """Findings, best first, and the index of the finding that explains each wrong output's key. `watched`: the engine's Pass in which
    `watch` saw the values. `early`: reads before a wait; what was read is arbitrary, so that they are the cause of all."""
    comparison, field = watched.comparison, watched.field
    wrong = [_in_pass(j, comparison) for j in judgements if j.verdict == "REFUTED"]
    wrong = wrong or [_in_pass(j, comparison) for j in judgements if j.unsure]
    if not wrong:
        return [], {}
    first = _primary(wrong)
    if early:
        return [Finding(early[0], explains=len(wrong), witnesses=witnesses(first))], {j.key: 0 for j in wrong}
    flow = Dataflow(program)
    search = Search(flow, watch)
    starts = [(j.key, p.rank, _read_ref(p.recorded), p.recorded.call.index)
              for j in first[:MOST_SEARCHED] for p in j.compared.pieces
              if (p.wrong("field") or p.undefined()) and _read_ref(p.recorded) is not None]
    origins = rank_origins(search, starts, _mark(watch, first))
    by_key = {j.key: j for j in wrong}
    findings: list[Finding] = []
    explained: dict = {}
    for origin in origins:
        fresh = [k for k in by_key if k in origin.outputs and k not in explained]   # not the set's order: it differs between runs
        if not fresh or len(findings) == MOST_FINDINGS:
            continue
        relation = _relation(field, comparison, by_key, fresh, groups)
        findings.append(_finding(flow, search, origin, relation, [by_key[k] for k in fresh], field, groups))
        explained.update(dict.fromkeys(fresh, len(findings) - 1))
    if not findings:
        relation = _relation(field, comparison, by_key, [first[0].key], groups)
        findings.append(_bare(flow, relation, first))
        explained.update({j.key: 0 for j in first})
    for j in wrong:                           # later steps and updates follow from the first cause
        explained.setdefault(j.key, 0)
    counts = defaultdict(int)
    for index in explained.values():
        counts[index] += 1
    return [Finding(f.diagnostic, f.op, f.modules, f.used_at, f.algebra, f.operands, counts[i], f.witnesses) for i, f in enumerate(findings)], explained


def _in_pass(j: Judgement, comparison) -> Judgement:
    """The judgement with the pieces of another pass over the same traces."""
    fresh = comparison.compared[j.key]
    twin = {id(old): new for old, new in zip(j.compared.pieces, fresh.pieces, strict=True)}
    return replace(j, compared=fresh, wrong=[replace(w, piece=twin[id(w.piece)]) for w in j.wrong], unsure=[twin[id(p)] for p in j.unsure])


def _mark(watch: Watch, first: list[Judgement]):
    """What to follow upwards: values that are not a number or uninitialised, or (None) values that are not the reference's."""
    if all(j.code == "REL010" for j in first):
        return watch.nan
    return watch.garbage if all(j.code == "REL009" for j in first) else None


def _primary(wrong: list[Judgement]) -> list[Judgement]:
    """The wrong outputs that come first: earliest step, and its scalars and gradients before what follows from them."""
    step = min(j.key[2] for j in wrong)
    early = sorted((j for j in wrong if j.key[2] == step), key=lambda j: ORDER.get(j.key[0], 9))
    gradients = [j for j in early if j.key[0] == "gradient"]
    losses = [j for j in early if j.key[0] == "scalar"]
    return gradients + losses or early


def _read_ref(recorded):
    """Where to start from: the output's tensor, or for a tracked scalar the call that made it."""
    if recorded.ref is not None:
        return recorded.ref
    value = recorded.call.args[3]
    return value if hasattr(value, "id") else None


def _relation(field, comparison, by_key, keys, groups) -> Relation:
    for key in sorted(keys, key=lambda k: (ORDER.get(k[0], 9), k[2], k[1])):
        c = by_key[key].compared
        before = {}
        if key[0] == "parameter":
            for p in c.pieces:
                line = comparison.lineage_of(p.rank, "parameter", p.recorded.name)
                before[id(p)] = field.take([comparison.every["field"]], torch.from_numpy(p.numbers) + 1) if line is not None and len(p.numbers) else None
        got = relate(field, c, list(groups), groups, before)
        if got.kind != "other":
            return got
    return Relation("other", "REL001", "")


def _finding(flow: Dataflow, search: Search, origin: Origin, relation: Relation, judgements: list[Judgement], field, groups) -> Finding:
    call = flow.call(origin.node)
    span = flow.span(origin.node)
    severity, sure = "error", any(j.wrong for j in judgements)
    if not sure:
        relation, severity = Relation("other", judgements[0].code, ""), "warning"
    elif all(w.nan for j in judgements for w in j.wrong):
        relation = Relation("nan", "REL010", "parallel is not a number where the reference is")
    elif relation.kind == "other" and origin.status.startswith("x "):
        relation = Relation("scaled", "REL003", f"result = {origin.status[2:]} x a value of the reference", Fraction(origin.status[2:]))
    elif relation.kind == "other" and (group := search.share(field, origin.node, list(groups))) is not None:
        axis = groups.get(group, "")
        over = f"{axis} ranks {list(group)}" if axis else f"ranks {list(group)}"
        relation = Relation("partial", "REL002", f"reference = sum over {over} of the parallel values", Fraction(1), group)
    own = (span.file, span.line) if span else None
    constants = [s for s in map(flow.span, search.constants()) if s is not None and (s.file, s.line) != own and s.phase != "setup"]
    places = _distinct(constants)[:2] + _distinct(_used_at(flow, judgements))
    return Finding(
        Diagnostic(relation.code, MESSAGES[relation.code].format(factor=relation.factor), severity, span, tuple(sorted(origin.ranks)),
                   () if sure else ("no float64 witness was found",)),
        call.name, tuple(dict.fromkeys(s for s in [span.module if span else ""] if s)), places, relation.text,
        _operands(flow, search, origin.node, call), len(judgements), witnesses(judgements))


def _bare(flow: Dataflow, relation: Relation, judgements: list[Judgement]) -> Finding:
    """No operation could be singled out: name where ranks that are right last wrote the value, and where the wrong one was read."""
    wrong = {w.piece.rank for j in judgements for w in j.wrong}
    right = [p.recorded for j in judgements[:4] for p in j.compared.pieces if p.rank not in wrong and isinstance(p.recorded.ref, TensorRef)]
    writers = [flow.span(n) for rec in right[:4] for n in flow.writer(rec.rank, rec.ref, rec.call.index)[:1]]
    own = [flow.span(n) for j in judgements[:4] for w in j.wrong[:1] if isinstance(w.piece.recorded.ref, TensorRef)
           for n in flow.writer(w.piece.rank, w.piece.recorded.ref, w.piece.recorded.call.index)[:1]]
    places = _distinct(writers + own + _used_at(flow, judgements))
    return Finding(Diagnostic(relation.code, MESSAGES[relation.code].format(factor=relation.factor), "error", places[0] if places else None,
                              tuple(sorted(wrong))), "", (), places[1:], relation.text, (), len(judgements), witnesses(judgements))


def _distinct(spans: list[Span | None]) -> tuple[Span, ...]:
    return tuple({(s.file, s.line): s for s in reversed(spans) if s is not None and s.file}.values())[::-1][:4]


def _used_at(flow: Dataflow, judgements: list[Judgement]) -> list[Span | None]:
    """Where the wrong values are used as if they were right: the first reader after their last write, and the optimizer's step."""
    out: list[Span | None] = []
    for j in judgements[:8]:
        for w in j.wrong[:1]:
            rec = w.piece.recorded
            if isinstance(rec.ref, TensorRef):
                last = flow.writer(rec.rank, rec.ref, rec.call.index)[:1]
                reader = flow.first_reader(last[0]) if last else None
                out.append(flow.span(reader) if reader else None)
            out.append(flow.span((rec.rank, rec.call.index)))
    return out


def _operands(flow: Dataflow, search: Search, node, call: OpCall) -> tuple[Operand, ...]:
    refs = call.collective.inputs if call.collective is not None else tuple(inputs(call))
    out = []
    for i, ref in enumerate(refs[:4]):
        status = [search.status(p) for p in flow.writer(node[0], ref, node[1])]
        bad = next((s for s in status if s != "good"), "good")
        out.append(Operand(f"input {i}", ref.size, ref.dtype, _words(bad)))
    targets = call.collective.outputs if call.collective is not None else call.targets()
    out += [Operand("result", ref.size, ref.dtype, _words(search.status(node))) for ref in targets[:1]]
    return tuple(out)


def _words(status: str) -> str:
    return {"good": "agrees with the reference", "open": "no value of the reference", "constant": "a constant that the reference lacks"}.get(status, f"{status[2:]} x a value of the reference")


def witnesses(judgements: list[Judgement], most: int = 3) -> tuple[Witness, ...]:
    """Concrete elements on which the sides differ, the largest relative difference first in each output."""
    out = []
    for j in [j for j in judgements if j.wrong][:most]:
        w = j.wrong[0]
        k = int((w.parallel - w.reference).abs().nan_to_num(float("inf")).argmax())
        element = int(w.piece.at[int(w.index[k])])
        values = []
        for other in j.wrong:
            here = [i for i, at in enumerate(other.index.tolist()) if int(other.piece.at[at]) == element]
            if here:
                values.append((other.piece.rank, float(other.parallel[here[0]])))
        kind, name, step = j.key
        label = {"gradient": f"{name}.grad", "state": name.replace("::", "."), "scalar": name}.get(kind, name)
        shape = w.piece.recorded.ref.size if w.piece.recorded.ref is not None else ()
        out.append(Witness(f"{label}{_index(element, shape)}, step {step}", float(w.reference[k]), tuple(values[:8])))
    return tuple(out)


def _index(flat: int, shape: tuple[int, ...]) -> str:
    if not shape:
        return ""
    index = []
    for size in reversed(shape):
        index.append(flat % size)
        flat //= size
    return "[" + ", ".join(str(i) for i in reversed(index)) + "]"
