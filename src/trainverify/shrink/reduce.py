"""Both programs at small sizes: classes, sizes, integers, traces, and the check that each call, executed at these sizes, gives them (trusted)."""
from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from trainverify.ir.trace import Collective, OpCall, Program
from trainverify.ops.table import OpTable
from trainverify.replay.errors import ReplayError
from trainverify.replay.machine import Hooks, Machine
from trainverify.replay.run import World, replay
from trainverify.shrink.classes import Classes, read, refusal
from trainverify.shrink.integers import Full, Values, check_sizes, look
from trainverify.shrink.layout import item, references
from trainverify.shrink.rewrite import Rewriter
from trainverify.shrink.solve import LEAST, Sizes, atoms_of, problem, solve
from trainverify.shrink.spaces import Kept

ROUNDS = 6                                    # of finding the indices that occur; each adds some
SCALARS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "truediv": operator.truediv, "floordiv": operator.floordiv, "mod": operator.mod,
           "pow": operator.pow, "neg": operator.neg, "pos": operator.pos, "abs": abs, "min": min, "max": max, "float": float}


@dataclass(slots=True)
class Reduced:
    """Two reduced programs and how they came about."""

    reference: Program
    parallel: Program
    classes: Classes
    kept: Kept
    sizes: Sizes
    replaced: int = 0                         # integer results that were taken from the recorded program
    notes: list[str] = field(default_factory=list)


def sized(classes: Classes, base: int = LEAST, required: dict[int, set[int]] | None = None) -> tuple[Kept, Sizes]:
    """Sizes for all classes, and the indices that are kept: those that are required, and the first others."""
    required = required or {}
    found = solve(classes, problem(classes, {a: len(v) for a, v in required.items()}, base))
    atoms = {}
    for a in atoms_of(classes):
        n, size = found.count[a], classes.spaces.size(a)
        must = sorted(required.get(a, ()))
        free = [i for i in range(min(size, n + len(must))) if i not in required.get(a, ())]
        atoms[a] = np.array(sorted([*must, *free[:n - len(must)]]), dtype=np.int64)
    return Kept(classes.spaces, atoms), found


def reduce_programs(reference: Program, parallel: Program, table: OpTable, base: int = LEAST, progress: Callable = lambda *a, **k: None) -> Reduced:
    """Reduce both programs together. Raises Fault where that cannot be done."""
    progress("reduce", "classes")
    classes, values = _read(reference, parallel, table)
    kept, sizes, full = _settled(classes, values, table, base, progress)
    check_sizes(classes, full)
    programs = {}
    for side, program in classes.programs.items():
        made = [Rewriter(classes, classes.layouts[(side, rank)], kept, values, full).program() for rank in range(len(program.traces))]
        programs[side] = Program([t for t, _ in made], [b for _, b in made])
        well_formed(programs[side])
    for layout in classes.layouts.values():
        for ref in layout.views:
            if item(ref.dtype) == layout.items.get(ref.storage) and not layout.restricts(ref, layout.reduced(ref, kept), kept):
                raise AssertionError(f"{layout.where}: {ref} at the reduced sizes is not its restriction: {layout.reduced(ref, kept)}")
    for program in programs.values():
        execute(program, table)
    return Reduced(programs["reference"], programs["parallel"], classes, kept, sizes, len(full.truths))


def _read(reference: Program, parallel: Program, table: OpTable) -> tuple[Classes, Values]:
    classes = read(reference, parallel, table)
    values = Values(classes)
    for domain, call in values.clashes():
        classes.spaces.pin(domain.space, f"its indices are also numbers, in {call.name}", domain.span)
    classes.spaces.close()
    return classes, values


def classified(reference: Program, parallel: Program, table: OpTable, base: int = LEAST) -> tuple[Classes, Kept]:
    """Classes and sizes alone, without rewriting anything: for `trainverify shapes`."""
    classes, values = _read(reference, parallel, table)
    kept, _, _ = _settled(classes, values, table, base, lambda *a, **k: None)
    return classes, kept


