"""Which samples of the reference's batch each rank reads, followed through the trace (for warnings and the data line; not trusted).

Batch tensors carry, beside their bytes, the number of each element in the batch (its origin). Ops that only move elements are
evaluated by their own rows on these origins; any other op that takes an element reads it. Samples are the first dimension.
"""
from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from trainverify.diagnostics import Diagnostic, Fault
from trainverify.ir.trace import Arg, Collective, OpCall, Program, ScalarRef, Sequence, TensorRef, Trace, tensors
from trainverify.ops.access import reads
from trainverify.ops.foreach import foreach_call
from trainverify.relate.liveness import idle_calls
from trainverify.replay.collectives import Tensors, deliver, message
from trainverify.replay.machine import Machine
from trainverify.replay.native import dtype_of

REDUCING = ("all_reduce", "reduce", "reduce_scatter")
COPIES = {"aten.copy": 1, "aten._to_copy": 0, "aten.clone": 0}          # op -> position of the argument that is copied
LOST = frozenset({"tolist", "numpy", "array", "dlpack", "data_ptr", "untyped_storage", "storage", "complex"})


class Consumed(Exception):
    """The op computes with its elements: it does not only move them."""


# A row that is given origins where it wants numbers or an index refuses in one of these ways: then the op reads its elements.
REFUSALS = (Consumed, Fault, TypeError, ValueError, RuntimeError, IndexError)


class Origin:
    """A tensor of origins as a value that rows may move and nothing else."""

    __slots__ = ("t",)

    def __init__(self, t: torch.Tensor):
        self.t = t

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.t.shape)

    def __getattr__(self, name: str):
        raise Consumed(name)


class Moves:
    """The movement part of an algebra (algebra/base.py); every other micro-op reads its operands."""

    name = "origin"

    def const(self, x, shape=()) -> Origin:
        return Origin(torch.zeros(tuple(shape), dtype=torch.int64))

    def data(self, t) -> Origin:
        return t if isinstance(t, Origin) else self.const(0, t.shape)

    def is_const(self, a) -> bool:
        return False

    def reshape(self, a, shape) -> Origin:
        return Origin(a.t.reshape(tuple(shape)))

    def permute(self, a, dims) -> Origin:
        return Origin(a.t.permute(tuple(dims)))

    def expand(self, a, shape) -> Origin:
        return Origin(a.t.expand(tuple(shape)))

    def stack(self, values) -> Origin:
        return Origin(torch.stack([v.t for v in values]))

    def take(self, sources, index) -> Origin:
        return Origin(torch.cat([torch.zeros(1, dtype=torch.int64), *(s.t.reshape(-1) for s in sources)])[index])

    def where(self, mask, a, b) -> Origin:
        if not isinstance(mask, torch.Tensor):
            raise Consumed("where")
        return Origin(torch.where(mask, a.t, b.t))

    def cast(self, a, dtype) -> Origin:
        return a

    def __getattr__(self, name: str):
        raise Consumed(name)


@dataclass(frozen=True, slots=True)
class BatchTensor:
    """One tensor of the batch: its elements have the origins first .. first + n - 1."""

    name: str
    shape: tuple[int, ...]
    first: int

    @property
    def n(self) -> int:
        return math.prod(self.shape)

    @property
    def samples(self) -> int:
        return self.shape[0] if self.shape else 0


class Batch:
    """The tensors of the reference's batch, numbered through (origin 0 is no element of it)."""

    def __init__(self, reference: Program):
        self.tensors: dict[str, BatchTensor] = {}
        total = 1
        for call in reference.traces[0].ops:
            if call.name == "tv.data" and isinstance(call.args[1], TensorRef) and call.args[0] not in self.tensors:
                made = self.tensors[call.args[0]] = BatchTensor(call.args[0], call.args[1].size, total)
                total += made.n
        self.total = total
        sizes = Counter(t.samples for t in self.tensors.values() if t.samples)
        self.samples = max(sizes, key=lambda n: (sizes[n], n)) if sizes else 0


