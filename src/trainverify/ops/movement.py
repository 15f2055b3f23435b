"""Pure data movement: rows that run torch's own kernel once on element positions, then let the algebra follow them (trusted).

Each tensor argument is replaced by positions 1, 2, ... counting through the concatenation of all of them. What the kernel
returns says for every result element where it comes from; 0 is the constant zero that the kernel filled in. So there is
no second implementation of `cat`, `tril` or `pixel_shuffle` that could differ from torch's. The same holds backwards:
the adjoint of a move sums gradients at the positions that the move read.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from trainverify.algebra.base import Algebra, Complex
from trainverify.ops.lift import each, lift, pair, refuse
from trainverify.ops.table import Rows

rows = Rows("move")
aten = torch.ops.aten
CACHED_ELEMENTS = 1 << 15            # plans over more elements are recomputed: remembering them would cost more memory than time


# ---- plans: what a kernel does to positions
@dataclass(frozen=True, slots=True)
class Fill:
    """A scalar argument that the kernel writes as an element (a padding value)."""

    value: Any


@dataclass(frozen=True, slots=True)
class Moved:
    """In a plan's key: a tensor of this shape whose elements move."""

    shape: tuple[int, ...]


class Index:
    """In a plan's key: a concrete integer or boolean tensor, compared by contents."""

    __slots__ = ("tensor", "contents")

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor
        self.contents: tuple | None = None

    def _key(self) -> tuple:
        if self.contents is None:
            t = self.tensor
            self.contents = (t.dtype, tuple(t.shape), t.contiguous().numpy().tobytes())
        return self.contents

    def __hash__(self) -> int:
        return hash(self._key())

    def __eq__(self, other) -> bool:
        return isinstance(other, Index) and self._key() == other._key()


def _keyed(a, sources: list) -> Any:
    """An argument as part of a plan's key; values and fills are appended to `sources`."""
    if isinstance(a, Fill):
        sources.append(a.value)
        return Fill(None)
    if isinstance(a, torch.Tensor):
        return Index(a)
    if isinstance(a, (list, tuple)):
        return tuple(_keyed(x, sources) for x in a)
    if a is None or isinstance(a, (bool, int, float, str)):
        return type(a), a
    if hasattr(a, "shape"):
        sources.append(a)
        return Moved(tuple(a.shape))
    raise TypeError(f"not an argument of a data movement: {a!r}")


def _on_positions(key, first: int, dtype: torch.dtype) -> tuple[Any, int]:
    """The argument for the kernel, its positions counting from `first`; and the next free position."""
    if isinstance(key, Fill):
        return first, first + 1
    if isinstance(key, Moved):
        n = math.prod(key.shape)
        return torch.arange(first, first + n, dtype=dtype).reshape(key.shape), first + n
    if isinstance(key, Index):
        return key.tensor, first
    if len(key) == 2 and isinstance(key[0], type):
        return key[1], first
    items = []
    for k in key:
        item, first = _on_positions(k, first, dtype)
        items.append(item)
    return items, first


def _run(op: Callable, key: tuple, kwargs: tuple, dtype: torch.dtype) -> torch.Tensor | list[torch.Tensor]:
    """The plan: for each result of op, the position that every element comes from."""
    args, first = _on_positions(key, 1, dtype)
    named, first = _on_positions(tuple(k for _, k in kwargs), first, dtype)
    got = op(*args, **{name: v for (name, _), v in zip(kwargs, named)})
    return got.long() if isinstance(got, torch.Tensor) else [t.long() for t in got]


_remembered = lru_cache(maxsize=1024)(_run)      # pure: the same layer comes again on every rank and step


def plan(op: Callable, args, kwargs=None, dtype: torch.dtype = torch.int64):
    """(positions, sources): where each result element of op(*args) comes from; a list of positions if op gives a list.

    Values and `Fill`s among the arguments are the sources, in order; torch tensors are concrete and passed as they are.
    """
    sources: list = []
    key = _keyed(tuple(args), sources)
    named = tuple((k, _keyed(v, sources)) for k, v in sorted((kwargs or {}).items()))
    size = sum(math.prod(getattr(s, "shape", ())) for s in sources) + sum(t.numel() for t in _concrete(args))
    return (_remembered if size <= CACHED_ELEMENTS else _run)(op, key, named, dtype), sources


def _concrete(args) -> Iterable[torch.Tensor]:
    for a in args:
        if isinstance(a, torch.Tensor):
            yield a
        elif isinstance(a, (list, tuple)):
            yield from _concrete(a)


def taken(m: Algebra, sources: list, index: torch.Tensor):
    """The elements of `sources` (values, Complex, numbers) at these positions."""
    sources = [lift(m, s) for s in sources]
    if any(isinstance(s, Complex) for s in sources):
        pairs = [pair(m, s) for s in sources]
        return Complex(m.take([p.re for p in pairs], index), m.take([p.im for p in pairs], index))
    return m.take(sources, index)


