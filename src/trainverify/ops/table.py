"""OpRow and OpTable: how an op's name finds its one meaning (trusted).

A row's `meaning(m, *args, **kwargs)` is written in micro-ops of an algebra `m` (algebra/base.py). Arguments come as in the
call: float tensors (and boolean masks that depend on symbols) as algebra values, complex ones as `Complex`, integer and
concrete boolean tensors as torch tensors, numbers as they are, tracked scalars as algebra values of shape (). It returns
one value, or a list in the order of `OpCall.targets()`; None for a target that is an integer (replay has it already).
In-place (`add_`), `out=` and `_foreach_` variants need no row of their own.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OpRow:
    """name: "aten.add" (no overload). kind: pointwise, reduce, matmul, move, normalise, attention, loss, optimizer,
    random, decision, scalar. source: the PyTorch function or paper it follows. ctx: `meaning` takes ctx= (replay.Ctx)."""

    name: str
    meaning: Callable
    kind: str
    source: str
    ctx: bool = False

    @property
    def summary(self) -> str:
        return (self.meaning.__doc__ or "").strip().split("\n")[0]


class Rows:
    """Collects a module's rows: `rows = Rows("pointwise")`, then `@rows("aten.add", source="torch.add")`."""

    def __init__(self, kind: str):
        self.kind, self.items = kind, []

    def __call__(self, *names: str, source: str, ctx: bool = False, kind: str | None = None):
        def deco(fn):
            self.items += [OpRow(n, fn, kind or self.kind, source, ctx) for n in names]
            return fn
        return deco


@dataclass(frozen=True, slots=True)
class Resolved:
    row: OpRow
    foreach: bool = False


class OpTable:
    """All rows; `lookup` resolves overloads, in-place and foreach forms to the one row."""

    def __init__(self, rows: Iterable[OpRow]):
        self.rows: dict[str, OpRow] = {}
        for r in rows:
            if r.name in self.rows:
                raise ValueError(f"two rows for {r.name}")
            self.rows[r.name] = r
        self._memo: dict[str, Resolved | None] = {}

    def lookup(self, name: str) -> Resolved | None:
        if name not in self._memo:
            self._memo[name] = self._resolve(name)
        return self._memo[name]

    def _resolve(self, name: str) -> Resolved | None:
        if name in self.rows:                 # tv.scalar.add has no overload
            return Resolved(self.rows[name])
        ns, op = name.split(".")[:2]
        for cand in (op, op[:-1] if op.endswith("_") and not op.endswith("__") else op):
            if f"{ns}.{cand}" in self.rows:
                return Resolved(self.rows[f"{ns}.{cand}"])
            if cand.startswith("_foreach_") and f"{ns}.{cand[9:]}" in self.rows:
                return Resolved(self.rows[f"{ns}.{cand[9:]}"], foreach=True)
        return None
