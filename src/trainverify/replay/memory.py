"""Algebra memory: for one rank and one algebra, what the float elements of each storage are (trusted: loads and stores follow the recorded strides)."""
from __future__ import annotations

from collections.abc import Callable

import torch

from trainverify.algebra.base import Algebra, Complex, V
from trainverify.algebra.fieldvalue import is_dense
from trainverify.ir.trace import TensorRef
from trainverify.replay.native import NativeMemory, dtype_of

FLOATS = {**{name: name for name in ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
                                     "float8_e8m0fnu")}, "complex64": "float32", "complex128": "float64"}


def _is_long(flat: torch.Tensor) -> bool:
    """Whether some number has more than 16 significant bits."""
    mantissa = torch.frexp(flat[flat.isfinite()].double())[0] * 2.0 ** 16
    return bool((mantissa != mantissa.floor()).any())


def is_float(dtype: str) -> bool:
    return dtype in FLOATS


class AlgebraMemory:
    """Cells by storage. A storage without a cell holds plain data: its native bytes.

    `bind(storage, n)` may supply the contents of a storage at its first read (symbols found by their tags).
    """

    def __init__(self, m: Algebra, native: NativeMemory, key: str, bind: Callable[[int, str], V | None]):
        self.m, self.native, self.key, self.bind = m, native, key, bind
        self.cells: dict[int, object] = {}
        self.dtypes: dict[int, str] = {}
        self.plain: set[int] = set()          # storages that plain data was written over: their first bytes are gone
        self.rounded = False                  # whether data was read that may be rounded results (float32 with a long mantissa)

    def has(self, ref: TensorRef) -> bool:
        return ref.storage in self.cells

    def reinterpreted(self, ref: TensorRef) -> bool:
        """Whether the reference reads what the storage holds as another type: bytes have no meaning over the reals."""
        have = self.dtypes.get(ref.storage) if ref.storage in self.cells else None
        return have is not None and have != FLOATS.get(ref.dtype, ref.dtype)

    def _real_ref(self, ref: TensorRef) -> TensorRef:
        """A complex reference as pairs of floats in a trailing dimension."""
        return TensorRef(ref.storage, 2 * ref.offset, (*ref.size, 2), (*(2 * s for s in ref.stride), 1), FLOATS[ref.dtype])

    def load(self, ref: TensorRef) -> V:
        if ref.dtype.startswith("complex"):
            pair = self.load(self._real_ref(ref))
            n = len(ref.size)
            index = torch.arange(1, 1 + 2 * ref.numel).reshape(*ref.size, 2)
            return Complex(self.m.take([pair], index.select(n, 0)), self.m.take([pair], index.select(n, 1)))
        if ref.storage not in self.cells:
            self._open(ref)
        if self.reinterpreted(ref):
            return self.m.reshape(self.m.garbage(f"{self.key}.{ref.storage}.bytes", ref.numel), ref.size)
        return self.m.load(self.cells[ref.storage], ref.offset, ref.size, ref.stride)

    def _open(self, ref: TensorRef) -> None:
        nobody = self.native.initial(ref.storage) is None and ref.storage in self.native.storages
        if nobody or ref.storage in self.plain:
            return self.forget(ref)           # memory that nobody wrote, or not as floats
        bound = self.bind(ref.storage, ref.dtype)
        if bound is None:
            storage = self.native.storage(ref.storage)
            item = dtype_of(ref.dtype).itemsize
            flat = torch.empty(0, dtype=dtype_of(ref.dtype)).set_(storage, 0, (storage.nbytes() // item,), (1,))
            bound = self.m.data(flat.clone())
            self.rounded = self.rounded or ref.dtype in ("float32", "float64") and _is_long(flat)
        self.cells[ref.storage] = self.m.cell(bound)
        self.dtypes[ref.storage] = ref.dtype

    def store(self, ref: TensorRef, v: V) -> None:
        if isinstance(v, Complex):
            n, both = ref.numel, self.m.stack([v.re, v.im])
            index = (torch.arange(1, n + 1).reshape(ref.size).unsqueeze(-1) + torch.tensor([0, n]))
            return self.store(self._real_ref(ref), self.m.take([both], index))
        if tuple(v.shape) != ref.size:
            v = self.m.expand(v, ref.size)
        if ref.storage not in self.cells:
            if self._covers(ref):
                if ref.offset == 0 and is_dense(ref.size, ref.stride, ref.numel):     # what was there does not matter
                    self.cells[ref.storage], self.dtypes[ref.storage] = self.m.cell(self.m.reshape(v, (ref.numel,))), ref.dtype
                    return
                self.cells[ref.storage] = self.m.cell(self.m.garbage(f"{self.key}.{ref.storage}", self._numel(ref)))
                self.dtypes[ref.storage] = ref.dtype
            else:
                self._open_for_write(ref)
        if self.reinterpreted(ref):
            self.forget(ref)
        self.cells[ref.storage] = self.m.store(self.cells[ref.storage], ref.offset, ref.size, ref.stride, v)

    def _numel(self, ref: TensorRef) -> int:
        nbytes = max(self.native.storage(ref.storage).nbytes(), self.native.trace.storages[ref.storage].nbytes)
        return nbytes // dtype_of(ref.dtype).itemsize

    def _covers(self, ref: TensorRef) -> bool:
        return ref.numel == self._numel(ref)

    def _open_for_write(self, ref: TensorRef) -> None:
        if self.native.initial(ref.storage) is not None:
            self._open(ref)
        else:
            self.forget(ref)

    def forget(self, ref: TensorRef) -> None:
        """The whole storage becomes fresh garbage."""
        self.cells[ref.storage] = self.m.cell(self.m.garbage(f"{self.key}.{ref.storage}", self._numel(ref)))
        self.dtypes[ref.storage] = ref.dtype

    def overwrite(self, ref: TensorRef, data: torch.Tensor) -> None:
        """Plain data (integers, a concrete mask) was written; what it does not cover stays, unless it is of another type."""
        if self.native.initial(ref.storage) is not None:
            self.plain.add(ref.storage)
        if ref.storage not in self.cells or ref.numel == 0:
            return
        if self._covers(ref):
            self.plain.add(ref.storage)
            self.drop(ref.storage)
        elif self.reinterpreted(ref):
            self.forget(TensorRef(ref.storage, 0, (0,), (1,), self.dtypes[ref.storage]))
        else:
            self.store(ref, self.m.data(data))

    def drop(self, storage: int) -> None:
        """Nothing is known of the storage: it is no longer used."""
        self.cells.pop(storage, None)
