"""What repeats in one rank's trace (trusted for one thing: calls that it calls alike are alike up to the numbers of their storages).

A deep program makes the same calls for each layer, on other storages. Two calls of one *form* differ in the numbers of their storages (and of
scalars, works and collectives) and of their layers alone. Stretches of the trace that have the same forms in the same order are laid upon each other, and
storages that then meet are *one* for the reduction, as are weights whose names differ in numbers alone: they share their index spaces. That is a further
constraint on what is kept, so any choice of what is laid upon what is sound; a good one makes each layer's facts those of the first, and a bad one keeps
more indices than necessary. A call whose form and storages (up to that) were seen before says nothing new.
"""
from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from trainverify.diagnostics import Span
from trainverify.ir.trace import Arg, Name, OpCall, ScalarRef, Sequence, TensorRef, Trace, references, scalar_ids
from trainverify.ops.access import reads

WINDOW = 12                                   # calls that must be alike in a row, for stretches to be laid upon each other

ITEMS = {"bool": 1, "uint8": 1, "int8": 1, "int16": 2, "uint16": 2, "float16": 2, "bfloat16": 2, "int32": 4, "uint32": 4, "float32": 4, "int64": 8,
         "uint64": 8, "float64": 8, "complex64": 8, "complex128": 16, "complex32": 4}

FLOATS = ("float", "bfloat", "complex")
NUMBERED = re.compile(r"(?<![^.])\d+(?![^.:])")       # a number between dots: of a layer, of an expert
NAMES = {"tv.symbol": 1, "tv.param": 0, "tv.stepped": 0, "tv.output": 1}       # which argument is a name


def item(dtype: str) -> int:
    return ITEMS.get(dtype, 1)                # the float8 types


def is_float(ref: TensorRef) -> bool:
    return ref.dtype.startswith(FLOATS)


@dataclass(eq=False)
class Form:
    """Calls that differ only in the numbers of storages, scalars, works and collectives; `call` is the first of them. Positions count `references`."""

    call: OpCall

    @cached_property
    def refs(self) -> tuple[TensorRef, ...]:
        return tuple(references(self.call))

    def _positions(self, refs) -> tuple[int, ...]:
        at = {r: k for k, r in reversed(list(enumerate(self.refs)))}
        return tuple(at[r] for r in refs)

    @cached_property
    def read(self) -> tuple[int, ...]:
        return self._positions(reads(self.call))

    @cached_property
    def float_targets(self) -> tuple[int, ...]:
        return self._positions(t for t in self.call.targets() if is_float(t))

    @cached_property
    def other_targets(self) -> tuple[int, ...]:
        return self._positions(t for t in self.call.targets() if not is_float(t))

    @cached_property
    def sent(self) -> tuple[int, ...]:
        return self._positions(self.call.collective.inputs)

    @cached_property
    def received(self) -> tuple[int, ...]:
        return self._positions(self.call.collective.outputs)

    @cached_property
    def reads_floats(self) -> bool:
        return any(is_float(r) for r in reads(self.call))

    @cached_property
    def integers_only(self) -> bool:
        return not any(is_float(r) for r in self.refs)

    @cached_property
    def takes_scalars(self) -> bool:
        return any(True for _ in scalars(self.call))

    @cached_property
    def has_scalars(self) -> bool:
        """Anywhere: in lists, among keyword arguments, as a result."""
        return self.takes_scalars or any(True for _ in scalar_ids((self.call.outs,)))


def scalars(call: OpCall) -> Iterator[int]:
    """Numbers of the tracked scalars that a call takes, also in lists and by name."""
    return scalar_ids((*call.args, *call.kwargs.values()))


class Forms:
    """The forms of all traces of a reduction."""

    def __init__(self) -> None:
        self.numbers: dict[tuple, int] = {}
        self.forms: list[Form] = []
        self._places: dict[tuple, int] = {}

    def places(self, spans: list[Span]) -> list[int]:
        """Spans up to the numbers of layers."""
        return [self._places.setdefault((s.file, s.line, s.function, unnumbered(s.module), s.phase, s.step, s.stack, s.microbatch), len(self._places)) for s in spans]

    def of(self, call: OpCall, places: list[int]) -> tuple[int, tuple[int, ...]]:
        """The call's form and the storages that it names, as often as it names them."""
        storages: list[int] = []
        if call.name.startswith("tv.") and not call.name.startswith("tv.scalar."):       # names of weights and outputs make no difference
            key: tuple = (call.name, tuple([_coded(r, storages) for r in references(call)]))
        else:
            key = (call.name, places[call.span] if call.span >= 0 else -1, call.rng, tuple([_coded(a, storages) for a in call.args]),
                   tuple([(k, _coded(a, storages)) for k, a in call.kwargs.items()]) if call.kwargs else (), _coded(call.outs, storages),
                   tuple([_coded(w, storages) for w in call.writes]), None if call.collective is None else _met(call, storages))
        named = tuple(storages)
        key = (key, _pattern(named))
        number = self.numbers.get(key)
        if number is None:
            number = self.numbers[key] = len(self.forms)
            self.forms.append(Form(call))
        return number, named


def _coded(a: Arg, storages: list[int]):
    """An argument without the numbers of its storages and scalars. Equal only if equal: 1, 1.0 and True are three things, as are 0.0 and -0.0."""
    kind = type(a)
    if kind is TensorRef:
        storages.append(a.storage)
        return (a.offset, a.size, a.stride, a.dtype)
    if kind is int or kind is str or a is None:
        return a
    if kind is Sequence:
        return ("list", *[_coded(x, storages) for x in a.items])
    if kind is float:
        return ("float", a.hex())
    if kind is Name:
        return ("name", a.kind, a.value)
    return ("scalar",) if kind is ScalarRef else (kind.__name__, a)


