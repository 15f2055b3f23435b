"""What a run may be told: frozen, passed down, no configuration singleton."""
from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainverify.diagnostics import Diagnostic, Fault


ENGINES = ("local", "ray")


@dataclass(frozen=True, slots=True)
class Options:
    """ranks: world size (None: the spec's RANKS); timeout: seconds of wall clock for each capture; accept: FILE:LINE of decisions
    that the user takes as matched; stand_ins: packages whose functions are taken as plain PyTorch; keep: keep the traces under workdir; second_opinion: "z3" or "cvc5" is asked about what was proved;
    certificate: a file for the proved obligations; dump_unknown: a folder for those that were not; counterexample: a file for a script
    that shows a difference; jobs: processes that analyse (from 2 on: the proof beside the rest, with all but two of them for theorems; the report is the same);
    engine: "local" or "ray": where theorems are proved; address: of the Ray cluster; repair: try repairs of
    what is refuted; self_test: plant bugs and see which the spec shows; full_size: capture sizes without the values of floats (implies reduce);
    routing: from 1 on, symbols have other values, for which data may be routed otherwise; cache: a verdict may be that of an earlier run on identical programs."""

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
    engine: str = "local"
    address: str = ""
    repair: bool = True
    self_test: bool = False
    cache: bool = False
    stand_ins: tuple[str, ...] = ()
    reduce: bool = False
    cross_check: bool = False
    full_size: bool = False
    routing: int = 0

    def check(self) -> None:
        """Raises Fault with OPT001 for a value that no run can have; the command line says it of its own arguments earlier."""
        wrong = {"ranks": self.ranks is not None and not _whole(self.ranks, 1) and "a number of processes, from 1 on", "steps": not _whole(self.steps, 1) and "a number from 1 on",
                 "jobs": not _whole(self.jobs, 1) and "a number of processes, from 1 on", "engine": self.engine not in ENGINES and f"one of {', '.join(ENGINES)}",
                 "address": bool(self.address) != (self.engine == "ray") and "given with engine='ray', and only then",
                 "seed": not _whole(self.seed, 0) and "an integer from 0 on", "timeout": not _positive(self.timeout) and "a positive number of seconds",
                 "accept": next((f"places FILE:LINE, and {a!r} is none" for a in self.accept if not _place(a)), False)}
        if found := [Diagnostic("OPT001", f"{name}={getattr(self, name)!r}: it must be {what}", fix=f"Give {name} another value, or leave it out.") for name, what in wrong.items() if what]:
            raise Fault(*found)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _place(value: Any) -> bool:
    return isinstance(value, str) and bool(value.rpartition(":")[0]) and value.rpartition(":")[2].isdecimal()
