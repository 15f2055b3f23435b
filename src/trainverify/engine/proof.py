"""What a proof is, and when the reference lets one say something (trusted)."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from trainverify.algebra.constants import Rounding
from trainverify.diagnostics import Diagnostic
from trainverify.ir.trace import OpCall, Program, TensorRef
from trainverify.kernel.terms import Obligation
from trainverify.ops.table import OpTable
from trainverify.relate.compare import Comparison, Key, Lineage
from trainverify.relate.symbols import Binder, Symbols
from trainverify.replay.machine import Hooks, Machine
from trainverify.replay.run import World, replay


@dataclass(slots=True)
class Proof:
    """What was proved: outputs of the reference of which every element that a rank holds is; why not, for the others.

    diagnostics: what withholds all proofs (decisions that do not follow, a reference that is undefined); accepted: places of
    decisions that do not follow and that the user takes as matched (an assumption of the proof); counts: of the work; obligations:
    the distinct ones that were proved; failures: obligations that were not, each with its place and the reason; rounding: constants of the parallel
    side that were taken for the reference's.
    """

    proved: frozenset[Key] = frozenset()
    reasons: dict[Key, str] = field(default_factory=dict)
    diagnostics: list[Diagnostic] = field(default_factory=list)
    accepted: tuple[str, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    obligations: list[Obligation] = field(default_factory=list)
    failures: list[tuple[Obligation, str, str]] = field(default_factory=list)
    rounding: list[Rounding] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Lineages:
    """Which symbols parameters hold, as the comparison in the field found (to be confirmed by identifiers)."""

    ref_lineage: dict[tuple[int, str, str], Lineage]
    lineage: dict[tuple[int, str, str], Lineage]


class Vacuity:
    """Whether the reference is defined at the recorded inputs: what the store takes for a number is no NaN and no infinity there."""

    def __init__(self) -> None:
        self.found: list[Diagnostic] = []

    def value(self, machine: Machine, m, call: OpCall, k: int, ref: TensorRef) -> None:
        native = machine.native.tensor(ref)
        if self.found or native.is_complex():
            return
        finite = torch.isfinite(native.float() if native.itemsize == 1 else native)    # torch does not ask it of 8 bits
        if bool(finite.all()):
            return
        ids = m.ids(machine.value(m, ref))[~finite].numpy()
        if m.nodes.clean[ids].any():
            self.found.append(Diagnostic(
                "REL016", f"{call.name} of the reference gives what is no finite number at the recorded inputs: a proof would say nothing",
                "warning", machine.span(call), (machine.rank,), fix="give the reference inputs at which it is defined"))


def replayed(reference: Program, parallel: Program, m, table: OpTable, symbols: Symbols, progress: Callable) -> tuple[World, World, Vacuity]:
    """Both sides in the algebra of a proof, the reference first, and what says whether it is defined."""
    vacuity = Vacuity()
    worlds = [replayed_side(side, program, m, table, symbols, progress, vacuity) for side, program in (("reference", reference), ("parallel", parallel))]
    return worlds[0], worlds[1], vacuity


def replayed_side(side: str, program: Program, m, table: OpTable, symbols: Symbols, progress: Callable, vacuity: Vacuity) -> World:
    """One side in the algebra of a proof."""
    m.begin_side(side)
    binder = Binder(symbols, [m])
    hooks = Hooks(symbol=binder.symbol, bind=binder.bind, value=vacuity.value if side == "reference" else None)
    return replay(program, [m], table, hooks, lambda f: progress("prove", side, f))


def is_proved(comparison: Comparison, key: Key) -> bool:
    """Whether every element that a rank holds is proved, and every element is held."""
    c = comparison.compared[key]
    return bool(c.pieces) and not c.missing and not c.problems and all(bool(p.equal["terms"].all()) for p in c.pieces)
