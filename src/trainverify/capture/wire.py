"""Messages between a rank and the coordinator: frames of msgpack headers and raw tensor bytes (trusted: it carries what collectives compute with).

A frame is 4 bytes of header length, 8 bytes of body length, the header, the body. Tensors travel as their bytes; the
coordinator forwards bodies without looking into them and needs no torch. Nothing is pickled. `Buffer` cuts frames out of a
byte stream, so that the coordinator can read from many ranks without blocking on one.
"""
from __future__ import annotations

import ctypes
import functools
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Union

import msgspec

from trainverify.diagnostics import Diagnostic, Span

if TYPE_CHECKING:
    import torch

Key = Union[str, int, tuple[Union[str, int], ...]]

_PREFIX = struct.Struct("<IQ")
_CHUNKS = 512                                  # that one system call takes
NO_BYTES = -1


class Signature(msgspec.Struct, frozen=True, array_like=True):
    """What one rank believes a communication call to be; the coordinator compares the members' signatures.

    op is a kind of `ir.trace.Collective`; sizes are the shapes of the tensors whose element counts must agree among the members
    (for scatter the outputs, for gather the inputs). Where counts differ by design (all_to_all, lists) leave sizes empty and give
    `in_splits[j]`, the elements sent to member j, and `out_splits[j]`, those expected from member j: they must match pairwise.
    """

    op: str
    reduce_op: str | None = None
    sizes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[str, ...] = ()
    group_name: str = ""
    span: Span | None = None
    root: int | None = None
    peer: int | None = None
    in_splits: tuple[int, ...] = ()
    out_splits: tuple[int, ...] = ()


class Meta(msgspec.Struct, frozen=True, array_like=True):
    """A tensor whose bytes are in the body; nbytes is negative where it has none (at full size)."""

    dtype: str
    size: tuple[int, ...]
    nbytes: int


Metas = Union[tuple[Meta, ...], None]         # None: this rank contributes nothing


class Post(msgspec.Struct, tag=True, array_like=True):
    """A member arrives at collective number `seq` of a group; `wait`: it blocks until all have come."""

    ticket: int
    group: tuple[int, ...]
    seq: int
    signature: Signature
    payload: Metas
    wait: bool


class Wait(msgspec.Struct, tag=True, array_like=True):
    """The rank blocks until the collective that it posted as `ticket` is complete."""

    ticket: int


class Send(msgspec.Struct, tag=True, array_like=True):
    """A point-to-point message; the rank goes on."""

    dst: int
    key: Key
    payload: Metas
    signature: Signature | None


class Recv(msgspec.Struct, tag=True, array_like=True):
    """The rank blocks until a message comes from src under this key; one (src, dst, key) is first in, first out."""

    src: int
    key: Key
    signature: Signature | None


class Progress(msgspec.Struct, tag=True, array_like=True):
    """Something for the progress display."""

    text: str


class Done(msgspec.Struct, tag=True, array_like=True):
    """The rank returned; its result is the body."""


class Raised(msgspec.Struct, tag=True, array_like=True):
    """The rank ended with an exception; frames are the user's, outermost first, as (file, line, function, text)."""

    kind: str
    text: str
    frames: tuple[tuple[str, int, str, str], ...]
    diagnostics: tuple[Diagnostic, ...]
    internal: bool
    traceback: str
    missing: str = ""                         # the module that could not be imported


class Reply(msgspec.Struct, tag=True, array_like=True):
    """The members' payloads in group order (of a Recv: one)."""

    payloads: tuple[Metas, ...]


Message = Union[Post, Wait, Send, Recv, Progress, Done, Raised, Reply]

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Message).decode


def frame(message: Message, parts: Sequence[bytes | memoryview] = ()) -> list[bytes | memoryview]:
    """The chunks of bytes to write for a message whose body is the concatenation of `parts`."""
    header = _encode(message)
    body = [memoryview(p).cast("B") for p in parts if len(p)]
    return [_PREFIX.pack(len(header), sum(map(len, body))) + header, *body]


