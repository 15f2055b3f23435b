"""The table of all built-in rows (trusted): the one list of the modules that hold them."""
from __future__ import annotations

from collections.abc import Iterable

from trainverify.ops import activation, attention, creation, indexing, loss, matmul, movement, normalise, optimizer, pointwise, pooling, reduce, resample, scalars, sequences
from trainverify.ops.table import OpRow, OpTable


def standard_table(extra: Iterable[OpRow] = ()) -> OpTable:
    """The table of all built-in rows plus a spec's own."""
    mods = (pointwise, activation, creation, reduce, matmul, movement, indexing, pooling, resample, sequences, normalise, attention, loss, optimizer, scalars)
    return OpTable([r for mod in mods for r in mod.rows.items] + list(extra))
