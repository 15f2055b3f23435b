"""Codes, source spans and diagnostics: what a user is told, as data (no torch, nothing trusted)."""
from __future__ import annotations

import os

import msgspec


class Span(msgspec.Struct, frozen=True, array_like=True):
    """Where a call comes from: the innermost user frame; for a backward call, the frame of the forward call that it differentiates."""

    file: str
    line: int                                 # 0: the file as a whole
    function: str
    module: str = ""                          # module path, "layers.0.attn.wq"
    phase: str = "forward"                    # setup, forward, backward, optimizer, hook; "" where it is not known
    step: int = 0                             # 0 before the first step
    stack: tuple[tuple[str, int, str], ...] = ()   # outer user frames (file, line, function), innermost first
    microbatch: int = -1

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


def names_place(given: str, place: str) -> bool:
    """Whether the user's FILE:LINE (absolute, relative to the working folder, or the end of a path) is this place, "file:line"."""
    file, _, line = given.rpartition(":")
    short = os.path.normpath(file)
    return place in (f"{short}:{line}", f"{os.path.abspath(file)}:{line}") or place.endswith(f"/{short}:{line}")


class Diagnostic(msgspec.Struct, frozen=True):
    """One message: a stable code (its page: `trainverify explain CODE`), what is wrong with the offending value, where, and the way out."""

    code: str
    message: str
    severity: str = "error"                   # error (program at fault), internal (we are), warning, note
    span: Span | None = None
    ranks: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    fix: str = ""


class Fault(Exception):
    """Carries diagnostics up to the edge: a program that cannot run, a spec that cannot be used, or our own error."""

    def __init__(self, *diagnostics: Diagnostic):
        super().__init__("; ".join(f"{d.code}: {d.message}" for d in diagnostics))
        self.diagnostics = diagnostics

    def __reduce__(self):
        return type(self), self.diagnostics, self.__dict__     # it may cross to another process
