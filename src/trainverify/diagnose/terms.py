"""The addends of a value: what was summed into it, over microbatches and ranks, read off the traces (not trusted).

Walks from a region of memory back through additions, copies, multiplications by numbers and reducing collectives. What is left
are the terms, each a region that stands in memory after some call, so that a replay can keep its value.
"""
from __future__ import annotations

from dataclasses import dataclass

from trainverify.diagnose.dataflow import Dataflow, Node
from trainverify.ir.trace import OpCall, ScalarRef, Sequence, TensorRef

MOST_TERMS, MOST_CALLS, MOST_STAGES = 32, 400, 3
SCALED = {"mul", "mul_", "_foreach_mul", "_foreach_mul_", "div", "div_", "_foreach_div", "_foreach_div_"}
COPIED = {"copy_", "_foreach_copy_", "clone", "_to_copy", "detach", "alias", "contiguous"}
SUMS = {"add", "add_", "sub", "sub_", "_foreach_add", "_foreach_add_", "_foreach_sub", "_foreach_sub_"}
SAME = {"copy_", "_foreach_copy_", "clone", "_to_copy", "detach", "alias", "neg", "neg_", "mul", "mul_", "div", "div_", "view", "_unsafe_view", "reshape",
        "_foreach_mul", "_foreach_mul_", "_foreach_div", "_foreach_div_", "contiguous", "expand", "lift_fresh"}


@dataclass(frozen=True, slots=True)
class Term:
    """One addend: the region where it stands on `rank` once the call has run, and the call that adds it to others."""

    rank: int
    node: Node
    ref: TensorRef
    taken: Node | None = None

    @property
    def key(self) -> tuple[int, int, TensorRef]:
        return (self.rank, self.node[1], self.ref)


def addends(flow: Dataflow, rank: int, ref: TensorRef, before: int) -> list[Term]:
    """The terms of what a region holds before a call, [] if some cannot be named. A value that is no sum is its own only term."""
    out: dict[tuple, Term] = {}
    stack, steps = [(rank, ref, before, None)], 0
    while stack:
        steps += 1
        rank, ref, before, taken = stack.pop()
        found = flow.writer(rank, ref, before)
        if not found or len(out) > MOST_TERMS or steps > MOST_CALLS:
            return []
        node = found[0]
        parts = _parts(flow, node, ref) if len(found) == 1 else None
        if parts is None:
            term = Term(rank, flow.delivered(node), ref, taken)
            out.setdefault((*term.key, len(out)), term)
        else:
            if len(parts) > 1 or flow.call(node).collective is not None:
                taken = node
            stack += [(*part, taken) for part in parts]
    return sorted(out.values(), key=lambda t: (t.rank, t.node))


def siblings(flow: Dataflow, terms: list[Term], ranks: list[int]) -> list[Term]:
    """What the same lines made in the same step, on these ranks, and that is no term: other microbatches' values, say."""
    known = {t.key for t in terms}
    out: list[Term] = []
    for t in terms:
        target = next((x for x in flow.call(t.node).targets() if x.storage == t.ref.storage and _holds(x, t.ref)), None)
        place = flow.place(t.node)
        for rank in ranks if target is not None and place is not None else ():
            for index in flow.at_place(rank, place):
                for other in flow.calls[rank][index].targets():
                    if (other.size, other.stride, other.dtype) == (target.size, target.stride, target.dtype):
                        ref = TensorRef(other.storage, other.offset + t.ref.offset - target.offset, t.ref.size, t.ref.stride, t.ref.dtype)
                        term = Term(rank, (rank, index), ref)
                        if term.key not in known:
                            known.add(term.key)
                            out.append(term)
        if len(known) > MOST_TERMS:
            return []
    return out


def _parts(flow: Dataflow, node: Node, ref: TensorRef) -> list[tuple[int, TensorRef, int]] | None:
    """The regions that the call made this one of, as sums or copies; None: it made something else."""
    call = flow.call(node)
    if call.name == "tv.wait":
        node = flow.sender(node)              # only receives are written by their wait
        return None if node is None else _parts(flow, node, ref)
    if call.collective is not None:
        return _collected(flow, node, call, ref)
    base = call.name.split(".")[1] if call.name.startswith("aten.") else ""
    if base not in SUMS and base not in SAME:
        return None
    for k, target in enumerate(call.targets()):
        if target.storage == ref.storage and _holds(target, ref):
            return _operands(call, base, k, target, ref, node)
    return None


def _operands(call: OpCall, base: str, k: int, target: TensorRef, ref: TensorRef, node: Node) -> list[tuple[int, TensorRef, int]] | None:
    args = [a.items[k] if isinstance(a, Sequence) and base.startswith("_foreach") and k < len(a.items) else a for a in call.args]
    if any(isinstance(a, ScalarRef) for a in args):
        return None                           # scaled by a number that depends on the weights
    tensors = [a for a in args if isinstance(a, TensorRef)]
    if base in ("copy_", "_foreach_copy_"):
        tensors = tensors[1:]
    whole = [moved for a in tensors if (moved := _shifted(a, target, ref)) is not None]
    if base in SUMS:
        return [(node[0], r, node[1]) for r in whole] if len(whole) == len(tensors) == 2 else None
    if len(whole) != 1 or any(a.size != () for a in tensors[1:]):
        return None
    return [(node[0], whole[0], node[1])]


