"""What depends on what in the recorded programs, without executing them (trusted): results that may depend on symbols, integers that were computed
from floats, memory that nobody has written.

Both are read in the order of the replay: ranks in lock step where they meet. What is found is by storage and only grows (a storage that once held a
symbol counts from the start), so what a call that is not found here reads was computed by calls that are not found either.
"""
from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field

from trainverify.ir.trace import Collective, OpCall, ScalarRef
from trainverify.ops.access import makes_garbage
from trainverify.shrink.classes import Classes, refusal
from trainverify.shrink.layout import Layout
from trainverify.shrink.repeat import Form, item, scalars

SYMBOLIC, TAINTED, GARBAGE = 1, 2, 4          # of a call: its result may depend on symbols; its integers come from floats; it reads what nobody wrote


def meeting(rank: int, c: Collective) -> tuple:
    """What the members of a collective, or the ends of a message, have in common."""
    if c.kind in ("send", "recv"):
        return ("mail", *((rank, c.peer) if c.kind == "send" else (c.peer, rank)), c.group, c.group_name, c.tag, c.seq)
    return (c.group, c.group_name, c.seq)


@dataclass(slots=True)
class Rank:
    """One rank while it is read, and what was found of it."""

    layout: Layout
    blobs: dict[str, object]
    marks: bytearray                          # of each call
    symbolic: set[int]
    tainted: set[int] = field(default_factory=set)
    garbage: set[int] = field(default_factory=set)
    scalars: set[int] = field(default_factory=set)
    chosen: set[tuple[int, int]] = field(default_factory=set)       # (call, storage): of the calls that were asked about, integers from floats
    issued: dict[int, OpCall] = field(default_factory=dict)
    at: int = 0


@dataclass(slots=True)
class Met:
    came: int = 0
    symbolic: bool = False
    tainted: bool = False


def flows(classes: Classes, side: str, asked: dict[int, dict[int, tuple[int, ...]]]) -> list[Rank]:
    """All ranks of one side. asked: of each rank, calls (by the first like them) and the positions of integers of which `chosen` is to tell."""
    ranks = []
    for (where, rank), layout in classes.layouts.items():
        if where == side:
            bound = {sid for s, r, sid in classes.bound if (s, r) == (side, rank)}
            bound |= {c.args[2].storage for c in layout.trace.ops if c.name == "tv.symbol"}
            blobs = classes.programs[side].blobs[rank]
            bound |= {sid for sid, st in enumerate(layout.trace.storages) if st.initial and f"init.{sid}" not in blobs}      # a capture without values
            ranks.append(Rank(layout, blobs, bytearray(len(layout.trace.ops)), bound))
    met: dict[tuple, Met] = defaultdict(Met)
    live, idle = deque(ranks), 0
    while live:
        rank = live.popleft()
        before = rank.at
        _advance(rank, met, asked.get(rank.layout.where[1], {}))
        idle = idle + 1 if rank.at == before else 0
        if rank.at < len(rank.layout.trace.ops):
            live.append(rank)
        if idle > len(live):
            raise refusal("SHAPE003", "the ranks do not meet in the order of their traces", "verify without --reduce, and report this")
    return ranks


def _advance(rank: Rank, met: dict[tuple, Met], asked: dict[int, tuple[int, ...]]) -> None:
    """Until others must come."""
    repeats, ops = rank.layout.repeats, rank.layout.trace.ops
    forms = repeats.forms
    while rank.at < len(ops):
        k = rank.at
        call, form, named = ops[k], forms[repeats.form[k]], repeats.named[k]
        if call.collective is not None:
            if not _collective(rank, call, form, named, met):
                return
        elif call.name == "tv.wait":
            waited = rank.issued.get(call.args[0])
            if waited is not None and not _complete(rank, waited, met):
                return
            rank.issued.pop(call.args[0], None)
        elif not call.name.startswith("tv.") or call.name.startswith("tv.scalar."):
            if asked and (places := asked.get(repeats.like[k])):
                rank.chosen.update((k, named[p]) for p in places if named[p] in rank.tainted)
            rank.marks[k] = _local(rank, call, form, named)
        rank.at += 1


def _local(rank: Rank, call: OpCall, form: Form, named: tuple[int, ...]) -> int:
    read = [named[p] for p in form.read]
    mark = 0
    if not rank.symbolic.isdisjoint(read) or (form.takes_scalars and any(i in rank.scalars for i in scalars(call))):
        mark |= SYMBOLIC
        rank.symbolic.update([named[p] for p in form.float_targets])
    if form.other_targets and (form.reads_floats or form.takes_scalars or not rank.tainted.isdisjoint(read)):
        mark |= TAINTED
        rank.tainted.update([named[p] for p in form.other_targets])
    if makes_garbage(call.name):
        rank.garbage.update([named[p] for p in (*form.float_targets, *form.other_targets)])
    elif rank.garbage:
        mark |= _garbage(rank, form, named, read)
    if mark and isinstance(call.outs, ScalarRef):
        rank.scalars.add(call.outs.id)
    return mark


def _garbage(rank: Rank, form: Form, named: tuple[int, ...], read: list[int]) -> int:
    """Garbage spreads, and ends where all of a storage is written."""
    spoiled = not rank.garbage.isdisjoint(read)
    for p in (*form.float_targets, *form.other_targets):
        if spoiled:
            rank.garbage.add(named[p])
        elif named[p] in rank.garbage and form.refs[p].numel * item(form.refs[p].dtype) >= rank.layout.trace.storages[named[p]].nbytes:
            rank.garbage.discard(named[p])
    return GARBAGE if spoiled else 0


def _collective(rank: Rank, call: OpCall, form: Form, named: tuple[int, ...], met: dict[tuple, Met]) -> bool:
    """False while others have not come."""
    c, k = call.collective, rank.at
    here = met[meeting(rank.layout.where[1], c)]
    if c.kind != "recv" and not rank.marks[k]:
        rank.marks[k] = 128                   # has come
        here.came += 1
        sent = {named[p] for p in form.sent}
        here.symbolic |= not rank.symbolic.isdisjoint(sent) or not rank.garbage.isdisjoint(sent)
        here.tainted |= not rank.tainted.isdisjoint(sent)
    if c.work is not None:
        rank.issued[c.work] = call
        return True
    return _complete(rank, call, met)


def _complete(rank: Rank, call: OpCall, met: dict[tuple, Met]) -> bool:
    c = call.collective
    here = met[meeting(rank.layout.where[1], c)]
    if here.came < (len(c.group) if c.kind not in ("send", "recv") else 1):
        return c.kind == "send"
    outputs = [r.storage for r in c.outputs]
    if here.symbolic or c.kind == "recv":
        rank.symbolic.update(outputs)
    if here.tainted:
        rank.tainted.update(outputs)
    return True


__all__ = ["GARBAGE", "SYMBOLIC", "TAINTED", "Rank", "flows", "meeting"]
