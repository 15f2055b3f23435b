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

from trainverify.ir.trace import RESIZE, OpCall, Program, ScalarRef, TensorRef, Trace, inputs, references, resized
from trainverify.ops.access import reads
from trainverify.replay.machine import Hooks, Machine
from trainverify.replay.run import replay
from trainverify.shrink.check import SCALARS, scalar_value
from trainverify.shrink.classes import Classes, refusal
from trainverify.shrink.facts import Domain, base
from trainverify.shrink.flow import TAINTED, Rank, flows, meeting
from trainverify.shrink.repeat import is_float, scalars
from trainverify.shrink.spaces import PICK, PRODUCT, Kept, Spaces

MOVES = {"clone", "copy", "_to_copy", "cat", "stack", "alias", "detach", "contiguous", "split_with_sizes_copy", "constant_pad_nd", "repeat"}
INDEXING = {"embedding", "embedding_dense_backward", "gather", "scatter", "scatter_add", "index_select", "index_add", "index", "_unsafe_index", "index_put",
            "_index_put_impl", "_unsafe_index_put", "nll_loss_forward", "nll_loss_backward", "torchtitan.deterministic_scatter_add"}
MOVED = {"embedding", "gather", "index_select", "index", "_unsafe_index"}       # each element of the result is one of an argument's
RUNNING = {"cumsum", "_softmax", "_log_softmax", "_safe_softmax"}        # add up without losing a dimension
COUNTED = ("nonzero", "masked_select", "repeat_interleave", "_unique2", "bincount")
VALUELESS = ("floats", "meta")                # in a trace's meta: its floats have no values
LOOK = "tv.escape"                            # the call by which the replay stops to look at integers
SAME_ELSEWHERE = {"nll_loss_forward": 4, "nll_loss_backward": 5}         # position of ignore_index

Key = tuple[str, int, int]                    # side, rank, call or storage


class Values:
    """Storages of integers that hold the same values: those that only moves connect. Each class may have one index domain."""

    def __init__(self, classes: Classes):
        self.parent: dict[Key, Key] = {}
        self.domain: dict[Key, Domain] = {}
        self.numeric: dict[Key, OpCall] = {}
        self.spaces = classes.spaces
        self.canon = {where: layout.canon for where, layout in classes.layouts.items()}
        for where, layout in classes.layouts.items():
            for call in layout.repeats.distinct():
                self._moves(where, call)
        self._messages(classes)
        for d in classes.notes.domains:
            key = self.find(self.key(d.where, d.ref))
            if key in self.domain:
                self.spaces.unify(self.domain[key].space, d.space)
            else:
                self.domain[key] = d
        for where, layout in classes.layouts.items():
            for call in layout.repeats.distinct():
                self._numbers(where, call)

    def key(self, where: tuple[str, int], ref: TensorRef) -> Key:
        return (*where, self.canon[where][ref.storage])

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
        return self.domain.get(self.find(self.key(where, ref)))

    def _moves(self, where, call: OpCall) -> None:
        if call.collective is None and base(call.name) in MOVES:
            ints = [r for r in (*inputs(call), *call.targets()) if not is_float(r) and r.dtype != "bool"]
            for r in ints[1:]:
                self.join(self.key(where, ints[0]), self.key(where, r))

    def _messages(self, classes: Classes) -> None:
        """All integers that one group exchanges are of one kind, except those that are added up."""
        groups: dict[tuple, list[Key]] = defaultdict(list)
        for where, layout in classes.layouts.items():
            for call in layout.trace.ops:
                c = call.collective
                if c is None or c.kind in ("all_reduce", "reduce", "reduce_scatter") or all(is_float(r) for r in (*c.inputs, *c.outputs)):
                    continue
                groups[(where[0], *meeting(where[1], c))] += [self.key(where, r) for r in (*c.inputs, *c.outputs) if not is_float(r) and r.dtype != "bool"]
        for keys in groups.values():
            for k in keys[1:]:
                self.join(keys[0], k)

    def _numbers(self, where, call: OpCall) -> None:
        """Integers that a float result is computed from, as numbers."""
        if call.name.startswith("tv.") or base(call.name) in INDEXING or not any(is_float(t) for t in call.targets()):
            return
        for r in reads(call):
            if not is_float(r) and r.dtype != "bool":
                self.numeric.setdefault(self.find(self.key(where, r)), call)

    def clashes(self) -> list[tuple[Domain, OpCall]]:
        """Domains whose indices are also numbers: they must stay what they are."""
        return [(d, self.numeric[k]) for k, d in self.domain.items() if k in self.numeric]


