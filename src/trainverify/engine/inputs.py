"""Replays both programs in float64 on other inputs than the recorded ones (trusted: a difference found here refutes).

Integers, Python's branches and the places of elements stay as they were recorded. A trial therefore counts only if every decision would have
fallen as it did (its operands are looked at again), and if what left for Python untracked is what it was. Masks, maxima and the like are
computed from the trial's own values.

`elsewhere` looks for a witness of a difference that the field sees and the recorded inputs do not show: a norm that does not clip there, a
unit that is off. It counts if it is far beyond what rounding can do, which is measured: both programs again, with every input and the result of
every operation perturbed a little, so that what cancellation or saturation leaves of a value shows as the noise that it is.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import torch

from trainverify.algebra.base import Complex
from trainverify.algebra.real import Real, RealValue
from trainverify.ir.trace import OpCall, Program, ScalarRef
from trainverify.ops.table import OpTable
from trainverify.relate.compare import Comparison, Key, Piece
from trainverify.relate.decisions import CHOOSES, Idle
from trainverify.relate.symbols import Binder, Symbols
from trainverify.replay.errors import ReplayError
from trainverify.replay.machine import Decision, Hooks, Machine
from trainverify.replay.memory import is_float
from trainverify.replay.run import World, replay

MOST_WORK = 150_000                           # calls of all trials together, a thousand elements counting as one
LEAST, BEYOND = 1e-7, 1000.0                  # a relative difference that counts at all; how many times what a perturbation changes
NUDGE, NUDGE_ROUNDED = 2.0 ** -43, 2.0 ** -20     # relative perturbations: of float64, and where constants were rounded to float32
NUDGES = 2
_TINY = 2.0 ** -1000
_NONZERO: dict[str, Callable[..., torch.Tensor]] = {   # where the result cannot be zero
    "exp": lambda a: a.isfinite(), "mul": lambda a, b: (a != 0) & (b != 0), "div": lambda a, b: a != 0, "inv": lambda a: ~a.isnan()}
_ROUNDING = ("add", "sub", "mul", "inv", "div", "scale", "sum", "cumsum", "matmul", "exp", "log", "sqrt", "pow", "power", "sin", "cos", "erf", "opaque", "scatter_sum")


class Trial(Real):
    """float64 in which masks are values too: they follow the inputs."""

    name = "trial"

    def opaque(self, tag: str, *args):
        if tag not in self._functions:
            raise ReplayError(f"{tag!r} has no known meaning")
        return super().opaque(tag, *args)


class Shaken(Trial):
    """Every result that would be rounded is off by a random part of itself."""

    def __init__(self, symbols: Callable, nudge: float, seed: int):
        super().__init__(symbols)
        self._nudge, self._random = nudge, torch.Generator().manual_seed(seed)

    def shake(self, t: torch.Tensor) -> torch.Tensor:
        return t * (1.0 + self._nudge * self._any(t))

    def underflown(self, t: torch.Tensor, nonzero: torch.Tensor) -> torch.Tensor:
        """t, with noise where it is zero and should not be: what is scaled up later."""
        return torch.where((t == 0) & nonzero, _TINY * self._any(t), t)

    def _any(self, t: torch.Tensor) -> torch.Tensor:
        return 2.0 * torch.rand(t.shape, dtype=t.dtype, generator=self._random) - 1.0


def _shaken(name: str) -> Callable:
    exact = getattr(Trial, name)

    def method(self, *args, **kwargs):
        t = exact(self, *args, **kwargs).t
        if name in _NONZERO:
            t = self.underflown(t, _NONZERO[name](*(a.t for a in args)))
        return RealValue(self.shake(t))
    return method


for _name in _ROUNDING:
    setattr(Shaken, _name, _shaken(_name))


@dataclass(slots=True)
class Witness:
    """Inputs (a value of each symbol) at which an output differs; how they were made; flat indices into each of its pieces, and both sides' values there."""

    inputs: torch.Tensor
    how: str
    found: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


class Ran(NamedTuple):
    """What is compared, every decision, the floats that left for Python untracked, and whether some operation has no known meaning."""

    comparison: Comparison
    decisions: list[tuple[Machine, Decision]]
    told: list[torch.Tensor]
    strange: bool

    def takes_the_way_of(self, other: Ran) -> bool:
        """Whether Python would do the same: it decides alike, and was told the same numbers, of which nobody knows what it makes (int, round, a list)."""
        return fall_alike(other.decisions, self.decisions) and len(self.told) == len(other.told) and all(map(torch.equal, self.told, other.told))


