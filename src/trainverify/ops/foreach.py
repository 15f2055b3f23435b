"""How `_foreach_X` is the row of X applied entry by entry (trusted): every list argument is zipped, everything else is shared.

A one-dimensional tensor of scalars (`_foreach_addcmul.Tensor`) is not a list; the ops that take one have rows of their own
(ops/optimizer.py).
"""
from __future__ import annotations

from trainverify.algebra.base import Algebra
from trainverify.ops.table import OpRow


def foreach_call(m: Algebra, row: OpRow, args, kwargs) -> list:
    """One result per entry of the lists among `args` and `kwargs`, in order."""
    lengths = {len(a) for a in (*args, *kwargs.values()) if isinstance(a, (list, tuple))}
    if len(lengths) != 1:
        raise ValueError(f"{row.name}: a foreach call needs lists of one length, got lengths {sorted(lengths)}")
    results = []
    for i in range(lengths.pop()):
        got = row.meaning(m, *(_entry(a, i) for a in args), **{k: _entry(a, i) for k, a in kwargs.items()})
        if isinstance(got, (list, tuple)):
            raise ValueError(f"{row.name} gives {len(got)} results per entry: it has no foreach form")
        results.append(got)
    return results


def _entry(a, i: int):
    return a[i] if isinstance(a, (list, tuple)) else a
