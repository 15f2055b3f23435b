"""Which leaves of a refuted claim to replace by their definitions (a wrong choice costs time, or a proof; never truth)."""
from __future__ import annotations

import numpy as np

from trainverify.kernel.store import Store

SHORT = 4                                     # operands
LOOK = 300                                    # identifiers at which a look for others below stops


class Choice:
    """Chooses among the identifiers of a store."""

    def __init__(self, store: Store):
        self.store = store
        self.stubborn: set[int] = set()       # not proved to be what their fingerprints say: what they are made of may not help
        self._below: dict[int, list[int]] = {}

    def among(self, ids: np.ndarray, names: np.ndarray, split: int, short_first: bool) -> set[int]:
        """Names of the newest leaf that one side alone has (or whose definition comes to such a leaf soon), and of all that are made like it.

        If both sides have the same: of the newest whose definition comes to another leaf, for only such leaves depend on each other. What a
        maximum is of seldom matters (it is subtracted before exp): those come last.
        """
        store = self.store
        by_name = dict(zip(names.tolist(), ids.tolist()))
        left, right = set(names[:split].tolist()), set(names[split:].tolist())
        every = {n for n, i in by_name.items() if store.code[i] > 0 and i not in self.stubborn}
        open_ = {n for n in every if store.ops[store.code[by_name[n]]][0][0] != "max"}
        alone = left ^ right
        candidates = open_ & alone
        if candidates:
            strangers = {by_name[n] for n in alone}
            across = [(candidates & own, {by_name[n] for n in alone & other}) for own, other in ((left, right), (right, left))]
            joining = {n for mine, theirs in across for n in mine if self._mentions(by_name[n], theirs, 4)}
            reach = 1 if joining else 2
            both = {n for n in open_ & left & right if (reach > 1 or self._is_short(by_name[n])) and self._mentions(by_name[n], strangers, reach)}
            candidates = (joining or candidates) | both
        else:
            leaves = set(by_name.values())
            candidates = {n for n in open_ if self._mentions(by_name[n], leaves, 4)} or open_ or every
        if short_first:
            candidates = {n for n in candidates if self._is_short(by_name[n])} or candidates
        if not candidates:
            return set()
        newest = self._made(by_name[max(candidates, key=by_name.__getitem__)])
        return {n for n in candidates if self._made(by_name[n]) == newest}

    def _is_short(self, i: int) -> bool:
        return len(self._operands(i)) <= SHORT

    def _made(self, i: int) -> tuple:
        """The call and the operation that made an identifier; of a short operation also what its operands are, since one call can make scores
        and probabilities, both of them products."""
        store, operands = self.store, self._operands(i)
        return int(store.origin[i]), int(store.code[i]), sorted(store.code[operands].tolist()) if len(operands) <= SHORT else []

    def _mentions(self, i: int, strangers: set[int], depth: int) -> bool:
        """Whether one of some identifiers stands within so many definitions below i, as far as a short look finds."""
        seen, layer = {i}, [i]
        while depth and layer and len(seen) < LOOK:
            below = {o for j in layer for o in self._operands(j)} - seen
            if not strangers.isdisjoint(below):
                return True
            seen |= below
            layer, depth = [o for o in below if self.store.code[o] > 0], depth - 1
        return False

    def _operands(self, i: int) -> list[int]:
        if i not in self._below:
            code = int(self.store.code[i])
            self._below[i] = self.store.operands(code, self.store.definition(np.array([i]), code))[0].tolist()
        return self._below[i]
