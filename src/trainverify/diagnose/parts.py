"""Repairs that read another part of a value: the next of several, two that changed places, this rank's own; of activations with their backward,
and of the batch (not trusted: each is tried)."""
from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

import msgspec

from trainverify.diagnose.candidate import Candidate
from trainverify.diagnose.dataflow import Dataflow, Node
from trainverify.diagnose.edit import Edit, reading
from trainverify.diagnose.places import Family, Places, result
from trainverify.diagnose.terms import dense
from trainverify.ir.trace import OpCall, Sequence, TensorRef, inputs
from trainverify.replay.memory import is_float

Order = tuple[int, ...]                       # part k is read where part order[k] is due
Read = dict[TensorRef, tuple[tuple, list[TensorRef]]]    # a region that a call reads -> what made the whole, and all parts of it
DATA = "data"


class Parts:
    def __init__(self, flow: Dataflow, places: Places):
        self.flow, self.places = flow, places
        self._data: dict[tuple[int, int], list[tuple[str, TensorRef]]] = {}
        for rank, ops in flow.calls.items():
            for call in ops:
                if call.name == "tv.data" and isinstance(call.args[1], TensorRef):
                    self._data.setdefault((rank, call.args[1].storage), []).append((str(call.args[0]), call.args[1]))

    def candidates(self, nodes: Iterable[Node]) -> Iterator[Candidate]:
        yield from self._activations(list(nodes))
        yield from self._batch()

    # ---- activations
    def _activations(self, nodes: list[Node]) -> Iterator[Candidate]:
        """Where one of the equal parts of a value is read: another one, in the whole function, with what its backward reads and delivers, or without."""
        seen: set = set()
        for node in self.places.above(nodes):
            span = self.flow.span(node)
            if span is None or span.phase == "setup":
                continue
            for made, parts in self._read(node).values():
                scope = (span.file, span.function)
                if made[0] == DATA or (scope, made) in seen:
                    continue
                seen.add((scope, made))
                for words, orders in self._orders(len(parts)):
                    for phases in (("forward", "backward"), (span.phase,)):
                        yield Candidate(f"read {words} of the parts of what {made[1]}:{made[2]} makes, at {span}", self._reordered(scope, phases, made, orders))

    def _orders(self, n: int) -> Iterator[tuple[str, Callable[[int], Order | None]]]:
        """In words, and for each rank."""
        shifts = [("the next", 1), ("the previous", -1)] if n > 2 else [("the other", 1)]
        for words, by in shifts:
            yield words, lambda rank, by=by: tuple((k + by) % n for k in range(n))
        for i, j in itertools.combinations(range(n), 2) if n == 3 else ():
            yield f"{_NTH[i]} for the {_NTH[j]}, and the other way round,", lambda rank, i=i, j=j: _exchanged(n, i, j)
        yield from self._own(n)

    def _own(self, n: int) -> Iterator[tuple[str, Callable[[int], Order | None]]]:
        """The part of each rank's place in a group; of several parts for each rank, the same one of its own."""
        for family in self.places.families():
            sizes = {len(g) for g in family.values()}
            if len(sizes) == 1 and n % (size := sizes.pop()) == 0:
                yield f"this rank's own, by its place in {self.places.over(family)},", lambda rank, family=family, each=n // size: _of_rank(family, rank, n, each)

    def _reordered(self, scope: tuple[str, str], phases: tuple[str, ...], made: tuple, order_of: Callable[[int], Order | None]) -> Edit:
        edit = Edit()
        for rank, ops in self.flow.calls.items():
            order = order_of(rank)
            for n in ((rank, call.index) for call in ops) if order is not None else ():
                at = self.flow.span(n)
                if at is not None and at.file == scope[0] and at.phase in phases:
                    new = self._reading(n, made, order, at.function == scope[1])
                    if new is not None:
                        edit.calls[n] = new
        return edit

    def _reading(self, node: Node, made: tuple, order: Order, inside: bool) -> OpCall | None:
        """The call with other parts read; of a backward that joins the gradients of all parts, with those in their other places."""
        call, span = self.flow.call(node), self.flow.span(node)
        if span.phase == "backward" and sorted(order) == list(range(len(order))):
            joined = self._joined(node, made, order)
            if joined is not None:
                return joined
        instead = {ref: parts[order[parts.index(ref)]] for ref, (line, parts) in self._read(node).items()
                   if line == made and len(parts) == len(order)} if inside else {}
        instead = {old: new for old, new in instead.items() if old != new}
        return reading(call, instead) if instead else None

    def _joined(self, node: Node, made: tuple, order: Order) -> OpCall | None:
        call = self.flow.call(node)
        length = self._length(made, node[0])
        if call.name == "aten.cat.default" and isinstance(call.args[0], Sequence) and len(call.args[0].items) == len(order):
            items = call.args[0].items
            if len({i.size for i in items if isinstance(i, TensorRef)}) != 1 or items[0].numel * len(order) != length:
                return None
            new = list(items)
            for k, item in enumerate(items):
                new[order[k]] = item
            return msgspec.structs.replace(call, args=(Sequence(tuple(new)), *call.args[1:]))
        if call.name == "aten.slice_backward.default" and isinstance(call.args[0], TensorRef):
            grad, _, dim, start, *_ = call.args
            n = grad.size[dim]
            k, rest = divmod(start, n) if n else (0, 1)
            if rest or k >= len(order) or grad.numel * len(order) != length:
                return None
            return msgspec.structs.replace(call, args=(*call.args[:3], order[k] * n, (order[k] + 1) * n, *call.args[5:]))
        return None

    def _length(self, made: tuple, rank: int) -> int:
        """The number of elements of what is made at a line, on a rank."""
        ref = next((result(self.flow.call(n)) for n in self.places.at_line(made, rank)), None)
        return 0 if ref is None else ref.numel

    # ---- the batch
    def _batch(self) -> Iterator[Candidate]:
        """Other parts of the batch: this rank's own, in the other order, or the next; of all its tensors or of one."""
        reads: dict[str, dict[Node, Read]] = {}
        for rank, ops in self.flow.calls.items():
            for call in ops:
                for ref, (made, parts) in self._read((rank, call.index)).items():
                    if made[0] == DATA:
                        reads.setdefault(made[1], {}).setdefault((rank, call.index), {})[ref] = (made, parts)
        names = list(reads)
        for chosen in ([names] if len(names) > 1 else []) + [[name] for name in names]:
            for n in sorted({len(parts) for name in chosen for read in reads[name].values() for _, parts in read.values()}):
                for words, order_of in self._batch_orders(n):
                    edit, changed = Edit(), []
                    for name in chosen:
                        changed += [name] if self._take(edit, reads[name], n, order_of) else []
                    yield Candidate(f"take {words} of the {n} parts of {' and '.join(changed)}", edit)

    def _batch_orders(self, n: int) -> Iterator[tuple[str, Callable[[int], Order | None]]]:
        yield from self._own(n)
        yield "the one at the other end", lambda rank: tuple(range(n))[::-1]
        for by in (1, -1) if n > 2 else ():
            yield f"the {'next' if by > 0 else 'previous'}", lambda rank, by=by: tuple((k + by) % n for k in range(n))

    def _take(self, edit: Edit, reads: dict[Node, Read], n: int, order_of: Callable[[int], Order | None]) -> bool:
        """Have these calls read other parts; whether any does."""
        some = False
        for node, read in reads.items():
            order = order_of(node[0])
            instead = {ref: new for ref, (_, parts) in read.items() if order is not None and len(parts) == n and (new := parts[order[parts.index(ref)]]) != ref}
            if instead:
                edit.calls[node], some = reading(edit.calls.get(node) or self.flow.call(node), instead), True
        return some

    # ---- what is read
    def _read(self, node: Node) -> Read:
        """The regions that a call reads which are one of several equal parts of what was written, or handed over, as a whole: each with
        what made it (a line, or "data" and its name) and all parts in order."""
        call = self.flow.call(node)
        if call.name.startswith("tv.") or call.collective is not None:
            return {}
        found: Read = {}
        for ref in inputs(call):
            for made, whole in self._wholes(node, ref) if ref not in call.writes else ():
                parts = divided(whole, ref)
                if parts:
                    found[ref] = (made, parts)
                    break
        return found

    def _wholes(self, node: Node, ref: TensorRef) -> Iterator[tuple[tuple, TensorRef]]:
        for name, whole in self._data.get((node[0], ref.storage), ()):
            yield (DATA, name), whole
        if (node[0], ref.storage) in self._data or not is_float(ref.dtype):
            return
        made = self.flow.writer(node[0], ref, node[1])[:1]
        whole, line = (result(self.flow.call(made[0])), self.places.line(made[0])) if made else (None, None)
        if whole is not None and line is not None and whole.storage == ref.storage:
            yield line, whole


_NTH = ("first", "second", "third")


def _exchanged(n: int, i: int, j: int) -> Order:
    order = list(range(n))
    order[i], order[j] = j, i
    return tuple(order)


def _of_rank(family: Family, rank: int, n: int, each: int) -> Order | None:
    return tuple(family[rank].index(rank) * each + k % each for k in range(n)) if rank in family else None


def divided(whole: TensorRef, part: TensorRef) -> list[TensorRef]:
    """The equal parts along one dimension of which this is one, whatever its shape; [] if it is none."""
    runs: list[tuple[int, int]] = []          # stride and number, outermost first, dimensions that are one merged
    for stride, n in sorted((d for d in zip(part.stride, part.size) if d[1] > 1), reverse=True):
        if runs and runs[-1][0] == n * stride:
            n *= runs.pop()[1]
        runs.append((stride, n))
    if not dense(whole) or len(runs) not in (1, 2) or runs[-1][0] != 1:
        return []
    length = runs[-1][1]
    every, times = runs[0] if len(runs) == 2 else (whole.numel, 1)
    if every * times != whole.numel or every % length or every == length:
        return []
    parts = [msgspec.structs.replace(part, offset=whole.offset + k * length) for k in range(every // length)]
    return parts if part in parts else []
