"""Integers and masks: evaluated at full size by a native replay, and restricted to the kept indices (trusted).

What integers are computed from integers alone (positions, masks, shifted tokens, local ids) is not computed again at the reduced
sizes: each such result is the recorded program's, at the kept positions. Values that are used as indices become the indices' places
among those that are kept; every index that occurs at a kept position is kept. Integers that come from floats (a choice of experts) are
left to the reduced program, and what they choose among keeps its size.
"""
from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch

from trainverify.ir.trace import Collective, OpCall, ScalarRef, Sequence, TensorRef, inputs, tensors
from trainverify.ops.access import reads
from trainverify.replay.machine import Hooks, Machine
from trainverify.replay.run import replay
from trainverify.shrink.classes import Classes, is_float, refusal
from trainverify.shrink.facts import Domain
from trainverify.shrink.rules import base
from trainverify.shrink.spaces import PRODUCT, Kept, Spaces

MOVES = {"clone", "copy", "_to_copy", "cat", "stack", "alias", "detach", "contiguous", "split_with_sizes_copy", "constant_pad_nd", "repeat"}
INDEXING = {"embedding", "embedding_dense_backward", "gather", "scatter", "scatter_add", "index_select", "index_add", "index", "_unsafe_index", "index_put",
            "_index_put_impl", "_unsafe_index_put", "nll_loss_forward", "nll_loss_backward"}
RUNNING = {"cumsum", "_softmax", "_log_softmax", "_safe_softmax"}        # add up without losing a dimension
SAME_ELSEWHERE = {"nll_loss_forward": 4, "nll_loss_backward": 5}         # position of ignore_index

Key = tuple[str, int, int]                    # side, rank, call or storage


class Values:
    """Storages of integers that hold the same values: those that only moves connect. Each class may have one index domain."""

    def __init__(self, classes: Classes):
        self.parent: dict[Key, Key] = {}
        self.domain: dict[Key, Domain] = {}
        self.numeric: dict[Key, OpCall] = {}
        self.spaces = classes.spaces
        for where, layout in classes.layouts.items():
            for call in layout.trace.ops:
                self._moves(where, call)
        self._messages(classes)
        for d in classes.notes.domains:
            key = self.find((*d.where, d.ref.storage))
            if key in self.domain:
                self.spaces.unify(self.domain[key].space, d.space)
            else:
                self.domain[key] = d
        for where, layout in classes.layouts.items():
            for call in layout.trace.ops:
                self._numbers(where, call)

    def find(self, key: Key) -> Key:
        while (up := self.parent.get(key, key)) != key:
            key = up
        return key

    def join(self, a: Key, b: Key) -> None:
        a, b = self.find(a), self.find(b)
        if a != b:
            self.parent[b] = a

    def of(self, where: tuple[str, int], ref: TensorRef) -> Domain | None:
        """The domain of an integer tensor's values."""
        return self.domain.get(self.find((*where, ref.storage)))

    def _moves(self, where, call: OpCall) -> None:
        if call.collective is None and base(call.name) in MOVES:
            ints = [r for r in (*inputs(call), *call.targets()) if not is_float(r) and r.dtype != "bool"]
            for r in ints[1:]:
                self.join((*where, ints[0].storage), (*where, r.storage))

    def _messages(self, classes: Classes) -> None:
        """All integers that one group exchanges are of one kind, except those that are added up."""
        groups: dict[tuple, list[Key]] = defaultdict(list)
        for where, layout in classes.layouts.items():
            for call in layout.trace.ops:
                c = call.collective
                if c is None or c.kind in ("all_reduce", "reduce", "reduce_scatter"):
                    continue
                met = (where[0], c.kind, c.group, c.group_name, c.seq) if c.kind not in ("send", "recv") else (where[0], c.group_name, c.tag, c.seq, *sorted((where[1], c.peer)))
                groups[met] += [(*where, r.storage) for r in (*c.inputs, *c.outputs) if not is_float(r) and r.dtype != "bool"]
        for keys in groups.values():
            for k in keys[1:]:
                self.join(keys[0], k)

    def _numbers(self, where, call: OpCall) -> None:
        """Integers that a float result is computed from, as numbers."""
        if call.name.startswith("tv.") or base(call.name) in INDEXING or not any(is_float(t) for t in call.targets()):
            return
        for r in reads(call):
            if not is_float(r) and r.dtype != "bool":
                self.numeric.setdefault(self.find((*where, r.storage)), call)

    def clashes(self) -> list[tuple[Domain, OpCall]]:
        """Domains whose indices are also numbers: they must stay what they are."""
        return [(d, self.numeric[k]) for k, d in self.domain.items() if k in self.numeric]