class Inputs:
    """Both programs, to be replayed with given values of the symbols."""

    def __init__(self, reference: Program, parallel: Program, table: OpTable, symbols: Symbols, like: Comparison):
        self.programs = {"reference": reference, "parallel": parallel}
        self.table, self.symbols, self.like = table, symbols, like

    def shaken(self, values: torch.Tensor, nudge: float, seed: int):
        """`run`, with everything off by a little."""
        values = Shaken(None, nudge, seed).shake(values)
        return self.run(values, Shaken(lambda numbers: values[numbers], nudge, seed + 1))

    def run(self, values: torch.Tensor, m: Trial | None = None) -> Ran:
        m, worlds, told = m or Trial(lambda numbers: values[numbers]), [], []

        def before(machine: Machine, call: OpCall) -> None:
            if call.name == "tv.escape" and (isinstance(call.args[1], ScalarRef) or is_float(call.args[1].dtype)):
                told.extend(_plain([machine.value(m, call.args[1])]))
        for program in self.programs.values():
            binder = Binder(self.symbols, [m])
            worlds.append(replay(program, [m], self.table, Hooks(symbol=binder.symbol, bind=binder.bind, before=(before,))))
        comparison = Comparison(self.symbols, [m], *worlds, like=self.like)
        comparison.run()
        return Ran(comparison, decisions_of(worlds), told, any(machine.diagnostics for w in worlds for machine in w.machines))


def elsewhere(reference: Program, parallel: Program, table: OpTable, symbols: Symbols, like: Comparison, wanted: dict[Key, list[int]], rounded: bool,
              progress: Callable = lambda *a: None) -> dict[Key, Witness]:
    """Witnesses, at other inputs, of outputs that differ in the field: `wanted` names their pieces. `rounded`: constants of the programs are."""
    last = max(key[2] for key in wanted)
    programs = until(reference, last), until(parallel, last)
    inputs = Inputs(*programs, table, symbols, like)
    cost = sum(len(t.ops) for p in programs for t in p.traces) + sum(s.nbytes for p in programs for t in p.traces for s in t.storages) // 4000 + 1
    allowed = MOST_WORK // cost - 1
    if allowed < 1 + 2 * NUDGES:
        return {}
    recorded = torch.from_numpy(symbols.values).clone()
    try:
        base = inputs.run(recorded)
    except (ReplayError, RuntimeError):       # an operation without a meaning, or one that refuses
        return {}
    if base.strange:
        return {}
    out: dict[Key, Witness] = {}
    for done, (how, values) in enumerate(_others(symbols, recorded)):
        left = {k: v for k, v in wanted.items() if k not in out}
        if not left or allowed < 1 + 2 * NUDGES:
            break
        progress("other inputs", how, done / 8)
        found, used = _at(inputs, values, base, left, NUDGE_ROUNDED if rounded else NUDGE)
        allowed -= used
        out |= {key: Witness(values, how, pieces) for key, pieces in found.items()}
    return {key: w for key, w in out.items() if not _rests_on_a_gradient(key, wanted, out)}


def _rests_on_a_gradient(key: Key, wanted: dict[Key, list[int]], found: dict[Key, Witness]) -> bool:
    """Whether an update differs whose gradient differs in the field, but shows nothing itself: an optimizer that divides by the gradient's size
    makes steps of whatever underflow or cancellation has left of it."""
    kind, name, step = key
    its = {("gradient", name.split("::")[0], s) for s in range(1, step + 1)} & wanted.keys()
    return kind in ("parameter", "state") and bool(its) and not its & found.keys()


