"""The meeting point of all ranks: completes collectives, delivers messages, and knows who waits for whom (trusted: it moves the data).

A pure state machine: messages go in, replies come out; no I/O, no clock, no torch. A collective is complete when every member has
posted it under the same (members, group name, number) with signatures that agree; if they disagree it never completes and a
`Mismatch` is kept. Nothing is reported before no rank can go on any more, so that what is reported does not depend on timing.
"""
from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field

from trainverify.capture import wire
from trainverify.capture.wire import Signature

RUNNING, FINISHED, RAISED, DIED = "running", "finished", "raised", "died"


@dataclass
class Slot:
    """One collective call: who has come, with what."""

    group: tuple[int, ...]
    seq: int
    arrived: dict[int, Signature] = field(default_factory=dict)
    payloads: dict[int, tuple[wire.Metas, bytes]] = field(default_factory=dict)
    complete: bool = False
    fetched: int = 0

    def missing(self) -> tuple[int, ...]:
        return tuple(r for r in self.group if r not in self.arrived)


@dataclass(frozen=True)
class Mail:
    """A message on its way."""

    src: int
    dst: int
    key: wire.Key
    metas: wire.Metas
    body: bytes
    signature: Signature | None


@dataclass(frozen=True)
class InSlot:
    """A rank blocks in a collective."""

    slot: Slot
    signature: Signature


@dataclass(frozen=True)
class InRecv:
    """A rank blocks until src sends."""

    src: int
    key: wire.Key
    signature: Signature | None


@dataclass(frozen=True)
class Mismatch:
    """Members that came to one collective with different signatures; `what` is the first field that differs."""

    slot: Slot
    what: str


@dataclass(frozen=True)
class BadMail:
    """A message that the receiver expects with another size or dtype."""

    mail: Mail
    expected: Signature


@dataclass
class Member:
    """What is known of one rank."""

    rank: int
    status: str = RUNNING
    waiting: InSlot | InRecv | None = None
    last: Signature | None = None              # its last communication call
    calls: dict[str, list[Signature]] = field(default_factory=lambda: defaultdict(list))   # per group name
    tickets: dict[int, Slot] = field(default_factory=dict)
    raised: wire.Raised | None = None
    death: str = ""
    result: bytes = b""


Replies = list[tuple[int, wire.Reply, list[bytes]]]


