"""The decision procedure for obligations: the only place that makes a Proved (trusted).

Order: equality up to the order of sums and products; sample points, which refute cheaply and before anything expensive; equal
normal forms; equal normal forms once denominators are multiplied out. Budgets count steps, so results do not depend on the
machine. Whatever does not succeed is Unknown, with a reason.
"""
from __future__ import annotations

from dataclasses import InitVar, dataclass
from fractions import Fraction
from typing import Literal

from trainverify.kernel.normal import Builder, Undefined
from trainverify.kernel.poly import OutOfSteps, Steps
from trainverify.kernel.refute import Point, late_refuting_point, refuting_point
from trainverify.kernel.terms import Obligation, merged, reachable

BUDGET = 300_000
_TOKEN = object()

Reason = Literal[
    "definedness",     # equal where both are defined, but nothing shows that the parallel side is defined wherever the reference is
    "not equal",       # the normal forms differ, and no point was found that refutes
    "no point",        # no sample point has both sides defined: the claim may be empty
    "undefined",       # one side is defined nowhere
    "budget",
]


@dataclass(frozen=True, slots=True)
class Proved:
    """The obligation holds for all values of its leaves. Only `prove` makes one."""

    obligation: Obligation
    how: Literal["same", "flat", "cleared"]
    steps: int
    token: InitVar[object]

    def __post_init__(self, token: object) -> None:
        if token is not _TOKEN:
            raise TypeError("only trainverify.kernel.prove makes a Proved")


@dataclass(frozen=True, slots=True)
class Refuted:
    """The sides differ at these leaf values (under one meaning of the uninterpreted functions); rhs is None where it is undefined."""

    values: tuple[Fraction, ...]
    lhs: float
    rhs: float | None
    steps: int = 0


@dataclass(frozen=True, slots=True)
class Unknown:
    """No decision. nodes: for "definedness", the nodes (of the given obligation) whose condition did not follow."""

    reason: Reason
    steps: int = 0
    nodes: tuple[int, ...] = ()


Verdict = Proved | Refuted | Unknown


def prove(obligation: Obligation, budget: int = BUDGET) -> Verdict:
    """Decide an obligation; the budget counts products of monomials. Raises ValueError if it is malformed."""
    small, origins = merged(obligation)
    if small.lhs == small.rhs:
        return Proved(obligation, "same", 0, _TOKEN)
    agreed = refuting_point(small)
    if isinstance(agreed, Point):
        return Refuted(agreed.values, agreed.lhs, agreed.rhs)
    steps = Steps(budget)
    how, missing = normal_forms_agree(small, steps)
    used = budget - max(steps.left, 0)
    if how in ("flat", "cleared") and not missing:
        return Proved(obligation, how, used, _TOKEN) if agreed else Unknown("no point", used)
    if point := late_refuting_point(small):
        return Refuted(point.values, point.lhs, point.rhs, used)
    return Unknown("definedness" if how in ("flat", "cleared") else how, used, tuple(origins[i] for i in missing))


def normal_forms_agree(obligation: Obligation, steps: Steps) -> tuple[str, tuple[int, ...]]:
    """(flat or cleared if the sides are equal where defined, else a reason; the parallel side's nodes that may be undefined)."""
    builder = Builder(obligation.nodes, dict(obligation.given), steps)
    reference = reachable(obligation.nodes, [obligation.lhs, *(i for i, _ in obligation.given)])
    parallel = reachable(obligation.nodes, [obligation.rhs])
    try:
        builder.build(reference, reference=True)
        if builder.signs.changed:             # a fact came after a rule asked for it
            builder.restart()
            builder.build(reference, reference=True)
        builder.build(parallel, reference=False)
        missing = tuple(builder.missing)
        if builder.signs.changed:             # definedness is settled: both sides again, with all the facts
            builder.restart()
            builder.build([*reference, *parallel], reference=True)
        lhs, rhs = builder.values[obligation.lhs], builder.values[obligation.rhs]
        if lhs == rhs:
            return "flat", missing
        return ("cleared" if builder.functions.ring.equal(lhs, rhs) else "not equal"), missing
    except Undefined:
        return "undefined", ()
    except OutOfSteps:
        return "budget", ()