class Reads:
    """Hooks `before` and `after` for one side's replay: follows origins, and counts where each element is read."""

    def __init__(self, batch: Batch):
        self.batch = batch
        self.m = Moves()
        self.cells: dict[int, dict[int, tuple[torch.Tensor, int]]] = defaultdict(dict)   # rank -> storage -> (origins, bytes of an element)
        self.counts: dict[tuple[int, int, str], torch.Tensor] = {}                       # (step, rank, op) -> how often, by origin
        self.traces: dict[int, Trace] = {}
        self._calls: dict[tuple[int, int, str], list[tuple[int, torch.Tensor]]] = defaultdict(list)     # which call read which origins
        # (rank, step, span) -> for each set of labels that is compared there: how many are not the ignored value
        self.marked: dict[tuple[int, int, int], dict[bytes, int]] = defaultdict(dict)
        self.lost: dict[str, str] = {}                                                   # batch tensor -> where it left for Python
        self._meetings: dict[tuple, _Meeting] = defaultdict(_Meeting)
        self._mail: dict[tuple, list[torch.Tensor] | None] = {}

    # ---- hooks
    def before(self, machine: Machine, call: OpCall) -> None:
        if call.name == "tv.data":
            self._announce(machine, call)
        elif call.collective is not None:
            self._send(machine, call)
        elif call.name == "tv.escape" and call.args[0] in LOST and self._follows(machine, call.args[1:]):
            self._leave(machine, call)

    def after(self, machine: Machine, call: OpCall, results: list) -> None:
        if call.collective is not None:
            return self._arrive(machine, call)
        cells = self.cells[machine.rank]
        if not cells or not _touches(call, cells):
            return
        read = [r for r in reads(call) if r.storage in cells]
        if read:
            self._evaluate(machine, call, read, results)
        else:
            self._store(machine, call.targets(), None)

    def _announce(self, machine: Machine, call: OpCall) -> None:
        name, ref = call.args
        tensor = self.batch.tensors.get(name)
        if tensor is not None and isinstance(ref, TensorRef) and ref.size == tensor.shape:
            self._put(machine, ref, torch.arange(tensor.first, tensor.first + tensor.n).reshape(tensor.shape))

    def _leave(self, machine: Machine, call: OpCall) -> None:
        origins = self._get(machine, call.args[1]).reshape(-1)
        for tensor in self.batch.tensors.values():
            if bool(((origins >= tensor.first) & (origins < tensor.first + tensor.n)).any()):
                self.lost.setdefault(tensor.name, f"{call.args[0]}, {machine.span(call) or 'no line'}")

    # ---- local calls
    def _evaluate(self, machine: Machine, call: OpCall, read: list[TensorRef], results: list) -> None:
        self._count_marked(machine, call, read)
        moved = self._moved(machine, call, results)
        if moved is None:
            self._consume(machine, call, read)
            return self._store(machine, call.targets(), None)
        values, steering = moved
        self._consume(machine, call, steering)
        self._store(machine, call.targets(), values)

    def _moved(self, machine: Machine, call: OpCall, results: list) -> tuple[list, list[TensorRef]] | None:
        """The origins of the call's results, and the arguments that only steer the movement; None if it computes."""
        base = ".".join(call.name.split(".")[:2]).removesuffix("_")
        if base in COPIES:
            ref = call.args[COPIES[base]]
            return ([self._get(machine, ref).expand(call.targets()[0].size)], []) if isinstance(ref, TensorRef) else None
        found = machine.table.lookup(call.name)
        if found is None:
            return None
        ctx = {"ctx": _Ctx(call, results, machine)} if found.row.ctx else {}
        for elements in (None, 0):            # every followed argument as elements; then the first alone, the others steer
            if elements == 0 and not self._follows(machine, call.args[:1]):
                break
            args = [self._value(machine, a, elements is None or i == 0) for i, a in enumerate(call.args)]
            kwargs = {k: self._value(machine, a, elements is None) for k, a in call.kwargs.items() if k != "out"}
            try:
                got = foreach_call(self.m, found.row, args, kwargs | ctx) if found.foreach else found.row.meaning(self.m, *args, **kwargs, **ctx)
            except REFUSALS:
                continue
            values = list(got) if isinstance(got, (list, tuple)) else [got]
            if [v.shape if isinstance(v, Origin) else None for v in values] == [t.size for t in call.targets()]:
                steering = [] if elements is None else [r for a in (*call.args[1:], *call.kwargs.values()) for r in tensors(a) if r.storage in self.cells[machine.rank]]
                return [v.t for v in values], steering
        return None

    def _value(self, machine: Machine, a: Arg, elements: bool):
        if isinstance(a, TensorRef):
            if elements and a.storage in self.cells[machine.rank]:
                return Origin(self._get(machine, a))
            t = machine.native.tensor(a)
            return self.m.data(t) if t.is_floating_point() or t.is_complex() else t
        if isinstance(a, Sequence):
            return [self._value(machine, x, elements) for x in a.items]
        return self.m.const(0) if isinstance(a, ScalarRef) else machine.native.decode(a)

    def _consume(self, machine: Machine, call: OpCall, refs: list[TensorRef]) -> None:
        if not refs:
            return
        key = (machine.step, machine.rank, ".".join(call.name.split(".")[:2]))
        counts = self.counts.get(key)
        if counts is None:
            counts = self.counts[key] = torch.zeros(self.batch.total, dtype=torch.int64)
        for ref in refs:
            origins, item = self.cells[machine.rank][ref.storage]
            if item == dtype_of(ref.dtype).itemsize:      # else bytes are reinterpreted: all that is there counts as read
                origins = self._get(machine, ref)
            counts += torch.bincount(origins.reshape(-1), minlength=self.batch.total)
            self._calls[key].append((call.index, origins.reshape(-1).to(torch.int32)))
        self.traces[machine.rank] = machine.trace

    def _count_marked(self, machine: Machine, call: OpCall, read: list[TensorRef]) -> None:
        """Comparisons of labels with a negative number: how many of them are valid."""
        op = call.name.split(".")[1]
        if op in ("ne", "eq") and len(call.args) == 2 and isinstance(call.args[1], int) and call.args[1] < 0 and len(read) == 1:
            origins = self._get(machine, read[0])
            valid = int((machine.native.tensor(read[0])[origins > 0] != call.args[1]).sum())
            self.marked[(machine.rank, machine.step, call.span)].setdefault(origins.contiguous().numpy().tobytes(), valid)

    def used(self) -> dict[tuple[int, int, str], torch.Tensor]:
        """`counts` of the reads on which something depends that leaves the program."""
        idle, out = idle_calls(self.traces.values()), {}
        for key, calls in self._calls.items():
            kept = [origins for index, origins in calls if (key[1], index) not in idle]
            if kept:
                out[key] = torch.bincount(torch.cat(kept), minlength=self.batch.total)
        return out

    def compared_labels(self, step: int) -> dict[int, tuple[int, ...]]:
        """Per rank: how many labels were no ignored ones, for each set of labels that the first line to compare some compares."""
        out: dict[int, tuple[int, ...]] = {}
        for (rank, s, _), counts in self.marked.items():
            if s == step:
                out.setdefault(rank, tuple(counts.values()))
        return out

    def samples(self, tensor: BatchTensor, rank: int, step: int) -> int:
        """How many samples of a tensor a rank reads in a step."""
        counts = [c[tensor.first:tensor.first + tensor.n] for (s, r, _), c in self.counts.items() if (s, r) == (step, rank)]
        return int((torch.stack(counts) > 0).any(0).reshape(tensor.samples, -1).any(1).sum()) if counts else 0

    def read_by(self, rank: int, step: int) -> bytes:
        """Equal for ranks that read the same elements in a step; b"" where a rank reads none."""
        counts = [c for (s, r, _), c in self.counts.items() if (s, r) == (step, rank)]
        return (torch.stack(counts) > 0).any(0).numpy().tobytes() if counts else b""

    # ---- communication
    def _send(self, machine: Machine, call: OpCall) -> None:
        c = call.collective
        held = [r for r in c.inputs if r.storage in self.cells[machine.rank]]
        if held and c.kind in REDUCING:
            self._consume(machine, call, held)
            held = []
        origins = [self._get(machine, r).clone() for r in c.inputs] if held else None
        if c.kind == "send":
            self._mail[message(machine.rank, c)] = origins
        elif c.kind != "recv":
            self._meetings[(c.group, c.group_name, c.seq)].post(machine.rank, c, origins)

    def _arrive(self, machine: Machine, call: OpCall) -> None:
        c = call.collective
        if c.kind == "send":
            return
        if c.kind == "recv":
            return self._store(machine, c.outputs, self._mail.pop(message(machine.rank, c)))
        key = (c.group, c.group_name, c.seq)
        meeting = self._meetings[key]
        for ref, v in zip(c.outputs, meeting.outputs(c.group)[machine.rank] if meeting.followed else ()):
            if v is not None:
                self._store(machine, (ref,), [v.reshape(ref.size)])
        if not meeting.followed:
            self._store(machine, c.outputs, None)
        meeting.left += 1
        if meeting.left == len(c.group):
            del self._meetings[key]

    # ---- memory of origins
    def _follows(self, machine: Machine, args) -> bool:
        return any(r.storage in self.cells[machine.rank] for a in args for r in tensors(a))

    def _get(self, machine: Machine, ref: TensorRef) -> torch.Tensor:
        cell = self.cells[machine.rank].get(ref.storage)
        if cell is None or cell[1] != dtype_of(ref.dtype).itemsize or not self._inside(ref, cell[0]):
            return torch.zeros(ref.size, dtype=torch.int64)
        return torch.as_strided(cell[0], ref.size, ref.stride, ref.offset)

    def _store(self, machine: Machine, refs, values: list[torch.Tensor] | None) -> None:
        """What a call wrote: origins, or (None) elements of its own making."""
        cells = self.cells[machine.rank]
        for k, ref in enumerate(refs):
            if values is not None and bool(values[k].any()):
                self._put(machine, ref, values[k])
            elif ref.storage in cells:
                self._put(machine, ref, torch.zeros(ref.size, dtype=torch.int64))
                if not bool(cells[ref.storage][0].any()):
                    del cells[ref.storage]

    def _put(self, machine: Machine, ref: TensorRef, origins: torch.Tensor) -> None:
        item = dtype_of(ref.dtype).itemsize
        cell = self.cells[machine.rank].get(ref.storage)
        if cell is None or cell[1] != item or not self._inside(ref, cell[0]):
            n = max(machine.native.storage(ref.storage).nbytes(), machine.trace.storages[ref.storage].nbytes) // item
            cell = self.cells[machine.rank][ref.storage] = (torch.zeros(n, dtype=torch.int64), item)
        if self._inside(ref, cell[0]):
            torch.as_strided(cell[0], ref.size, ref.stride, ref.offset).copy_(origins.reshape(ref.size))

    @staticmethod
    def _inside(ref: TensorRef, cell: torch.Tensor) -> bool:
        return 0 in ref.size or ref.offset + sum((n - 1) * s for n, s in zip(ref.size, ref.stride)) < len(cell)