def _collected(flow: Dataflow, node: Node, call: OpCall, ref: TensorRef) -> list[tuple[int, TensorRef, int]] | None:
    c = call.collective
    if c.kind == "recv":
        sent = flow.sender(node)
        if sent is None or not c.outputs or (moved := _shifted(flow.call(sent).collective.inputs[0], c.outputs[0], ref)) is None:
            return None
        return [(sent[0], moved, sent[1])]
    if c.kind not in ("all_reduce", "reduce_scatter", "reduce", "broadcast") or c.reduce_op in ("max", "min", "product"):
        return None
    at = next((k for k, o in enumerate(c.outputs) if o.storage == ref.storage and _holds(o, ref)), None)
    if at is None:
        return None
    out = []
    for member in flow.members(node):
        if c.kind == "broadcast" and member[0] != c.root:
            continue
        theirs = flow.call(member).collective.inputs
        me = c.group.index(node[0]) if node[0] in c.group else 0
        if c.kind == "reduce_scatter" and not c.listed:
            moved = _within(theirs[at], me * c.outputs[at].numel, c.outputs[at], ref)
        else:
            index = at * len(c.group) + me if c.kind == "reduce_scatter" else at
            moved = _shifted(theirs[index], c.outputs[at], ref) if index < len(theirs) else None
        if moved is None:
            return None
        out.append((member[0], moved, member[1]))
    return out or None


def _holds(target: TensorRef, ref: TensorRef) -> bool:
    """Whether the region lies inside the target, by extent."""
    return target.dtype == ref.dtype and target.offset <= ref.offset and _end(ref) <= _end(target)


def _end(ref: TensorRef) -> int:
    return ref.offset + sum((n - 1) * s for n, s in zip(ref.size, ref.stride)) + 1


def _shifted(source: TensorRef, target: TensorRef, ref: TensorRef) -> TensorRef | None:
    """The part of `source`, of the target's shape, that corresponds to the part `ref` of the target."""
    if source.numel != target.numel:
        return None
    if ref == target and source.size == target.size:
        return source
    if source.stride == target.stride and source.size == target.size or dense(source) and dense(target):
        return TensorRef(source.storage, source.offset + ref.offset - target.offset, ref.size, ref.stride, source.dtype)
    return None


def _within(source: TensorRef, first: int, target: TensorRef, ref: TensorRef) -> TensorRef | None:
    """The part of a flat source, from element `first` on, that corresponds to the part `ref` of the target."""
    if not dense(source) or not dense(target):
        return None
    return TensorRef(source.storage, source.offset + first + ref.offset - target.offset, ref.size, ref.stride, source.dtype)


def dense(ref: TensorRef) -> bool:
    """Contiguous in the order of its dimensions."""
    expected = 1
    for size, stride in zip(reversed(ref.size), reversed(ref.stride)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


@dataclass(frozen=True, slots=True)
class Stage:
    """A gradient before it was multiplied by a number (clipping), which the calls `factors` made ((): a tracked Python number)."""

    term: Term
    before: int                               # the call that multiplied it
    factors: tuple[Node, ...]


def stages(flow: Dataflow, rank: int, ref: TensorRef, before: int) -> list[Stage]:
    """What a value was before the multiplications by single numbers that came last, latest first."""
    out: list[Stage] = []
    while len(out) < MOST_STAGES:
        found = flow.writer(rank, ref, before)
        if not found:
            break
        call = flow.call(found[0])
        base = call.name.split(".")[1] if call.name.startswith("aten.") else ""
        if base not in SCALED and base not in COPIED:
            break
        at = next((k for k, t in enumerate(call.targets()) if t.storage == ref.storage and _holds(t, ref)), None)
        args = [a.items[at] if isinstance(a, Sequence) and base.startswith("_foreach") and at is not None and at < len(a.items) else a for a in call.args]
        tensors = [a for a in args if isinstance(a, TensorRef)]
        numbers = [a for a in args if isinstance(a, ScalarRef)]
        if base in ("copy_", "_foreach_copy_"):
            tensors = tensors[1:]
        if at is None or not tensors or (moved := _shifted(tensors[0], call.targets()[at], ref)) is None:
            break
        ref, before = moved, call.index
        if base in SCALED:
            if not numbers and (len(tensors) != 2 or tensors[1].size != () or "float" not in tensors[1].dtype):
                break                         # by a plain number, or a count
            factors = tuple(n for t in tensors[1:] for n in flow.writer(rank, t, call.index)[:1])
            made = flow.writer(rank, ref, before)
            if not made:
                break
            out.append(Stage(Term(rank, flow.delivered(made[0]), ref), before, factors))
    return out
