"""z3 and cvc5, run in this process on SMT-LIB scripts (not trusted). Their packages are imported when they are first used.

Effort is limited in the solver's own resource units and never by a clock, so an answer does not depend on the machine.
"""
from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from types import ModuleType
from typing import Any, Literal

from trainverify.diagnostics import Diagnostic, Fault

DIGITS = 30            # of a coordinate that is not rational
Status = Literal["unsat", "sat", "unknown"]


Model = Callable[[str], Fraction]      # what a solver calls a counterexample: the value of a constant of the script, rational or near


@dataclass(frozen=True, slots=True)
class Outcome:
    """A solver's answer. limited: it gave up at its limit."""

    status: Status
    limited: bool = False
    model: Model | None = None


@dataclass(frozen=True, slots=True)
class Solver:
    """name, version, and how to run a script under a limit."""

    name: str
    version: str
    run: Callable[[str, int], Outcome]
    limit: int         # the usual limit, in the solver's units


def load(name: str) -> Solver:
    """The solver z3 or cvc5; raises Fault with SMT001 if its package is not there."""
    if name not in ("z3", "cvc5"):
        raise ValueError(f"no solver named {name!r}")
    try:
        module = importlib.import_module(name)
    except ImportError as e:
        package = "z3-solver" if name == "z3" else name
        raise Fault(Diagnostic("SMT001", f"the solver {name} cannot be loaded: {e}",
                               fix=f"pip install 'trainverify[smt]' (or only {package})")) from e
    if name == "z3":
        return Solver(name, module.get_version_string(), lambda script, limit: _run_z3(module, script, limit), 200_000)
    return Solver(name, module.__version__, lambda script, limit: _run_cvc5(module, script, limit), 50_000)


# ---- z3
def _run_z3(z3: ModuleType, script: str, limit: int) -> Outcome:
    """First the procedure for nonlinear real arithmetic, which takes functions for unknowns, then the general one with the arithmetic that keeps to limits.

    The ready-made strategy for this logic is a portfolio under clocks: its answers depend on the machine.
    """
    outcome = _check_z3(z3, script, limit, general=False)
    return _check_z3(z3, script, limit, general=True) if outcome.status == "unknown" else outcome


def _check_z3(z3: ModuleType, script: str, limit: int, general: bool) -> Outcome:
    context = z3.Context()
    if general:
        solver = z3.SimpleSolver(ctx=context)
        solver.set("smt.arith.solver", 2)
    else:
        solver = z3.Then("simplify", "propagate-values", "solve-eqs", "qfnra-nlsat", ctx=context).solver()
    solver.set("rlimit", limit)
    solver.from_string(script)
    answer = solver.check()
    if answer == z3.unsat:
        return Outcome("unsat")
    if answer == z3.unknown:
        return Outcome("unknown", any(word in solver.reason_unknown() for word in ("resource", "cancel")))
    return Outcome("sat", model=_model_z3(z3, solver.model(), context))


def _model_z3(z3: ModuleType, model: Any, context: Any) -> Model:
    def value(name: str) -> Fraction:
        term = model.eval(z3.Real(name, ctx=context), model_completion=True)
        if z3.is_algebraic_value(term):
            term = term.approx(DIGITS)
        return Fraction(term.numerator_as_long(), term.denominator_as_long())

    return value


# ---- cvc5
def _run_cvc5(cvc5: ModuleType, script: str, limit: int) -> Outcome:
    """Incremental linearisation only: the coverings method does not keep to limits."""
    terms = cvc5.TermManager()
    solver = cvc5.Solver(terms)
    for option, value in {"rlimit-per": str(limit), "produce-models": "true", "nl-cov": "false", "nl-ext": "full"}.items():
        solver.setOption(option, value)
    parser = cvc5.InputParser(solver)
    parser.setStringInput(cvc5.InputLanguage.SMT_LIB_2_6, script.replace("(check-sat)", ""), "obligation")
    symbols = parser.getSymbolManager()
    while not (command := parser.nextCommand()).isNull():
        command.invoke(solver, symbols)
    answer = solver.checkSat()
    if answer.isUnsat():
        return Outcome("unsat")
    if not answer.isSat():
        return Outcome("unknown", answer.getUnknownExplanation() == cvc5.UnknownExplanation.RESOURCEOUT)
    return Outcome("sat", model=_model_cvc5(solver, {t.getSymbol(): t for t in symbols.getDeclaredTerms()}))


def _model_cvc5(solver: Any, declared: dict[str, Any]) -> Model:
    def value(name: str) -> Fraction:
        if name not in declared:
            return Fraction(0)
        term = solver.getValue(declared[name])
        if term.isRealValue():
            return Fraction(term.getRealValue())
        low, high = term.getRealAlgebraicNumberLowerBound(), term.getRealAlgebraicNumberUpperBound()
        return (Fraction(low.getRealValue()) + Fraction(high.getRealValue())) / 2

    return value
