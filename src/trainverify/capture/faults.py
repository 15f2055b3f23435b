"""What went wrong in a world, in words: the coordinator's state at the end made into diagnostics (not trusted, no torch).

Root causes come first and alone are errors: mismatches, exceptions, deaths; if there is none and ranks still wait, a peer that
never comes or a deadlock. Where the others wait is told in the notes. Everything is derived from who called what, never from timing.
"""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from trainverify.capture.coordinator import (
    DIED, FINISHED, RAISED, BadMail, Coordinator, InRecv, InSlot, Mail, Member, Mismatch, Slot, count, difference)
from trainverify.capture.userframes import frame_text
from trainverify.capture.wire import Key, Raised, Signature
from trainverify.diagnostics import Diagnostic, Span

FAULTS: Mapping[str, str] = MappingProxyType({
    "RUN001": "deadlock",
    "RUN002": "ranks meet in different collective operations",
    "RUN003": "ranks meet in a collective with different reduce operations",
    "RUN004": "ranks meet in a collective with different dtypes",
    "RUN005": "ranks meet in a collective with different sizes",
    "RUN006": "ranks meet in a collective with different roots",
    "RUN007": "ranks wait in different process groups for each other",
    "RUN008": "a peer never comes: it has finished",
    "RUN009": "a rank raised an exception",
    "RUN010": "a rank died",
    "RUN011": "the wall-clock limit was reached",
    "RUN012": "a message was sent and never received",
    "RUN013": "a message arrives with another size or dtype than expected",
    "RUN014": "a collective was started that not all members joined",
    "RUN015": "a rank failed inside TrainVerify",
    "RUN016": "init_process_group disagrees with the world",
})

_MISMATCH = {"op": "RUN002", "reduce_op": "RUN003", "dtypes": "RUN004", "sizes": "RUN005", "splits": "RUN005", "root": "RUN006"}
_MISMATCH_FIX = {
    "op": "Let all members of the group make the same calls in the same order; look for a branch that depends on the rank.",
    "reduce_op": "Give the same reduce op on all members.",
    "dtypes": "Cast to the same dtype on all members before the call.",
    "sizes": "Let all members contribute the same number of elements (pad, or use all_to_all with split sizes).",
    "splits": "What a member sends to another must be what that one expects: exchange the split sizes first.",
    "root": "Give the same source or destination rank on all members (a global rank, not the rank in the group).",
}
_PRINTED = "--debug keeps what each rank printed beside the traces."
Stacks = Mapping[int, list[tuple[str, int, str]]]


def diagnose(world: Coordinator, output: tuple[str, ...], limit: float | None, stacks: Stacks) -> tuple[Diagnostic, ...]:
    """All faults of a world that has ended; limit: the wall-clock limit in seconds if it was reached."""
    found = [_mismatch(world, p) if isinstance(p, Mismatch) else _bad_mail(p) for p in world.problems]
    found += _raises(world)
    found += [_death(m, output[m.rank]) for m in world.members if m.status == DIED]
    if not found:
        found += [_mismatch(world, Mismatch(s, what)) for s in _waiting_slots(world) if (what := difference(s))]
    if found:
        told = {r for p in world.problems if isinstance(p, Mismatch) for r in p.slot.group}
        waits = tuple(_where(m) for m in world.live() if m.waiting is not None and m.rank not in told)
        found[0] = _with_notes(found[0], waits)
    elif limit is not None:
        found.append(_wall_clock(world, limit, stacks))
    elif world.live():
        found.append(_stuck(world))
    else:
        found += [_unjoined(world, s) for s in world.slots.values()]
        found += [_unreceived(m) for m in world.unreceived()]
    return tuple(found)


# -- words

def ranks_text(ranks: Iterable[int]) -> str:
    """'rank 3', 'ranks 0-2, 5'."""
    spans: list[list[int]] = []
    for r in sorted(ranks):
        if spans and r == spans[-1][1] + 1:
            spans[-1][1] = r
        else:
            spans.append([r, r])
    parts = [str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a}-{b}" for a, b in spans]
    return ("rank " if len(spans) == 1 and spans[0][0] == spans[0][1] else "ranks ") + ", ".join(parts)


def _at(span: Span | None) -> str:
    return f" at {span}" if span else ""


