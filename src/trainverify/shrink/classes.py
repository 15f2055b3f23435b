"""Reads both programs at once: the facts of every call, of every meeting of ranks, and of what the two sides share (trusted).

Both sides are one system of spaces. They are linked by the symbols (a parallel storage that holds reference elements has their
indices), and by the tensors of the batch.
"""
from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from trainverify.diagnostics import Diagnostic, Fault
from trainverify.ir.trace import Collective, OpCall, Program, TensorRef, references
from trainverify.ops.access import reads
from trainverify.ops.table import OpTable
from trainverify.shrink.facts import Facts, Notes, Undecoded, base
from trainverify.shrink.layout import Layout
from trainverify.shrink.repeat import Forms, Repeats, is_float
from trainverify.shrink.rules import find
from trainverify.shrink.spaces import ONE, Conflict, Spaces

Where = tuple[str, int]
LOGIC = {"bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not", "logical_and", "logical_or", "logical_not", "logical_xor"}      # masks: of floats too
BUNDLES = ("tv.", "aten._foreach_", "aten._fused_ada", "aten._fused_sgd", "aten.stack", "fsdp.")      # what they take together does not meet


@dataclass(slots=True)
class Classes:
    """Both programs' spaces, and what the rules said about them."""

    programs: dict[str, Program]
    notes: Notes
    layouts: dict[Where, Layout]
    unruled: dict[str, str] = field(default_factory=dict)      # operations without a rule -> where
    computed: set[int] = field(default_factory=set)            # spaces that some dimension of a float tensor ranges over
    bound: set[tuple[str, int, int]] = field(default_factory=set)        # (side, rank, storage): holds reference elements from the start
    unread: set[tuple[str, int, int]] = field(default_factory=set)       # (side, rank, call): calls on integers whose arguments and results are not linked;
                                                                         # each stands for those like it

    @property
    def spaces(self) -> Spaces:
        return self.notes.spaces


def is_integer_only(call: OpCall) -> bool:
    return not any(is_float(r) for r in references(call))


def read(reference: Program, parallel: Program, table: OpTable, rows: Callable | None = None) -> Classes:
    """All facts of both programs, closed. rows(classes, table): known.Rows."""
    classes = _unread(reference, parallel, True)
    if rows is not None:
        classes.notes.rows = rows(classes, table)
        if classes.notes.rows.differing:      # rows in another order in each layer: the layers are not alike
            classes = _unread(reference, parallel, False)
            classes.notes.rows = rows(classes, table)
    spaces = classes.spaces
    for program in (reference, parallel):
        meetings = Meetings()
        for rank, trace in enumerate(program.traces):
            _read_trace(classes, classes.layouts[(trace.side, rank)], table, meetings)
        meetings.facts(classes)
    _link(classes)
    _named(classes.notes)
    spaces.close()
    return classes


def _named(notes: Notes) -> None:
    """Rows that nothing else has named, of which each index of another space has several: they are named by that index and a number."""
    spaces = notes.spaces
    for taken, base, at in notes.often:
        if spaces.picks(taken) or spaces.picks(base):
            continue
        order, times = np.argsort(at, kind="stable"), len(at) // spaces.size(base)
        number = np.empty_like(at)
        number[order] = np.arange(len(at)) % times
        many, whole = spaces.new(times), spaces.new(len(at))
        spaces.pin(many, "how often each index is taken", structural=True)
        spaces.product(whole, (base, many))
        with contextlib.suppress(Conflict):   # they keep their own names: one constraint less
            spaces.pick(taken, whole, at * times + number)


def _unread(reference: Program, parallel: Program, lay: bool) -> Classes:
    spaces, forms = Spaces(), Forms()
    classes = Classes({"reference": reference, "parallel": parallel}, Notes(spaces), {})
    for program in (reference, parallel):
        for rank, trace in enumerate(program.traces):
            layout = Layout(spaces, program, rank, Repeats(forms, trace, lay))
            classes.layouts[layout.where] = layout
    return classes