@dataclass(slots=True)
class Full:
    """What the recorded integers show."""

    truths: dict[Key, list[torch.Tensor | None]] = field(default_factory=dict)          # of a call: its results at the kept positions
    valid: dict[Key, int] = field(default_factory=dict)      # of a loss: how many targets are not ignored
    required: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))     # atom -> indices that occur
    chosen: list[tuple[int, OpCall]] = field(default_factory=list)                      # domains of indices that floats chose
    uncounted: list[tuple[tuple[int, ...], OpCall]] = field(default_factory=list)       # atoms over which numbers are added up that nobody recorded


@dataclass(slots=True)
class Wanted:
    """What is to be known of one rank's integers, by call."""

    looked: dict[int, list[tuple[int, TensorRef, int]]] = field(default_factory=lambda: defaultdict(list))     # indices: (domain's space, where, ignored)
    targets: dict[int, TensorRef] = field(default_factory=dict)      # of losses
    truths: set[int] = field(default_factory=set)
    counts: set[int] = field(default_factory=set)

    def reads(self, k: int) -> list[TensorRef]:
        """What must be there before the call, which need not be executed itself."""
        return [ref for _, ref, _ in self.looked.get(k, ())] + ([self.targets[k]] if k in self.targets else [])


class Integers:
    """What is computed from integers alone, and numbers that depend on no symbol, evaluated at full size: the calls of which it is made, and no others."""

    def __init__(self, classes: Classes, values: Values, table):
        self.classes, self.values, self.table = classes, values, table
        self.domains: dict[tuple[str, int], dict[int, list[tuple[int, Domain]]]] = defaultdict(lambda: defaultdict(list))
        for d in classes.notes.domains:
            at = list(references(d.call)).index(d.ref)
            self.domains[d.where][d.call.index].append((at, d))
        self.ranks: dict[str, list[Rank]] = {}
        for side in classes.programs:
            asked = {rank: {k: tuple(at for at, _ in found) for k, found in self.domains[(side, rank)].items()} for s, rank in classes.layouts if s == side}
            self.ranks[side] = flows(classes, side, asked)
        self.wanted = {rank.layout.where: self._wanted(rank) for ranks in self.ranks.values() for rank in ranks}
        self.chosen: dict[int, OpCall] = {}
        for ranks in self.ranks.values():
            for rank in ranks:
                for k, sid in rank.chosen:
                    for at, d in self.domains[rank.layout.where][rank.layout.repeats.like[k]]:
                        if rank.layout.repeats.named[k][at] == sid:
                            self.chosen.setdefault(d.space, d.call)

    def _wanted(self, rank: Rank) -> Wanted:
        """All but the counts, which depend on what is kept."""
        layout, found = rank.layout, Wanted()
        repeats, domains = layout.repeats, self.domains[layout.where]
        for k, call in enumerate(layout.trace.ops):
            form = repeats.forms[repeats.form[k]]
            if call.collective is not None or call.name.startswith("tv."):
                continue
            for at, d in domains.get(repeats.like[k], ()):
                if (k, repeats.named[k][at]) not in rank.chosen:
                    ref = form.refs[at]
                    found.looked[k].append((d.space, TensorRef(repeats.named[k][at], ref.offset, ref.size, ref.stride, ref.dtype), _ignored(call)))
            if (op := base(call.name)) in SAME_ELSEWHERE:
                found.targets[k] = call.args[1 if op == "nll_loss_forward" else 2]
            if form.integers_only and form.other_targets and not call.rng and not form.takes_scalars and not rank.marks[k] & TAINTED:
                if op not in MOVES or (*layout.where, repeats.like[k]) in self.classes.unread:
                    found.truths.add(k)
        return found

    def _counts(self, rank: Rank, kept: Kept) -> set[int]:
        """Calls that add up numbers that depend on no symbol over indices of which some are not kept: counts in disguise."""
        layout, s, repeats, known = rank.layout, self.classes.spaces, rank.layout.repeats, {}

        def counts(first: int) -> bool:
            call, targets = layout.trace.ops[first], layout.trace.ops[first].targets()
            if base(call.name) in MOVED:
                return False
            there = {a for r in targets for d in layout.dims(r) for a in s.atoms(d)}
            gone = {a for r in reads(call) for d in layout.dims(r) for a in s.atoms(d)} - there
            running = {a for d in layout.dims(targets[0]) for a in s.atoms(d)} if base(call.name) in RUNNING else set()
            return any(kept.count(a) < s.size(a) for a in gone | running)

        found = set()
        for k, call in enumerate(layout.trace.ops):
            if rank.marks[k] or not repeats.forms[repeats.form[k]].float_targets or call.rng or call.name.startswith("tv.") or call.collective is not None:
                continue
            first = repeats.like[k]
            if first not in known:
                known[first] = counts(first)
            if known[first]:
                found.add(k)
        return found

    def look(self, kept: Kept) -> Full:
        """Evaluate both sides."""
        full = Full(chosen=[(space, call) for space, call in self.chosen.items()])
        for side in self.classes.programs:
            for rank in self.ranks[side]:
                self.wanted[rank.layout.where].counts = self._counts(rank, kept)
            traces = self._slices(side, full)
            blobs = self.classes.programs[side].blobs
            watcher = Watcher(self.classes, self.values, kept, full, side, self.wanted)
            replay(Program(traces, blobs), [], self.table, Hooks(before=(watcher.before,), after=(watcher.after,)))
        return full

    # ---- which calls that takes
    def _slices(self, side: str, full: Full) -> list[Trace]:
        ranks, met = self.ranks[side], set()
        while True:                           # a collective that one member needs, all must execute
            before = len(met)
            slices = [self._slice(rank, met) for rank in ranks]
            if len(met) == before:
                break
        unknown = [self._unrecorded(rank, needed) for rank, needed in zip(ranks, slices)]
        if any(unknown):
            for rank, missing in zip(ranks, unknown):
                self._leave(rank, missing, full)
            return self._slices(side, full)
        return [self._trace(rank, needed) for rank, needed in zip(ranks, slices)]

    def _slice(self, rank: Rank, met: set[tuple]) -> set[int]:
        """The calls of one rank on which what is wanted depends, last one first."""
        layout, wanted = rank.layout, self.wanted[rank.layout.where]
        repeats, ops, number = layout.repeats, layout.trace.ops, layout.where[1]
        needed: set[int] = set()
        storages: set[int] = set()
        works: set[int] = set()
        numbers: set[int] = set()              # tracked scalars
        for k in range(len(ops) - 1, -1, -1):
            call, form, named = ops[k], repeats.forms[repeats.form[k]], repeats.named[k]
            c = call.collective
            if c is not None:
                key = meeting(number, c)
                if key not in met and storages.isdisjoint([named[p] for p in form.received]):
                    continue
                met.add(key)
                needed.add(k)
                storages.update([named[p] for p in form.sent])
                if c.work is not None:
                    works.add(c.work)
                continue
            if call.name == RESIZE:
                if resized(call) in storages:
                    needed.add(k)
                continue
            if numbers and isinstance(call.outs, ScalarRef) and call.outs.id in numbers:
                needed.add(k)
                storages.update([named[p] for p in form.read])
                numbers.update(scalars(call))
            if call.name.startswith("tv."):
                continue
            if k in wanted.truths or k in wanted.counts or (storages and not storages.isdisjoint([named[p] for p in (*form.float_targets, *form.other_targets)])):
                needed.add(k)
                storages.update([named[p] for p in (*form.read, *form.float_targets, *form.other_targets)])
                numbers.update(scalars(call) if form.takes_scalars else ())
            storages.update([r.storage for r in wanted.reads(k)])
        needed.update(k for k, call in enumerate(ops) if call.name == "tv.wait" and call.args[0] in works)
        return needed

    @staticmethod
    def _unrecorded(rank: Rank, needed: set[int]) -> set[int]:
        """Calls that read numbers that a capture without values does not have."""
        repeats, trace, missing = rank.layout.repeats, rank.layout.trace, set()
        lost = {sid for sid, st in enumerate(trace.storages) if st.initial and f"init.{sid}" not in rank.blobs}
        numbers: set[int] = set()              # tracked scalars of which the value is not known
        for k in sorted(needed) if lost or VALUELESS in trace.meta.items() else ():
            call, form, named = trace.ops[k], repeats.forms[repeats.form[k]], repeats.named[k]
            drawn = call.rng and any(f"rng.{k}.{n}" not in rank.blobs for n in range(len(call.targets())))
            strange = call.name.startswith("tv.scalar.") and call.name.split(".")[2] not in (*SCALARS, "item")
            if drawn or strange or not lost.isdisjoint([named[p] for p in form.read]) or not numbers.isdisjoint(scalars(call)):
                missing.add(k)
                lost.update([named[p] for p in (*form.float_targets, *form.other_targets)])
                numbers.update([call.outs.id] if isinstance(call.outs, ScalarRef) else ())
        return missing

    def _leave(self, rank: Rank, missing: set[int], full: Full) -> None:
        """What is not recorded is not evaluated: what is added up over stays as it is."""
        layout, wanted = rank.layout, self.wanted[rank.layout.where]
        for k in missing & wanted.counts:
            call = layout.trace.ops[k]
            full.uncounted.append((tuple(a for r in reads(call) for d in layout.dims(r) for a in self.classes.spaces.atoms(d)), call))
        wanted.counts -= missing
        if missing & wanted.truths:
            call = layout.trace.ops[min(missing & wanted.truths)]
            raise refusal("SHAPE003", f"{call.name} computes integers from numbers that were not recorded", "verify without --reduce", layout.span(call))

    def _trace(self, rank: Rank, needed: set[int]) -> Trace:
        """The needed calls, and a place to look at indices before each call that has some."""
        t, wanted = rank.layout.trace, self.wanted[rank.layout.where]
        ops = []
        for k in sorted(needed | set(wanted.looked) | set(wanted.targets)):
            if found := wanted.reads(k):
                ops.append(OpCall(k, LOOK, ("", *found), {}, None))
            if k in needed:
                ops.append(t.ops[k])
        return Trace(t.side, t.rank, t.world_size, ops, t.storages, t.spans)