def _settled(classes: Classes, values: Values, table: OpTable, base: int, progress: Callable) -> tuple[Kept, Sizes, Full]:
    """Sizes such that every index that occurs at a kept position is kept."""
    required: dict[int, set[int]] = {}
    for _ in range(ROUNDS):
        progress("reduce", "sizes")
        kept, sizes = sized(classes, base, required)
        full = look(classes, values, kept, table)
        chosen = {classes.spaces.find(s): call for s, call in full.chosen if kept.count(s) < classes.spaces.size(s)}
        for space, call in chosen.items():
            classes.spaces.pin(space, f"{call.name} takes indices of it that floats chose")
        wanted = {a: required.get(a, set()) | full.required.get(a, set()) for a in {*required, *full.required}}
        if not chosen and all(set(v) <= set(kept.indices(a).tolist()) for a, v in wanted.items()):
            return kept, sizes, full
        required = wanted
    raise refusal("SHAPE003", "the indices that occur need more and more sizes", "verify without --reduce")


# ---- checks

def well_formed(program: Program) -> None:
    """Every reference lies inside its storage. Anything else is our own bug."""
    from trainverify.replay.native import dtype_of, extent

    for trace in program.traces:
        for k, call in enumerate(trace.ops):
            if call.index != k:
                raise AssertionError(f"call {k} has the number {call.index}")
            for ref in references(call):
                if ref.storage >= len(trace.storages) or (ref.numel and extent(ref) * dtype_of(ref.dtype).itemsize > trace.storages[ref.storage].nbytes):
                    raise AssertionError(f"{call.name} ({trace.spans[call.span] if call.span >= 0 else ''}): {ref} is not inside its storage")
            if call.collective is not None and not fills(call.collective):
                raise AssertionError(f"{call.name}: what comes in and goes out does not have the same sizes: {call.collective}")


def fills(c: Collective) -> bool:
    """Whether what comes in fills what goes out."""
    n = len(c.group)
    if c.kind == "all_gather" and not c.listed:
        return all(o.numel == n * i.numel for i, o in zip(c.inputs, c.outputs))
    if c.kind == "reduce_scatter" and not c.listed:
        return all(i.numel == n * o.numel for i, o in zip(c.inputs, c.outputs))
    if c.kind in ("all_reduce", "broadcast"):
        return all(i.numel == o.numel for i, o in zip(c.inputs, c.outputs))
    if c.kind == "all_to_all" and not c.listed:
        return (not c.in_splits or sum(c.in_splits) == c.inputs[0].size[0]) and (not c.out_splits or sum(c.out_splits) == c.outputs[0].size[0])
    return True


def execute(program: Program, table: OpTable) -> World:
    """Execute every call at the reduced sizes; each result must have exactly the sizes that its reference says. Tracked scalars get the values that they
    have at these sizes."""
    def after(machine: Machine, call: OpCall, results: list) -> None:
        if call.name.startswith("tv.scalar."):
            _scalar(machine, call)

    last: list[tuple[Machine, OpCall]] = []

    def before(machine: Machine, call: OpCall) -> None:
        last[:] = [(machine, call)]

    try:
        return replay(program, [], table, Hooks(before=(before,), after=(after,)))
    except (RuntimeError, IndexError, ValueError, ReplayError) as e:
        name, span = (last[0][1].name, last[0][0].span(last[0][1])) if last else ("a call", None)
        raise refusal("SHAPE003", f"{name} cannot be executed at the reduced sizes: {e}", "verify without --reduce, and report this", span) from e


def _scalar(machine: Machine, call: OpCall) -> None:
    op = call.name.split(".")[2]
    if op == "item":
        value = machine.native.tensor(call.args[0]).item()
    elif op in SCALARS:
        try:
            value = SCALARS[op](*[machine.native.decode(a) for a in call.args])
        except (ZeroDivisionError, OverflowError, TypeError):
            return
    else:
        return
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        call.kwargs["value"] = machine.native.scalars[call.outs.id] = float(value)
