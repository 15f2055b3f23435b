"""Values that change with the symbols although nothing in the trace says so (trusted: what it finds cannot be taken for a constant).

A float that left a tensor and came back through numpy, float(), a list or another module has no reference in the trace; it looks
like a constant. Two captures with different tagged values tell: a number, an input's bytes or a sequence of calls that differs
between them without a recorded reason depends on the symbols. Such a number becomes an unknown scalar (unless it equals one tracked
scalar bitwise in both captures: then it is that one, which is an assumption), such bytes become unknown contents, and such a
sequence becomes an unknown decision at its place.
"""
from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from trainverify.capture.tags import TagTable
from trainverify.ir.trace import Arg, Note, OpCall, Program, ScalarRef, Sequence, TensorRef, Trace, inputs, scalar_ids

_FLOATS = {"float32": np.float32, "float64": np.float64, "float16": np.float16}
SCALARS = "scalars"                            # blob: value of each tracked scalar, by its number


# ---- does anything leave at all

def tag_table(reference: Program) -> TagTable:
    """The reference's symbols by value."""
    blocks = []
    for call in reference.traces[0].ops:
        if call.name == "tv.symbol":
            raw = np.ascontiguousarray(reference.blobs[0][f"symbol.{call.args[1]}"]).view(np.uint8)
            blocks.append((call.args[1], decoded(raw, call.args[2].dtype)))
    return TagTable(blocks)