def move(m: Algebra, op: Callable, args, kwargs=None, dtype: torch.dtype = torch.int64):
    """op(*args) for an op that only moves elements; a list if op gives a list. See `plan` for the arguments."""
    index, sources = plan(op, args, kwargs, dtype)
    return [taken(m, sources, i) for i in index] if isinstance(index, list) else taken(m, sources, index)


def collect(m: Algebra, shape, index: torch.Tensor, grad):
    """The adjoint of a move: zeros of `shape`, with grad[i] added at position index[i]; 0 drops it."""
    index, n = index.reshape(-1), math.prod(shape)
    kept = index.nonzero().reshape(-1)
    source = taken(m, [grad], kept + 1)
    return each(m, lambda g: m.scatter_sum(m.const(0, tuple(shape)), index[kept] - 1, g), source) if n else lift(m, m.const(0, tuple(shape)))


def read_places(op: Callable, shape, attributes, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Where in x of shape `shape` each element of op(x, *attributes) comes from (from 1; 0: nowhere)."""
    key = (Moved(tuple(int(s) for s in shape)), *(_keyed(a, []) for a in attributes))
    size = math.prod(shape) + sum(t.numel() for t in _concrete(attributes))
    return (_remembered if size <= CACHED_ELEMENTS else _run)(op, key, (), dtype)


def adjoint(m: Algebra, op: Callable, shape, attributes, grad, dtype: torch.dtype = torch.int64):
    """The gradient with respect to x of shape `shape` of the move op(x, *attributes)."""
    index = read_places(op, shape, attributes, dtype)
    if tuple(index.shape) != tuple(grad.shape):
        raise ValueError(f"{op}: gradient of shape {tuple(grad.shape)} for a result of shape {tuple(index.shape)}")
    return collect(m, shape, index, grad)


# ---- arguments
def elements(m: Algebra, x):
    """An argument whose elements move: a value, or a list of them."""
    return [lift(m, v) for v in x] if isinstance(x, (list, tuple)) else lift(m, x)


def attribute(name: str, x):
    """An argument that steers the movement: it must not depend on symbols."""
    if isinstance(x, (list, tuple)):
        return [attribute(name, v) for v in x]
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    if isinstance(x, torch.Tensor) and not x.is_floating_point() and not x.is_complex():
        return x
    if isinstance(x, torch.dtype):
        raise refuse(name, f"bytes reinterpreted as {x} have no meaning over the real numbers", "convert with .to(dtype)")
    raise refuse(name, "an index that is computed from symbols", "compute indices from integers or from recorded decisions")


def mover(name: str, moves: tuple[int, ...] = (0,), fills: tuple[int, ...] = (), dtype: torch.dtype = torch.int64) -> Callable:
    """A row's meaning: run the kernel on positions. `moves` and `fills` are the places of the arguments that hold elements."""
    op = getattr(aten, name.split(".")[1])

    def meaning(m, *args, **kwargs):
        """Moves elements as torch's own kernel does."""
        slots = [elements(m, a) if i in moves else Fill(lift(m, a)) if i in fills else attribute(name, a) for i, a in enumerate(args)]
        return move(m, op, slots, {k: attribute(name, v) for k, v in kwargs.items()}, dtype)

    return meaning


def _register(names: Iterable[str], **places) -> None:
    for name in names:
        rows(f"aten.{name}", source=f"torch.ops.aten.{name}")(mover(f"aten.{name}", **places))


# ---- rows: shape, order and padding
_register(("cat", "stack", "_chunk_cat", "block_diag"))
_register(("view", "_unsafe_view", "view_copy", "_reshape_copy", "expand", "expand_copy", "permute", "permute_copy", "transpose",
           "transpose_copy", "t", "t_copy", "squeeze", "squeeze_copy", "unsqueeze", "unsqueeze_copy", "select", "select_copy", "slice",
           "slice_copy", "narrow_copy", "diagonal", "diagonal_copy", "unfold", "unfold_copy", "split", "split_copy",
           "split_with_sizes", "split_with_sizes_copy", "unsafe_split", "unsafe_split_with_sizes", "unbind", "unbind_copy"))
_register(("repeat", "roll", "flip", "rot90", "tril", "triu", "diag_embed", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
           "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d",
           "slice_backward", "select_backward", "diagonal_backward"))
_register(("constant_pad_nd",), fills=(2,))
_register(("slice_scatter", "select_scatter", "diagonal_scatter"), moves=(0, 1))
# these kernels take floats only; float64 positions are exact
_register(("im2col", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d",
           "_upsample_nearest_exact2d", "_upsample_nearest_exact3d"), dtype=torch.float64)


@rows("aten._reshape_alias", source="torch.reshape")
def reshape_alias(m, x, size, stride):
    """The same elements in another shape; the strides say nothing about their order."""
    return move(m, aten.reshape, [elements(m, x), attribute("aten._reshape_alias", size)])


@rows("aten._foreach_copy", source="torch._foreach_copy_")
def foreach_copy(m, targets, sources, non_blocking=False):
    """Each source, broadcast to its target's shape."""
    return [each(m, lambda v, t=t: m.expand(v, tuple(t.shape)), s) for t, s in zip(targets, sources, strict=True)]


# ---- rows: gradients of moves that read an element more than once
def _pad_backward(name: str):
    op = getattr(aten, name)

    def meaning(m, grad, x, padding):
        """Sums the gradient over the places where padding put each element."""
        return adjoint(m, op, x.shape, [padding], elements(m, grad))

    return meaning


def _upsample_backward(name: str):
    op = getattr(aten, name)

    def meaning(m, grad, output_size, input_size, *scales):
        """Sums the gradient over the copies of each element."""
        return adjoint(m, op, input_size, [output_size, *scales], elements(m, grad), torch.float64)

    return meaning


for _n in "123":
    for _name in (f"reflection_pad{_n}d", f"replication_pad{_n}d"):
        rows(f"aten.{_name}_backward", source=f"torch.ops.aten.{_name}")(_pad_backward(_name))
    for _name in (f"upsample_nearest{_n}d", f"_upsample_nearest_exact{_n}d"):
        rows(f"aten.{_name}_backward", source=f"torch.ops.aten.{_name}")(_upsample_backward(_name))


@rows("aten.unfold_backward", source="torch.Tensor.unfold")
def unfold_backward(m, grad, input_sizes, dim, size, step):
    """Sums the gradient over the windows that hold each element."""
    return adjoint(m, aten.unfold_copy, input_sizes, [dim, size, step], elements(m, grad))


@rows("aten.col2im", source="torch.nn.functional.fold")
def col2im(m, x, output_size, kernel_size, dilation, padding, stride):
    """Sums the columns into the image that they were cut from: the adjoint of im2col."""
    x = elements(m, x)
    channels = x.shape[-2] // math.prod(kernel_size)
    return adjoint(m, aten.im2col, (*x.shape[:-2], channels, *output_size), [kernel_size, dilation, padding, stride], x, torch.float64)


# ---- rows: complex tensors as pairs
@rows("aten.view_as_real", "aten.view_as_real_copy", source="torch.view_as_real")
def view_as_real(m, x):
    """Real and imaginary part in a trailing dimension."""
    x, n = pair(m, x), math.prod(x.shape)
    return m.take([x.re, x.im], torch.arange(1, n + 1).reshape(x.shape).unsqueeze(-1) + torch.tensor([0, n]))


@rows("aten.view_as_complex", "aten.view_as_complex_copy", source="torch.view_as_complex")
def view_as_complex(m, x):
    """The trailing dimension of size 2 as real and imaginary part."""
    re, im = move(m, aten.unbind, [elements(m, x), -1])
    return Complex(re, im)


# ---- rows: flat buffers of FSDP and functional collectives
@rows("_c10d_functional._wrap_tensor_autograd", source="torch.distributed._functional_collectives")
def wrap_tensor_autograd(m, x):
    """The same tensor."""
    return lift(m, x)


@rows("fsdp.all_gather_copy_in", source="torch.distributed.fsdp._fully_shard._fsdp_collectives.all_gather_copy_in")
def all_gather_copy_in(m, inputs, output, split_sizes, numel, rank):
    """Flattens the inputs into this rank's slice of the output; gives the slice and the whole output."""
    flat = move(m, aten.cat, [[each(m, lambda v: m.reshape(v, (-1,)), x) for x in elements(m, inputs)]])
    if math.prod(flat.shape) != numel:
        raise ValueError(f"fsdp.all_gather_copy_in: {math.prod(flat.shape)} elements for a slice of {numel}")
    whole = move(m, aten.slice_scatter, [elements(m, output), flat, 0, numel * rank, numel * (rank + 1)])
    return [flat, whole]


@rows("fsdp.split_with_sizes_copy", source="torch.split_with_sizes_copy")
def fsdp_split(m, x, split_sizes, dim=0):
    """The pieces of x along a dimension."""
    return move(m, aten.split_with_sizes, [elements(m, x), attribute("fsdp.split_with_sizes_copy", split_sizes), dim])


@rows("fsdp.chunk_cat", source="torch._chunk_cat")
def chunk_cat(m, tensors, dim, num_chunks):
    """Each tensor in equal chunks (the last ones padded with zeros), chunk by chunk, side by side."""
    return move(m, aten._chunk_cat, [elements(m, tensors), dim, num_chunks])
