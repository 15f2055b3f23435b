"""Second opinions: what the kernel proved, put to an independent solver (not trusted: it can only raise an alarm).

The solver gets the negation of each claim as SMT-LIB. `unsat` agrees with the kernel. `sat` counts only if its point, evaluated
exactly or in intervals, does contradict the claim: then the kernel or the export is wrong, which is our bug.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from trainverify.certify.exact import Inexact, claim_holds
from trainverify.certify.interval import surely_fails
from trainverify.certify.smtlib import in_theory, name_of, parts, script
from trainverify.certify.solvers import Model, Solver, load
from trainverify.diagnostics import Diagnostic
from trainverify.kernel.terms import Obligation, digest

Answer = Literal["agrees", "disagrees", "no answer"]
REASONS = {"limit": "at the limit of their effort", "theory": "outside the theory (exp, log, sin, cos, high powers)", "incomplete": "the solver gave up"}


@dataclass(frozen=True, slots=True)
class Opinion:
    """reason: for no answer, a key of REASONS. values: for a disagreement, the leaf values at which the claim fails."""

    obligation: Obligation
    answer: Answer
    reason: Literal["", "limit", "theory", "incomplete"] = ""
    values: tuple[Fraction, ...] = ()


@dataclass(frozen=True, slots=True)
class Opinions:
    """What a solver said about each obligation, in order."""

    solver: str
    version: str
    opinions: tuple[Opinion, ...]

    def count(self, answer: Answer) -> int:
        return sum(o.answer == answer for o in self.opinions)

    def summary(self) -> str:
        """One line for the report."""
        reasons = Counter(o.reason for o in self.opinions if o.reason)
        parts = [f"{self.solver} {self.version} re-proved {self.count('agrees')} of {len(self.opinions)} obligations"]
        if reasons:
            parts.append(f"no answer on {sum(reasons.values())} ({', '.join(f'{n} {REASONS[r]}' for r, n in sorted(reasons.items()))})")
        if self.count("disagrees"):
            parts.append(f"disagrees on {self.count('disagrees')}")
        return "; ".join(parts)

    def diagnostics(self) -> list[Diagnostic]:
        """An internal error for each disagreement."""
        return [_alarm(self, o) for o in self.opinions if o.answer == "disagrees"]


def second_opinion(obligations: Iterable[Obligation], solver: str, limit: int | None = None,
                   progress: Callable[[int, int], None] | None = None) -> Opinions:
    """Ask z3 or cvc5 about obligations that the kernel proved. limit: effort for each, in the solver's resource units.

    progress is called with the number done and the number of all. Raises Fault with SMT001 if the solver is not installed.
    """
    loaded, todo, done = load(solver), list(obligations), []
    for obligation in todo:
        done.append(_ask(loaded, obligation, loaded.limit if limit is None else limit))
        if progress:
            progress(len(done), len(todo))
    return Opinions(loaded.name, loaded.version, tuple(done))


def _ask(solver: Solver, obligation: Obligation, limit: int) -> Opinion:
    outcome = solver.run(script(obligation), limit)
    exact = in_theory(obligation)
    if outcome.status == "unknown" and exact and "function" in parts(obligation):     # functions hide a model from the procedures for arithmetic
        weaker = solver.run(script(obligation, functions=False), limit)
        outcome = outcome if weaker.status == "unknown" else weaker
    if outcome.status == "unsat":
        return Opinion(obligation, "agrees")
    if outcome.model:
        leaves = tuple(outcome.model(f"x{k}") for k in range(obligation.leaves))
        if contradicted(obligation, leaves, outcome.model):
            return Opinion(obligation, "disagrees", "", leaves)
    return Opinion(obligation, "no answer", "theory" if not exact and outcome.status == "sat" else "limit" if outcome.limited else "incomplete")


def contradicted(obligation: Obligation, leaves: tuple[Fraction, ...], model: Model) -> bool:
    """Whether the claim fails at this point: exactly, or else in intervals."""
    tables: dict[tuple, Fraction] = {}

    def function(node: int, args: tuple[Fraction, ...]) -> Fraction:
        """The model's value of the first node that applies the function to these arguments."""
        at = (obligation.nodes[node].attr, args)
        if at not in tables:
            tables[at] = model(name_of(node))
        return tables[at]

    try:
        return not claim_holds(obligation, leaves, function)
    except Inexact:
        return surely_fails(obligation, leaves)


def _alarm(opinions: Opinions, opinion: Opinion) -> Diagnostic:
    at = ", ".join(f"x{k} = {v}" for k, v in enumerate(opinion.values) if v) or "all leaves 0"
    message = f"{opinions.solver} {opinions.version} has a counterexample to obligation {digest(opinion.obligation)}, which the kernel proved"
    return Diagnostic("SMT002", message, "internal", notes=(f"the sides differ, or the parallel one is undefined, at {at[:500]}",),
                      fix="Do not trust this verdict. Please report it with the obligation (--certificate holds it).")
