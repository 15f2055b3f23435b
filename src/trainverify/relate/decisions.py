"""Matches the parallel program's decisions with the reference's: what float data chose must be chosen by the same values."""
from __future__ import annotations

import functools

import msgspec
import numpy as np
import torch

from trainverify.algebra.base import Complex
from trainverify.diagnostics import Diagnostic, names_place
from trainverify.ir.trace import OpCall, Sequence, TensorRef, inputs, tensors
from trainverify.replay.machine import Decision, Machine
from trainverify.replay.memory import is_float
from trainverify.replay.run import World

CHOOSES = ("topk", "sort", "argmax", "argmin", "kthvalue", "median")
ORDERED = ("sort",)


def match_decisions(reference: World, parallel: World, field, real, accept: tuple[str, ...]) -> tuple[list[Diagnostic], tuple[str, ...]]:
    """A diagnostic for each parallel decision some of whose operands are no reference decision's (by fingerprint: a guess, so
    that equality here never proves anything, and a mismatch only withholds a verdict); and the places (FILE:LINE) of those that `accept` accepts."""
    known: dict[str, set[int]] = {}
    constants = set(field.fingerprint(field.data(torch.tensor([0.0, 1.0]))).tolist())      # masks that no symbol decides
    taken: dict[tuple[str, bytes], bytes] = {}
    for machine in reference.machines:
        for d in machine.decisions:
            known.setdefault(d.kind, set()).update(_prints(field, d))
            for key, outcome, _ in _choices(field, d):
                taken.setdefault((d.kind, key), outcome)
    out: dict[tuple, Diagnostic] = {}
    accepted: dict[str, None] = {}
    is_idle = Idle()
    for machine in parallel.machines:
        for d in machine.decisions:
            span = machine.span(d.call)
            place = f"{span.file}:{span.line}" if span else ""
            prints = _prints(field, d)
            strange = prints - known.get(d.kind, set()) - (constants | _outcomes(field, d) if d.kind in ("mask", "cast") else set())
            if is_idle(machine, d):
                continue
            if not strange:
                _note_tie(out, machine, d, [gap for key, outcome, gap in _choices(field, d) if taken.get((d.kind, key), outcome) != outcome])
                continue
            if is_accepted(place, accept):
                accepted[place] = None
                continue
            key = (d.kind, place)
            old = out.get(key)
            ranks = tuple(sorted({machine.rank, *(old.ranks if old else ())}))
            out[key] = Diagnostic(
                "REL008", f"a {words_of(d.kind)} is decided by values that decide nothing in the reference "
                f"({len(strange)} of {len(prints)} operands)", "error", old.span if old else span, ranks,
                (f"{d.call.name}; the reference decides by {len(known.get(d.kind, ()))} values of this kind",),
                f"make both sides decide by the same values, or accept it: --accept {place}")
    return list(out.values()), tuple(accepted)


def idle_accepts(accept: tuple[str, ...], accepted: tuple[str, ...]) -> list[Diagnostic]:
    """A diagnostic for each of the user's places at which nothing had to be accepted."""
    return [Diagnostic("ACC001", f"--accept {a} accepts nothing: no unmatched decision is made there", "warning",
                       fix="leave it out, or name the line that a REL008 or REL017 of this run names")
            for a in accept if not any(names_place(a, place) for place in accepted)]


def _note_tie(out: dict[tuple, Diagnostic], machine: Machine, d: Decision, gaps: list[str]) -> None:
    """A choice among the reference's own values that fell differently: they are equal up to rounding."""
    if not gaps:
        return
    span = machine.span(d.call)
    key = ("tie", d.kind, f"{span}")
    old = out.get(key)
    out[key] = old or Diagnostic(
        "REL011", f"a {words_of(d.kind)} of the same values as the reference's fell differently ({len(gaps)} of its choices): a tie up to rounding", "warning",
        span, (), tuple(dict.fromkeys(g for g in gaps[:2] if g)), "run with another --seed; outputs that depend on the choice may differ for this reason alone")
    out[key] = msgspec.structs.replace(out[key], ranks=tuple(sorted({machine.rank, *out[key].ranks})))


