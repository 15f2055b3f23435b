"""The symbols that a verdict quantifies over, and how parallel storages are bound to them.

The reference's trace defines the symbols (tv.symbol) and their tagged values. A parallel storage is bound by identity where
we handed the tensor over, else by its tags: the recorded first bytes are looked up among the tagged values.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from trainverify.algebra.base import Algebra, V
from trainverify.ir.trace import Program, TensorRef
from trainverify.replay.machine import Machine
from trainverify.replay.memory import FLOATS
from trainverify.replay.native import dtype_of


@dataclass(frozen=True, slots=True)
class Symbol:
    """One named block of symbols: numbers first .. first + n - 1, in contiguous element order of `shape`."""

    name: str
    kind: str                                 # weight, buffer, batch, state
    first: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def n(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


class Symbols:
    """All symbols of a run: blocks by name, their tagged values, and the look-up from values to numbers."""

    def __init__(self, reference: Program):
        self.blocks: dict[str, Symbol] = {}
        values = []
        total = 0
        for call in reference.traces[0].ops:
            if call.name != "tv.symbol" or call.args[1] in self.blocks:
                continue
            kind, name, ref = call.args[:3]
            block = Symbol(name, kind, total, ref.size, ref.dtype)
            blob = np.ascontiguousarray(reference.blobs[0][f"symbol.{name}"])
            tagged = torch.from_numpy(blob.reshape(-1).view(np.uint8).copy()).view(dtype_of(ref.dtype)).double()
            if tagged.numel() != block.n:
                raise ValueError(f"symbol {name}: {tagged.numel()} tagged values for {block.n} elements")
            self.blocks[name] = block
            values.append(tagged.numpy())
            total += block.n
        self.total = total
        self.values = np.concatenate(values) if values else np.zeros(0)
        order = np.argsort(self.values, kind="stable")
        self._sorted, self._numbers = self.values[order], order
        self._unique = bool(total < 2 or (self._sorted[1:] != self._sorted[:-1]).all())
        self.blocks_in_order = tuple(self.blocks.values())
        self.handed: dict[str, tuple[torch.Tensor, list[tuple[Algebra, V]]]] = {}     # tensors of the batch that the reference computes
        self._firsts = np.array([b.first for b in self.blocks_in_order], dtype=np.int64)

    def real_values(self, numbers: torch.Tensor) -> torch.Tensor:
        """Tagged float64 values of symbol numbers (for the algebra `real`)."""
        return torch.from_numpy(self.values)[numbers]

    def owner(self, numbers: np.ndarray) -> np.ndarray:
        """Index into blocks_in_order of each symbol number."""
        return np.searchsorted(self._firsts, numbers, side="right") - 1

    def look_up(self, values: np.ndarray) -> np.ndarray:
        """Symbol number of each float64 value, -1 where it is nobody's tag. A value that several symbols share is nobody's."""
        if not self.total:
            return np.full(values.shape, -1, dtype=np.int64)
        run = self._run(values)
        if run is not None:
            return run
        lo = np.searchsorted(self._sorted, values)
        at = np.minimum(lo, self.total - 1)
        hit = self._sorted[at] == values
        if not self._unique:
            hit &= np.searchsorted(self._sorted, values, side="right") - lo == 1
        return np.where(hit, self._numbers[at], -1)

    def _run(self, values: np.ndarray) -> np.ndarray | None:
        """The symbol numbers if the values are those of successive symbols, as whole parameters' are."""
        if not self._unique or values.ndim != 1 or values.size < 2:
            return None
        at = int(np.searchsorted(self._sorted, values[0]))
        first = int(self._numbers[at]) if at < self.total else self.total
        successive = self.values[first:first + values.size]
        return np.arange(first, first + values.size) if np.array_equal(successive, values) else None


class Binder:
    """Hooks for one program: supplies symbol values at tv.symbol and at the first read of a storage that holds tags, and on the parallel
    side what the reference computed of the batch."""

    def __init__(self, symbols: Symbols, algebras: list[Algebra]):
        self.symbols = symbols
        self.all = {m.name: m.symbols("all", 0, symbols.total) for m in algebras}
        self._decoded: dict[tuple[int, int], np.ndarray | None] = {}

    def symbol(self, machine: Machine, kind: str, name: str, ref: TensorRef) -> dict[str, V] | None:
        if kind == "data":
            return self._handed(machine, name, ref)
        block = self.symbols.blocks.get(name)
        if block is None:
            return None
        if ref.numel != block.n:
            raise ValueError(f"symbol {name} has {block.n} elements, the tensor that carries it {ref.numel}")
        return {m.name: m.symbols("all", block.first, block.n) for m in machine.algebras}

    def _handed(self, machine: Machine, name: str, ref: TensorRef) -> dict[str, V] | None:
        """A tensor of the batch that is no symbol: what the reference computed it by (a table of angles, a mask that adds up to 1) is what
        the parallel side has of it, bit for bit, and not a number that was rounded on the way."""
        if ref.dtype not in FLOATS or ref.dtype.startswith("complex"):
            return None
        here, memories = machine.native.tensor(ref), [machine.memory[m.name] for m in machine.algebras]
        if machine.trace.side == "reference":
            if all(mem.has(ref) for mem in memories):
                self.symbols.handed[name] = here.clone(), [(mem.m, mem.load(ref)) for mem in memories]
            return None
        there, values = self.symbols.handed.get(name, (None, []))
        same = there is not None and there.dtype == here.dtype and there.shape == here.shape and bool((there == here).all())
        found = {m.name: v for m, v in values if any(m is mine for mine in machine.algebras)}
        return found if same and len(found) == len(memories) and not any(mem.has(ref) for mem in memories) else None

    def bind(self, machine: Machine, m: Algebra, storage: int, dtype: str) -> V | None:
        numbers = self._numbers(machine, storage, dtype)
        if numbers is None:
            return None
        raw = torch.from_numpy(np.array(machine.native.initial(storage), copy=True))
        flat = raw[: len(numbers) * dtype_of(dtype).itemsize].view(dtype_of(dtype))
        at = torch.from_numpy(numbers)
        hit = at >= 0
        mine = m.take([self.all[m.name]], at[hit] + 1)
        if bool(hit.all()):
            return mine
        rest = torch.arange(len(numbers)) + mine.shape[0]
        return m.take([mine, m.data(flat)], torch.where(hit, hit.cumsum(0) - 1, rest) + 1)

    def _numbers(self, machine: Machine, storage: int, dtype: str) -> np.ndarray | None:
        key = (machine.rank, storage)
        if key not in self._decoded:
            raw = machine.native.initial(storage)
            found = None
            item = dtype_of(dtype).itemsize
            if raw is not None and len(raw) >= item and dtype in ("float32", "float64", "bfloat16", "float16"):
                usable = np.ascontiguousarray(raw)[: len(raw) // item * item]
                values = torch.from_numpy(usable.copy()).view(dtype_of(dtype)).double().numpy()
                found = self.symbols.look_up(values)
                if (shown := machine.native.blobs.get(f"from.{storage}")) is not None and len(shown) == len(found):
                    found = np.where(found >= 0, found, shown)     # tags that repeat: told apart by further captures
                found = found if (found >= 0).any() else None
            self._decoded[key] = found
        return self._decoded[key]
