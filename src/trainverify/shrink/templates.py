"""Rewritten calls as templates (trusted): what a call became at the reduced sizes, to be made again for the calls like it, on their storages.

Calls that are alike for the reduction (repeat.py) have the same arguments and the same geometry in storages that share their index spaces, so each becomes
the same calls but for the numbers of storages, works and collectives, and its place in the source.
"""
from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import dataclass

from trainverify.ir.trace import Arg, Collective, OpCall, Sequence, Storage, TensorRef


@dataclass(frozen=True, slots=True)
class Slot:
    """In place of a tensor reference: its number in the template."""

    number: int


@dataclass(frozen=True, slots=True)
class Part:
    """One call of a template; arguments with slots."""

    name: str
    args: tuple
    kwargs: dict[str, Arg]
    plain: bool                               # no slot among the keyword arguments
    outs: object
    writes: tuple[Slot, ...]
    rng: bool
    collective: Collective | None
    sent: tuple[Slot, ...]
    received: tuple[Slot, ...]


class Template:
    """What one call became; `named`: the storages that it named, `first`: the least number of those that the rewriting added."""

    def __init__(self, made: Several[OpCall], named: Several[int], first: int, storages: Several[Storage]):
        self._at = {sid: k for k, sid in reversed(list(enumerate(named)))}
        self._first = first
        self.added = tuple(storages[first:])
        self.refs: list[tuple[int, int, tuple[int, ...], tuple[int, ...], str]] = []        # place among the storages named, or that of an added one, negative
        self._known: dict[TensorRef, Slot] = {}
        self.parts = [self._part(call) for call in made]

    def _slot(self, ref: TensorRef) -> Slot:
        got = self._known.get(ref)
        if got is None:
            at = self._at[ref.storage] if ref.storage < self._first else self._first - 1 - ref.storage
            got = self._known[ref] = Slot(len(self.refs))
            self.refs.append((at, ref.offset, ref.size, ref.stride, ref.dtype))
        return got

    def _slotted(self, a: Arg):
        if isinstance(a, TensorRef):
            return self._slot(a)
        if isinstance(a, Sequence) and any(isinstance(x, (TensorRef, Sequence)) for x in a.items):
            return [self._slotted(x) for x in a.items]
        return a

    def _part(self, call: OpCall) -> Part:
        c = call.collective
        kwargs = {k: self._slotted(a) for k, a in call.kwargs.items()}
        return Part(call.name, tuple(self._slotted(a) for a in call.args), kwargs, not any(isinstance(a, (Slot, list)) for a in kwargs.values()),
                    self._slotted(call.outs), tuple(self._slot(w) for w in call.writes), call.rng, c,
                    tuple(self._slot(r) for r in c.inputs) if c else (), tuple(self._slot(r) for r in c.outputs) if c else ())

    def make(self, call: OpCall, named: Several[int], storages: list[Storage], ops: list[OpCall]) -> None:
        """The same for a call like it: appended to `ops`."""
        if self.added:
            base = len(storages)
            storages.extend(self.added)
            refs = [TensorRef(named[at] if at >= 0 else base - 1 - at, offset, size, stride, dtype) for at, offset, size, stride, dtype in self.refs]
        else:
            refs = [TensorRef(named[at], offset, size, stride, dtype) for at, offset, size, stride, dtype in self.refs]
        for p in self.parts:
            collective = None if p.collective is None else _collective(p, call.collective, refs)
            ops.append(OpCall(len(ops), p.name, tuple([refs[a.number] if type(a) is Slot else _filled(a, refs) if type(a) is list else a for a in p.args]),
                              p.kwargs if p.plain else {k: _filled(a, refs) for k, a in p.kwargs.items()}, _filled(p.outs, refs),
                              tuple([refs[w.number] for w in p.writes]), call.span, collective, 0, 0, p.rng))


def _filled(a, refs: list[TensorRef]):
    if type(a) is Slot:
        return refs[a.number]
    return Sequence(tuple([_filled(x, refs) for x in a])) if type(a) is list else a


def _collective(p: Part, mine: Collective, refs: list[TensorRef]) -> Collective:
    c = p.collective
    return Collective(c.kind, c.group, c.group_name, mine.seq, tuple([refs[s.number] for s in p.sent]), tuple([refs[s.number] for s in p.received]), c.reduce_op,
                      c.factor, c.root, c.peer, c.tag, c.in_splits, c.out_splits, c.listed, mine.work)


__all__ = ["Template"]
