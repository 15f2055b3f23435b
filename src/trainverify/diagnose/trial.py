"""Replays both programs in float64 on other inputs than the recorded ones, to look for a simpler counterexample (not trusted).

Integers, Python's branches and the places of elements stay as they were recorded. A trial therefore counts only if every decision would have
fallen as it did: its operands are looked at again. Masks are computed from the trial's own values.
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec
import torch

from trainverify.algebra.real import RealValue
from trainverify.diagnose.dataflow import Dataflow, Node
from trainverify.engine.inputs import Trial, decisions_of, fall_alike, until
from trainverify.ir.trace import RESIZE, OpCall, Program, TensorRef, references, resized
from trainverify.ops.table import OpTable
from trainverify.relate.compare import Compared, Comparison, Key
from trainverify.relate.symbols import Binder, Symbols
from trainverify.replay.machine import Decision, Hooks, Machine
from trainverify.replay.run import replay

Place = tuple[str, int, int]                  # side, rank, call


@dataclass(slots=True)
class Arguments:
    """What a call was given, in float64: tensors, integers and plain values in the places of its arguments."""

    call: OpCall
    args: list
    kwargs: dict


@dataclass(slots=True)
class Outcome:
    """What one trial gives: the compared output, wanted calls' arguments and results, and every decision."""

    compared: Compared | None
    results: dict[Place, dict[int, torch.Tensor]]
    arguments: dict[Place, Arguments]
    decisions: list[tuple[Machine, Decision]]
    calls: int
    elements: int
    faults: int


@dataclass(slots=True)
class Tape:
    """Hook target that keeps what wanted calls were given and what they made."""

    wanted: frozenset[Place]
    results: dict[Place, dict[int, torch.Tensor]] = field(default_factory=dict)
    arguments: dict[Place, Arguments] = field(default_factory=dict)

    def before(self, machine: Machine, call: OpCall) -> None:
        place = (machine.trace.side, machine.rank, call.index)
        if place in self.wanted:
            m = machine.algebras[0]
            if call.collective is not None:
                args, kwargs = [machine.value(m, r) for r in call.collective.inputs], {}
            else:
                args, kwargs = [machine.value(m, a) for a in call.args], {k: machine.value(m, a) for k, a in call.kwargs.items()}
            self.arguments[place] = Arguments(call, [_plain(a) for a in args], {k: _plain(v) for k, v in kwargs.items()})

    def value(self, machine: Machine, m: Trial, call: OpCall, k: int, ref: TensorRef) -> None:
        place = (machine.trace.side, machine.rank, call.index)
        if place in self.wanted:
            held = machine.memory[m.name].load(ref)
            if isinstance(held, RealValue):
                self.results.setdefault(place, {})[k] = held.t.clone()


class Trials:
    """Both programs up to the end of one step, to be replayed with given values of the symbols."""

    def __init__(self, reference: Program, parallel: Program, table: OpTable, symbols: Symbols, like: Comparison, key: Key):
        self.programs = {side: until(p, key[2]) for side, p in (("reference", reference), ("parallel", parallel))}
        self.table, self.symbols, self.like, self.key = table, symbols, like, key

    def narrow(self, wanted: Iterable[Place]) -> None:
        """From here on replay only what the output and the wanted calls depend on."""
        its = list(wanted)
        self.programs = {side: sliced(p, [(r, i) for s, r, i in its if s == side], self.key) for side, p in self.programs.items()}

    def run(self, values: torch.Tensor, wanted: Iterable[Place] = ()) -> Outcome:
        m, tape, worlds = Trial(lambda numbers: values[numbers]), Tape(frozenset(wanted)), []
        for program in self.programs.values():
            binder = Binder(self.symbols, [m])
            hooks = Hooks(symbol=binder.symbol, bind=binder.bind, before=(tape.before,), value=tape.value)
            worlds.append(replay(program, [m], self.table, hooks))
        comparison = Comparison(self.symbols, [m], *worlds, like=self.like)
        comparison.run()
        machines = [machine for w in worlds for machine in w.machines]
        return Outcome(comparison.compared.get(self.key), tape.results, tape.arguments, decisions_of(worlds), sum(a.ops for a in machines),
                       sum(a.elements for a in machines), sum(len(a.diagnostics) for a in machines))


CONTROL = {"tv.decision", "tv.param", "tv.stepped", "aten.is_nonzero.default", "aten.equal.default", "aten._local_scalar_dense.default"}
ALWAYS = {"tv.symbol", "tv.data", "tv.step"}


def sliced(program: Program, wanted: Iterable[Node], key: Key) -> Program:
    """Only the calls that the output and the wanted calls were computed from, with every decision that Python took before them."""
    outputs = [(t.rank, c.index) for t in program.traces for c in t.ops if c.name == "tv.output" and (c.args[0], c.args[1], c.args[2]) == key]
    return needed(program, [*wanted, *outputs])


def needed(program: Program, starts: list[Node], decided: bool = True) -> Program:
    """Only these calls and what they were computed from, and (decided) with every decision that Python took before them."""
    flow = Dataflow(program)
    ends = {t.rank: 0 for t in program.traces}
    for rank, index in starts:
        ends[rank] = max(ends[rank], index)
    keep: set[Node] = set()
    stack = [*starts, *((t.rank, c.index) for t in program.traces for c in t.ops if decided and c.name in CONTROL and c.index <= ends[t.rank])]
    while stack:
        node = stack.pop()
        if node in keep:
            continue
        keep.add(node)
        call = flow.call(node)
        met = call.collective is not None and call.collective.kind not in ("send", "recv")
        stack += [*flow.producers(node), *(flow.members(node) if met else ())]
        if (sent := flow.sender(node)) is not None:
            stack += [sent, flow.delivered(node)]
    traces = []
    for t in program.traces:
        works = {t.ops[i].collective.work for r, i in keep if r == t.rank and t.ops[i].collective is not None} - {None}
        ops, named = [], set()
        for c in t.ops:
            if (t.rank, c.index) in keep or c.name in ALWAYS or c.name == "tv.wait" and c.args[0] in works or c.name == RESIZE and resized(c) in named:
                ops.append(c)
                named.update(r.storage for r in references(c))
        traces.append(msgspec.structs.replace(t, ops=ops))
    return Program(traces, program.blobs)


def same_decisions(old: Outcome, new: Outcome) -> bool:
    """Whether each decision falls on the new values as it fell on the old ones."""
    return fall_alike(old.decisions, new.decisions)


def _plain(a):
    """Values as tensors, through lists."""
    if isinstance(a, RealValue):
        return a.t.clone()
    return [_plain(x) for x in a] if isinstance(a, list) else a


def result_of(outcome: Outcome, side: str, node: Node, k: int = 0) -> torch.Tensor | None:
    return outcome.results.get((side, *node), {}).get(k)