def _choices(field, d: Decision):
    """(what is chosen from, what was chosen, how near) for every choice of a decision, as fingerprints in an order of their own: experts
    or rows that stand in another order are the same choice. Kinds that are no such choice give none."""
    values = [v for v in d.operands.get("field", ()) if not isinstance(v, (torch.Tensor, Complex))]
    real = [v for v in d.operands.get("real", ()) if hasattr(v, "t")]
    name = d.kind.partition(":")[0]
    if name in CHOOSES and len(values) == 1 and isinstance(d.outcome, torch.Tensor) and values[0].shape:
        yield from _rows(name, field.fingerprint(values[0]), d.outcome, real[0].t if real else None)
    elif name == "compare" and len(values) == len(d.operands.get("field", ())) == 2:
        prints = [field.fingerprint(v).reshape(-1) for v in values]
        gap = " and ".join(repr(float(v.t.reshape(-1)[0])) for v in real)
        yield torch.stack(prints).numpy().tobytes(), str(bool(d.outcome)).encode(), gap


def _rows(name: str, prints: torch.Tensor, outcome: torch.Tensor, real: torch.Tensor | None):
    n = prints.shape[-1]
    rows = prints.reshape(-1, n).numpy()
    chosen = outcome.reshape(len(rows), -1).numpy() if len(rows) else np.zeros((0, 1), dtype=np.int64)
    floats = real.reshape(-1, n).numpy() if real is not None else None
    for k, (row, at) in enumerate(zip(rows, chosen)):
        picked = row[at] if name in ORDERED else np.sort(row[at])
        rest = np.setdiff1d(np.arange(n), at)
        gap = "" if floats is None or not len(rest) else f"chosen: {floats[k][at].tolist()}; not chosen: {floats[k][rest].tolist()[:4]}"
        yield np.sort(row).tobytes(), picked.tobytes(), gap


class Idle:
    """Whether nobody looks at what was chosen: the position that max(dim) gives with the value, which does not depend on it, or all that a choice gave
    (a router's, where a balanced routing takes its place)."""

    def __init__(self) -> None:
        self._taken: dict[int, set[int]] = {}     # of each rank of a side, by its machine: storages from which something is computed that matters

    def __call__(self, machine: Machine, d: Decision) -> bool:
        name = d.kind.partition(":")[0]
        if name not in CHOOSES or d.call.writes:
            return False
        taken = self._taken.get(id(machine))
        if taken is None:
            taken = self._taken[id(machine)] = _taken(machine)
        return taken.isdisjoint([t.storage for t in tensors(d.call.outs) if name not in ("argmax", "argmin") or not is_float(t.dtype)])


def _taken(machine: Machine) -> set[int]:
    """What some call takes whose results are taken in turn, or that does more than to give results: Python sees how many elements there are."""
    found: set[int] = set()
    for call in reversed(machine.trace.ops):
        gives = [t.storage for t in call.targets()]
        if (call.collective is not None or call.name.startswith("tv.") or not gives or not isinstance(call.outs, (TensorRef, Sequence, type(None)))
                or is_sized_by_data(call) or not found.isdisjoint(gives)):
            found.update(t.storage for t in (*inputs(call), *(call.collective.inputs if call.collective else ())))
    return found


def is_sized_by_data(call: OpCall) -> bool:
    """Whether data may decide how many elements the results have, which Python sees without asking."""
    if call.name.startswith(("aten.index.", "aten._unsafe_index.")):
        return any(t.dtype in ("bool", "uint8") for t in tensors(call.args[1]))
    return not call.name.startswith("tv.") and call.collective is None and _may_be_sized_by_data(call.name)


@functools.lru_cache(maxsize=None)
def _may_be_sized_by_data(name: str) -> bool:
    try:
        namespace, op, overload = name.split(".")
        return torch.Tag.dynamic_output_shape in getattr(getattr(getattr(torch.ops, namespace), op), overload).tags
    except (AttributeError, ValueError):      # not known here
        return True


def is_accepted(place: str, accept: tuple[str, ...]) -> bool:
    return bool(place) and any(names_place(a, place) for a in accept)


def words_of(kind: str) -> str:
    return {"topk": "top-k choice", "cast": "cast to integer", "mask": "choice by a mask"}.get(kind, kind.replace("compare:", "comparison "))


def _outcomes(field, d: Decision) -> set[int]:
    """What the numbers are that a cast gave: an integer that is cast is no choice, also where it stands among symbols."""
    return set(field.fingerprint(field.data(d.outcome.to(torch.float64))).reshape(-1).tolist()) if isinstance(d.outcome, torch.Tensor) else set()


def _prints(field, d: Decision) -> set[int]:
    out: set[int] = set()
    for v in d.operands.get("field", ()):
        for part in (v.re, v.im) if isinstance(v, Complex) else (v,):
            if not isinstance(part, torch.Tensor):
                out.update(field.fingerprint(part).reshape(-1).tolist())
    return out
