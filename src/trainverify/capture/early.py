"""Symbols that construction itself reads: an average of the weights, a master copy, a flat buffer (trusted: as capture/symbols.py is).

Symbols are defined when `reference()` returns; what it had computed from a weight before would keep the weight's old value. Where
the trace of the construction shows such a read, the reference runs once more, and these symbols are defined right behind the last
call that writes them.
"""
from __future__ import annotations

from collections import defaultdict

import msgspec
import torch

from trainverify.capture.digest import contents
from trainverify.capture.quiet import unseen
from trainverify.capture.symbols import Defined, Symbols
from trainverify.diagnostics import Diagnostic, Fault
from trainverify.ir.trace import OpCall
from trainverify.ops.access import reads


class Early(msgspec.Struct, frozen=True):
    """A symbol to define behind the call with this name and number (symbols' own calls not counted)."""

    call: int
    op: str
    symbol: Defined


def read_before_defined(ops: list[OpCall], defined: list[Defined]) -> list[Early]:
    """The symbols whose memory is read in `ops`, a reference's construction, after the last call that wrote it."""
    written: dict[int, int] = {}
    read: dict[int, int] = {}
    for call in ops:
        for ref in reads(call):
            read[ref.storage] = call.index
        for ref in call.targets():
            written[ref.storage] = call.index
    last = [(written.get(d.ref.storage), d) for d in defined]
    return [Early(at, ops[at].name, d) for at, d in last if at is not None and read.get(d.ref.storage, -1) > at]


class EarlySymbols:
    """Sees every recorded call of the second construction. A call that is not the one expected defines nothing: its symbols come late."""

    def __init__(self, symbols: Symbols, planned: list[Early]):
        self.symbols = symbols
        self.planned: dict[int, list[Early]] = defaultdict(list)
        for early in planned:
            self.planned[early.call].append(early)
        self.made: list[tuple[str, torch.Tensor]] = []

    def __call__(self, call: OpCall, targets: list[torch.Tensor]) -> None:
        for early in self.planned.pop(call.index - len(self.made), ()):
            ref = early.symbol.ref
            found = [t for t, r in zip(targets, call.targets()) if r.storage == ref.storage]
            if call.name == early.op and found:
                with unseen():
                    whole = torch.empty(0, dtype=found[0].dtype).set_(found[0].untyped_storage(), ref.offset, ref.size, ref.stride)
                self.symbols.define(early.symbol.kind, early.symbol.name, whole, early.symbol.key)
                self.made.append((early.symbol.name, whole))

    def check(self) -> None:
        """Nothing may have been written over a symbol."""
        with unseen():
            blobs = self.symbols.recorder.blobs
            changed = [name for name, whole in self.made if not whole.is_meta and contents(whole).tobytes() != blobs[f"symbol.{name}"].tobytes()]
        if changed:
            raise Fault(Diagnostic("SPEC010", f"reference() gave {changed[0]} its values at another place when it ran again",
                                   fix="Let reference() do the same whenever it runs: seed every random generator in it."))
