"""Both programs at small sizes: classes, sizes, integers, traces, and the check that each call, executed at these sizes, gives them (trusted)."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from trainverify.ir.trace import Program
from trainverify.ops.table import OpTable
from trainverify.shrink.check import check
from trainverify.shrink.classes import Classes, read, refusal
from trainverify.shrink.cover import cover
from trainverify.shrink.integers import Full, Integers, Values, check_sizes, locate
from trainverify.shrink.known import rows_known
from trainverify.shrink.rewrite import Rewriter
from trainverify.shrink.solve import LEAST, Sizes, problem, solve
from trainverify.shrink.spaces import Kept, Spaces
from trainverify.shrink.values import fill

LARGEST = 1 << 30                             # bytes of one reduced tensor: what keeps its size is then too much to be verified
ROUNDS = 6                                    # of finding the indices that occur; each adds some


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


def sized(classes: Classes, base: int = LEAST, required: dict[int, set[int]] | None = None, unlike: Kept | None = None) -> tuple[Kept, Sizes]:
    """Sizes for all classes, and the indices that are kept: those that are required, and the first others. Of positions, at which integers are read, the
    last one is kept too: what is wrong there alone (a label at the end of a shard) is no less wrong."""
    required = required or {}
    positions = {a for d in classes.notes.domains for s in classes.layouts[d.where].dims(d.ref) for a in classes.spaces.atoms(s)}
    found = solve(classes, problem(classes, {a: len(v) for a, v in required.items()}, base, unlike))
    atoms = {}
    for a, n in found.count.items():
        if n < classes.spaces.size(a):        # the others keep all
            must = required.get(a, set()) | ({classes.spaces.size(a) - 1} if a in positions and len(required.get(a, ())) < n else set())
            free = [i for i in range(n + len(must)) if i not in must]
            atoms[a] = np.array(sorted([*must, *free[:n - len(must)]]), dtype=np.int64)
    return Kept(classes.spaces, atoms), found


class Reducer:
    """Both programs, read once; reduced as often as is asked, to sizes of at least `base`. Raises Fault where that cannot be done."""

    def __init__(self, reference: Program, parallel: Program, table: OpTable, progress: Callable = lambda *a, **k: None):
        progress("reduce", "classes")
        self.table, self.progress = table, progress
        self.classes = read(reference, parallel, table, rows_known)
        self.values = Values(self.classes)
        for domain, call in self.values.clashes():
            self.classes.spaces.pin(domain.space, f"its indices are also numbers, in {call.name}", domain.span)
        self.classes.spaces.close()
        self.integers = Integers(self.classes, self.values, table)

    def classified(self, base: int = LEAST) -> tuple[Classes, Kept]:
        """Classes and sizes alone, without rewriting anything: for `trainverify shapes`."""
        return self.classes, _settled(self.classes, self.integers, base, None, self.progress)[0]

    def reduced(self, base: int = LEAST, unlike: Kept | None = None) -> Reduced:
        """unlike: another choice, from which that of every reduced class is to differ."""
        classes = self.classes
        check_sizes(classes, self.integers)
        kept, sizes, full = _settled(classes, self.integers, base, unlike, self.progress)
        _bearable(classes, kept)
        programs, checked = {}, {}
        self.progress("reduce", "programs")
        for side, program in classes.programs.items():
            made = [Rewriter(classes, classes.layouts[(side, rank)], kept, self.values, full) for rank in range(len(program.traces))]
            built = [m.program() for m in made]
            programs[side] = Program([t for t, _ in built], [b for _, b in built])
            checked[side] = [m.checked for m in made]
        fill(programs["reference"], programs["parallel"], classes.programs["reference"])
        for side, program in programs.items():
            check(program, checked[side], self.table)
        for layout in classes.layouts.values():
            for ref in layout.views:
                if layout.is_checked(ref) and not layout.restricts(ref, layout.reduced(ref, kept), kept):
                    raise AssertionError(f"{layout.where}: {ref} at the reduced sizes is not its restriction: {layout.reduced(ref, kept)}")
        return Reduced(programs["reference"], programs["parallel"], classes, kept, sizes, len(full.truths))


def reduce_programs(reference: Program, parallel: Program, table: OpTable, base: int = LEAST, progress: Callable = lambda *a, **k: None) -> Reduced:
    """Reduce both programs together. Raises Fault where that cannot be done."""
    return Reducer(reference, parallel, table, progress).reduced(base)


def classified(reference: Program, parallel: Program, table: OpTable, base: int = LEAST) -> tuple[Classes, Kept]:
    """Classes and sizes alone, without rewriting anything: for `trainverify shapes`."""
    return Reducer(reference, parallel, table).classified(base)


def _bearable(classes: Classes, kept: Kept) -> None:
    """Refuse where so much keeps its size that the reduced programs are still large."""
    for layout in classes.layouts.values():
        largest = max(layout.storages, key=lambda sid: kept.count(layout.storages[sid]) * layout.items[sid], default=None)
        if largest is None or (n := layout.nbytes(largest, kept)) <= LARGEST:
            continue
        pins = [p for p in classes.spaces.pins if not p.structural]
        why = f"; {pins[0].why}" if pins else ""
        span = next((layout.span(c) for c in layout.repeats.distinct() if any(layout.canon[t.storage] == largest for t in c.targets())), None)
        raise refusal("SHAPE003", f"a tensor of {n / 2 ** 30:.1f} GB is left at the reduced sizes: too many of its dimensions keep their size{why}",
                      "trainverify shapes says which; a buffer that is used for tensors of different sizes is one reason", span)


def _settled(classes: Classes, integers: Integers, base: int, unlike: Kept | None, progress: Callable) -> tuple[Kept, Sizes, Full]:
    """Sizes such that every index that occurs at a kept position is kept."""
    required = _picked(classes.spaces)
    for _ in range(ROUNDS):
        progress("reduce", "sizes")
        kept, sizes = sized(classes, base, required, unlike)
        full = integers.look(kept)
        chosen = {classes.spaces.find(s): call for s, call in full.chosen if kept.count(s) < classes.spaces.size(s)}
        for space, call in chosen.items():
            classes.spaces.pin(space, f"{call.name} takes indices of it that floats chose")
        for atoms, call in full.uncounted:
            for atom in atoms:
                classes.spaces.pin(atom, f"{call.name} adds up numbers over it that were not recorded")
        chosen.update(full.uncounted)
        wanted = {a: required.get(a, set()) | full.required.get(a, set()) for a in {*required, *full.required}}
        if not chosen and all(set(v) <= set(kept.indices(a).tolist()) for a, v in wanted.items()):
            return kept, sizes, full
        required = wanted
    raise refusal("SHAPE003", "the indices that occur need more and more sizes", "verify without --reduce")


def _picked(spaces: Spaces) -> dict[int, set[int]]:
    """Atoms' indices that must be kept: such that of all rows that data pick together, one at least is."""
    required: dict[int, set[int]] = defaultdict(set)
    for s, index in spaces.fixed:
        locate(spaces, s, np.array([index]), required)
    cover(spaces, required)
    return required
