"""A trace at the reduced sizes: storages, tensor references and the sizes among the arguments, all by position (trusted).

No number is recognised by its value: each argument that is a size is known by its operation and its place, and becomes what the
rewritten references say. Literals stay.
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from trainverify.ir.trace import RESIZE, Arg, Collective, Name, OpCall, Sequence, Storage, TensorRef, Trace, references, resized, tensors
from trainverify.shrink.classes import Classes, is_integer_only, refusal, row_pieces
from trainverify.shrink.counts import Written, _with
from trainverify.shrink.facts import base
from trainverify.shrink.integers import MOVES, SAME_ELSEWHERE, VALUELESS, Full, Values, places
from trainverify.shrink.layout import Layout
from trainverify.shrink.repeat import is_float, item
from trainverify.shrink.rules import stepped
from trainverify.shrink.spaces import Kept
from trainverify.shrink.templates import Template


class Rewriter:
    """One rank of one side."""

    def __init__(self, classes: Classes, layout: Layout, kept: Kept, values: Values, full: Full):
        self.classes, self.layout, self.kept, self.values, self.full = classes, layout, kept, values, full
        self.blobs_before = classes.programs[layout.where[0]].blobs[layout.where[1]]
        self.storages = [Storage(layout.nbytes(sid, kept), s.initial) for sid, s in enumerate(layout.trace.storages)]
        self.blobs: dict[str, object] = {}
        self.ops: list[OpCall] = []
        self.checked: list[range] = []        # what calls became that were not made from a template: what holds of it holds of all
        self._refs: dict[TensorRef, TensorRef] = {}
        self._templates: dict[int, Template] = {}
        self._integers: dict[int, TensorRef] = {}

    def program(self) -> tuple[Trace, dict[str, object]]:
        t = self.layout.trace
        for call in t.ops:
            self._call(call)
        self._bytes()
        meta = {k: v for k, v in t.meta.items() if (k, v) != VALUELESS}
        return Trace(t.side, t.rank, t.world_size, self.ops, self.storages, t.spans, t.notes, t.groups, t.steps, meta), self.blobs

    # ---- references
    def ref(self, ref: TensorRef) -> TensorRef:
        one = self.layout.one(ref)
        got = self._refs.get(one)
        if got is None:
            got = self._refs[one] = self.layout.reduced(one, self.kept)
        return got if one is ref else TensorRef(ref.storage, got.offset, got.size, got.stride, got.dtype)

    def value(self, a: Arg) -> Arg:
        if isinstance(a, TensorRef):
            return self.ref(a)
        return Sequence(tuple(self.value(x) for x in a.items)) if isinstance(a, Sequence) else a

    def fresh(self, size: tuple[int, ...], dtype: str, initial: bool) -> TensorRef:
        """A storage that the recorded program does not have."""
        ref = TensorRef(len(self.storages), 0, size, tuple(int(np.prod(size[k + 1:], dtype=np.int64)) for k in range(len(size))), dtype)
        self.storages.append(Storage(max(1, ref.numel) * item(dtype), initial))
        return ref

    def data(self, t: torch.Tensor) -> TensorRef:
        """A storage with these contents."""
        ref = self.fresh(tuple(t.shape), str(t.dtype).removeprefix("torch."), True)
        raw = t.contiguous().reshape(-1).view(torch.uint8).numpy() if t.numel() else np.zeros(item(ref.dtype), dtype=np.uint8)
        self.blobs[f"init.{ref.storage}"] = np.array(raw, copy=True)
        return ref

    # ---- calls
    def _call(self, call: OpCall) -> None:
        repeats = self.layout.repeats
        template = self._templates.get(repeats.like[call.index])
        if template is not None and (*self.layout.where, call.index) not in self.full.truths:
            return template.make(call, repeats.named[call.index], self.storages, self.ops)
        made, added = len(self.ops), len(self.storages)
        self._rewritten(call)
        self.checked.append(range(made, len(self.ops)))
        if self._is_template(call):
            self._templates[repeats.like[call.index]] = Template(self.ops[made:], repeats.named[call.index], added, self.storages)

    def _is_template(self, call: OpCall) -> bool:
        """Whether nothing but storages tells it from the calls like it: no values that were recorded for it alone."""
        if call.name.startswith("tv.") or call.rng or base(call.name) in (*SAME_ELSEWHERE, "arange", "_grouped_mm") or (*self.layout.where, call.index) in self.full.truths:
            return False
        repeats = self.layout.repeats
        return not repeats.forms[repeats.form[call.index]].has_scalars

    def _rewritten(self, call: OpCall) -> None:
        after = _with(call, args=tuple(self.value(a) for a in call.args), kwargs={k: self.value(a) for k, a in call.kwargs.items()}, outs=self.value(call.outs),
                      writes=tuple(self.ref(w) for w in call.writes))
        if call.collective is not None:
            return self._add(_with(after, collective=self._collective(call.collective)))
        if call.name == RESIZE:
            return self._add(self._resized(call))
        if call.name.startswith("tv."):
            return self._add(after)
        key = (*self.layout.where, call.index)
        if not call.rng and key in self.full.truths and is_integer_only(call) and (self._like(call) in self.classes.unread or base(call.name) not in MOVES):
            return self._recorded(call, after, self.full.truths[key])
        if key in self.full.truths and any(is_float(r) for r in call.targets()):
            return self._recorded(call, after, self.full.truths[key])
        if base(call.name) == "arange" and is_float(call.targets()[0]):
            return self._arange(call, after)
        rewrite = ARGUMENTS.get(base(call.name))
        if rewrite is not None:
            after = _with(after, args=rewrite(self, call, after))
        self._random(call, len(self.ops))
        for one in Written(lambda like: self.fresh(like.size, like.dtype, False), self.full.valid.get(key)).calls(call, after):
            self._add(one)

    def _like(self, call: OpCall) -> tuple[str, int, int]:
        return (*self.layout.where, self.layout.repeats.like[call.index])

    def _add(self, call: OpCall) -> None:
        call.index = len(self.ops)
        call.digest_in = call.digest_out = 0
        self.ops.append(call)

    def _recorded(self, call: OpCall, after: OpCall, truths: list) -> None:
        """Integers as the recorded program has them. The call itself stays where it can: it shows who reads what."""
        executed = base(call.name) in EXECUTED and self._like(call) not in self.classes.unread
        if executed:
            self._add(after)
        for before, ref, t in zip(call.targets(), after.targets(), truths):
            if tuple(t.shape) != ref.size:
                raise AssertionError(f"{call.name}: {tuple(t.shape)} values for a tensor of sizes {ref.size}")
            source = self.data(t)
            if executed or before in call.writes:
                self._add(_with(call, name="aten.copy_.default", args=(ref, source), kwargs={}, outs=ref, writes=(ref,)))
            else:
                self._add(_with(call, name="aten.clone.default", args=(source,), kwargs={}, outs=ref, writes=()))
        if not call.targets():
            self._add(after)

    def _arange(self, call: OpCall, after: OpCall) -> None:
        """The kept numbers of a range, which are exact."""
        ref = call.targets()[0]
        if ref.size == after.targets()[0].size:
            return self._add(after)
        numbers = [float(a) for a in call.args if isinstance(a, (int, float))]
        start, step = (0.0, 1.0) if len(numbers) == 1 else (numbers[0], numbers[2] if len(numbers) > 2 else 1.0)
        values = start + step * self.kept.indices(self.layout.dims(ref)[0]).astype(np.float64)
        if (values != np.round(values)).any() or abs(values).max() > 2 ** 24:
            raise refusal("SHAPE003", "a range of numbers that are no integers cannot be written at other sizes", "use torch.arange of integers, and scale it",
                          self.layout.span(call))
        self._add(_with(call, name="aten._to_copy.default", args=(self.data(torch.from_numpy(values).to(torch.int64)),),
                        kwargs={"dtype": Name("dtype", ref.dtype)}, outs=after.outs, writes=()))

    def _resized(self, call: OpCall) -> OpCall:
        sid, (storage, nbytes) = resized(call), call.args
        full, small = self.layout.trace.storages[sid].nbytes, self.storages[sid].nbytes
        if nbytes not in (0, full) and full != small:
            raise refusal("SHAPE003", f"storage {sid} is resized to {nbytes} of {full} bytes", "verify without --reduce", self.layout.span(call))
        return _with(call, args=(storage, small if nbytes == full else nbytes))

    def _collective(self, c: Collective) -> Collective:
        new = {f: getattr(c, f) for f in c.__struct_fields__}
        new["inputs"], new["outputs"] = tuple(self.ref(r) for r in c.inputs), tuple(self.ref(r) for r in c.outputs)
        if c.in_splits:
            new["in_splits"] = tuple(self.kept.count(s) for s in row_pieces(self.layout, c.inputs[0], list(c.in_splits)))
        if c.out_splits:
            new["out_splits"] = tuple(self.kept.count(s) for s in row_pieces(self.layout, c.outputs[0], list(c.out_splits)))
        return Collective(**new)

    # ---- bytes
    def _indices(self, ref: TensorRef) -> tuple[np.ndarray, ...]:
        return np.ix_(*(self.kept.indices(s) for s in self.layout.dims(ref))) if ref.size else ()

    def _random(self, call: OpCall, index: int) -> None:
        """What was drawn, at the kept positions."""
        for k, ref in enumerate(call.targets()) if call.rng else ():
            raw = np.ascontiguousarray(self.blobs_before[f"rng.{call.index}.{k}"]).reshape(-1).view(np.uint8)
            drawn = raw.reshape(*ref.size, -1)[self._indices(ref)] if ref.size and ref.numel else raw
            if not is_float(ref):
                drawn = _as_bytes(places(self.kept, self.values.of(self.layout.where, ref), _as_tensor(drawn, ref)))
            self.blobs[f"rng.{index}.{k}"] = np.ascontiguousarray(drawn).reshape(-1)

    def _bytes(self) -> None:
        """The contents of storages that were there before, and of symbols."""
        self._integers = self._whole_integers()
        symbols = {c.args[1]: c.args[2] for c in reversed(self.layout.trace.ops) if c.name == "tv.symbol"}
        for name, blob in self.blobs_before.items():
            kind, _, rest = name.partition(".")
            if kind == "init":
                self.blobs[name] = self._initial(int(rest), np.asarray(blob))
            elif kind == "symbol":
                ref = symbols[rest]
                raw = np.ascontiguousarray(blob).reshape(-1).view(np.uint8)
                self.blobs[name] = np.ascontiguousarray(raw.reshape(*ref.size, -1)[self._indices(ref)] if ref.size else raw).reshape(-1)
            elif kind != "rng":
                self.blobs[name] = blob

    def _whole_integers(self) -> dict[int, TensorRef]:
        """Of each storage of integers that was there before: the first reference to it."""
        repeats, found = self.layout.repeats, {}
        wanted = {int(name[5:]) for name in self.blobs_before if name.startswith("init.")}
        for number, named in zip(repeats.form, repeats.named) if wanted else ():
            if not wanted.isdisjoint(named):
                for ref, sid in zip(repeats.forms[number].refs, named):
                    if sid in wanted and not is_float(ref) and ref.dtype != "bool":
                        found.setdefault(sid, TensorRef(sid, ref.offset, ref.size, ref.stride, ref.dtype))
        return found

    def _initial(self, sid: int, blob: np.ndarray) -> np.ndarray:
        if self.layout.canon[sid] not in self.layout.storages:
            return blob
        space, width = self.layout.space(sid), self.layout.items[self.layout.canon[sid]]
        if self.kept.count(space) == self.classes.spaces.size(space):
            kept = np.ascontiguousarray(blob).reshape(-1).view(np.uint8)
        else:
            kept = np.ascontiguousarray(blob).reshape(-1).view(np.uint8).reshape(-1, width)[self.kept.indices(space)].reshape(-1)
        ref = self._integers.get(sid)
        if ref is None:
            return np.array(kept, copy=True)
        flat = TensorRef(sid, 0, (len(kept) // width,), (1,), ref.dtype)
        return _as_bytes(places(self.kept, self.values.of(self.layout.where, ref), _as_tensor(kept, flat)))


def _as_tensor(raw: np.ndarray, ref: TensorRef) -> torch.Tensor:
    return torch.from_numpy(np.array(raw, copy=True).reshape(-1)).view(getattr(torch, ref.dtype))


def _as_bytes(t: torch.Tensor) -> np.ndarray:
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().copy()


# Operations on integers that can be executed at the reduced sizes, before their results are replaced by the recorded ones.
EXECUTED = {"add", "sub", "mul", "rsub", "eq", "ne", "lt", "le", "gt", "ge", "masked_fill", "bitwise_and", "bitwise_or", "bitwise_not", "logical_and", "logical_or",
            "logical_not", "where", "sum", "clamp", "floor_divide", "remainder", "fill", "zero"}


# ---- sizes among arguments: operation -> the arguments of its reduced call

def _sizes(at: int, strides: int | None = None) -> Callable:
    def rewrite(w: Rewriter, call: OpCall, after: OpCall) -> tuple[Arg, ...]:
        ref, args = after.targets()[0], list(after.args)
        args[at] = Sequence(ref.size)
        if strides is not None:
            args[strides] = Sequence(ref.stride)
        return tuple(args)
    return rewrite


def _rows(w: Rewriter, call: OpCall, after: OpCall) -> tuple[Arg, ...]:
    return (*after.args[:2], after.targets()[0].size[0], *after.args[3:])


def _parts(w: Rewriter, call: OpCall, after: OpCall) -> tuple[Arg, ...]:
    dim = after.args[2] if len(after.args) > 2 else after.kwargs.get("dim", 0)
    sizes = tuple(t.size[dim] for t in after.targets())
    given = Sequence(sizes) if isinstance(call.args[1], Sequence) else sizes[0]
    return (after.args[0], given, *after.args[2:])


def _copied_in(w: Rewriter, call: OpCall, after: OpCall) -> tuple[Arg, ...]:
    sizes = tuple(r.numel for r in tensors(after.args[0]))
    return (*after.args[:2], Sequence(sizes), sum(sizes), *after.args[4:])


def _padding(w: Rewriter, call: OpCall, after: OpCall) -> tuple[Arg, ...]:
    x, out = (w.layout.dims(r) for r in (call.args[0], call.targets()[0]))
    pads: list[int] = []
    for k in range(len(call.args[1].items) // 2):
        left = call.args[1].items[2 * k]
        a, b = x[-1 - k], out[-1 - k]
        new = w.kept.before(b, left) if left > 0 else -w.kept.before(a, -left)
        pads += [new, w.kept.count(b) - w.kept.count(a) - new]
    return (after.args[0], Sequence(tuple(pads)), *after.args[2:])


def _sliced(w: Rewriter, call: OpCall, after: OpCall) -> tuple[Arg, ...]:
    grad, out = after.args[0], after.targets()[0]
    dim = call.args[2] % len(out.size)
    s = w.layout.dims(call.targets()[0])[dim]
    n = w.classes.spaces.size(s)
    first = min(n, call.args[3] + n if call.args[3] < 0 else call.args[3])
    step = call.args[5] if len(call.args) > 5 else 1
    if step == 1:
        lo = w.kept.before(s, first)
        return (grad, Sequence(out.size), call.args[2], lo, lo + grad.size[dim], 1)
    taken = w.layout.dims(call.args[0])[dim]
    part, start = stepped(w.classes.spaces, s, first, step, taken)
    small = w.kept.count(part) // grad.size[dim]
    row = start + int(w.kept.indices(taken)[0]) * step
    lo = w.kept.before(s, start) + w.kept.before(s, row + first - start) - w.kept.before(s, row)
    return (grad, Sequence(out.size), call.args[2], lo, lo + (grad.size[dim] - 1) * small + 1, small)


def _selected(w: Rewriter, call: OpCall, after: OpCall) -> tuple[Arg, ...]:
    out = after.targets()[0]
    s = w.layout.dims(call.targets()[0])[call.args[2] % len(out.size)]
    return (after.args[0], Sequence(out.size), call.args[2], w.kept.before(s, call.args[3] % w.classes.spaces.size(s)))


def _groups(w: Rewriter, call: OpCall, after: OpCall) -> tuple[Arg, ...]:
    """The ends of the groups, among the kept rows."""
    rows = w.layout.dims(call.args[0])[0 if len(call.args[1].size) == 3 else 1]
    like = w.layout.repeats.like[call.index]
    ends = w.classes.notes.rows and w.classes.notes.rows.of(w.layout.where, like, list(references(call)).index(call.args[2]))
    if ends is None:
        return after.args
    return (*after.args[:2], w.data(torch.tensor([w.kept.before(rows, e) for e in ends.tolist()], dtype=torch.int32)), *after.args[3:])


ARGUMENTS: dict[str, Callable[[Rewriter, OpCall, OpCall], tuple[Arg, ...]]] = {
    **dict.fromkeys(("zeros", "ones", "full", "empty", "rand", "randn"), _sizes(0)), **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), _sizes(1)),
    "empty_strided": _sizes(0, 1), "new_empty_strided": _sizes(1, 2), "embedding_dense_backward": _rows,
    **dict.fromkeys(("split_with_sizes_copy", "split_copy", "split_with_sizes", "split", "unsafe_split", "unsafe_split_with_sizes", "fsdp.split_with_sizes_copy"), _parts),
    "fsdp.all_gather_copy_in": _copied_in, "constant_pad_nd": _padding, "_grouped_mm": _groups, "slice_backward": _sliced, "select_backward": _selected}
