"""What the rules write down while they read a program: equalities, index domains, choices, literals that a reduction must know (trusted)."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainverify.diagnostics import Span
from trainverify.ir.trace import Arg, OpCall, TensorRef, references
from trainverify.ir.trace import Sequence as Listed
from trainverify.shrink.layout import Layout
from trainverify.shrink.spaces import Conflict, Spaces


class Undecoded(Exception):
    """The call has a form that its rule does not understand: everything it touches keeps its size."""


@dataclass(slots=True)
class Domain:
    """An integer tensor whose values are indices into a space; `low` values (ignore_index) are none."""

    where: tuple[str, int]
    ref: TensorRef
    space: int
    span: Span | None
    call: OpCall


@dataclass(slots=True)
class Notes:
    """What all programs have in common."""

    spaces: Spaces
    domains: list[Domain] = field(default_factory=list)
    ties: list[tuple[int, ...]] = field(default_factory=list)       # spaces of equal size whose counts must stay equal
    meets: list[tuple[int, ...]] = field(default_factory=list)      # the dimensions of one call
    rows: Any = None                                                # known.Rows
    often: list[tuple[int, int, np.ndarray]] = field(default_factory=list)     # (rows, where they are from, which index each is): each index as often
    multiples: list[tuple[int, int]] = field(default_factory=list)  # (space, n): a kernel takes multiples of n alone
    work: list[tuple[tuple[int, ...], int]] = field(default_factory=list)      # the dimensions of each tensor of a call; how many calls are like it


class Facts:
    """What a rule may say about one call of one rank."""

    def __init__(self, notes: Notes, layout: Layout, call: OpCall):
        self.notes, self.spaces, self.layout, self.call = notes, notes.spaces, layout, call
        self.span = layout.span(call)

    # ---- arguments
    def arg(self, k: int, name: str = "", default: Arg = None) -> Arg:
        return self.call.args[k] if k < len(self.call.args) else self.call.kwargs.get(name, default)

    def tensor(self, k: int) -> TensorRef:
        a = self.arg(k)
        if not isinstance(a, TensorRef):
            raise Undecoded(f"argument {k} is no tensor")
        return a

    def axis(self, k: int, rank: int, default: int | None = None, name: str = "dim") -> int:
        a = self.arg(k, name, default)
        if not isinstance(a, int):
            raise Undecoded(f"argument {k} is no dimension")
        return a % rank if rank else 0

    def dims(self, ref: TensorRef) -> tuple[int, ...]:
        return self.layout.dims(ref, self.span)

    def is_read(self, ref: TensorRef) -> bool:
        """Whether any call reads the memory that this one writes."""
        return self.layout.canon[ref.storage] in self.layout.read

    def out(self, k: int = 0) -> TensorRef:
        return self.call.targets()[k]

    # ---- facts
    def same(self, a: int, b: int) -> None:
        self.spaces.unify(a, b)

    def alike(self, a: Sequence[int], b: Sequence[int]) -> None:
        if len(a) != len(b):
            raise Undecoded("different numbers of dimensions")
        for x, y in zip(a, b):
            self.same(x, y)

    def broadcast(self, part: Sequence[int], whole: Sequence[int]) -> None:
        """part has the last dimensions of whole, or 1 instead."""
        if len(part) > len(whole):
            raise Undecoded("an argument has more dimensions than the result")
        for x, y in zip(reversed(part), reversed(whole)):
            if self.spaces.size(x) != 1:
                self.same(x, y)

    def pin(self, s: int, why: str, structural: bool = False) -> None:
        self.spaces.pin(s, why, self.span, structural)

    def chunks(self, s: int, parts: Sequence[int]) -> None:
        self.spaces.cat(s, parts)

    def known(self, ref: TensorRef) -> np.ndarray | None:
        """The values of an integer argument that says which rows are taken, where they are cut, or what is sorted: the same in all calls like this one."""
        return None if self.notes.rows is None else self.notes.rows.of(self.layout.where, self.call.index, list(references(self.call)).index(ref))

    def picked(self, taken: int, base: int, ref: TensorRef) -> None:
        """The indices of `taken` are those that an integer argument names, among those of base. What follows one after the other needs no names."""
        at = self.known(ref)
        if at is None or len(at) < 2:
            return
        at = np.where(at < 0, at + self.spaces.size(base), at)
        times = np.bincount(at)
        if times.max() == 1 and (len(at) == self.spaces.size(base) or (np.diff(at) != 1).any()):
            self.spaces.pick(taken, base, at)
        elif len(times) == self.spaces.size(base) and times.min() == times.max() > 1:
            self.notes.often.append((taken, base, at))

    def domain(self, ref: TensorRef, space: int) -> None:
        self.notes.domains.append(Domain(self.layout.where, ref, space, self.span, self.call))


def base(name: str) -> str:
    """"add" of "aten.add_.Tensor"; other namespaces keep theirs."""
    ns, op = name.split(".")[:2]
    op = op[:-1] if op.endswith("_") and not op.endswith("__") else op
    return op if ns == "aten" else f"{ns}.{op}"


def refs(a: Arg) -> list[TensorRef | None]:
    """A list argument: its tensors, None where there is none."""
    if not isinstance(a, Listed):
        raise Undecoded("a list is expected")
    return [x if isinstance(x, TensorRef) else None for x in a.items]


def ints(a: Arg) -> list[int]:
    if isinstance(a, int) and not isinstance(a, bool):
        return [a]
    if isinstance(a, Listed) and all(isinstance(x, int) for x in a.items):
        return list(a.items)
    raise Undecoded("integers are expected")


__all__ = ["Conflict", "Domain", "Facts", "Notes", "Undecoded", "ints", "refs"]