@dataclass(slots=True)
class _Meeting:
    """One collective: what its members send (None: nothing that is followed), and how many have taken their part."""

    calls: dict[int, Collective] = field(default_factory=dict)
    origins: dict[int, list[torch.Tensor] | None] = field(default_factory=dict)
    left: int = 0
    _outputs: dict[int, list] | None = None

    def post(self, rank: int, call: Collective, origins: list[torch.Tensor] | None) -> None:
        self.calls[rank], self.origins[rank] = call, origins

    @property
    def followed(self) -> bool:
        return any(o is not None for o in self.origins.values())

    def outputs(self, group: tuple[int, ...]) -> dict[int, list]:
        """Every member's results."""
        if self._outputs is None:
            nothing = {r: [torch.zeros(i.size, dtype=torch.int64) for i in self.calls[r].inputs] for r in group if self.origins[r] is None}
            got = deliver(Tensors(), [self.calls[r] for r in group], [self.origins[r] or nothing[r] for r in group])
            self._outputs = dict(zip(group, got))
        return self._outputs


def _touches(call: OpCall, cells: dict) -> bool:
    """Whether the call names a storage that is followed."""
    for a in (*call.args, *call.kwargs.values(), *call.writes):
        if type(a) is TensorRef:
            if a.storage in cells:
                return True
        elif type(a) is Sequence and any(t.storage in cells for t in tensors(a)):
            return True
    return False


