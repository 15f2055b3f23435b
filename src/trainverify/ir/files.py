"""A program on disk: one folder per side, a msgpack trace and a safetensors file of blobs per rank (no torch, no pickle).

`program.json` names the format version and the size and crc32 of every file, so that a damaged or foreign folder is a
diagnostic and never a wrong program.
"""
from __future__ import annotations

import os
import zlib
from pathlib import Path

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from trainverify.diagnostics import Diagnostic, Fault
from trainverify.ir.carried import restate_carried_floats
from trainverify.ir.trace import Program, Trace

VERSION = 1
INDEX = "program.json"
_FIX = "Capture again with this version of TrainVerify."


class Entry(msgspec.Struct, frozen=True):
    """One file: its length in bytes and crc32."""

    size: int
    crc32: int


class Index(msgspec.Struct, frozen=True):
    """What a program's folder holds."""

    version: int
    side: str
    world_size: int
    files: dict[str, Entry]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Trace).decode


def rank_files(rank: int) -> tuple[str, str]:
    """Names of a rank's trace and blobs."""
    return f"trace.{rank}.msgpack", f"blobs.{rank}.safetensors"


def save_rank(folder: str | os.PathLike, trace: Trace, blobs: dict[str, object]) -> None:
    """Write one rank's trace and blobs; `write_index` completes the folder when all ranks have."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    trace_file, blob_file = rank_files(trace.rank)
    (path / trace_file).write_bytes(_encode(trace))
    save_file({k: np.ascontiguousarray(v) for k, v in blobs.items()}, path / blob_file)


def write_index(folder: str | os.PathLike, side: str, world_size: int) -> None:
    """Write the index of a folder that holds all ranks' files."""
    path = Path(folder)
    files = {}
    for rank in range(world_size):
        for name in rank_files(rank):
            files[name] = Entry((path / name).stat().st_size, _crc32(path / name))
    (path / INDEX).write_bytes(msgspec.json.format(msgspec.json.encode(Index(VERSION, side, world_size, files)), indent=1))


def save_program(program: Program, folder: str | os.PathLike) -> None:
    """Write a whole program."""
    for trace, blobs in zip(program.traces, program.blobs, strict=True):
        save_rank(folder, trace, blobs)
    write_index(folder, program.traces[0].side, len(program.traces))


def load_program(folder: str | os.PathLike) -> Program:
    """Read a program; raises Fault with FILE001 (nothing there), FILE002 (another version) or FILE003 (damaged)."""
    path = Path(folder)
    if not (path / INDEX).is_file():
        raise _fault("FILE001", f"{path} holds no captured program: there is no {INDEX}", "Name a folder that `trainverify capture` wrote.")
    index = _index(path / INDEX)
    program = Program([], [])
    for rank in range(index.world_size):
        trace_file, blob_file = rank_files(rank)
        for name in (trace_file, blob_file):
            _check(path / name, index.files.get(name))
        try:
            program.traces.append(_decode((path / trace_file).read_bytes()))
        except (msgspec.DecodeError, msgspec.ValidationError) as e:
            raise _fault("FILE003", f"{path / trace_file} is damaged: {e}") from e
        try:
            program.blobs.append(load_file(path / blob_file))
        except (SafetensorError, OSError) as e:
            raise _fault("FILE003", f"{path / blob_file} is damaged: {e}") from e
    return restate_carried_floats(program)


def _index(file: Path) -> Index:
    data = file.read_bytes()
    try:
        version = msgspec.json.decode(data)["version"]
    except (msgspec.DecodeError, TypeError, KeyError) as e:
        raise _fault("FILE003", f"{file} is damaged: {e}") from e
    if version != VERSION:
        raise _fault("FILE002", f"{file} is of format version {version}; this TrainVerify reads version {VERSION}")
    try:
        return msgspec.json.decode(data, type=Index)
    except (msgspec.DecodeError, msgspec.ValidationError) as e:
        raise _fault("FILE003", f"{file} is damaged: {e}") from e


def _check(file: Path, entry: Entry | None) -> None:
    if entry is None or not file.is_file():
        raise _fault("FILE003", f"{file} is missing")
    size = file.stat().st_size
    if size != entry.size:
        raise _fault("FILE003", f"{file} has {size} bytes, it was written with {entry.size}")
    if _crc32(file) != entry.crc32:
        raise _fault("FILE003", f"{file} has changed since it was written (crc32)")


def _crc32(file: Path) -> int:
    crc = 0
    with open(file, "rb") as f:
        while chunk := f.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return crc


def _fault(code: str, message: str, fix: str = _FIX) -> Fault:
    return Fault(Diagnostic(code, message, fix=fix))