class Watcher:
    """Hooks of the replay of one side."""

    def __init__(self, classes: Classes, values: Values, kept: Kept, full: Full, side: str, wanted: dict[tuple[str, int], Wanted]):
        self.classes, self.values, self.kept, self.full, self.side, self.wanted = classes, values, kept, full, side, wanted

    def restricted(self, machine: Machine, ref: TensorRef) -> torch.Tensor:
        """The tensor at the kept positions."""
        t = machine.native.tensor(ref)
        for k, s in enumerate(self.classes.layouts[(self.side, machine.rank)].dims(ref)):
            if self.kept.count(s) != t.shape[k]:
                t = t.index_select(k, torch.from_numpy(np.ascontiguousarray(self.kept.indices(s))))
        return t.clone()

    def before(self, machine: Machine, call: OpCall) -> None:
        if call.name != LOOK:
            return
        wanted, spaces = self.wanted[(self.side, machine.rank)], self.classes.spaces
        for space, ref, low in wanted.looked.get(call.index, ()):
            at = self.restricted(machine, ref).reshape(-1).unique().numpy()
            at = at[at != low] if low is not None else np.where(at < 0, at + spaces.size(space), at)
            locate(spaces, space, at, self.full.required)
        if call.index in wanted.targets:
            target = wanted.targets[call.index]
            original = self.classes.layouts[(self.side, machine.rank)].trace.ops[call.index]
            self.full.valid[(self.side, machine.rank, call.index)] = int((machine.native.tensor(target) != _ignored(original)).sum())

    def after(self, machine: Machine, call: OpCall, results: list) -> None:
        wanted, key = self.wanted[(self.side, machine.rank)], (self.side, machine.rank, call.index)
        if call.name.startswith("tv.scalar.") and (number := scalar_value(machine, call)) is not None:
            machine.native.scalars[call.outs.id] = number      # at full size, what was recorded may stand for it only
        if call.collective is not None or (call.index not in wanted.truths and call.index not in wanted.counts):
            return
        self.full.truths[key] = [self.restricted(machine, t) if is_float(t) else self.placed(machine, t) for t in call.targets()]

    def placed(self, machine: Machine, ref: TensorRef) -> torch.Tensor:
        """The kept values of an integer tensor, indices as places among the kept ones."""
        t = self.restricted(machine, ref)
        return t if ref.dtype == "bool" else places(self.kept, self.values.of((self.side, machine.rank), ref), t)


