"""Words of a diagnosis: what a factor equals in the parallel program, how its groups are called, where elements come from (not trusted)."""
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from trainverify.ir.trace import Program, TensorRef

MOST_RUNS = 4


@dataclass(frozen=True, slots=True)
class Names:
    """Groups of the parallel program (members -> mesh axis or ""), its ranks, and its backward passes in one step."""

    groups: dict[tuple[int, ...], str]
    world: int
    microbatches: int

    def over(self, group: Sequence[int]) -> str:
        """"tp ranks [0, 1]" """
        axis = self.groups.get(tuple(group), "")
        return f"{axis} ranks {list(group)}" if axis else f"ranks {list(group)}"

    def sizes(self) -> dict[str, int]:
        """The sizes that a wrong factor may be, by name: mesh axes, other groups, all ranks, microbatches."""
        out: dict[str, int] = {}
        for group, axis in self.groups.items():
            if axis:
                out.setdefault(axis, len(group))
            elif 1 < len(group) < self.world and len(group) not in out.values():
                out[f"the size of the group {list(group)}"] = len(group)
        if self.world not in out.values():        # also where as many microbatches are: nothing tells which of both it is
            out["the number of ranks"] = self.world
        out["the number of microbatches"] = self.microbatches
        return {name: n for name, n in out.items() if n > 1}

    def of_factor(self, factor: Fraction) -> str:
        """What the factor equals, "" if nothing: "dp", "1/tp", "the number of ranks = dp x tp"."""
        sizes = self.sizes()
        for value, form in ((factor, "{}"), (1 / factor if factor else factor, "1/{}")):
            if value <= 1 or value.denominator != 1:
                continue
            single = [form.format(name if form == "{}" else f"({name})" if " " in name else name) for name, n in sizes.items() if n == value]
            if single:
                return " = ".join(single)
            for a, m in sizes.items():
                for b, n in sizes.items():
                    if a < b and m * n == value:
                        return f"{a} x {b}" if form == "{}" else f"1/({a} x {b})"
            squared = [a for a, n in sizes.items() if n * n == value]
            if squared:
                return form.format(f"({squared[0]} squared)")
        for a, m in sizes.items():
            for b, n in sizes.items():
                if a != b and Fraction(m, n) == factor:
                    return f"{a} / {b}"
        return ""

    def factors(self) -> tuple[Fraction, ...]:
        """Multiples of the reference to look for."""
        sizes = sorted({*self.sizes().values(), self.world, 2, 3, 4, 6, 8} - {1})
        named = sorted(set(self.sizes().values()))
        whole = {*sizes, *(m * n for m in named for n in named)}
        ratios = {Fraction(m, n) for m in named for n in named if m != n}
        return tuple(dict.fromkeys([*(Fraction(n) for n in sorted(whole)), Fraction(-1), *(Fraction(1, n) for n in sorted(whole)), *sorted(ratios)]))


def names_of(program: Program) -> Names:
    groups: dict[tuple[int, ...], str] = {}
    for g in (g for t in program.traces for g in t.groups if len(g.ranks) > 1):
        groups[g.ranks] = g.axis or groups.get(g.ranks, "")
    return Names(groups, len(program.traces), max((_backwards(t.ops) for t in program.traces), default=1))


def _backwards(ops) -> int:
    """Backward passes in the busiest step: each begins with a gradient of one for a scalar."""
    count: Counter[int] = Counter()
    step = 0
    for call in ops:
        if call.name == "tv.step":
            step = call.args[0]
        elif call.name == "aten.ones_like.default" and isinstance(call.outs, TensorRef) and call.outs.size == ():
            count[step] += 1
    return max((n for s, n in count.items() if s), default=1)


# ---- where elements come from
def index_map(held: np.ndarray, due: np.ndarray, shape: tuple[int, ...]) -> str:
    """How the flat positions `held` of a reference tensor of that shape differ from the ones that are due, element by element."""
    if not len(shape) or not len(held) or len(held) != len(due):
        return ""
    at, want = np.stack(np.unravel_index(held, shape)), np.stack(np.unravel_index(due, shape))
    moved = [d for d in range(len(shape)) if (at[d] != want[d]).any()]
    if not moved:
        return "the same places"
    for d in moved:
        if moved == [d]:
            return _along(at[d], want[d], d, shape[d])
    if len(moved) == 2 and (at[moved[0]] == want[moved[1]]).all() and (at[moved[1]] == want[moved[0]]).all():
        return f"transposed (dimensions {moved[0]} and {moved[1]} change places)"
    shifts = [(at[d] - want[d]) % shape[d] for d in moved]
    if all((s == s[0]).all() for s in shifts):
        return " and ".join(f"shifted by {_signed(int(s[0]), shape[d])} along dimension {d}" for s, d in zip(shifts, moved))
    k = int(np.flatnonzero((at != want).any(0))[0])
    return f"element {at_text(want[:, k])} is the reference's {at_text(at[:, k])}"


def number_text(x: float) -> str:
    """A value as a reader would write it; there is one zero."""
    return f"{x + 0.0:.9g}"


def ranks_text(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(set(ranks)) == 1 else f"ranks {sorted(set(ranks))}"


def at_text(index) -> str:
    return "[" + ", ".join(str(int(i)) for i in index) + "]"


def _signed(shift: int, size: int) -> int:
    return shift - size if shift > size // 2 else shift


def _along(at: np.ndarray, want: np.ndarray, d: int, size: int) -> str:
    """A movement along one dimension: a shift, a reversal, or blocks that stand elsewhere."""
    shift = (at - want) % size
    if (shift == shift[0]).all():
        return f"shifted by {_signed(int(shift[0]), size)} along dimension {d}"
    if (at == size - 1 - want).all():
        return f"reversed along dimension {d}"
    pairs = sorted(set(zip(want.tolist(), at.tolist())))
    if len({w for w, _ in pairs}) < len(pairs):
        return f"mixed along dimension {d}"
    runs: list[list[int]] = []                # due first, held first, length
    for w, a in pairs:
        if runs and w == runs[-1][0] + runs[-1][2] and a == runs[-1][1] + runs[-1][2]:
            runs[-1][2] += 1
        else:
            runs.append([w, a, 1])
    told = [f"[{w}:{w + n}] is the reference's [{a}:{a + n}]" for w, a, n in runs if w != a]
    return f"along dimension {d}: " + ", ".join(told[:MOST_RUNS]) + (", ..." if len(told) > MOST_RUNS else "")


def box(flat: np.ndarray, shape: tuple[int, ...]) -> str:
    """The part of a tensor that these positions fill: "[0:2, :, 3:6]", "" if it is no box. Equal elements may stand for each other."""
    if not len(shape) or not len(flat):
        return ""
    spans = [(int(i.min()), int(i.max()) + 1) for i in np.unravel_index(flat, shape)]
    if np.prod([b - a for a, b in spans]) != len(flat):
        return ""
    return "[" + ", ".join(":" if (a, b) == (0, n) else f"{a}:{b}" if b > a + 1 else f"{a}" for (a, b), n in zip(spans, shape)) + "]"
