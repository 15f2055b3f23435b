"""Data model of a captured program (trusted as data: capture writes it, replay reads it; no torch).

A *program* is one side (reference or parallel): one `Trace` per rank. A trace is a memory model, not SSA: every op call
names the storages it touched through `TensorRef`s, so views, `.data =`, in-place ops and flat buffers need no op of their
own. Everything that happened in Python and matters later (a tracked scalar's arithmetic, a wait, an output to compare) is
an op call too, in the namespace `tv`, at its place in the order:

tv.symbol(kind, name, ref)        from here on `ref` holds the symbols `name` in contiguous element order; kind is weight, buffer, batch
                                  or state. Reference: writes=(ref,), the tagged values are blob `symbol.<name>`. Parallel: a tensor
                                  that was handed over by us (ref.weights, ref.batch), bound by identity.
tv.data(name, ref)                `ref` holds the tensor `name` of the reference's batch, of any dtype; both sides. The first
                                  dimension counts samples
tv.param(name, ref)               a model parameter or buffer of Training.model when parallel() or reference() returned
tv.stepped(name, ref)             a tensor that an optimizer steps, before its first step; name is the parameter's where known
tv.step(n)                        step n (from 1) begins
tv.output(kind, name, step, value, declare=None, group=None)   a value to compare (see Output); value: TensorRef, ScalarRef, number or None
tv.wait(work)                     the program waited for collective `work`
tv.scalar.item(ref)               -> ScalarRef; value= the float, bit for bit. tv.scalar.<add|sub|mul|truediv|pow|neg|abs|min|max|...>(a, b)
tv.decision(op, a, b)             -> bool; a comparison (gt, ge, lt, le, eq, ne, bool) of tracked scalars that Python branched on
tv.escape(how, ref or scalar)     a value left for Python untracked (float(), tolist, numpy, ...)
tv.resize(storage, nbytes)        storage resized; contents are garbage where it grew
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Union

import msgspec

from trainverify.diagnostics import Span


class TensorRef(msgspec.Struct, frozen=True, array_like=True, tag="t", gc=False):
    """A tensor as read or written at one use. `offset` and `stride` count elements of `dtype` ("float32", "int64", ...)."""

    storage: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        n = 1
        for s in self.size:
            n *= s
        return n


class ScalarRef(msgspec.Struct, frozen=True, array_like=True, tag="s", gc=False):
    """A tracked Python float (it left a tensor through item(), or was computed from one that did)."""

    id: int


class Name(msgspec.Struct, frozen=True, array_like=True, tag="n", gc=False):
    """An attribute that is neither number nor tensor: kind is dtype, device, layout, memory_format, generator,
    group, reduce_op, storage, complex, or opaque (could not be decoded: replay refuses it)."""

    kind: str
    value: str


class Sequence(msgspec.Struct, frozen=True, array_like=True, tag="l", gc=False):
    """A list or tuple argument."""

    items: tuple[Arg, ...]


Arg = Union[None, bool, int, float, str, TensorRef, ScalarRef, Name, Sequence]


class Collective(msgspec.Struct, frozen=True, array_like=True):
    """The normalised meaning of one communication call; members are global ranks.

    kind         inputs / outputs
    all_reduce   inputs[i] -> outputs[i], same shape (in place: equal refs)
    broadcast    root's inputs[i] -> everyone's outputs[i]
    reduce       like all_reduce, written on root only
    all_gather   outputs[i] holds the members' inputs[i] flattened and concatenated in group order;
                 listed: outputs[i*n+j] receives member j's inputs[i]
    reduce_scatter  outputs[i] = chunk `me` (flat, equal parts) of the reduced inputs[i];
                 listed: outputs[i] = reduction over members of their inputs[i*n+me]
    all_to_all   dim-0 blocks: in_splits rows of inputs[0] go to the members, out_splits rows of outputs[0] arrive;
                 listed: inputs[j] goes to member j, outputs[j] arrives from member j
    scatter, gather  listed, with root
    send, recv   peer (global rank), tag; recv writes its outputs at the wait
    barrier      nothing
    """

    kind: str
    group: tuple[int, ...]
    group_name: str
    seq: int                                  # position among this group's collectives; for send/recv: per (src, dst, tag)
    inputs: tuple[TensorRef, ...] = ()
    outputs: tuple[TensorRef, ...] = ()
    reduce_op: str | None = None              # sum, avg, max, min, product, premul_sum
    factor: float | None = None               # premul_sum
    root: int | None = None                   # global rank
    peer: int | None = None                   # global rank
    tag: int = 0
    in_splits: tuple[int, ...] = ()
    out_splits: tuple[int, ...] = ()
    listed: bool = False
    work: int | None = None                   # id of the pending work; a later `tv.wait` names it; None: complete on return


class OpCall(msgspec.Struct, array_like=True):
    """One executed call. `outs` are returned values, `writes` the tensors it wrote in place (our own table, not the schema's).

    `digest_in`, `digest_out`: crc32 over the bytes of all tensor inputs before, and all outs and writes after the call.
    `rng`: outputs came from a random generator; their bytes are in the trace's blobs as `rng.<index>.<k>`, flattened order.
    """

    index: int
    name: str                                 # "aten.add.Tensor", "c10d.allreduce_.default", "tv.output"
    args: tuple[Arg, ...]
    kwargs: dict[str, Arg]
    outs: Arg
    writes: tuple[TensorRef, ...] = ()
    span: int = -1
    collective: Collective | None = None
    digest_in: int = 0
    digest_out: int = 0
    rng: bool = False

    def targets(self) -> tuple[TensorRef, ...]:
        """Where a row's results go, in order: returned tensors, then tensors written but not returned."""
        outs = tuple(tensors(self.outs))
        return outs + tuple(w for w in self.writes if w not in outs)


class Output(msgspec.Struct, frozen=True, array_like=True):
    """One thing to compare, named at a `tv.output` call: its args are (kind, name, step, value) and declare= for scalars.

    kind: scalar, gradient, parameter, buffer, state. name: parameter's name ("layers.0.wq.weight"), for state
    "<parameter>::<key>". value: TensorRef, ScalarRef, float or None (absent).
    """

    kind: str
    name: str
    step: int


class Storage(msgspec.Struct, frozen=True, array_like=True):
    """nbytes at its largest; initial: its bytes when first seen as an input are in the blobs as `init.<id>`."""

    nbytes: int
    initial: bool


class Note(msgspec.Struct, frozen=True, array_like=True):
    """Something that the report must say: an escape, a shimmed branch, a patched call, an assumption."""

    code: str
    span: int
    text: str


class Group(msgspec.Struct, frozen=True, array_like=True):
    """A process group: members in order, its name, mesh axis names if it belongs to a DeviceMesh, creation span."""

    name: str
    ranks: tuple[int, ...]
    axis: str = ""
    span: int = -1


class Patched(msgspec.Struct, frozen=True):
    """Something of a framework, or of torch for its sake, that an adapter replaced: an assumption."""

    framework: str
    target: str
    reason: str


class Trace(msgspec.Struct):
    side: str                                 # reference | parallel
    rank: int
    world_size: int
    ops: list[OpCall] = []
    storages: list[Storage] = []
    spans: list[Span] = []
    notes: list[Note] = []
    groups: list[Group] = []
    steps: int = 0
    meta: dict[str, str] = {}                 # torch version, argv, case, seed; optimizers (JSON): settings of each group; patches (JSON): see Patched


class Program(msgspec.Struct):
    """All ranks of one side. `blobs[r]` maps names (init.<sid>, rng.<op>.<k>, symbol.<name>) to numpy arrays."""

    traces: list[Trace]
    blobs: list[dict[str, object]]


def tensors(arg: Arg) -> Iterator[TensorRef]:
    """All tensor references in an argument, in order."""
    if isinstance(arg, TensorRef):
        yield arg
    elif isinstance(arg, Sequence):
        for a in arg.items:
            yield from tensors(a)


def inputs(call: OpCall) -> Iterator[TensorRef]:
    """All tensor references in a call's arguments, in order (keyword arguments last)."""
    for a in call.args:
        yield from tensors(a)
    for a in call.kwargs.values():
        yield from tensors(a)


def references(call: OpCall) -> Iterator[TensorRef]:
    """All that a call names in memory: arguments, results, what it writes, what its collective moves."""
    yield from inputs(call)
    yield from tensors(call.outs)
    yield from call.writes
    if call.collective is not None:
        yield from call.collective.inputs
        yield from call.collective.outputs


def scalar_ids(args: Iterable[Arg]) -> Iterator[int]:
    """Numbers of the tracked scalars among arguments, also in lists."""
    for a in args:
        if isinstance(a, ScalarRef):
            yield a.id
        elif isinstance(a, Sequence):
            yield from scalar_ids(a.items)


RESIZE = "tv.resize"


def resized(call: OpCall) -> int:
    """The storage that a tv.resize speaks of."""
    storage = call.args[0]
    return int(storage.value) if isinstance(storage, Name) else int(storage)