class Buffer:
    """Cuts a byte stream into (message, body) pairs."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._need = _PREFIX.size

    def feed(self, data: bytes) -> Iterator[tuple[Message, bytes]]:
        self._data += data
        while len(self._data) >= self._need:
            header, body = _PREFIX.unpack_from(self._data)
            start = _PREFIX.size + header
            self._need = start + body
            if len(self._data) < self._need:
                return
            view = memoryview(self._data)
            message, content = _decode(view[_PREFIX.size:start]), bytes(view[start:self._need])
            view.release()
            del self._data[:self._need]
            self._need = _PREFIX.size
            yield message, content


def send_frame(sock: socket.socket, message: Message, parts: Sequence[bytes | memoryview] = ()) -> None:
    """Write a frame to a blocking socket, in one system call where the system takes it."""
    chunks = frame(message, parts)
    sent = sock.sendmsg(chunks[:_CHUNKS])
    for chunk in chunks:
        if sent < len(chunk):
            sock.sendall(memoryview(chunk)[sent:])
        sent = max(sent - len(chunk), 0)


def read_frame(sock: socket.socket) -> tuple[Message, memoryview]:
    """Read one frame from a blocking socket; the peer sends one at a time."""
    header, body = _PREFIX.unpack(_read(sock, _PREFIX.size))
    data = _read(sock, header + body)
    return _decode(data[:header]), data[header:]


def _read(sock: socket.socket, n: int) -> memoryview:
    """The next n bytes."""
    data = memoryview(bytearray(n))
    at = 0
    while at < n:
        got = sock.recv_into(data[at:], n - at, socket.MSG_WAITALL)
        if not got:
            raise ConnectionError("the coordinator has gone")
        at += got
    return data


def pack(payload: Sequence[torch.Tensor] | None) -> tuple[Metas, list[memoryview]]:
    """The metas and bytes of CPU tensors (call it with dispatch modes off)."""
    import torch

    if payload is None:
        return None, []
    metas, parts = [], []
    for tensor in payload:
        if tensor.is_meta:
            metas.append(Meta(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), NO_BYTES))
            continue
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            raise TypeError(f"cannot send a {tensor.layout} tensor on {tensor.device}")
        flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
        data = _bytes_of(flat) if flat.numel() else memoryview(b"")
        metas.append(Meta(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data.nbytes))
        parts.append(data)
    return tuple(metas), parts


def _bytes_of(flat: torch.Tensor) -> memoryview:
    """The tensor's own memory, kept alive. (`numpy()` would forbid the program to resize its storage for ever.)"""
    array = _array(flat.nbytes).from_address(flat.data_ptr())
    array.owner = flat
    return memoryview(array).cast("B")


@functools.lru_cache(4096)
def _array(n: int) -> type:
    return ctypes.c_ubyte * n


def unpack(payloads: Sequence[Metas], body: bytes | memoryview) -> list[list[torch.Tensor] | None]:
    """Fresh tensors, each in its own storage (call it with dispatch modes off)."""
    import numpy
    import torch

    at, result = 0, []
    start = numpy.frombuffer(body, dtype=numpy.uint8).__array_interface__["data"][0] if len(body) else 0
    for metas in payloads:
        if metas is None:
            result.append(None)
            continue
        tensors = []
        for meta in metas:
            tensor = torch.empty(meta.size, dtype=getattr(torch, meta.dtype), device="meta" if meta.nbytes == NO_BYTES else "cpu")
            if meta.nbytes > 0:
                if meta.nbytes != tensor.nbytes or at + meta.nbytes > len(body):
                    raise ValueError(f"{meta} does not fit a body of {len(body)} bytes")
                ctypes.memmove(tensor.data_ptr(), start + at, meta.nbytes)
                at += meta.nbytes
            tensors.append(tensor)
        result.append(tensors)
    return result
