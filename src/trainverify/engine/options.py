"""What a run may be told: frozen, passed down, no configuration singleton."""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Options:
    """ranks: world size (None: the spec's RANKS); timeout: seconds of wall clock for each capture; accept: FILE:LINE of decisions
    that the user takes as matched; stand_ins: packages whose functions are taken as plain PyTorch; keep: keep the traces under workdir; second_opinion: "z3" or "cvc5" is asked about what was proved;
    certificate: a file for the proved obligations; dump_unknown: a folder for those that were not; counterexample: a file for a script
    that shows a difference; jobs: processes that analyse (2: the proof beside the rest; the report is the same); repair: try repairs of
    what is refuted; self_test: plant bugs and see which the spec shows; full_size: capture sizes without the values of floats (implies reduce); cache: a verdict may be that of an earlier run on identical programs."""

    ranks: int | None = None
    case: dict = field(default_factory=dict)
    steps: int = 2
    seed: int = 0
    timeout: float = 300.0
    accept: tuple[str, ...] = ()
    dry_run: bool = False
    workdir: Path | None = None
    keep: bool = False
    conform: bool = True
    second_opinion: str = ""
    certificate: Path | None = None
    dump_unknown: Path | None = None
    counterexample: Path | None = None
    jobs: int = 2
    repair: bool = True
    self_test: bool = False
    cache: bool = False
    stand_ins: tuple[str, ...] = ()
    reduce: bool = False
    cross_check: bool = False
    full_size: bool = False
