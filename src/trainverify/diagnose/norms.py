"""A gradient norm that counts wrongly: some parameters' squares too often, not at all, or on some ranks only (not trusted; float64 only)."""
from __future__ import annotations

from collections import defaultdict
from fractions import Fraction

from trainverify.diagnose.relation import Relation, Relations
from trainverify.relate.compare import Compared, Key

NEAR = 1e-9
SHOWN = 3


class Norms:
    """`gradients`: the reference's gradients of the step before clipping, as far as they are known."""

    def __init__(self, relations: Relations, gradients: dict[Key, Compared]):
        self.names = relations.names
        self.total: dict[str, float] = {}                     # squares of each parameter's gradient in the reference
        self.held: dict[str, dict[int, float]] = {}           # what of them each rank holds
        for (_, name, _), c in gradients.items():
            shares: dict[int, float] = defaultdict(float)
            for p in c.pieces:
                shares[p.rank] += float(p.reference["real"].t.square().sum())
            self.total[name], self.held[name] = float(_whole(c).square().sum()), dict(shares)
        self.square = sum(self.total.values())

    def of(self, c: Compared) -> Relation | None:
        """What is wrong with a scalar, if it is the norm of all gradients in the reference."""
        if c.key[0] != "scalar" or not self.square:
            return None
        wrong = {p.rank: float(p.parallel["real"].t.sum()) ** 2 for p in c.pieces if p.wrong("field")}
        due = float(c.pieces[0].reference["real"].t.sum()) ** 2
        if not wrong or not self._is(due, self.square):
            return None
        gap = next(iter(wrong.values())) - due
        return self._ranks(wrong) or self._parameters(gap) or self._elsewhere(gap)

    def _is(self, a: float, b: float) -> bool:
        return abs(a - b) <= NEAR * self.square

    def _ranks(self, wrong: dict[int, float]) -> Relation | None:
        """The squares of what each rank, or the ranks of its group, hold, and no others'."""
        if all(self._is(here, self._on((rank,))) for rank, here in wrong.items()):
            return Relation("partial sum", "REL002", "norm^2 = the squares of what the rank itself holds",
                            detail="each rank counts only what it holds", same=("norm", ()))
        for group in sorted(self.names.groups, key=len):
            mine = [here for rank, here in wrong.items() if rank in group]
            if mine and all(self._is(here, self._on(group)) for here in mine):
                if mine[0] < self.square:
                    what = f"only what {self.names.over(group)} hold is counted"
                    right = f"norm^2 = the squares of what {self.names.over(group)} hold"
                    return Relation("partial sum", "REL002", right, detail=what, same=("norm", group))
                return _additive(f"what several of {self.names.over(group)} hold is counted on each of them",
                                 f"the squares of what each of {self.names.over(group)} holds, replicas as well", ONCE)
        return None

    def _on(self, group: tuple[int, ...]) -> float:
        return sum(shares.get(r, 0.0) for shares in self.held.values() for r in group)

    def _parameters(self, gap: float) -> Relation | None:
        """Squares of one parameter, or of all that are spread over the ranks in the same way, counted a wrong number of times."""
        for names in self._sets():
            squares = sum(self.total[n] for n in names)
            for k in sorted({2, *self.names.sizes().values()}):
                for times in (Fraction(k), Fraction(1, k), Fraction(0)):
                    if squares and self._is(gap, float(times - 1) * squares):
                        return _counted(names, times)
        return None

    def _sets(self) -> list[tuple[str, ...]]:
        spread: dict[tuple, list[str]] = defaultdict(list)
        for name, shares in self.held.items():
            whole = self.total[name]
            spread[tuple(sorted((r, round(s / whole, 9) == 1) for r, s in shares.items())) if whole else ()].append(name)
        return [*((n,) for n in self.total), *(tuple(its) for its in spread.values() if len(its) > 1)]

    def _elsewhere(self, gap: float) -> Relation | None:
        """What other ranks than one hold of some parameters is missing."""
        for names in self._sets():
            for rank in sorted({r for n in names for r in self.held[n]}):
                rest = sum(self.total[n] - self.held[n].get(rank, 0.0) for n in names)
                if rest and self._is(gap, -rest):
                    told = _some(names)
                    return _additive(f"of {told} only what rank {rank} holds is counted", f"reference's - the squares of {told} on other ranks than {rank}")
        return None


ONCE = "add the squares of what several ranks hold on one of them alone; sum over ranks only the squares of parts"
TWICE = "count these squares once: the parameter is in the list twice, or several ranks hold it, of which one alone should count it"


def _whole(c: Compared):
    """The reference's whole gradient, before clipping where its pieces are."""
    part = c.pieces[0].reference
    return part.values["real"].t if hasattr(part, "values") and not isinstance(part, dict) else part["real"].t


def _counted(names: tuple[str, ...], times: Fraction) -> Relation:
    told = _some(names)
    if times == 0:
        return _additive(f"{told} is not counted", f"reference's - the squares of {told}", "look at the list of parameters that the norm is taken of: these are not in it")
    right = f"reference's + {times - 1} x the squares of {told}"
    return _additive(f"{told} counts {times} times", right, TWICE if times > 1 else "sum these squares over all ranks that hold a part of them, before the root is taken")


def _additive(detail: str, right: str, fix: str = "") -> Relation:
    return Relation("additive term", "REL014", f"norm^2 = {right}", detail=detail, same=("norm", detail), fix=fix)


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
