"""The address of a captured program's content (no torch): equal only for programs that are the same to every analysis."""
from __future__ import annotations

import hashlib

import msgspec
import numpy as np

from trainverify.ir.trace import Program


def digest(program: Program) -> str:
    """64 hexadecimal digits over every rank's trace (but for the command line that made it) and blobs (names, dtypes, shapes, bytes)."""
    h = hashlib.blake2b(digest_size=32)
    encode = msgspec.msgpack.Encoder(order="deterministic").encode
    for trace, blobs in zip(program.traces, program.blobs, strict=True):
        _add(h, encode(msgspec.structs.replace(trace, meta={k: v for k, v in trace.meta.items() if k != "argv"})))
        for name in sorted(blobs):
            array = np.ascontiguousarray(blobs[name])
            _add(h, encode((name, str(array.dtype), array.shape)))
            _add(h, array.reshape(-1).view(np.uint8).data)
    return h.hexdigest()


def _add(h, part) -> None:
    """A part with its length, so that parts cannot be mistaken for each other."""
    h.update(len(part).to_bytes(8, "little"))
    h.update(part)
