"""Every call must have read what recorded calls last wrote: compares the digests of its inputs with the bytes that the native replay
has there (trusted). A difference is a hidden write: numpy on shared memory, ctypes, a C++ extension.

A kernel whose result is not reproducible bit for bit must not look like one: what it wrote, and what is computed from that, is
not compared any more.
"""
from __future__ import annotations

import ctypes
import zlib
from collections import defaultdict
from collections.abc import Iterable

import torch

from trainverify.diagnostics import Diagnostic
from trainverify.ir.trace import OpCall, TensorRef
from trainverify.ops.access import makes_garbage, reads
from trainverify.replay.machine import Machine


class Digests:
    """Hooks `before`, `after` and `waited` of one side's replay."""

    def __init__(self) -> None:
        self.diagnostics: list[Diagnostic] = []
        self._differing: dict[int, set[int]] = defaultdict(set)   # rank -> storages that are not as they were
        self._works: dict[tuple[int, int], tuple[TensorRef, ...]] = {}
        self._told: set[int] = set()

    def before(self, machine: Machine, call: OpCall) -> None:
        refs = reads(call)
        mine = self._differing[machine.rank]
        if not call.digest_in or any(r.storage in mine for r in refs) or self._digest(machine, refs) == call.digest_in:
            return
        mine.update(r.storage for r in refs)
        if machine.rank not in self._told:
            self._told.add(machine.rank)
            self.diagnostics.append(Diagnostic(
                "CONF002", f"what {call.name} reads is not what recorded operations wrote: something else has written there", "error",
                machine.span(call), (machine.rank,), (f"one of {len(refs)} inputs, of sizes {[r.size for r in refs]}",),
                "use tensor operations instead of numpy, ctypes or an extension that writes to a tensor's memory"))

    def after(self, machine: Machine, call: OpCall, results: list) -> None:
        mine = self._differing[machine.rank]
        refs = call.collective.outputs if call.collective is not None else call.targets()
        if call.collective is not None and call.collective.work is not None:
            self._works[(machine.rank, call.collective.work)] = refs
            mine.update(r.storage for r in refs)          # the result was there only at the wait
        else:
            self._compare(machine, refs, call.digest_out if not makes_garbage(call.name) else 0)

    def waited(self, machine: Machine, call: OpCall) -> None:
        refs = self._works.pop((machine.rank, call.args[0]), ())
        self._differing[machine.rank].difference_update(r.storage for r in refs)
        self._compare(machine, refs, call.digest_out)

    def _compare(self, machine: Machine, refs: tuple[TensorRef, ...], digest: int) -> None:
        """Note which storages are as they were; no digest: as the native replay has them."""
        mine = self._differing[machine.rank]
        if digest and self._digest(machine, refs) != digest:
            mine.update(r.storage for r in refs)
        elif mine:
            mine.difference_update(r.storage for r in refs if r.numel == _elements(machine, r))

    @staticmethod
    def _digest(machine: Machine, refs: Iterable[TensorRef]) -> int:
        return crc(machine.native.tensor(r) for r in refs)


def _elements(machine: Machine, ref: TensorRef) -> int:
    t = machine.native.tensor(ref)
    return t.untyped_storage().nbytes() // t.itemsize


def crc(tensors: Iterable[torch.Tensor]) -> int:
    """crc32 over the tensors' elements, one tensor after the other, each in row-major order (as capture takes it)."""
    value = 0
    for t in tensors:
        if t.nbytes:
            t = t.contiguous()
            value = zlib.crc32((ctypes.c_char * t.nbytes).from_address(t.data_ptr()), value)
    return value
