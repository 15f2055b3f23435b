"""Shapes of terms: what remains of a term when its leaves are forgotten, so that many rows share one obligation (trusted).

A term over identifiers is a shape and a row of leaves, in the order in which a walk through the term meets them. Shape 0 is a
single leaf. Constants are part of the shape.
"""
from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from trainverify.kernel.terms import Attr, Terms

LEAF = 0
PARTIAL = frozenset({"inv", "log", "sqrt", "pow", "max", "compare"})     # whose rules look at signs


class Shapes:
    """Interned shapes: (kind, attr, shapes of the operands), leaf counts, depths, and whether signs matter."""

    def __init__(self) -> None:
        self.nodes: list[tuple[str, Attr, tuple[int, ...]]] = [("leaf", None, ())]
        self.leaves, self.depth, self.partial = [1], [0], [False]
        self._index: dict[tuple, int] = {}

    def intern(self, kind: str, attr: Attr, operands: tuple[int, ...]) -> int:
        key = (kind, attr, operands)
        i = self._index.get(key)
        if i is None:
            i = self._index[key] = len(self.nodes)
            self.nodes.append(key)
            self.leaves.append(sum(self.leaves[o] for o in operands))
            self.depth.append(1 + max((self.depth[o] for o in operands), default=0))
            self.partial.append(kind in PARTIAL or any(self.partial[o] for o in operands))
        return i

    def constant(self, q: Fraction) -> int:
        return self.intern("const", q, ())

    def replace(self, shape: int, new: dict[int, int], first: int = 0) -> int:
        """The shape with the leaves at these positions replaced by shapes; `first` is the position of its own first leaf."""
        if shape == LEAF:
            return new.get(first, LEAF)
        kind, attr, operands = self.nodes[shape]
        if not any(first <= p < first + self.leaves[shape] for p in new):
            return shape
        out = []
        for o in operands:
            out.append(self.replace(o, new, first))
            first += self.leaves[o]
        return self.intern(kind, attr, tuple(out))

    def term(self, terms: Terms, shape: int, positions: Iterator[int]) -> int:
        """The term's node; its leaves are numbered from the iterator."""
        if shape == LEAF:
            return terms.add("leaf", next(positions))
        kind, attr, operands = self.nodes[shape]
        args = [self.term(terms, o, positions) for o in operands]
        if kind == "sub":
            return terms.add("add", None, (args[0], terms.add("neg", None, (args[1],))))
        return terms.add(kind, attr, args)