def _read_trace(classes: Classes, layout: Layout, table: OpTable, meetings: Meetings) -> None:
    """The calls that differ, and all collectives: who meets whom is not a matter of one trace."""
    alike = Counter(layout.repeats.like)
    for call in layout.repeats.distinct():
        for ref in references(call):
            layout.dims(ref, layout.span(call))
            if is_float(ref) and call.name != "tv.escape":
                classes.computed.update(layout.dims(ref))
        if call.collective is None and not call.name.startswith("tv."):
            if not is_integer_only(call) or base(call.name) in LOGIC or (layout.repeats.began[call.index] and not any(layout.shifted(r) for r in reads(call))):
                _apply(classes, layout, call, table)
            else:
                classes.unread.add((*layout.where, call.index))
        if not call.name.startswith(BUNDLES):
            classes.notes.meets.append(tuple(dict.fromkeys(s for ref in references(call) for s in layout.dims(ref) if s != ONE)))
            classes.notes.work += [(dims, alike[call.index]) for dims in _worked(layout, call)]
    for call in layout.trace.ops:
        if call.collective is not None:
            meetings.add(layout, call)


def _worked(layout: Layout, call: OpCall) -> Iterator[tuple[int, ...]]:
    """What a call looks at: its tensors' elements, and attention a score for each query with each key."""
    for ref in references(call):
        dims = layout.dims(ref)
        yield dims
        if base(call.name).startswith("_scaled_dot_product") and len(dims) == 4:
            yield (*dims[:3], dims[2])


def _apply(classes: Classes, layout: Layout, call: OpCall, table: OpTable) -> None:
    f = Facts(classes.notes, layout, call)
    rule = find(call.name, table)
    why = f"{call.name} has no shape rule"
    if rule is not None:
        try:
            return rule(f)
        except (Undecoded, Conflict) as e:
            why = f"{call.name}: {e}"
    elif is_integer_only(call):
        return classes.unread.add((*layout.where, call.index))
    else:
        classes.unruled.setdefault(call.name, str(f.span or ""))
    for ref in references(call):
        for s in layout.dims(ref):
            f.pin(s, why)


# ---- ranks that meet

class Meetings:
    """Collectives and messages of one program: who takes part."""

    def __init__(self) -> None:
        self.collectives: dict[tuple, dict[int, tuple[Layout, OpCall]]] = defaultdict(dict)
        self.mail: dict[tuple, list[tuple[Layout, OpCall]]] = defaultdict(list)

    def add(self, layout: Layout, call: OpCall) -> None:
        c, rank = call.collective, layout.trace.rank
        if c.kind in ("send", "recv"):
            ends = (rank, c.peer) if c.kind == "send" else (c.peer, rank)
            self.mail[(*ends, c.group, c.group_name, c.tag, c.seq)].append((layout, call))
        else:
            self.collectives[(c.group, c.group_name, c.seq)][rank] = (layout, call)

    def facts(self, classes: Classes) -> None:
        known: set[tuple] = set()

        def new(members: list[tuple[Layout, OpCall]]) -> bool:
            """Whether calls like these have not met before."""
            key = tuple([(layout.where, layout.repeats.like[call.index]) for layout, call in members])
            return not (key in known or known.add(key))

        for both in self.mail.values():
            if len(both) == 2 and new(both):
                (a, x), (b, y) = sorted(both, key=lambda end: end[1].collective.kind)
                _delivered(classes, [(a, x, b, y)])
        for met in self.collectives.values():
            members = [met[r] for r in next(iter(met.values()))[1].collective.group if r in met]
            if not new(members):
                continue
            try:
                _meet(classes.notes, members)
            except (Undecoded, Conflict) as e:
                for layout, call in members:
                    for ref in references(call):
                        for s in layout.dims(ref):
                            classes.spaces.pin(s, f"{call.name}: {e}", layout.span(call))