def _op(s: Signature) -> str:
    reduce_op = f"({s.reduce_op})" if s.reduce_op else ""
    root = f" with root {s.root}" if s.root is not None else ""
    dtype = "/".join(dict.fromkeys(s.dtypes))
    sizes = ", ".join(str(list(size)) for size in s.sizes[:3]) + (", ..." if len(s.sizes) > 3 else "")
    splits = f" sending {list(s.in_splits)}, expecting {list(s.out_splits)} elements" if s.in_splits or s.out_splits else ""
    return f"{s.op}{reduce_op}{root}" + (f" of {dtype} {sizes}".rstrip() if dtype or sizes else "") + splits


def _group(slot: Slot) -> str:
    name = next(iter(slot.arrived.values())).group_name
    return f"group {name!r} ({ranks_text(slot.group)})"


def _tag(key: Key) -> str:
    return "/".join(map(str, key)) if isinstance(key, tuple) else str(key)


def _where(m: Member) -> str:
    """One line: what a rank is doing."""
    who = f"rank {m.rank}"
    if m.status == FINISHED:
        return f"{who} has finished" + (f"; its last communication was {_op(m.last)}{_at(m.last.span)}" if m.last else "")
    if isinstance(m.waiting, InRecv):
        at = _at(m.waiting.signature.span if m.waiting.signature else None)
        return f"{who} waits{at} to receive from rank {m.waiting.src} (tag {_tag(m.waiting.key)})"
    if isinstance(m.waiting, InSlot):
        slot, missing = m.waiting.slot, m.waiting.slot.missing()
        text = f"{who} waits in {_op(m.waiting.signature)}{_at(m.waiting.signature.span)}, call {slot.seq} of {_group(slot)}"
        return text + (f", for {ranks_text(missing)}" if missing else "")
    return f"{who} is running" + (f"; its last communication was {_op(m.last)}{_at(m.last.span)}" if m.last else "")


def _with_notes(d: Diagnostic, notes: tuple[str, ...]) -> Diagnostic:
    return Diagnostic(d.code, d.message, d.severity, d.span, d.ranks, d.notes + notes, d.fix)


def _span_waiting(m: Member) -> Span | None:
    waiting = m.waiting
    return waiting.signature.span if waiting is not None and waiting.signature is not None else None


# -- mismatches

def _value(s: Signature, what: str) -> object:
    if what == "sizes":
        return tuple(map(count, s.sizes))
    return (s.in_splits, s.out_splits) if what == "splits" else getattr(s, what)


def _odd_ones(slot: Slot, what: str) -> tuple[int, ...]:
    """The members outside the majority; all who came if there is none."""
    if what == "splits":
        return _split_pair(slot)
    values = {r: _value(s, what) for r, s in slot.arrived.items()}
    (best, n), *rest = Counter(values.values()).most_common()
    if rest and rest[0][1] == n:
        return tuple(sorted(values))
    return tuple(sorted(r for r, v in values.items() if v != best))


def _split_pair(slot: Slot) -> tuple[int, ...]:
    for i, a in enumerate(slot.group):
        for j, b in enumerate(slot.group):
            sender, receiver = slot.arrived.get(a), slot.arrived.get(b)
            if sender and receiver and sender.in_splits and receiver.out_splits and sender.in_splits[j] != receiver.out_splits[i]:
                return tuple(sorted({a, b}))
    return tuple(sorted(slot.arrived))


def _mismatch(world: Coordinator, problem: Mismatch) -> Diagnostic:
    slot, what = problem.slot, problem.what
    odd = _odd_ones(slot, what)
    others = [r for r in slot.arrived if r not in odd]
    if what == "splits":
        message = _split_message(slot, odd)
    elif others:
        a, b = slot.arrived[odd[0]], slot.arrived[others[0]]
        plural = "s" if len(odd) == 1 else ""
        message = f"{ranks_text(odd)} call{plural} {_op(a)} where {ranks_text(others)} call {_op(b)}"
    else:
        classes: dict[object, list[int]] = {}
        for r in odd:
            classes.setdefault(_value(slot.arrived[r], what), []).append(r)
        message = ", ".join(f"{ranks_text(rs)}: {_op(slot.arrived[rs[0]])}" for rs in classes.values()) + " in one collective"
    notes = [f"rank {r}: {_op(s)}{_at(s.span)}" for r, s in sorted(slot.arrived.items())]
    notes.append(f"call {slot.seq} of {_group(slot)}")
    notes += _history(world, slot)
    span = slot.arrived[odd[-1]].span
    lines = {str(s.span) for s in slot.arrived.values()}
    if len(lines) > 1:
        notes.append("likely cause: the ranks took different branches, or one of them left out or added a call before")
    return Diagnostic(_MISMATCH[what], message, span=span, ranks=odd, notes=tuple(notes), fix=_MISMATCH_FIX[what])