class Coordinator:
    """Takes the ranks' messages; returns the replies to send."""

    def __init__(self, n: int):
        self.members = [Member(r) for r in range(n)]
        self.problems: list[Mismatch | BadMail] = []
        self.slots: dict[tuple[tuple[int, ...], str, int], Slot] = {}
        self.mail: dict[tuple[int, int, wire.Key], deque[Mail]] = defaultdict(deque)

    # -- questions

    def live(self) -> list[Member]:
        return [m for m in self.members if m.status == RUNNING]

    def stuck(self) -> bool:
        """No rank can go on."""
        return all(m.waiting is not None for m in self.live())

    def unreceived(self) -> list[Mail]:
        return [mail for queue in self.mail.values() for mail in queue]

    # -- events

    def handle(self, rank: int, message: wire.Message, body: bytes) -> Replies:
        member = self.members[rank]
        if isinstance(message, wire.Post):
            return self._post(member, message, body)
        if isinstance(message, wire.Wait):
            slot = member.tickets[message.ticket]
            return self._wait(member, message.ticket, slot)
        if isinstance(message, wire.Send):
            return self._send(member, message, body)
        if isinstance(message, wire.Recv):
            return self._recv(member, message)
        if isinstance(message, wire.Done):
            member.status, member.result = FINISHED, body
        elif isinstance(message, wire.Raised):
            member.status, member.raised = RAISED, message
        else:
            raise TypeError(f"unexpected {type(message).__name__} from rank {rank}")
        return []

    def died(self, rank: int, how: str) -> None:
        member = self.members[rank]
        if member.status == RUNNING:
            member.status, member.death, member.waiting = DIED, how, None

    # -- collectives

    def _post(self, member: Member, post: wire.Post, body: bytes) -> Replies:
        signature = post.signature
        key = (post.group, signature.group_name, post.seq)
        slot = self.slots.setdefault(key, Slot(post.group, post.seq))
        if member.rank in slot.arrived or member.rank not in post.group:
            raise AssertionError(f"rank {member.rank} posts {key} twice or is no member")
        slot.arrived[member.rank] = signature
        slot.payloads[member.rank] = (post.payload, body)
        member.last = signature
        member.calls[signature.group_name].append(signature)
        member.tickets[post.ticket] = slot
        replies: Replies = []
        if len(slot.arrived) == len(slot.group):
            del self.slots[key]
            what = difference(slot)
            if what:
                self.problems.append(Mismatch(slot, what))
            else:
                slot.complete = True
                replies = self._release(slot)
        return replies + (self._wait(member, post.ticket, slot) if post.wait else [])

    def _wait(self, member: Member, ticket: int, slot: Slot) -> Replies:
        if slot.complete:
            del member.tickets[ticket]
            return [self._fetch(member, slot)]
        member.waiting = InSlot(slot, slot.arrived[member.rank])
        return []

    def _release(self, slot: Slot) -> Replies:
        replies = []
        for rank in slot.group:
            member = self.members[rank]
            if isinstance(member.waiting, InSlot) and member.waiting.slot is slot:
                member.waiting = None
                member.tickets = {t: s for t, s in member.tickets.items() if s is not slot}
                replies.append(self._fetch(member, slot))
        return replies

    @staticmethod
    def _fetch(member: Member, slot: Slot) -> tuple[int, wire.Reply, list[bytes]]:
        payloads = [slot.payloads[r] for r in slot.group]
        slot.fetched += 1
        if slot.fetched == len(slot.group):
            slot.payloads = {}
        return member.rank, wire.Reply(tuple(m for m, _ in payloads)), [b for _, b in payloads]

    # -- messages

    def _send(self, member: Member, send: wire.Send, body: bytes) -> Replies:
        mail = Mail(member.rank, send.dst, send.key, send.payload, body, send.signature)
        member.last = send.signature or member.last
        receiver = self.members[send.dst]
        waits = receiver.waiting
        if isinstance(waits, InRecv) and (waits.src, waits.key) == (member.rank, send.key):
            return self._deliver(receiver, mail, waits.signature)
        self.mail[member.rank, send.dst, send.key].append(mail)
        return []

    def _recv(self, member: Member, recv: wire.Recv) -> Replies:
        member.last = recv.signature or member.last
        member.waiting = InRecv(recv.src, recv.key, recv.signature)
        queue = self.mail[recv.src, member.rank, recv.key]
        return self._deliver(member, queue.popleft(), recv.signature) if queue else []

    def _deliver(self, receiver: Member, mail: Mail, expected: Signature | None) -> Replies:
        if expected is not None and not fits(mail, expected):
            self.problems.append(BadMail(mail, expected))
            return []                          # it stays blocked
        receiver.waiting = None
        return [(receiver.rank, wire.Reply((mail.metas,)), [mail.body])]


def count(size: tuple[int, ...]) -> int:
    n = 1
    for s in size:
        n *= s
    return n


def fits(mail: Mail, expected: Signature) -> bool:
    """Whether a message has the element counts and dtypes that its receiver expects (which may give none)."""
    metas = mail.metas or ()
    sizes_fit = not expected.sizes or [count(m.size) for m in metas] == [count(s) for s in expected.sizes]
    return sizes_fit and (not expected.dtypes or tuple(m.dtype for m in metas) == expected.dtypes)


def difference(slot: Slot) -> str:
    """The first field in which the arrived members' signatures disagree, or nothing."""
    signatures = list(slot.arrived.values())
    for what in ("op", "reduce_op", "root", "dtypes"):
        if len({getattr(s, what) for s in signatures}) > 1:
            return what
    if len({tuple(map(count, s.sizes)) for s in signatures}) > 1:
        return "sizes"
    for i, rank in enumerate(slot.group):
        for j, other in enumerate(slot.group):
            a, b = slot.arrived.get(rank), slot.arrived.get(other)
            if a and b and a.in_splits and b.out_splits and a.in_splits[j] != b.out_splits[i]:
                return "splits"
    return ""
