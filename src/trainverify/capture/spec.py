"""Spec files: loading them, their functions and settings, and cases from the command line (not trusted).

A spec is the user's Python file. Everything that is wrong with it is a diagnostic that shows the user's own line.
"""
from __future__ import annotations

import inspect
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainverify import adapters
from trainverify.adapters import standins
from trainverify.api import CustomOp
from trainverify.capture.userframes import frame_text, frames_of_exception
from trainverify.diagnostics import Diagnostic, Fault, Span
from trainverify.ops import custom
from trainverify.ops.table import OpRow

Value = str | int | float | bool


@dataclass(frozen=True)
class Spec:
    """A spec as it was read. ranks: default world size, or a function of the case; cases: the spec's CASES; path: "" for functions.

    accept: the spec's ACCEPT, places of decisions that it takes as matched (as --accept does).
    """

    path: str
    reference: Callable[[], Any]
    parallel: Callable[..., Any]
    ranks: int | Callable[..., int] | None = None
    cases: tuple[dict[str, Any], ...] = ()
    ops: tuple[Any, ...] = ()
    accept: tuple[str, ...] = ()

    # What scripts in place of a spec do otherwise (capture/script.py): what runs in the processes, and what is done before and after the parallel side.
    children = None

    def before_parallel(self, handed: Any, options: Any, folder: Path) -> tuple[Diagnostic, ...]:
        """Nothing is to be done; diagnostics would keep the parallel side from running."""
        return ()

    def settle(self, reference: Any, parallel: Any, folder: Path) -> tuple[Diagnostic, ...]:
        """step() says which scalars there are."""
        return ()

    def op_rows(self) -> tuple[OpRow, ...]:
        """Rows for custom ops, made anew: they belong to one run."""
        return tuple(_row(o) for o in self.ops)

    def case(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments for parallel(ref, ...): what was given, checked against its signature and brought to its types.

        Where nothing is given and parallel has parameters without defaults, the first of CASES fills them in.
        """
        parameters = _case_parameters(self.parallel)
        anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        known = {k: p for k, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
        unknown = [k for k in given if k not in known and not anything]
        if unknown:
            names = ", ".join(known) or "none"
            raise self._fault("SPEC006", f"parallel() has no argument {unknown[0]!r} (its arguments after ref: {names})",
                              "Use one of them in --case, or add the argument to parallel().")
        merged = dict(given)
        if not given and self.cases and (anything or any(p.default is p.empty for p in known.values())):
            merged = dict(self.cases[0])
        missing = [k for k, p in known.items() if p.default is p.empty and k not in merged]
        if missing:
            raise self._fault("SPEC006", f"parallel() needs a value for {', '.join(missing)}", f"Pass --case {missing[0]}=VALUE, or give it a default.")
        return {k: self._typed(k, v, known.get(k)) for k, v in merged.items()}

    def for_reference(self, case: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the case that reference() takes too: sizes that both sides must have."""
        parameters = inspect.signature(self.reference).parameters.values()
        named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        return {k: v for k, v in case.items() if k in named}

    def world_size(self, ranks: int | None, case: dict[str, Any]) -> int:
        """The number of ranks to run."""
        n = ranks if ranks is not None else self.ranks
        if callable(n):
            n = call_user(lambda: self.ranks(**case), "RANKS")
        if n is None:
            raise Fault(Diagnostic("SPEC005", "the spec does not say how many ranks to run", span=self._whole(), fix="Define RANKS = N in the spec, or pass --ranks N."))
        if type(n) is not int or n < 1:
            raise Fault(Diagnostic("SPEC005", f"RANKS is {n!r}, which is no positive integer", span=self._whole(), fix="Define RANKS = N in the spec."))
        return n

    def _typed(self, key: str, value: Any, parameter: inspect.Parameter | None) -> Any:
        kind = _expected_type(parameter)
        if kind is None or not isinstance(value, (str, int, float, bool)):
            return value
        try:
            return _convert(value, kind)
        except ValueError:
            raise self._fault("SPEC007", f"case argument {key}={value!r} is no {kind.__name__}",
                              f"parallel() takes {key} as {kind.__name__}.") from None

    def _whole(self) -> Span | None:
        return Span(self.path, 0, "", phase="") if self.path else None

    def _fault(self, code: str, message: str, fix: str) -> Fault:
        code_object = getattr(self.parallel, "__code__", None)
        span = Span(code_object.co_filename, code_object.co_firstlineno, code_object.co_name, phase="setup") if code_object else None
        return Fault(Diagnostic(code, message, span=span, fix=fix))


def load_spec(path: str | Path, stand_ins: Iterable[str] = ()) -> Spec:
    """Import a spec file; raises Fault with a SPEC code for everything that keeps it from being used.

    stand_ins: packages that are stood in for; others are where the spec cannot be imported without them.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise Fault(Diagnostic("SPEC001", f"{path}: no such file", fix="Name a Python file that defines reference() and parallel(ref)."))
    folder = str(file.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    adapters.install(stand_ins)                # before the spec imports a framework
    module = types.ModuleType(file.stem)
    module.__file__ = str(file)
    sys.modules[file.stem] = module            # functions and classes of the spec must be found by their module's name

    def run() -> None:
        exec(compile(file.read_bytes(), str(file), "exec"), module.__dict__)

    def run_with_stand_ins() -> None:
        while True:
            try:
                return run()
            except ModuleNotFoundError as missing:
                if not standins.provide_missing(missing.name or ""):
                    raise

    try:
        call_user(run_with_stand_ins, f"importing {file.name}", "SPEC002")
    except Fault:
        del sys.modules[file.stem]
        raise
    return _spec(str(path), str(file), vars(module))


def spec_of(reference: Callable, parallel: Callable, ranks: int | None = None, ops: Iterable[Any] = (), stand_ins: Iterable[str] = ()) -> Spec:
    """A spec from two functions, as a file would define them."""
    adapters.install(stand_ins)
    names = {"reference": reference, "parallel": parallel, "RANKS": ranks, "OPS": list(ops)}
    return _spec("", getattr(getattr(parallel, "__code__", None), "co_filename", ""), names)


def call_user(function: Callable[[], Any], what: str, code: str = "SPEC002") -> Any:
    """Run the user's code here in the parent; an exception becomes a diagnostic with the user's own line."""
    try:
        return function()
    except (Exception, SystemExit) as error:
        frames = frames_of_exception(error)
        span = Span(*frames[-1][:3], phase="setup", stack=tuple(f[:3] for f in frames[-2::-1])) if frames else None
        notes = tuple(map(frame_text, reversed(frames)))
        raise Fault(Diagnostic(code, f"{what} raised {type(error).__name__}: {error}", span=span, notes=notes,
                               fix="The spec must be importable by itself; run `python` on it to see the error.")) from error


def _spec(path: str, file: str, names: dict[str, Any]) -> Spec:
    for name, what in (("reference", "reference()"), ("parallel", "parallel(ref)")):
        if not callable(names.get(name)):
            kind = "no" if names.get(name) is None else f"a {type(names[name]).__name__} in place of"
            raise Fault(Diagnostic("SPEC003", f"{file or 'the spec'} defines {kind} {what}", span=Span(file, 0, "", phase="") if file else None,
                                   fix="Define reference() -> tv.Training and parallel(ref, **case) -> tv.Training."))
        _takes(names[name], file, what, *(() if name == "reference" else ("ref",)))
    cases = names.get("CASES") or ()
    if isinstance(cases, dict):
        cases = tuple(cases.values())
    if not isinstance(cases, (list, tuple)) or not all(isinstance(c, dict) for c in cases):
        raise Fault(Diagnostic("SPEC004", f"CASES is {cases!r}, which is no list of dicts", span=Span(file, 0, "", phase=""),
                               fix='Write CASES = [{"tp": 2}, {"tp": 3}].'))
    ops = names.get("OPS") or ()
    wrong = [o for o in ops if not isinstance(o, (CustomOp, OpRow))] if isinstance(ops, (list, tuple)) else [ops]
    if wrong:
        raise Fault(Diagnostic("SPEC004", f"OPS holds {wrong[0]!r}, which is no tv.op", span=Span(file, 0, "", phase=""),
                               fix='Write OPS = [tv.op("mylib::fused", meaning=function)].'))
    twice = [n for n, k in Counter(_row(o).name for o in ops).items() if k > 1]
    if twice:
        raise Fault(Diagnostic("SPEC004", f"OPS explains {twice[0]} twice", span=Span(file, 0, "", phase=""), fix="Keep one of them."))
    accept = names.get("ACCEPT") or ()
    if not isinstance(accept, (list, tuple)) or not all(isinstance(a, str) and a.rpartition(":")[2].isdigit() for a in accept):
        raise Fault(Diagnostic("SPEC004", f"ACCEPT is {accept!r}, which is no list of places", span=Span(file, 0, "", phase=""),
                               fix='Write ACCEPT = ["path/file.py:12"]: the lines of decisions to take as matched.'))
    return Spec(path, names["reference"], names["parallel"], names.get("RANKS"), tuple(cases), tuple(ops), tuple(accept))


def _row(op: CustomOp | OpRow) -> OpRow:
    """What OPS says of one op as a row."""
    if isinstance(op, OpRow):
        return replace(op, kind=custom.KIND)
    name = custom.op_name(op.name)
    return custom.uninterpreted_row(name, op.pointwise) if op.meaning is None else custom.function_row(name, op.meaning)


def _takes(function: Callable, file: str, what: str, *given: str) -> None:
    """Whether a function of the spec can be called as it will be (parallel's own case arguments aside)."""
    parameters = list(inspect.signature(function).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    variable = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    unfilled = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if (len(positional) < len(given) and not variable) or (not given and unfilled):
        line = getattr(getattr(function, "__code__", None), "co_firstlineno", 1)
        raise Fault(Diagnostic("SPEC003", f"{function.__name__}{inspect.signature(function)} cannot be called as {what}",
                               span=Span(file, line, function.__name__, phase="setup"), fix=f"Define it as {what}."))


def _case_parameters(parallel: Callable) -> dict[str, inspect.Parameter]:
    """The parameters of parallel() after ref."""
    parameters = dict(list(inspect.signature(parallel).parameters.items())[1:])
    return {k: p for k, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.POSITIONAL_ONLY)}


def _expected_type(parameter: inspect.Parameter | None) -> type | None:
    if parameter is None:
        return None
    names = {"int": int, "float": float, "bool": bool, "str": str}
    annotation = names.get(parameter.annotation, parameter.annotation) if isinstance(parameter.annotation, str) else parameter.annotation
    if annotation in (int, float, bool, str):
        return annotation
    return type(parameter.default) if type(parameter.default) in (int, float, bool, str) else None


def _convert(value: Value, kind: type) -> Value:
    if kind is str:
        return str(value)
    if kind is bool:
        if isinstance(value, bool) or value in (0, 1):
            return bool(value)
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        raise ValueError(value)
    if isinstance(value, bool) or (kind is int and isinstance(value, float)):
        raise ValueError(value)
    return kind(value)