def _split_message(slot: Slot, pair: tuple[int, ...]) -> str:
    for a, b in ((pair[0], pair[-1]), (pair[-1], pair[0])):
        i, j = slot.group.index(a), slot.group.index(b)
        sends, expects = slot.arrived[a].in_splits[j], slot.arrived[b].out_splits[i]
        if sends != expects:
            return f"in {slot.arrived[a].op}, rank {a} sends {sends} elements to rank {b}, which expects {expects}"
    raise AssertionError("the splits agree")


def _history(world: Coordinator, slot: Slot) -> list[str]:
    """The last call of this group on which all agreed, to see where they part."""
    name = next(iter(slot.arrived.values())).group_name
    before = []
    for r in slot.arrived:
        calls = [s for s in world.members[r].calls[name] if s != slot.arrived[r]]
        before.append(calls[-1] if calls else None)
    if not before or before[0] is None:
        return []
    same = {(s.op, str(s.span)) for s in before if s is not None}
    return [f"the call before was {_op(before[0])}{_at(before[0].span)} on all of them"] if len(same) == 1 and None not in before else []


def _bad_mail(problem: BadMail) -> Diagnostic:
    mail, expected = problem.mail, problem.expected
    got = ", ".join(f"{m.dtype} {list(m.size)}" for m in mail.metas or ())
    wants = ", ".join(f"{d} {list(s)}" for d, s in zip(expected.dtypes, expected.sizes))
    notes = (f"sent{_at(mail.signature.span if mail.signature else None)} (tag {_tag(mail.key)})",)
    return Diagnostic("RUN013", f"rank {mail.src} sends {got} to rank {mail.dst}, which expects {wants}", span=expected.span,
                      ranks=(mail.src, mail.dst), notes=notes, fix="Send and receive with the same shape and dtype, in the same order.")


# -- exceptions and deaths

def _raises(world: Coordinator) -> list[Diagnostic]:
    """One diagnostic per distinct exception, with all its ranks; a fault that names no place is one of the user's line that led to it."""
    by_cause: dict[object, list[Member]] = {}
    found = []
    for m in world.members:
        if m.status != RAISED:
            continue
        if m.raised.diagnostics:
            found += [Diagnostic(d.code, d.message, d.severity, d.span or _innermost(m.raised), d.ranks or (m.rank,), d.notes, d.fix)
                      for d in m.raised.diagnostics]
        else:
            by_cause.setdefault((m.raised.kind, m.raised.frames), []).append(m)
    return _merged(found) + [_raise(members) for members in by_cause.values()]


def _merged(found: list[Diagnostic]) -> list[Diagnostic]:
    """The same diagnostic from several ranks, once."""
    ranks: dict[Diagnostic, set[int]] = {}
    for d in found:
        ranks.setdefault(Diagnostic(d.code, d.message, d.severity, d.span, (), d.notes, d.fix), set()).update(d.ranks)
    return [Diagnostic(d.code, d.message, d.severity, d.span, tuple(sorted(r)), d.notes, d.fix) for d, r in ranks.items()]


def _raise(members: list[Member]) -> Diagnostic:
    raised: Raised = members[0].raised
    who = ranks_text(m.rank for m in members)
    ranks = tuple(m.rank for m in members)
    span = _innermost(raised)
    text = f"{raised.kind}: {raised.text}" if raised.text else raised.kind
    if raised.internal:
        return Diagnostic("RUN015", f"{who}: {text}", "internal", span, ranks, tuple(raised.traceback.splitlines()[-12:]),
                          "This is a bug in TrainVerify; please report it with this traceback.")
    notes = [frame_text(frame) for frame in reversed(raised.frames)]
    notes += [f"raised at {place}" for place in [_deepest(raised)] if not raised.text and place]
    notes += [f"rank {m.rank}: {m.raised.text}" for m in members[1:] if m.raised.text != raised.text]
    return Diagnostic("RUN009", f"{who} raised {text}", span=span, ranks=ranks, notes=tuple(notes), fix=f"Correct what it states. {_PRINTED}")


