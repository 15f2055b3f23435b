"""Codes, source spans and diagnostics: what a user is told, as data (no torch, nothing trusted)."""
from __future__ import annotations

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
