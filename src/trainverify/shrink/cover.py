"""Which tokens are kept so that of all rows that data pick together (those of one expert, those from one rank to another) one at least is (trusted only in
that each such group ends with a kept row, which is looked at; how few tokens that takes is a matter of cost)."""
from __future__ import annotations

import numpy as np

from trainverify.shrink.spaces import PICK, PRODUCT, Spaces

_SHIFT = 40                                   # an atom and an index of it are one number
_NONE = -1
_SPREAD = 0x9E3779B1


def cover(spaces: Spaces, required: dict[int, set[int]]) -> None:
    """Add to the required indices of atoms, few at a time: always those of the row that is in the most groups without a kept one."""
    groups = [s for s in spaces.roots() if (form := spaces.form(s)) is not None and form.kind == PICK]
    if not groups:
        return
    whole = {a for p in spaces.pins for a in spaces.atoms(p.space)}
    rows, group = _rows(spaces, groups, whole)
    kept = np.isin(rows, [a << _SHIFT | i for a, indices in required.items() for i in indices]) | (rows == _NONE)
    price = np.array([*map(spaces.size, range(int(rows.max(initial=0) >> _SHIFT) + 1)), 0])      # what has many indices is reduced the most
    waiting = np.ones(len(groups), bool)
    while True:
        waiting[group[kept.all(1)]] = False
        left = np.flatnonzero(waiting[group])
        if not left.size:
            return
        items, item = np.unique(rows[left], axis=0, return_inverse=True)
        item = item.reshape(-1)
        first = np.unique(np.stack([item, group[left]]), axis=1)[0]       # a row counts once in a group
        new = (items != _NONE) & ~np.isin(items, rows[kept])
        gain = np.bincount(first, minlength=len(items)) / np.maximum(1, (price[items >> _SHIFT] * new).sum(1))
        best = np.flatnonzero(gain == gain.max())
        taken = items[best[int(waiting.sum()) * _SPREAD % len(best)]]     # any of them will do: spread, so that few are alike
        for x in taken[taken != _NONE].tolist():
            required[x >> _SHIFT].add(x & (1 << _SHIFT) - 1)
        kept |= np.isin(rows, taken[taken != _NONE])


def _rows(spaces: Spaces, groups: list[int], whole: set[int]) -> tuple[np.ndarray, np.ndarray]:
    """[rows of all groups, n]: the atoms' indices of which each is made (but for atoms that keep their size); and the group of each row."""
    made = [_made(spaces, g, np.arange(spaces.size(g)), whole) for g in groups]
    width = max(m.shape[1] for m in made)
    rows = np.concatenate([np.pad(m, ((0, 0), (0, width - m.shape[1])), constant_values=_NONE) for m in made])
    return rows, np.repeat(np.arange(len(groups)), [len(m) for m in made])


def _made(spaces: Spaces, s: int, at: np.ndarray, whole: set[int]) -> np.ndarray:
    """For each of these indices of s, the atoms' indices of which it is made, as numbers."""
    s = spaces.find(s)
    form = spaces.form(s)
    if form is None:
        return (np.full((len(at), 0), _NONE, np.int64) if s in whole or spaces.size(s) == 1 else (s << _SHIFT | at)[:, None])
    if form.kind == PICK:
        return _made(spaces, form.parts[0], form.picked[at], whole)
    if form.kind == PRODUCT:
        columns, size = [], spaces.size(s)
        for p in form.parts:
            size //= spaces.size(p)
            k, at = np.divmod(at, size)
            columns.append(_made(spaces, p, k, whole))
        return np.concatenate(columns, axis=1)
    ends = np.cumsum([0, *map(spaces.size, form.parts)])
    part = np.searchsorted(ends, at, side="right") - 1
    found = [(np.flatnonzero(part == k), k) for k in np.unique(part).tolist()]
    made = [_made(spaces, form.parts[k], at[where] - ends[k], whole) for where, k in found]
    out = np.full((len(at), max((m.shape[1] for m in made), default=0)), _NONE, np.int64)
    for (where, _), m in zip(found, made):
        out[where, :m.shape[1]] = m
    return out