@dataclass(slots=True)
class Truth:
    """What the recorded program computed in one target of one call, at the kept positions and as the reduced program must have it."""

    data: torch.Tensor


@dataclass(slots=True)
class Full:
    """What a native replay at full size shows."""

    truths: dict[Key, list[torch.Tensor | None]] = field(default_factory=dict)
    tainted: set[Key] = field(default_factory=set)           # (side, rank, storage): computed from floats
    valid: dict[Key, int] = field(default_factory=dict)      # of a loss: how many targets are not ignored
    required: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))     # atom -> indices that occur
    chosen: list[tuple[int, OpCall]] = field(default_factory=list)                      # domains of indices that floats chose


class Watcher:
    """Hooks of the native replay of one side."""

    def __init__(self, classes: Classes, values: Values, kept: Kept, full: Full, side: str):
        self.classes, self.values, self.kept, self.full, self.side = classes, values, kept, full, side
        self.domains: dict[Key, list[Domain]] = defaultdict(list)
        for d in classes.notes.domains:
            if d.where[0] == side:
                self.domains[(*d.where, d.call.index)].append(d)
        self.met: dict[tuple, bool] = {}
        # Storages that may depend on symbols. A storage that once has held a symbol counts from the start.
        self.symbolic = {(rank, sid) for where, rank, sid in classes.bound if where == side}
        self.symbolic |= {(rank, c.args[2].storage) for (where, rank), layout in classes.layouts.items() if where == side
                          for c in layout.trace.ops if c.name == "tv.symbol"}
        self.scalars: set[tuple[int, int]] = set()
        self.moved: set[tuple] = set()

    def hooks(self) -> Hooks:
        return Hooks(before=(self.before,), after=(self.after,))

    def restricted(self, machine: Machine, ref: TensorRef) -> torch.Tensor:
        """The tensor at the kept positions."""
        t = machine.native.tensor(ref)
        for k, s in enumerate(self.classes.layouts[(self.side, machine.rank)].dims(ref)):
            if self.kept.count(s) != t.shape[k]:
                t = t.index_select(k, torch.from_numpy(np.ascontiguousarray(self.kept.indices(s))))
        return t.clone()

    def _tainted(self, machine: Machine, refs) -> bool:
        return any(is_float(r) or (self.side, machine.rank, r.storage) in self.full.tainted for r in refs)

    def before(self, machine: Machine, call: OpCall) -> None:
        key = (self.side, machine.rank, call.index)
        for d in self.domains.get(key, ()):
            if (self.side, machine.rank, d.ref.storage) in self.full.tainted:
                self.full.chosen.append((d.space, call))
                continue
            at = self.restricted(machine, d.ref).reshape(-1).unique().numpy()
            size = self.classes.spaces.size(d.space)
            low = call.args[SAME_ELSEWHERE[base(call.name)]] if base(call.name) in SAME_ELSEWHERE else None
            at = at[at != low] if low is not None else np.where(at < 0, at + size, at)
            for v in at.tolist():
                locate(self.classes.spaces, d.space, v, self.full.required)
        if base(call.name) in SAME_ELSEWHERE:
            k = 1 if call.name.startswith("aten.nll_loss_forward") else 2
            self.full.valid[key] = int((machine.native.tensor(call.args[k]) != call.args[k + 3]).sum())
        c = call.collective
        if c is not None and any((machine.rank, r.storage) in self.symbolic for r in c.inputs):
            self.moved.add(_meeting(machine.rank, c))
        if c is not None and any(not is_float(r) for r in c.inputs):
            self.met[_meeting(machine.rank, c)] = self.met.get(_meeting(machine.rank, c), False) or self._tainted(machine, [r for r in c.inputs if not is_float(r)])

    def after(self, machine: Machine, call: OpCall, results: list) -> None:
        if call.collective is not None:
            if _meeting(machine.rank, call.collective) in self.moved or call.collective.kind == "recv":
                self.symbolic |= {(machine.rank, r.storage) for r in call.collective.outputs}
            if self.met.get(_meeting(machine.rank, call.collective)):
                self.full.tainted |= {(self.side, machine.rank, r.storage) for r in call.collective.outputs if not is_float(r)}
            return
        targets, key = call.targets(), (self.side, machine.rank, call.index)
        if self._depends(machine.rank, call):
            self.symbolic |= {(machine.rank, t.storage) for t in targets if is_float(t)}
            if isinstance(call.outs, ScalarRef):
                self.scalars.add((machine.rank, call.outs.id))
        elif self._counts(machine.rank, call):
            self.full.truths[key] = [self.restricted(machine, t) if is_float(t) else self.placed(machine, t) for t in targets]
            return
        if not any(not is_float(t) for t in targets) or call.name.startswith("tv."):
            return
        if self._tainted(machine, reads(call)) or any(isinstance(a, ScalarRef) for a in call.args):
            self.full.tainted |= {(self.side, machine.rank, t.storage) for t in targets if not is_float(t)}
            return
        if not call.rng:
            self.full.truths[key] = [None if is_float(t) else self.placed(machine, t) for t in targets]

    def _depends(self, rank: int, call: OpCall) -> bool:
        """Whether a result may depend on symbols."""
        scalars = [a for a in call.args if isinstance(a, ScalarRef)]
        return any((rank, r.storage) in self.symbolic for r in reads(call)) or any((rank, a.id) in self.scalars for a in scalars)

    def _counts(self, rank: int, call: OpCall) -> bool:
        """Whether the call adds up numbers that depend on no symbol over indices of which some are not kept: a count in disguise."""
        targets = call.targets()
        if call.rng or call.name.startswith("tv.") or not targets or not any(is_float(t) for t in targets):
            return False
        layout, s = self.classes.layouts[(self.side, rank)], self.classes.spaces
        there = {a for r in targets for d in layout.dims(r) for a in s.atoms(d)}
        gone = {a for r in reads(call) for d in layout.dims(r) for a in s.atoms(d)} - there
        running = {a for d in layout.dims(targets[0]) for a in s.atoms(d)} if base(call.name) in RUNNING else set()
        return any(self.kept.count(a) < s.size(a) for a in gone | running)

    def placed(self, machine: Machine, ref: TensorRef) -> torch.Tensor:
        """The kept values of an integer tensor, indices as places among the kept ones."""
        t = self.restricted(machine, ref)
        return t if ref.dtype == "bool" else places(self.kept, self.values.of((self.side, machine.rank), ref), t)


