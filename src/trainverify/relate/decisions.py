"""Matches the parallel program's decisions with the reference's: what float data chose must be chosen by the same values."""
from __future__ import annotations

import os

import torch

from trainverify.algebra.base import Complex
from trainverify.diagnostics import Diagnostic
from trainverify.ir.trace import inputs, tensors
from trainverify.replay.machine import Decision, Machine
from trainverify.replay.memory import is_float
from trainverify.replay.run import World


def match_decisions(reference: World, parallel: World, field, real, accept: tuple[str, ...]) -> tuple[list[Diagnostic], tuple[str, ...]]:
    """A diagnostic for each parallel decision some of whose operands are no reference decision's (by fingerprint: a guess, so
    that equality here never proves anything, and a mismatch only withholds a verdict), and for each place in `accept` (FILE:LINE)
    that accepts none; and the places of those that were accepted."""
    known: dict[str, set[int]] = {}
    for machine in reference.machines:
        for d in machine.decisions:
            known.setdefault(d.kind, set()).update(_prints(field, d))
    out: dict[tuple, Diagnostic] = {}
    accepted: dict[str, None] = {}
    used: set[str] = set()
    for machine in parallel.machines:
        for d in machine.decisions:
            span = machine.span(d.call)
            place = f"{span.file}:{span.line}" if span else ""
            prints = _prints(field, d)
            strange = prints - known.get(d.kind, set())
            if not strange or _idle(machine, d):
                continue
            if by := [a for a in accept if place and _names(a, place)]:
                used.update(by)
                accepted[place] = None
                continue
            key = (d.kind, place)
            old = out.get(key)
            ranks = tuple(sorted({machine.rank, *(old.ranks if old else ())}))
            out[key] = Diagnostic(
                "REL008", f"a {_words(d.kind)} is decided by values that decide nothing in the reference "
                f"({len(strange)} of {len(prints)} operands)", "error", old.span if old else span, ranks,
                (f"{d.call.name}; the reference decides by {len(known.get(d.kind, ()))} values of this kind",),
                f"make both sides decide by the same values, or accept it: --accept {place}")
    idle = [Diagnostic("ACC001", f"--accept {a} accepts nothing: no unmatched decision is made there", "warning",
                       fix="leave it out, or name the line that a REL008 of this run names") for a in accept if a not in used]
    return [*out.values(), *idle], tuple(accepted)


def _idle(machine: Machine, d: Decision) -> bool:
    """Whether a maximum's position is looked at by nobody: max(dim) gives it with the value, which does not depend on it."""
    if d.kind not in ("argmax", "argmin"):
        return False
    positions = {t.storage for t in tensors(d.call.outs) if not is_float(t.dtype)}
    return all(t.storage not in positions for call in machine.trace.ops for t in inputs(call))


def _names(given: str, place: str) -> bool:
    """Whether the user's FILE:LINE (absolute, relative to the working folder, or the end of a path) is this place."""
    file, _, line = given.rpartition(":")
    short = os.path.normpath(file)
    return place in (f"{short}:{line}", f"{os.path.abspath(file)}:{line}") or place.endswith(f"/{short}:{line}")


def _words(kind: str) -> str:
    return {"topk": "top-k choice", "cast": "cast to integer", "mask": "choice by a mask"}.get(kind, kind.replace("compare:", "comparison "))


def _prints(field, d: Decision) -> set[int]:
    out: set[int] = set()
    for v in d.operands.get("field", ()):
        for part in (v.re, v.im) if isinstance(v, Complex) else (v,):
            if not isinstance(part, torch.Tensor):
                out.update(field.fingerprint(part).reshape(-1).tolist())
    return out