def _delivered(classes: Classes, pairs) -> None:
    """recv writes what send reads."""
    for a, x, b, y in pairs:
        there, here = (x, y) if x.collective.kind == "send" else (y, x)
        there_at, here_at = (a, b) if x.collective.kind == "send" else (b, a)
        for r, w in zip(there.collective.inputs, here.collective.outputs):
            _joined(classes.spaces, (there_at, r), (here_at, w))


def _joined(spaces: Spaces, a: tuple[Layout, TensorRef], b: tuple[Layout, TensorRef]) -> None:
    """Two tensors with the same elements: dimension by dimension, or as a whole where their sizes differ."""
    if a[1].size == b[1].size:
        for x, y in zip(a[0].dims(a[1]), b[0].dims(b[1])):
            spaces.unify(x, y)
    else:
        spaces.unify(a[0].flat(a[1]), b[0].flat(b[1]))


Member = tuple[Layout, OpCall]


def _meet(notes: Notes, members: list[Member]) -> None:
    spaces, first = notes.spaces, members[0][1].collective
    n = len(members)

    def ins(j: int, i: int) -> tuple[Layout, TensorRef]:
        return members[j][0], members[j][1].collective.inputs[i]

    def outs(j: int, i: int) -> tuple[Layout, TensorRef]:
        return members[j][0], members[j][1].collective.outputs[i]

    def many(of: str) -> int:
        return min(len(getattr(call.collective, of)) for _, call in members)

    if first.kind in ("all_reduce", "reduce", "broadcast"):
        for j, (layout, call) in enumerate(members):
            c = call.collective
            for i in range(len(c.inputs)):
                if i < len(first.inputs) and c.inputs[i].numel == first.inputs[i].numel:
                    _joined(spaces, ins(0, i), ins(j, i))
                if i < len(c.outputs):
                    _joined(spaces, (layout, c.inputs[i]), (layout, c.outputs[i]))
    elif first.kind == "all_to_all" and not first.listed:
        _all_to_all(notes, members)
    elif first.listed:
        _listed(spaces, members, ins, outs)
    elif first.kind == "all_gather":
        for i in range(many("inputs")):
            parts = [layout.flat(ref) for layout, ref in (ins(j, i) for j in range(n))]
            notes.ties.append(tuple(parts))
            for j in range(n):
                layout, ref = outs(j, i)
                spaces.cat(layout.flat(ref), parts)
    elif first.kind == "reduce_scatter":
        for i in range(many("outputs")):
            parts = [layout.flat(ref) for layout, ref in (outs(j, i) for j in range(n))]
            notes.ties.append(tuple(parts))
            for j in range(n):
                layout, ref = ins(j, i)
                spaces.cat(layout.flat(ref), parts)
    elif first.kind != "barrier":
        raise Undecoded(f"{first.kind} has no shape rule")


def _listed(spaces: Spaces, members: list[Member], ins, outs) -> None:
    first, n = members[0][1].collective, len(members)
    roots = [j for j, (layout, _) in enumerate(members) if layout.trace.rank == first.root]
    for me in range(n):
        c = members[me][1].collective
        if first.kind == "all_to_all":
            pairs = [(ins(j, me), outs(me, j)) for j in range(n)]
        elif first.kind == "all_gather":
            pairs = [(ins(j, i), outs(me, i * n + j)) for i in range(len(c.inputs)) for j in range(n)]
        elif first.kind == "reduce_scatter":
            pairs = [(ins(j, i * n + me), outs(me, i)) for i in range(len(c.outputs)) for j in range(n)]
        elif first.kind == "scatter":
            pairs = [(ins(roots[0], i * n + me), outs(me, i)) for i in range(len(c.outputs))] if roots else []
        elif first.kind == "gather":
            pairs = [(ins(me, i), outs(roots[0], i * n + me)) for i in range(len(c.inputs))] if roots else []
        else:
            raise Undecoded(f"{first.kind} has no shape rule")
        for a, b in pairs:
            _joined(spaces, a, b)