def _meeting(rank: int, c: Collective) -> tuple:
    if c.kind in ("send", "recv"):
        return ("mail", *((rank, c.peer) if c.kind == "send" else (c.peer, rank)), c.group, c.group_name, c.tag, c.seq)
    return (c.group, c.group_name, c.seq)


def places(kept: Kept, domain: Domain | None, t: torch.Tensor) -> torch.Tensor:
    """Indices as places among the kept ones. Values that are no index of the domain (ignored labels, other shards' ids) stay."""
    if domain is None:
        return t
    size, mine = kept.spaces.size(domain.space), kept.indices(domain.space)
    if len(mine) == size:
        return t
    flat = t.reshape(-1).numpy()
    inside = (flat >= 0) & (flat < size)
    at = np.minimum(np.searchsorted(mine, flat), len(mine) - 1)
    return torch.from_numpy(np.where(inside, at, flat)).to(t.dtype).reshape(t.shape)


def locate(spaces: Spaces, s: int, v: int, into: dict[int, set[int]]) -> None:
    """The atoms' indices of which index v of s is made."""
    s = spaces.find(s)
    form = spaces.form(s)
    if form is None:
        into[s].add(v)
    elif form.kind == PRODUCT:
        size = spaces.size(s)
        for p in form.parts:
            size //= spaces.size(p)
            k, v = divmod(v, size)
            locate(spaces, p, k, into)
    else:
        for p in form.parts:
            if v < spaces.size(p):
                return locate(spaces, p, v, into)
            v -= spaces.size(p)


def look(classes: Classes, values: Values, kept: Kept, table) -> Full:
    """Replay both programs natively at full size."""
    full = Full()
    for side, program in classes.programs.items():
        replay(program, [], table, Watcher(classes, values, kept, full, side).hooks())
    return full


def check_sizes(classes: Classes, full: Full) -> None:
    """How many elements floats choose must not be a size."""
    for (side, rank), layout in classes.layouts.items():
        for call in layout.trace.ops:
            if base(call.name) in ("nonzero", "masked_select", "repeat_interleave", "_unique2", "bincount") and any(
                    is_float(r) or (side, rank, r.storage) in full.tainted for r in reads(call)):
                raise refusal("SHAPE003", f"{call.name}: how many elements there are depends on floats, so the sizes after it are not known at other sizes",
                              "verify without --reduce, or give the routing as data", layout.span(call))


__all__ = ["Full", "Sequence", "Values", "Watcher", "check_sizes", "locate", "look", "places", "tensors"]
