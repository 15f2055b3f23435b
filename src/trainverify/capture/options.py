"""What a capture may be told (frozen, passed down)."""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class CaptureOptions:
    """steps: how often step() is called; seed: of the symbols' tagged values; timeout: seconds of wall clock for each side;
    workdir: where traces and the checkpoint go (None: a temporary folder, removed when the programs have been read);
    ranks, case: as in the spec where None or empty; second_run: look for values that change without provenance (None: if any left);
    full_size: floats have sizes and no values (capture/meta.py); accept: FILE:LINE of branches on floats that are then not taken;
    nudge: in a second run, symbols' values close to the first's; digit: in further runs, which digit 16 bit symbols show (-1: none);
    routing: from 1 on, symbols have values farther from the initial ones, others for each number: data that they route goes other ways."""

    steps: int = 2
    seed: int = 0
    timeout: float = 300.0
    workdir: Path | None = None
    ranks: int | None = None
    case: dict = field(default_factory=dict)
    second_run: bool | None = None
    nudge: int = 0
    digit: int = -1
    full_size: bool = False
    accept: tuple[str, ...] = ()
    routing: int = 0
