"""Which routing a run covered: the choices that data made in the reference, by place (words for an assumption; not trusted).

A verdict holds for the routing that was recorded. How often each index was chosen shows whether that is a routing worth covering
(every expert has tokens), and a checksum tells two routings apart.
"""
from __future__ import annotations

import os
import zlib
from dataclasses import dataclass, field

import torch

from trainverify.replay.run import World

_CHOICES = ("topk", "sort", "kthvalue", "argmax", "argmin", "cast", "mask")    # kinds of decisions, as far as their first ":"
_PLACES, _SHOWN = 4, 16                       # places that are told, numbers of one place


@dataclass
class _Place:
    """The largest-k choices that were made at one line: how many there are to choose from, and how often each was taken."""

    k: int
    taken: torch.Tensor
    calls: int = field(default=0)


def is_choice(kind: str) -> bool:
    """Whether a decision of this kind picks by data: routing, sorting, masks, indices."""
    return kind.split(":")[0] in _CHOICES


def covered(reference: World) -> str:
    """The routing of the reference's step, "" where none of its choices picks the largest of several."""
    places: dict[str, _Place] = {}
    checksum = 0
    for machine in reference.machines:
        for d in machine.decisions:
            kind = d.kind.split(":")
            if not is_choice(d.kind) or not isinstance(d.outcome, torch.Tensor):
                continue
            checksum = zlib.crc32(d.outcome.contiguous().numpy().tobytes(), checksum)
            operand = next(iter(d.operands.values()))[0]
            if kind[0] == "topk" and operand.shape:
                span = machine.span(d.call)
                at = places.setdefault(f"{os.path.basename(span.file)}:{span.line}" if span else "an unknown line", _Place(int(kind[1]), torch.zeros(0, dtype=torch.int64)))
                counts = torch.bincount(d.outcome.reshape(-1), minlength=operand.shape[-1])
                longer = torch.zeros(max(len(counts), len(at.taken)), dtype=torch.int64)
                longer[:len(at.taken)] += at.taken
                longer[:len(counts)] += counts
                at.taken, at.calls = longer, at.calls + 1
    if not places:
        return ""
    told = [_told(name, at) for name, at in places.items()]
    more = [f"and {len(told) - _PLACES} more places"] if len(told) > _PLACES else []
    return f"{'; '.join([*told[:_PLACES], *more])}; checksum {checksum:08x}"


def _told(name: str, at: _Place) -> str:
    counts = at.taken.tolist()
    shown = ", ".join(map(str, counts[:_SHOWN])) + (", ..." if len(counts) > _SHOWN else "")
    return f"top {at.k} of {len(counts)} at {name} took these {shown} times"