def _met(call: OpCall, storages: list[int]) -> tuple:
    c = call.collective
    return (c.kind, c.group, c.group_name, tuple([_coded(r, storages) for r in c.inputs]), tuple([_coded(r, storages) for r in c.outputs]), c.reduce_op,
            None if c.factor is None else c.factor.hex(), c.root, c.peer, c.tag, c.in_splits, c.out_splits, c.listed, c.work is None)


def _pattern(named: tuple[int, ...]) -> tuple[int, ...]:
    """Which of the storages are the same."""
    if len(named) < 2:
        return ()
    first: dict[int, int] = {}
    return tuple([first.setdefault(s, k) for k, s in enumerate(named)])


def unnumbered(name: str) -> str:
    return NUMBERED.sub("#", name)


class Repeats:
    """One rank's calls by form, its storages by what they are laid upon, and the calls that differ after that. lay: whether anything is laid."""

    def __init__(self, forms: Forms, trace: Trace, lay: bool = True):
        self.forms, self.trace = forms.forms, trace
        self.form: list[int] = []
        self.named: list[tuple[int, ...]] = []
        places = forms.places(trace.spans)
        for call in trace.ops:
            number, named = forms.of(call, places)
            self.form.append(number)
            self.named.append(named)
        self.canon = list(range(len(trace.storages)))
        if lay:
            self._laid()
        self.canon = [self.find(s) for s in range(len(trace.storages))]
        self.like: list[int] = []             # the first call with the same form and storages
        self._tell_apart()

    def _laid(self) -> None:
        widths, roles, trace = self._widths(), self._roles(), self.trace
        first: dict[tuple, int] = {}
        for sid, role in roles.items():
            self._join(sid, first.setdefault((role, trace.storages[sid].nbytes), sid), widths)
        self._lay(widths, roles)

    def _widths(self) -> dict[int, set[int]]:
        """Bytes of one element, for each storage; geometry is looked up once for each form."""
        widths: dict[int, set[int]] = {}
        known: dict[int, tuple[int, ...]] = {}
        for number, named in zip(self.form, self.named):
            of = known.get(number)
            if of is None:
                of = known[number] = tuple(item(r.dtype) if r.numel else 0 for r in self.forms[number].refs)
            for s, w in zip(named, of):
                if w:
                    widths.setdefault(s, set()).add(w)
        return widths

    def find(self, s: int) -> int:
        canon = self.canon
        while canon[s] != s:
            canon[s] = canon[canon[s]]
            s = canon[s]
        return s

    def _roles(self) -> dict[int, str]:
        """What is in a storage by name, up to the numbers of layers: a weight, its gradient, its optimizer's state. Not where there are several things."""
        roles: dict[int, str] = {}
        several: set[int] = set()
        for call in self.trace.ops:
            at = NAMES.get(call.name)
            if at is None or not isinstance(call.args[-1], TensorRef):
                continue
            ref = call.args[-1]
            role = f"{unnumbered(call.args[at])} {call.args[0] if call.name == 'tv.output' and call.args[0] in ('gradient', 'state') else ''}{ref.size}"
            if roles.setdefault(ref.storage, role) != role:
                several.add(ref.storage)
        return {sid: role for sid, role in roles.items() if sid not in several}

    def _join(self, a: int, b: int, widths: dict[int, set[int]]) -> None:
        storages = self.trace.storages
        if a != b and storages[a].nbytes == storages[b].nbytes:
            x, y = self.find(a), self.find(b)
            if x != y and widths.get(a) == widths.get(b):
                self.canon[max(x, y)] = min(x, y)

    def _lay(self, widths: dict[int, set[int]], roles: dict[int, str]) -> None:
        """Each call upon an earlier one: upon that which follows the one upon which the call before it was laid, or where that is of
        another form, upon the latest one that is followed by the same forms. What has names is laid only upon what has the same."""
        named, tokens = self.named, {}
        form = [tokens.setdefault((number, *[roles.get(s) for s in mine]), len(tokens)) for number, mine in zip(self.form, named)]
        latest: dict[tuple[int, ...], int] = {}
        back = 0
        for i, number in enumerate(form):
            window = tuple(form[i:i + WINDOW])
            if not back or form[i - back] != number:
                at = latest.get(window) if len(window) == WINDOW else None
                back = 0 if at is None else i - at
            latest[window] = i
            if back:
                for a, b in zip(named[i], named[i - back]):
                    self._join(a, b, widths)

    def _tell_apart(self) -> None:
        """`like`, and whether the batch was there: before that, integers are linked to nothing."""
        seen: dict[tuple, int] = {}
        canon, began = self.canon, not any(c.name == "tv.data" for c in self.trace.ops)
        self.began: list[bool] = []
        for i, (number, named) in enumerate(zip(self.form, self.named)):
            began = began or self.trace.ops[i].name == "tv.data"
            self.like.append(seen.setdefault((number, began, tuple([canon[s] for s in named])), i))
            self.began.append(began)

    def distinct(self) -> Iterator[OpCall]:
        """The calls that differ."""
        ops = self.trace.ops
        for i, first in enumerate(self.like):
            if first == i:
                yield ops[i]


__all__ = ["Form", "Forms", "Repeats", "is_float", "item", "references", "scalars"]