def _others(symbols: Symbols, recorded: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Other inputs, the likeliest to show something first. Buffers and optimizer state, which may have to be positive, stay."""
    free = torch.zeros(len(recorded), dtype=torch.bool)
    drawn = recorded.clone()
    generator = torch.Generator().manual_seed(len(recorded))
    for block in symbols.blocks_in_order:
        its = slice(block.first, block.first + block.n)
        if block.kind in ("weight", "batch"):
            free[its] = True
            size = float(recorded[its].square().mean().sqrt()) if block.n else 0.0
            drawn[its] = size * torch.randn(block.n, dtype=torch.float64, generator=generator)
    for factor in (8.0, 0.125, 64.0):
        yield f"weights and inputs times {factor:g}", torch.where(free, recorded * factor, recorded)
    yield "other random weights and inputs", drawn
    yield "other random weights and inputs, times 8", torch.where(free, drawn * 8, drawn)
    yield "weights and inputs times -1", torch.where(free, -recorded, recorded)


def _at(inputs: Inputs, values: torch.Tensor, base: Ran, wanted: dict[Key, list[int]], nudge: float):
    """({output: its pieces that differ at these inputs}, replays that it took). Nothing counts where a decision falls otherwise."""
    try:
        ran = inputs.run(values)
        here = ran.comparison
        gaps = _gaps(here, base.comparison, wanted) if ran.takes_the_way_of(base) else {}
        if not gaps:
            return {}, 1
        noise: dict[tuple[Key, int], float] = {}
        for k in range(NUDGES):
            shaken = inputs.shaken(values, nudge, 2 * k)
            near = shaken.comparison
            if not fall_alike(base.decisions, shaken.decisions):
                return {}, 2 + k
            for key, piece in gaps:
                noise[key, piece] = max(noise.get((key, piece), 0.0), _moved(here, near, key, piece))
    except (ReplayError, RuntimeError):       # a trial that torch refuses, say to invert a singular matrix, shows nothing
        return {}, 1 + NUDGES
    found: dict[Key, dict[int, tuple]] = {}
    for (key, piece), (reference, parallel) in gaps.items():
        scale = float(reference.abs().max())
        at = torch.nonzero((reference - parallel).abs() > max(LEAST * max(scale, 1e-30), BEYOND * noise[key, piece])).reshape(-1)
        if len(at):
            found.setdefault(key, {})[piece] = (at, reference[at], parallel[at])
    return found, 1 + NUDGES


def _gaps(here: Comparison, base: Comparison, wanted: dict[Key, list[int]]) -> dict[tuple[Key, int], tuple[torch.Tensor, torch.Tensor]]:
    """Both sides' values of the wanted pieces that differ and are numbers throughout."""
    out = {}
    for key, pieces in wanted.items():
        if not _same_pieces(here, base, key):
            continue
        for k in pieces:
            a, b = _sides(here.compared[key].pieces[k])
            if bool(a.isfinite().all() and b.isfinite().all()) and bool(((a - b).abs() > LEAST * max(float(a.abs().max()), 1e-30)).any()):
                out[key, k] = (a, b)
    return out


def _same_pieces(here: Comparison, base: Comparison, key: Key) -> bool:
    new, old = here.compared.get(key), base.compared.get(key)
    return new is not None and old is not None and not new.problems and not new.missing and len(new.pieces) == len(old.pieces) and all(
        p.rank == q.rank and len(p.at) == len(q.at) and (p.at == q.at).all() for p, q in zip(new.pieces, old.pieces))


def _sides(piece: Piece) -> tuple[torch.Tensor, torch.Tensor]:
    return piece.reference[Trial.name].t.reshape(-1), piece.parallel[Trial.name].t.reshape(-1)


def _moved(here: Comparison, near: Comparison, key: Key, k: int) -> float:
    """By how much either side changed: infinitely if what is compared did."""
    if not _same_pieces(near, here, key):
        return float("inf")
    changes = [(a - b).abs() for a, b in zip(_sides(here.compared[key].pieces[k]), _sides(near.compared[key].pieces[k]))]
    return max(float(c.max()) if bool(c.isfinite().all()) else float("inf") for c in changes)


def until(program: Program, step: int) -> Program:
    """The program up to the end of a step."""
    def cut(ops: list[OpCall]) -> list[OpCall]:
        end = next((c.index for c in ops if c.name == "tv.step" and c.args[0] > step), len(ops))
        return ops[:end]
    return Program([msgspec.structs.replace(t, ops=cut(t.ops)) for t in program.traces], program.blobs)


def fall_alike(old: list[tuple[Machine, Decision]], new: list[tuple[Machine, Decision]]) -> bool:
    if len(old) != len(new):
        return False
    return all(a.call is b.call and a.kind == b.kind and _falls_alike(a, b) for (_, a), (_, b) in zip(old, new))


def decisions_of(worlds: list[World]) -> list[tuple[Machine, Decision]]:
    is_idle = Idle()
    return [(m, d) for w in worlds for m in w.machines for d in m.decisions if not is_idle(m, d)]


def _falls_alike(old: Decision, new: Decision) -> bool:
    a, b = _operands(old), _operands(new)
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b)):
        return False
    name, _, op = old.kind.partition(":")
    if all(torch.equal(x, y) for x, y in zip(a, b)):
        return True
    if name == "compare" and len(a) == 2:
        return all(_order(x, y) == _order(u, v) for x, y, u, v in [(*a, *b)])
    if name == "mask" and len(a) == 1:
        return torch.equal(a[0] != 0, b[0] != 0)
    if name == "cast" and len(a) == 1:
        return torch.equal(a[0].trunc(), b[0].trunc())
    return name in CHOOSES and len(a) == 1 and _same_order(a[0], b[0])


def _order(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).sign().reshape(-1)[0])


def _same_order(old: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether the elements of every row stand in the same order of size, equal ones (which a choice may take in any order) as before."""
    at = old.argsort(dim=-1, stable=True)
    return torch.equal(old.gather(-1, at).diff(dim=-1) > 0, new.gather(-1, at).diff(dim=-1) > 0) and not bool((new.gather(-1, at).diff(dim=-1) < 0).any())


def _operands(d: Decision) -> list[torch.Tensor]:
    return _plain(d.operands.get(Trial.name, ()))


def _plain(values: Iterable) -> list[torch.Tensor]:
    parts = [p for v in values for p in ((v.re, v.im) if isinstance(v, Complex) else (v,))]
    return [p.t if isinstance(p, RealValue) else p for p in parts]