def _deepest(raised: Raised) -> str:
    """Where an exception that says nothing was raised, in whatever library: FILE:LINE in FUNCTION: SOURCE."""
    lines = raised.traceback.splitlines()
    at = max((i for i, line in enumerate(lines) if line.startswith('  File "')), default=None)
    found = None if at is None else re.match(r'  File "(?:.*/site-packages/)?(.*)", line (\d+), in (.*)', lines[at])
    return "" if found is None else f"{found[1]}:{found[2]} in {found[3]}: {''.join(lines[at + 1:at + 2]).strip()}"


def _innermost(raised: Raised) -> Span | None:
    """The user's line that an exception passed first."""
    if not raised.frames:
        return None
    file, line, function, _ = raised.frames[-1]
    return Span(file, line, function, phase="", stack=tuple((f, n, name) for f, n, name, _ in raised.frames[-2::-1]))


def _death(m: Member, output: str) -> Diagnostic:
    notes = [f"its last communication was {_op(m.last)}{_at(m.last.span)}"] if m.last else ["it had not communicated"]
    notes += [f"output: {line}" for line in output.splitlines()[-5:]]
    return Diagnostic("RUN010", f"rank {m.rank} {m.death}", span=m.last.span if m.last else None, ranks=(m.rank,), notes=tuple(notes),
                      fix=f"Look for a crash in native code, an exit, or too little memory. {_PRINTED}")


# -- waiting for ever

def _waiting_slots(world: Coordinator) -> list[Slot]:
    slots: list[Slot] = []
    for m in world.live():
        if isinstance(m.waiting, InSlot) and m.waiting.slot not in slots:
            slots.append(m.waiting.slot)
    return slots


def _needs(m: Member) -> tuple[int, ...]:
    """The ranks that a blocked rank waits for."""
    if isinstance(m.waiting, InSlot):
        return m.waiting.slot.missing()
    return (m.waiting.src,) if isinstance(m.waiting, InRecv) else ()


def _stuck(world: Coordinator) -> Diagnostic:
    waits = tuple(_where(m) for m in world.members)
    gone = {r for m in world.live() for r in _needs(m) if world.members[r].status == FINISHED}
    if gone:
        return _never_comes(world, tuple(sorted(gone)), waits)
    cycle = _cycle(world)
    code, cause, fix = _cause(world, cycle)
    circle = ", ".join(f"rank {a} waits for rank {b}" for a, b in zip(cycle, cycle[1:] + cycle[:1]))
    span = _span_waiting(world.members[_odd_in(world, cycle)])
    notes = waits + _unread(world, cycle) + ((f"likely cause: {cause}",) if cause else ())
    return Diagnostic(code, f"{FAULTS[code]}: {circle}", span=span, ranks=tuple(sorted(cycle)), notes=notes, fix=fix)


def _never_comes(world: Coordinator, gone: tuple[int, ...], waits: tuple[str, ...]) -> Diagnostic:
    waiting = [m for m in world.live() if set(_needs(m)) & set(gone)]
    first = waiting[0]
    if isinstance(first.waiting, InSlot):
        slot = first.waiting.slot
        name = first.waiting.signature.group_name
        calls = len(world.members[gone[0]].calls[name])
        doing = f"in {_op(first.waiting.signature)}{_at(_span_waiting(first))}"
        counts = (f"on {_group(slot)}, rank {gone[0]} made {calls} calls; rank {first.rank} waits in call "
                  f"{len(first.calls[name])}",)
    else:
        doing, counts = f"to receive{_at(_span_waiting(first))}", ()
    verb = "has" if len(gone) == 1 else "have"
    who = ranks_text(m.rank for m in waiting)
    message = f"{ranks_text(gone)} {verb} finished while {who} {'waits' if len(waiting) == 1 else 'wait'} {doing}"
    return Diagnostic("RUN008", message, span=_span_waiting(first), ranks=gone, notes=counts + waits + _unread(world, [first.rank]),
                      fix="Let every member make the same number of calls: look for an early return, a shorter loop or a skipped branch.")


