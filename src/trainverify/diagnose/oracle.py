"""Whether an edited program computes something else, found out without the algebras that verdicts come from: by running it in float64 (not trusted).

Both the program and its edited form are replayed at the recorded inputs and at others near them. Only inputs at which the reference is defined and
takes its recorded decisions count: of others a verdict says nothing.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch

from trainverify.diagnose.trial import Trial, decisions_of, fall_alike
from trainverify.engine.analysis import Analysis
from trainverify.engine.proof import Lineages
from trainverify.ir.trace import Program
from trainverify.relate.compare import Compared, Comparison, Key
from trainverify.relate.symbols import Binder
from trainverify.replay.machine import Hooks
from trainverify.replay.run import World, replay

NEAR = (0.02, 0.1)                            # how far the other inputs are from the recorded ones
OWN, KIND = 1e-9, 1e-10                       # rounding, relative to the output itself and to the largest output of its kind


@dataclass(frozen=True, slots=True)
class Point:
    """Inputs, the reference's run on them, and what the unedited program gives."""

    values: torch.Tensor
    reference: World
    compared: dict[Key, Compared]


class Oracle:
    def __init__(self, reference: Program, parallel: Program, analysis: Analysis, seed: int):
        self.parallel, self.analysis = parallel, analysis
        self.points: list[Point] = []
        recorded = torch.from_numpy(analysis.symbols.values)
        generator = torch.Generator().manual_seed(seed)
        taken = None
        for far in (0.0, *NEAR):
            values = recorded * (1 + far * torch.randn(recorded.shape, generator=generator, dtype=torch.float64))
            world = self._replayed(reference, values)
            found = decisions_of([world])
            taken = found if taken is None else taken
            if fall_alike(taken, found) and _is_defined(world):
                self.points.append(Point(values, world, self._compared(world, self._replayed(parallel, values), values)))
        if not self.points:
            raise ValueError("the reference is undefined at its recorded inputs")

    def changed(self, edited: Program) -> set[Key]:
        """The outputs of which some element differs by more than rounding, or is nobody's any more. Raises as a replay of a program that cannot run."""
        out: set[Key] = set()
        for point in self.points:
            now = self._compared(point.reference, self._replayed(edited, point.values), point.values)
            sizes: dict[str, float] = {}
            for key, c in point.compared.items():
                sizes[key[0]] = max(sizes.get(key[0], 0.0), *(_size(p.parallel[Trial.name].t) for p in c.pieces), 0.0)
            out |= {key for key, c in point.compared.items() if _differs(c, now[key], KIND * sizes[key[0]])}
        return out

    def _replayed(self, program: Program, values: torch.Tensor) -> World:
        m = Trial(lambda numbers: values[numbers])
        binder = Binder(self.analysis.symbols, [m])
        return replay(program, [m], self.analysis.table, Hooks(symbol=binder.symbol, bind=binder.bind))

    def _compared(self, reference: World, parallel: World, values: torch.Tensor) -> dict[Key, Compared]:
        like = self.analysis.first.comparison
        m = Trial(lambda numbers: values[numbers])
        comparison = Comparison(self.analysis.symbols, [m], reference, parallel, Lineages(like.ref_lineage, like.lineage))
        comparison.run()
        return comparison.compared


def _is_defined(world: World) -> bool:
    return all(bool(torch.isfinite(r.values[Trial.name].t).all()) for m in world.machines for r in m.outputs if r.values)


def _size(t: torch.Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


def _differs(old: Compared, new: Compared, floor: float) -> bool:
    if [(p.rank, len(p.at)) for p in old.pieces] != [(p.rank, len(p.at)) for p in new.pieces] or old.missing != new.missing:
        return True
    for p, q in zip(old.pieces, new.pieces):
        a, b = p.parallel[Trial.name].t.reshape(-1), q.parallel[Trial.name].t.reshape(-1)
        if not bool(((a - b).abs() <= max(OWN * _size(a), floor)).all()):     # a NaN is no number that is as small
            return True
    return False