def _ignored(call: OpCall) -> int | None:
    """The label of a loss that is no index."""
    return call.args[SAME_ELSEWHERE[base(call.name)]] if base(call.name) in SAME_ELSEWHERE else None


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


def locate(spaces: Spaces, s: int, at: np.ndarray, into: dict[int, set[int]]) -> None:
    """The atoms' indices of which these indices of s are made."""
    s = spaces.find(s)
    form = spaces.form(s)
    if not at.size:
        return
    if form is None:
        into[s].update(np.unique(at).tolist())
    elif form.kind == PRODUCT:
        size = spaces.size(s)
        for p in form.parts:
            size //= spaces.size(p)
            k, at = np.divmod(at, size)
            locate(spaces, p, np.unique(k), into)
            at = np.unique(at)
    elif form.kind == PICK:
        locate(spaces, form.parts[0], form.picked[at], into)
    else:
        for p in form.parts:
            inside = at < spaces.size(p)
            locate(spaces, p, at[inside], into)
            at = at[~inside] - spaces.size(p)


def check_sizes(classes: Classes, integers: Integers) -> None:
    """How many elements floats choose must not be a size."""
    for ranks in integers.ranks.values():
        for rank in ranks:
            repeats = rank.layout.repeats
            counted = {number for number in set(repeats.form) if base(repeats.forms[number].call.name) in COUNTED}
            for call, number in zip(rank.layout.trace.ops, repeats.form):
                if number in counted and (repeats.forms[number].reads_floats or rank.marks[call.index] & TAINTED):
                    raise refusal("SHAPE003", f"{call.name}: how many elements there are depends on floats, so the sizes after it are not known at other sizes",
                                  "verify without --reduce, or give the routing as data", rank.layout.span(call))


__all__ = ["Full", "Integers", "Values", "Watcher", "check_sizes", "locate", "places"]