def decoded(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes of a float tensor as fp32 values."""
    if dtype == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(_FLOATS[dtype]).astype(np.float32)


def is_float(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat", "complex"))


def has_tags(dtype: str) -> bool:
    """Whether symbols may be of this type."""
    return dtype in _FLOATS or dtype == "bfloat16"


def width(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(_FLOATS[dtype]).itemsize


def something_leaves(program: Program, table: TagTable) -> bool:
    """Whether a float that may depend on symbols has left a tensor for Python."""
    return any(True for t, b in zip(program.traces, program.blobs) for _ in _leaving(t, b, table))


def _leaving(trace: Trace, blobs: dict, table: TagTable) -> Iterator[OpCall]:
    """The calls by which a float that may depend on symbols leaves a tensor, or by which a number is made of such floats."""
    tainted: set[int] = set()                  # storages
    scalars: set[int] = set()
    seen: set[int] = set()

    def dirty(ref: TensorRef) -> bool:
        if ref.storage not in seen:
            seen.add(ref.storage)
            raw = blobs.get(f"init.{ref.storage}")
            if raw is not None and has_tags(ref.dtype):
                usable = raw[: len(raw) // width(ref.dtype) * width(ref.dtype)]
                if (table.decode(decoded(np.ascontiguousarray(usable), ref.dtype)) >= 0).any():
                    tainted.add(ref.storage)
        return ref.storage in tainted

    for call in trace.ops:
        if call.name == "tv.symbol":
            tainted.add(call.args[2].storage)
            seen.add(call.args[2].storage)
            continue
        if call.collective is not None:
            tainted.update(o.storage for o in call.collective.outputs if is_float(o.dtype))
            continue
        from_symbols = any(dirty(r) for r in inputs(call)) or any(s in scalars for s in scalar_ids((*call.args, *call.kwargs.values())))
        if not from_symbols:
            continue
        if call.name == "tv.escape":
            ref = call.args[1]
            if isinstance(ref, ScalarRef) or is_float(ref.dtype):
                yield call
        tainted.update(t.storage for t in call.targets())
        if isinstance(call.outs, ScalarRef):
            scalars.add(call.outs.id)
            yield call


# ---- what differs between two captures

@dataclass(frozen=True)
class _Both:
    """One rank in two captures."""

    trace: Trace
    blobs: dict
    other: Trace
    other_blobs: dict
    table: TagTable
    other_table: TagTable


def decided_otherwise(done, second) -> bool:
    """Whether two captures (each with `reference` and `parallel`) first part where a recorded decision came out differently."""
    pairs = [(a.ops, b.ops) for x, y in ((done.reference, second.reference), (done.parallel, second.parallel)) for a, b in zip(x.traces, y.traces)]
    return any(next((v for v in map(_parting, a, b) if v), "") == "decided" for a, b in pairs)


def _parting(call: OpCall, other: OpCall) -> str:
    """"": the same call, up to floats; "decided": what came out of tensors differs, the call itself is the reason; "shape": no reason known."""
    if call.name != other.name or call.kwargs.keys() != other.kwargs.keys() or len(call.args) != len(other.args):
        return "shape"
    if call.collective != other.collective:
        return "shape"
    if call.name == "tv.escape":               # integers, masks
        return "decided" if call.digest_in != other.digest_in else ""
    if not all(map(_alike, call.args, other.args)) or not all(_alike(a, other.kwargs[k]) for k, a in call.kwargs.items()):
        return "shape"
    return "" if call.outs == other.outs and call.writes == other.writes else "decided"


def _alike(a: Arg, b: Arg) -> bool:
    if isinstance(a, Sequence) and isinstance(b, Sequence):
        return len(a.items) == len(b.items) and all(map(_alike, a.items, b.items))
    return type(a) is type(b) and (type(a) is float or a == b)


def mark_changes(first: Program, second: Program, table: TagTable, other_table: TagTable) -> int:
    """Make what changes without a recorded reason unknown in `first`, with a note each; how many there were."""
    found = 0
    for trace, blobs, other, other_blobs in zip(first.traces, first.blobs, second.traces, second.blobs):
        found += _Marker(_Both(trace, blobs, other, other_blobs, table, other_table)).run()
    return found


class _Marker:
    """Walks one rank's calls in both captures, and rewrites those of the first."""

    def __init__(self, both: _Both):
        self.both = both
        self.values = both.blobs.get(SCALARS, np.empty(0)), both.other_blobs.get(SCALARS, np.empty(0))
        self.made = len(self.values[0])        # number for the next unknown scalar
        self.known: dict[tuple[bytes, bytes], int] = {}    # the last tracked scalar so far that has these values in the two captures
        self.dependent = {c.outs.id for c in _leaving(both.trace, both.blobs, both.table) if isinstance(c.outs, ScalarRef)}
        self.out: list[OpCall] = []
        self.found = 0
        self.opened: set[int] = set()

    def run(self) -> int:
        ops, others = self.both.trace.ops, self.both.other.ops
        for i, call in enumerate(ops):
            other = others[i] if i < len(others) else None
            verdict = "shape" if other is None else _parting(call, other)
            if verdict != "shape":
                self._look_at(call, other)
            if verdict:                        # from here on the captures are different programs
                self._branch(call, verdict)
                self.out.extend(ops[i:])
                break
            self.out.append(call)
        if self.found:
            self._renumber()
        return self.found

    def _look_at(self, call: OpCall, other: OpCall) -> None:
        """Make unknown what differs although the calls are alike."""
        for ref in inputs(call):
            self._contents(ref, call)
        if call.name == "tv.escape":
            return
        skip = ("value",) if call.name.startswith("tv.scalar.") else ()
        call.args = tuple([self._argument(a, b, call) for a, b in zip(call.args, other.args)])
        call.kwargs = {k: a if k in skip else self._argument(a, other.kwargs[k], call) for k, a in call.kwargs.items()}
        if isinstance(call.outs, ScalarRef):
            k, (mine, theirs) = call.outs.id, self.values
            if k < len(mine) and k < len(theirs):
                self.known[_bits(mine[k]), _bits(theirs[k])] = k

    def _argument(self, a: Arg, b: Arg, call: OpCall) -> Arg:
        if isinstance(a, Sequence):
            return Sequence(tuple([self._argument(x, y, call) for x, y in zip(a.items, b.items)]))
        return self._number(a, b, call) if type(a) is float else a

    def _number(self, a: float, b: float, call: OpCall) -> float | ScalarRef:
        same = self.known.get((_bits(a), _bits(b)))
        if _bits(a) == _bits(b) and (same not in self.dependent or _is_short(a)):
            return a                           # a value that depends on symbols may round to the same in both captures: then no constant has all its digits
        if same is not None:
            self._note("CAP007", call, f"the number {a!r} is taken for the tracked value that it equals")
            self.found += 1
            return ScalarRef(same)
        self._note("CAP006", call, f"the number {a!r} given to {_short(call)} changes with the weights, by a way that is not tracked")
        return self._unknown(a, call)

    def _unknown(self, value: float, call: OpCall) -> ScalarRef:
        ref = ScalarRef(self.made)
        self.made += 1
        self.found += 1
        self.out.append(OpCall(-1, "tv.scalar.unknown", (), {"value": value}, ref, span=call.span))
        return ref

    def _contents(self, ref: TensorRef, call: OpCall) -> None:
        """Initial bytes that differ must be the tags of the same symbols."""
        if ref.storage in self.opened:
            return
        self.opened.add(ref.storage)
        a, b = (np.ascontiguousarray(x[f"init.{ref.storage}"]) if f"init.{ref.storage}" in x else None for x in (self.both.blobs, self.both.other_blobs))
        if a is None or b is None or (len(a) == len(b) and (a == b).all()) or call.name == "tv.symbol":
            return
        if has_tags(ref.dtype):
            n = len(a) // width(ref.dtype) * width(ref.dtype)
            mine, theirs = (decoded(x[:n], ref.dtype) for x in (a, b))
            explained = len(a) == len(b) and ((mine == theirs) | ((self.both.table.decode(mine) >= 0) & (self.both.table.decode(mine) == self.both.other_table.decode(theirs)))
                                              | self._by_digits(ref.storage, theirs)).all()
            if explained and (a[n:] == b[n:]).all():
                return
        self._note("CAP006", call, f"data that {_short(call)} reads changes with the weights, by a way that is not tracked")
        self.found += 1
        if has_tags(ref.dtype):
            item = width(ref.dtype)
            whole = TensorRef(ref.storage, 0, (len(a) // item,), (1,), ref.dtype)
            # Contents that the capture knows and the algebras do not: an uninitialised tensor with recorded bytes.
            self.out.append(OpCall(-1, "aten.empty.memory_format", (), {}, whole, (), call.span, rng=True))
            self.both.blobs["rng.-1.0." + str(len(self.out))] = a[: whole.numel * item]
        else:
            self._branch(call)

    def _by_digits(self, storage: int, theirs: np.ndarray) -> np.ndarray:
        """Where the contents, of symbols whose tags repeat (capture/digits.py), are the same symbols' values in the other capture."""
        numbers = self.both.blobs.get(f"from.{storage}")
        if numbers is None:
            return np.zeros(len(theirs), dtype=bool)
        return (numbers >= 0) & (self.both.other_table.values[numbers] == theirs)

    def _branch(self, call: OpCall, verdict: str = "") -> None:
        if verdict == "shape":
            self._note("CAP006", call, f"from {_short(call)} on, what the program does changes with the weights, by a way that is not tracked")
        elif verdict:
            self._note("CAP006", call, f"{_short(call)} decides otherwise with weights that are hardly different: whether a number that is used "
                                       "from here on changes with them could not be seen")
        ref = self._unknown(math.nan, call)
        self.out.append(OpCall(-1, "tv.decision", ("unknown", ref), {}, True, span=call.span))

    def _note(self, code: str, call: OpCall, text: str) -> None:
        note = Note(code, call.span, text)
        if note not in self.both.trace.notes:
            self.both.trace.notes.append(note)

    def _renumber(self) -> None:
        """Calls are numbered by their place; random results are kept under that number."""
        blobs = self.both.blobs
        moved = {}
        for i, call in enumerate(self.out):
            if call.index < 0 and call.rng:
                moved[f"rng.{i}.0"] = blobs.pop(f"rng.-1.0.{i + 1}")
            elif call.rng and call.index != i:
                for k in range(len(call.targets())):
                    moved[f"rng.{i}.{k}"] = blobs.pop(f"rng.{call.index}.{k}")
            call.index = i
        blobs.update(moved)
        self.both.trace.ops = self.out


def _bits(x: float) -> bytes:
    return struct.pack("<d", x)


def _is_short(x: float) -> bool:
    """Whether x is a number that programs write down, like 0.5 or 3: at most 12 binary digits."""
    return not math.isfinite(x) or (math.frexp(x)[0] * 4096).is_integer()


def _short(call: OpCall) -> str:
    return ".".join(call.name.split(".")[:2])
