"""The classes in words: which dimensions each joins, its sizes, and what pins it (not trusted)."""
from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from trainverify.ir.trace import TensorRef
from trainverify.kernel.terms import Obligation
from trainverify.report.model import DimClass, Reduction
from trainverify.shrink.classes import Classes
from trainverify.shrink.criterion import sums
from trainverify.shrink.facts import base
from trainverify.shrink.solve import atoms_of
from trainverify.shrink.spaces import ONE, PRODUCT, Kept

SHOWN = 6                                     # joined dimensions of a class; pins of one reason


def free_indices(classes: Classes) -> dict[int, int]:
    """Of each atom: how many dimensions of one tensor range over it, at most."""
    s, most = classes.spaces, defaultdict(int)
    for layout in classes.layouts.values():
        for dims in {tuple(s.find(d) for d in v.dims) for v in layout.views.values()}:
            for a, n in Counter(a for d in dims if d != ONE for a in s.atoms(d)).items():
                most[a] = max(most[a], n)
    return dict(most)


def criterion(classes: Classes, kept: Kept, obligations: Sequence[Obligation]) -> tuple[int, int]:
    """The size that every reduced class needs for what was proved, and how many classes are smaller."""
    summed = max((sums(o) for o in obligations), default=0)
    free = free_indices(classes)
    reduced = [a for a in atoms_of(classes) if kept.count(a) < classes.spaces.size(a)]
    need = {a: min(classes.spaces.size(a), summed + free.get(a, 1)) for a in reduced}
    return max((summed + free.get(a, 1) for a in reduced), default=0), sum(kept.count(a) < need[a] for a in reduced)


class Names:
    """Names of spaces: from the batch, from what operations call their dimensions, and from the reference's weights."""

    def __init__(self, classes: Classes):
        self.classes, self.spaces = classes, classes.spaces
        self.names: dict[int, Counter] = defaultdict(Counter)
        self.joins: dict[int, dict[str, None]] = defaultdict(dict)
        self._of_layout(("reference", 0))
        for where in classes.layouts:
            self._operations(where)

    def _of_layout(self, where: tuple[str, int]) -> None:
        layout = self.classes.layouts[where]
        for call in layout.trace.ops:
            if call.name == "tv.symbol":
                self._joined(layout.dims(call.args[2]), call.args[1])
            elif call.name == "tv.data" and isinstance(call.args[1], TensorRef):
                dims = layout.dims(call.args[1])
                self._joined(dims, call.args[0])
                for s, name in zip(dims, ("samples", "sequence")):
                    self._name(s, name, 3)

    def _operations(self, where: tuple[str, int]) -> None:
        layout = self.classes.layouts[where]
        for call in layout.repeats.distinct():
            op = base(call.name)
            if op == "embedding":
                for s, name in zip(layout.dims(call.args[0]), ("vocabulary", "hidden")):
                    self._name(s, name, 2)
            elif op.startswith("_scaled_dot_product") and "backward" not in op:
                dims = layout.dims(call.args[0])
                self._name(dims[1], "heads", 2)
                self._name(dims[3], "head_dim", 2)
            elif op == "topk":
                self._name(layout.dims(call.args[0])[-1], "experts", 2)
            if call.name.startswith("tv.") or where != ("reference", 0):
                continue
            for ref in call.targets()[:1]:
                for k, s in enumerate(layout.dims(ref)):
                    for a in self.spaces.atoms(s):
                        if len(self.joins[a]) < 2:               # nothing of the model's names it
                            span = layout.span(call)
                            self.joins[a].setdefault(f"dimension {k} of {op}" + (f" ({span})" if span else ""))

    def _joined(self, dims: Sequence[int], name: str) -> None:
        for k, s in enumerate(dims):
            for a in self.spaces.atoms(s):
                self.joins[a][f"{name}[{k}]"] = None

    def _name(self, s: int, name: str, weight: int) -> None:
        form = self.spaces.form(s)
        parts = self.spaces.atoms(s)
        if form is not None and form.kind == PRODUCT:
            name = f"a factor of {name}"
        elif len(parts) > 1:
            name = f"a part of {name}"
        for a in parts:
            self.names[a][name] += weight if len(parts) == 1 else 1

    def name(self, a: int) -> str:
        """The name that most say, "" if nothing does."""
        found = self.names.get(a)
        return min(found, key=lambda n: (-found[n], n)) if found else ""


def describe(classes: Classes, kept: Kept, replaced: int = 0) -> Reduction:
    """All classes that hold float dimensions, equal ones as one line, largest first; then what is pinned."""
    s, names = classes.spaces, Names(classes)
    pinned: dict[int, str] = {}
    for p in s.pins:
        if not p.structural:
            for a in s.atoms(p.space):
                pinned.setdefault(a, p.why)
    structural = {a for p in s.pins if p.structural for a in s.atoms(p.space)} - set(pinned)
    reachable = {a for d in classes.computed for a in s.atoms(d)}
    found: Counter[DimClass] = Counter()
    for a in atoms_of(classes):
        if a in reachable and a not in structural:
            joins = list(names.joins.get(a, ()))
            more = (f"{len(joins) - SHOWN} more",) if len(joins) > SHOWN else ()
            found[DimClass(names.name(a), s.size(a), kept.count(a), (*joins[:SHOWN], *more), pinned.get(a, ""))] += 1
    order = sorted(found, key=lambda c: (-c.size, c.name, c.reduced, c.joins))
    counted = [DimClass(c.name, c.size, c.reduced, c.joins, c.pinned, found[c]) for c in order]
    return Reduction(counted, _pins(classes), replaced)


def _pins(classes: Classes) -> list[str]:
    """One line for each reason, with where."""
    places: dict[str, dict[str, None]] = defaultdict(dict)
    sizes: dict[str, set[int]] = defaultdict(set)
    for p in classes.spaces.pins:
        if not p.structural:
            sizes[p.why].add(classes.spaces.size(p.space))
            if p.span is not None:
                places[p.why][str(p.span)] = None
    out = []
    for why, seen in sizes.items():
        where = list(places[why])
        out.append(f"sizes {', '.join(map(str, sorted(seen)))}: {why}" + (f" ({', '.join(where[:SHOWN])}" + (", ..." if len(where) > SHOWN else "") + ")" if where else ""))
    return sorted(out)


__all__ = ["Names", "criterion", "describe", "free_indices"]