def splits(c: Collective, of: str, n: int) -> list[int]:
    """Rows for (from) each member."""
    given = getattr(c, f"{of}_splits")
    ref = c.inputs[0] if of == "in" else c.outputs[0]
    return list(given) if given else [ref.size[0] // n] * n


def row_pieces(layout: Layout, ref: TensorRef, sizes: list[int]) -> list[int]:
    """The parts of dimension 0 that the members get."""
    ends = np.cumsum([0, *sizes]).tolist()
    return [layout.spaces.segment(layout.dims(ref)[0], lo, hi) for lo, hi in zip(ends, ends[1:])]


def _all_to_all(notes: Notes, members: list[Member]) -> None:
    spaces, n = notes.spaces, len(members)
    for j, (source, call) in enumerate(members):
        sent = call.collective.inputs[0]
        for me, (target, other) in enumerate(members):
            got = other.collective.outputs[0]
            a = row_pieces(source, sent, splits(call.collective, "in", n))[me]
            b = row_pieces(target, got, splits(other.collective, "out", n))[j]
            spaces.unify(a, b)
            for x, y in zip(source.dims(sent)[1:], target.dims(got)[1:]):
                spaces.unify(x, y)
        if not call.collective.in_splits:
            notes.ties.append(tuple(row_pieces(source, sent, splits(call.collective, "in", n))))


# ---- what the two sides share

def _link(classes: Classes) -> None:
    """Symbols and the batch: by name; storages that hold tagged values: by these."""
    spaces = classes.spaces
    mine = classes.layouts[("reference", 0)]
    symbols = {c.args[1]: c.args[2] for c in mine.trace.ops if c.name == "tv.symbol"}
    data = {c.args[0]: c.args[1] for c in mine.trace.ops if c.name == "tv.data"}
    tags = Tags(classes.programs["reference"], symbols)
    for (side, rank), layout in classes.layouts.items():
        for call in layout.trace.ops:
            name, ref = (call.args[1], call.args[2]) if call.name == "tv.symbol" else (call.args[0], call.args[1]) if call.name == "tv.data" else ("", None)
            known = (symbols if call.name == "tv.symbol" else data).get(name)
            if isinstance(ref, TensorRef) and known is not None and ref.size == known.size:
                for x, y in zip(layout.dims(ref), mine.dims(known)):
                    spaces.unify(x, y)
        if side == "parallel":
            _bind(classes, layout, tags, mine, symbols)


class Tags:
    """Finds reference elements by their tagged values."""

    def __init__(self, reference: Program, symbols: dict[str, TensorRef]):
        self.names, self.firsts, values, total = [], [], [], 0
        for name, ref in symbols.items():
            blob = reference.blobs[0].get(f"symbol.{name}")
            if blob is None or item_type(ref.dtype) is None:
                continue
            self.names.append(name)
            self.firsts.append(total)
            values.append(numbers(blob, ref.dtype))
            total += ref.numel
        self.values = np.concatenate(values) if values else np.zeros(0)
        self.order = np.argsort(self.values, kind="stable")
        self._sorted = self.values[self.order]

    def find(self, values: np.ndarray) -> np.ndarray:
        """The number of each value's element, -1 where it is none's or several's."""
        if not self.values.size:
            return np.full(values.shape, -1)
        lo = np.searchsorted(self._sorted, values)
        at = np.minimum(lo, self.values.size - 1)
        hit = (self._sorted[at] == values) & (np.searchsorted(self._sorted, values, side="right") - lo == 1)
        return np.where(hit, self.order[at], -1)


def item_type(dtype: str) -> str | None:
    return {"float32": "<f4", "float64": "<f8", "float16": "<f2", "bfloat16": "bf"}.get(dtype)


def numbers(blob, dtype: str) -> np.ndarray:
    """The bytes of a blob as float64."""
    raw = np.ascontiguousarray(blob).reshape(-1).view(np.uint8)
    kind = item_type(dtype)
    if kind == "bf":
        wide = raw[: len(raw) // 2 * 2].view("<u2").astype(np.uint32) << 16
        return wide.view("<f4").astype(np.float64)
    width = np.dtype(kind).itemsize
    return raw[: len(raw) // width * width].view(kind).astype(np.float64)


def _bind(classes: Classes, layout: Layout, tags: Tags, mine: Layout, symbols: dict[str, TensorRef]) -> None:
    """The storages that were there before any operation: where they hold reference elements, they have their indices."""
    blobs = classes.programs["parallel"].blobs[layout.trace.rank]
    seen: dict[int, TensorRef] = {}
    initial = {int(name[5:]) for name in blobs if name.startswith("init.")}
    repeats = layout.repeats
    for number, named in zip(repeats.form, repeats.named) if initial else ():
        if initial.isdisjoint(named):
            continue
        for ref, sid in zip(repeats.forms[number].refs, named):
            if sid in initial and item_type(ref.dtype) and ref.numel:
                old = seen.get(sid)
                seen[sid] = TensorRef(sid, ref.offset, ref.size, ref.stride, ref.dtype) if old is None or ref.numel > old.numel else old
    for sid, ref in seen.items():
        found = tags.find(numbers(blobs[f"init.{sid}"], ref.dtype))
        if f"from.{sid}" in blobs:
            raise refusal("SHAPE002", "weights of a type too narrow to tell their elements apart by value", "capture them in float32, or with ref.weights")
        if (found >= 0).any():
            classes.bound.add((*layout.where, sid))
            at = np.lib.stride_tricks.as_strided(found[ref.offset:], ref.size, [d * found.itemsize for d in ref.stride])
            _bind_block(classes, layout, ref, at, tags, mine, symbols)


def _bind_block(classes: Classes, layout: Layout, ref: TensorRef, at: np.ndarray, tags: Tags, mine: Layout, symbols: dict[str, TensorRef]) -> None:
    """Blocks of rows, each a rectangle of one symbol."""
    lo = 0
    while lo < len(at):
        if (at[lo] < 0).all():
            lo += 1
            continue
        hi = lo + 1
        while hi < len(at) and _rectangle(at[lo:hi + 1], tags) is not None:
            hi += 1
        found = _rectangle(at[lo:hi], tags)
        rows = TensorRef(ref.storage, ref.offset + lo * ref.stride[0], (hi - lo, *ref.size[1:]), ref.stride, ref.dtype)
        if found is None:
            for s in (*layout.dims(rows), layout.space(ref.storage)):
                classes.spaces.pin(s, "it holds reference elements in no order that is a block of one tensor")
        else:
            name, offset, strides = found
            whole = symbols[name]
            inner = TensorRef(whole.storage, whole.offset + offset, rows.size, strides, whole.dtype)
            for x, y in zip(layout.dims(rows), mine.dims(inner)):
                if classes.spaces.size(x) > 1:
                    classes.spaces.unify(x, y)
        lo = hi


def _rectangle(at: np.ndarray, tags: Tags) -> tuple[str, int, tuple[int, ...]] | None:
    """The symbol, offset and strides of which the numbers are."""
    first = int(at.reshape(-1)[0])
    if first < 0:
        return None
    steps = [int(np.take(at, 1, axis=k).reshape(-1)[0]) - first if n > 1 else 1 for k, n in enumerate(at.shape)]
    expected = first + sum(np.arange(n).reshape([-1 if j == k else 1 for j in range(at.ndim)]) * d for k, (n, d) in enumerate(zip(at.shape, steps)))
    if min(steps, default=1) <= 0 or not np.array_equal(expected, at):
        return None
    k = int(np.searchsorted(tags.firsts, first, side="right")) - 1
    last = int(at.reshape(-1)[-1])
    if k + 1 < len(tags.firsts) and last >= tags.firsts[k + 1]:
        return None
    return tags.names[k], first - tags.firsts[k], tuple(steps)


def refusal(code: str, message: str, fix: str, span=None, notes: tuple[str, ...] = ()) -> Fault:
    return Fault(Diagnostic(code, message, "error", span, notes=notes, fix=fix))


__all__ = ["Classes", "is_float", "is_integer_only", "read", "refusal", "row_pieces", "splits"]
