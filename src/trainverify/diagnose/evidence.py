"""What a finding shows: values on which the sides differ, and the operands of an operation with what they hold of the reference (not trusted)."""
from __future__ import annotations

import numpy as np

from trainverify.diagnose.dataflow import Node
from trainverify.diagnose.origin import Search
from trainverify.diagnose.relation import Relations
from trainverify.diagnose.terms import dense
from trainverify.diagnose.watch import CONSTANT, GOOD, OPEN
from trainverify.diagnose.words import box
from trainverify.engine.verdict import Judgement
from trainverify.ir.trace import TensorRef, inputs
from trainverify.relate.layout import describe
from trainverify.replay.memory import is_float
from trainverify.report.model import Operand, Witness

STATUS = {GOOD: "agrees with the reference", OPEN: "no value of the reference", CONSTANT: "a constant that the reference lacks"}


def operands(search: Search, relations: Relations, node: Node) -> tuple[Operand, ...]:
    call = search.flow.call(node)
    refs = call.collective.inputs if call.collective is not None else tuple(inputs(call))
    out = [_operand(search, relations, node, f"input {i}", ref) for i, ref in enumerate(refs[:4])]
    targets = call.collective.outputs if call.collective is not None else call.targets()
    return (*out, *(Operand("result", ref.size, ref.dtype, status_words(search.status(node))) for ref in targets[:1]))


def status_words(status: str) -> str:
    return STATUS.get(status, f"{status[2:]} x a value of the reference")


def _operand(search: Search, relations: Relations, node: Node, role: str, ref: TensorRef) -> Operand:
    if not is_float(ref.dtype):
        return Operand(role, ref.size, ref.dtype, "")
    makers = search.flow.writer(node[0], ref, node[1])
    bad = next((s for p in makers if (s := search.status(p)) != GOOD), GOOD)
    words = status_words(bad)
    if all((s := search.flow.span(p)) is None or s.phase == "setup" for p in makers) and (held := parameter_words(relations, node[0], ref)):
        words = held
    elif bad == GOOD and len(makers) == 1:
        words = origin_words(search, relations, makers[0], ref) or words
    sent = next((s for p in makers if (s := search.flow.sender(p)) is not None), None)
    return Operand(role, ref.size, ref.dtype, words + (f"; received from rank {sent[0]}" if sent is not None else ""))


def parameter_words(relations: Relations, rank: int, ref: TensorRef) -> str:
    """Which elements of the reference's weights a parameter holds, "" for any other memory."""
    comparison = relations.comparison
    machine = next(m for m in comparison.parallel.machines if m.rank == rank)
    for _, name, held, _ in machine.params:
        line = comparison.lineage_of(rank, "parameter", name)
        if held.storage == ref.storage and held.numel == ref.numel and held.offset == ref.offset and line is not None and line.bound:
            return f"holds {describe(comparison.symbols, line)}"
    return ""


def origin_words(search: Search, relations: Relations, maker: Node, ref: TensorRef) -> str:
    """Which part of which value of the reference an operand holds, "" if that cannot be said in a few words."""
    prints = prints_of(search, maker, ref)
    found = search.watch.home(prints) if prints is not None else None
    if found is None or found[0].call < 0:
        return ""
    home, flat = found
    call = relations.comparison.reference.machines[0].trace.ops[home.call]
    targets = call.collective.outputs if call.collective is not None else call.targets()
    shape = targets[home.target].size if home.target < len(targets) else ()
    part = box(flat, shape) if (flat >= 0).all() else ""
    whole = part and set(part) <= set("[]:, ")
    return f"equals {relations.home_words(home)}" + (f", its part {part} of {list(shape)}" if part and not whole else "")


def prints_of(search: Search, maker: Node, ref: TensorRef) -> np.ndarray | None:
    """Fingerprints of a region that a call wrote, if they were kept."""
    for target, prints in search.watch.printed.get(search.flow.delivered(maker), ()):
        if target.storage != ref.storage or len(prints) != target.numel:
            continue
        if target == ref:
            return prints
        if dense(target):
            at = np.full(ref.size, ref.offset - target.offset, dtype=np.int64)
            for d, (n, stride) in enumerate(zip(ref.size, ref.stride)):
                at += (np.arange(n) * stride).reshape([-1 if k == d else 1 for k in range(len(ref.size))])
            if at.size and at.min() >= 0 and at.max() < len(prints):
                return prints[at.reshape(-1)]
    return None


def witnesses(judgements: list[Judgement], most: int = 3) -> tuple[Witness, ...]:
    """Concrete elements on which the sides differ, the largest difference first in each output."""
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
    return "[" + ", ".join(str(int(i)) for i in np.unravel_index(flat, shape)) + "]" if shape else ""