@dataclass(frozen=True, slots=True)
class _Ctx:
    """What rows with ctx=True see here; a decision about the batch's own integers is none about symbols."""

    call: OpCall
    native: list
    machine: Machine

    def argument(self, place: int):
        return self.machine.native.decode(self.call.args[place])

    def decide(self, kind, operands, outcome) -> None:
        raise Consumed(kind)


class Coverage:
    """What was read: `text` for the report's first screen, `diagnostics` for samples that are read unevenly or never."""

    def __init__(self, batch: Batch, reference: Reads, parallel: Reads):
        self.batch, self.reference, self.parallel = batch, reference, parallel
        self.tensors = [t for t in batch.tensors.values() if t.samples == batch.samples > 0]
        self.lost = {t.name: parallel.lost[t.name] for t in self.tensors if t.name in parallel.lost}
        self.never: dict[str, tuple[int, ...]] = {}                   # tensor -> samples that no rank reads
        self.repeated: dict[str, dict[int, int]] = {}                 # tensor -> sample -> how often it is read
        self.readers: dict[tuple[str, int], tuple[int, ...]] = {}     # tensor and sample -> ranks that read it
        self._judge_all(parallel.counts)
        if any(self.repeated.values()):        # a pipeline's first step may run a microbatch for its shapes only
            never, self.repeated, self.readers = self.never, {}, {}
            self._judge_all(parallel.used())
            self.never = never

    def _judge_all(self, counts: dict) -> None:
        steps = sorted({s for s, _, _ in (*self.reference.counts, *counts) if s})
        for tensor in self.tensors:
            once: set[int] = set()
            for step in steps:
                once |= self._judge(tensor, step, counts)
            # What counts is a sample that no step reads once.
            for sample in once & self.repeated.get(tensor.name, {}).keys():
                del self.repeated[tensor.name][sample]

    @staticmethod
    def _counts(by_key: dict, tensor: BatchTensor, step: int) -> Iterator[tuple[int, str, torch.Tensor]]:
        """Per rank and op: how often each element is read, as [sample, element]."""
        found = [(s, rank, op, mine) for (s, rank, op), counts in by_key.items() if bool((mine := counts[tensor.first:tensor.first + tensor.n]).any())]
        # What is only read before the first step (to make features of it, say) is read for all steps.
        at = step if any(s for s, _, _, _ in found) else 0
        for s, rank, op, mine in found:
            if s == at:
                yield rank, op, mine.reshape(tensor.samples, -1)

    def _judge(self, tensor: BatchTensor, step: int, counts: dict) -> set[int]:
        """Note what is wrong with one tensor in one step; the samples that are read as often as they should."""
        expected = torch.zeros(tensor.samples, dtype=torch.bool)
        for _, _, times in self._counts(self.reference.counts, tensor, step):
            expected |= times.any(1)
        by_op: dict[str, torch.Tensor] = {}
        by_rank: dict[int, torch.Tensor] = {}
        for rank, op, times in self._counts(counts, tensor, step):
            by_op[op] = by_op[op] + times if op in by_op else times
            by_rank[rank] = by_rank[rank] | times.any(1) if rank in by_rank else times.any(1)
        read = torch.stack([torch.zeros_like(expected), *by_rank.values()]).any(0)
        if tensor.name not in self.lost:
            never = torch.nonzero(expected & ~read).reshape(-1).tolist()
            self.never[tensor.name] = tuple(sorted({*self.never.get(tensor.name, ()), *never}))
        repeated = _repeated(by_op, read)
        for sample, times in repeated.items():
            mine = self.repeated.setdefault(tensor.name, {})
            mine[sample] = max(times, mine.get(sample, 0))
            ranks = {r for r, has in by_rank.items() if bool(has[sample])}
            self.readers[(tensor.name, sample)] = tuple(sorted({*ranks, *self.readers.get((tensor.name, sample), ())}))
        return set(torch.nonzero(read).reshape(-1).tolist()) - repeated.keys()

    # ---- in words
    @property
    def unread(self) -> bool:
        """Whether the parallel program reads nothing of the batch that it was handed."""
        return bool(self.tensors) and not self.lost and not any(bool(c.any()) for c in self.parallel.counts.values())

    def text(self, valid: str = "") -> str:
        """"12 samples, each read once; valid tokens 61, 48, 55"; "" where there is no batch."""
        if not self.tensors:
            return ""
        said = f"{self.batch.samples} sample" + ("s" if self.batch.samples != 1 else "")
        never, often = self._samples(self.never.values()), self._samples(self.repeated.values())
        if self.unread:
            said += ", none read from ref.batch"
        elif never or often:
            said += ": " + ", ".join([*([f"{numbers(never)} never read"] if never else []), *([f"{numbers(often)} read more often than others"] if often else [])])
        elif self.lost:
            said += f"; {', '.join(self.lost)} not followed"
        else:
            said += ", each read once" if self.batch.samples > 1 else ", read once"
        return said + (f"; {valid}" if valid else "")

    @staticmethod
    def _samples(sets) -> tuple[int, ...]:
        return tuple(sorted({s for one in sets for s in one}))

    def diagnostics(self) -> list[Diagnostic]:
        if self.unread:
            return [Diagnostic("DATA001", "the parallel program reads no sample of ref.batch", "warning", notes=(
                "it reads data of its own: whether that is the reference's data shows in the outputs only",), fix="take the data from ref.batch")]
        return [*self._never_read(), *self._read_repeatedly(), *self._not_followed()]

    def _never_read(self) -> list[Diagnostic]:
        groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for name, samples in self.never.items():
            if samples:
                groups[samples].append(name)
        every = tuple(range(self.batch.samples))
        return [Diagnostic("DATA001", f"{', '.join(names)}: {'all samples' if samples == every else numbers(samples)} read by no rank, but by the reference", "warning",
                           fix="check how the batch is divided over ranks and microbatches (rounding, drop_last, the rank in the slice)")
                for samples, names in groups.items()]

    def _read_repeatedly(self) -> list[Diagnostic]:
        groups: dict[tuple, list[str]] = defaultdict(list)
        for name, samples in self.repeated.items():
            if samples:
                groups[tuple((s, n, self.readers[(name, s)]) for s, n in sorted(samples.items()))].append(name)
        out = []
        for found, names in groups.items():
            ranks = tuple(sorted({r for _, _, readers in found for r in readers}))
            notes = tuple(f"{numbers((s,))}: {n} times as often, by rank{'s' if len(readers) > 1 else ''} {', '.join(map(str, readers))}"
                          for s, n, readers in found[:8])
            out.append(Diagnostic("DATA002", f"{', '.join(names)}: {numbers(tuple(s for s, _, _ in found))} read more often than others in one step", "warning", None, ranks, notes, "each sample must count once: check padding of samplers, and the slices of ranks and microbatches"))
        return out

    def _not_followed(self) -> list[Diagnostic]:
        return [Diagnostic("DATA003", f"{name} left for Python ({place}): which of its samples are read is not known", "note",
                           fix="nothing to do if the report is otherwise as expected; slicing tensors keeps them in sight") for name, place in self.lost.items()]


def _repeated(by_op: dict[str, torch.Tensor], read: torch.Tensor) -> dict[int, int]:
    """Samples that every op reads more often than it reads others, and how many times as often.

    A sample counts as often as its least read element, so that a halo of some elements is no repetition; an op that not all
    samples go through (one rank logs something) says nothing.
    """
    often = []
    for counts in by_op.values():
        least = torch.where(counts > 0, counts, counts.max() + 1).min(1).values * counts.any(1)
        if bool((least > 0)[read].all()):
            often.append(least // least[read].min())
    if not often:
        return {}
    times = torch.stack(often).min(0).values
    return {s: int(times[s]) for s in torch.nonzero(times > 1).reshape(-1).tolist()}


def numbers(samples: tuple[int, ...]) -> str:
    """"sample 3", "samples 0, 4-7"."""
    runs: list[list[int]] = []
    for s in samples:
        if runs and s == runs[-1][1] + 1:
            runs[-1][1] = s
        else:
            runs.append([s, s])
    return f"sample{'s' if len(samples) != 1 else ''} " + ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