def _cycle(world: Coordinator) -> list[int]:
    """Ranks of which each waits for the next, the last for the first. All live ranks wait for live ranks, so there is one."""
    rank, path = world.live()[0].rank, []
    while rank not in path:
        path.append(rank)
        needs = _needs(world.members[rank])
        if not needs:                          # it waits in a complete collective that never answers
            raise AssertionError(f"rank {rank} waits for nobody")
        rank = next((r for r in needs if r in path), needs[0])
    return path[path.index(rank):]


def _odd_in(world: Coordinator, cycle: list[int]) -> int:
    """Whom to point at: the rank on whom most others wait."""
    wanted = Counter(r for m in world.live() for r in _needs(m))
    return max(sorted(cycle), key=lambda r: wanted[r])


def _cause(world: Coordinator, cycle: list[int]) -> tuple[str, str, str]:
    """Code, likely cause and way out of a deadlock."""
    waits = [world.members[r].waiting for r in cycle]
    if all(isinstance(w, InRecv) for w in waits):
        return "RUN001", "each of them receives before it sends", "Send first on one side, or use batch_isend_irecv on both."
    if not all(isinstance(w, InSlot) for w in waits):
        return ("RUN001", "a receive on one rank faces a collective on another",
                "Let the ranks make their sends, receives and collectives in an order that fits.")
    groups = {(w.slot.group, w.signature.group_name) for w in waits}
    members = {w.slot.group for w in waits}
    if len(members) == 1:
        return ("RUN007", "the ranks made these groups in different order or number: they have the same members and are not the same group",
                "Create all process groups on all ranks, in the same order.")
    if len({str(w.signature.span) for w in waits}) == 1:
        return ("RUN007", f"the ranks of one call disagree about the group's members: {sorted(members)}",
                "Compute the member lists alike on all ranks.")
    order = "the ranks enter the collectives of overlapping groups in different order" if len(groups) > 1 else ""
    return "RUN001", order, "Let all ranks enter the collectives of groups that share members in the same order."


def _unread(world: Coordinator, ranks: Iterable[int]) -> tuple[str, ...]:
    """Messages for a waiting receiver that came under another tag."""
    notes = []
    for mail in world.unreceived():
        waiting = world.members[mail.dst].waiting
        if mail.dst in ranks and isinstance(waiting, InRecv) and waiting.src == mail.src:
            notes.append(f"rank {mail.src} did send to rank {mail.dst}, but with tag {_tag(mail.key)}"
                         f"{_at(mail.signature.span if mail.signature else None)}")
    return tuple(notes)


def _wall_clock(world: Coordinator, limit: float, stacks: Stacks) -> Diagnostic:
    running = [m for m in world.live() if m.waiting is None]
    notes, span = [], None
    for m in world.members:
        stack = stacks.get(m.rank)
        if stack and m in running:
            file, line, function = stack[0]
            span = span or Span(file, line, function, phase="", stack=tuple(stack[1:]))
            notes.append(f"rank {m.rank} was executing {file}:{line} in {function}")
        else:
            notes.append(_where(m))
    who = ranks_text(m.rank for m in running)
    return Diagnostic("RUN011", f"{who} still running after {limit:g} s", span=span, ranks=tuple(m.rank for m in running),
                      notes=tuple(notes), fix="Raise the limit, or make the program smaller; an endless loop also looks like this.")


# -- left over

def _unreceived(mail: Mail) -> Diagnostic:
    span = mail.signature.span if mail.signature else None
    what = ", ".join(f"{m.dtype} {list(m.size)}" for m in mail.metas or ())
    return Diagnostic("RUN012", f"rank {mail.src} sent {what} to rank {mail.dst} (tag {_tag(mail.key)}), which never received it",
                      "warning", span, (mail.src, mail.dst), fix="Receive it, or do not send it; on NCCL a send can block until it is received.")


def _unjoined(world: Coordinator, slot: Slot) -> Diagnostic:
    first = min(slot.arrived)
    s = slot.arrived[first]
    notes = tuple(_where(world.members[r]) for r in slot.missing())
    return Diagnostic("RUN014", f"{ranks_text(slot.arrived)} started {_op(s)}, call {slot.seq} of {_group(slot)}, which "
                      f"{ranks_text(slot.missing())} never joined", span=s.span, ranks=slot.missing(), notes=notes,
                      fix="Let all members make the call, and wait for its work.")
