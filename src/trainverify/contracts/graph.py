"""The blocks of both programs: each is one micro-operation applied to patterns over other blocks, interned (trusted).

Blocks are equal if their operations and operands are; what the parallel side computes exactly as the reference does is the
reference's block. A parallel block that is none of the reference's is *open*. Its *form* is its expression down to the reference's blocks
(its *leaves*, counted by first occurrence): open blocks of one form differ in their leaves only, so that a theorem on one of them for
all values of its leaves is a theorem on all.
"""
from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass

import torch

from trainverify.contracts.patterns import Blocks, Pattern

LEAF = -1                                     # the signature of symbols
FIRST = 16                                    # the number of the first element: below are the store's own


class Index:
    """A tensor of positions as an attribute: equal contents are equal."""

    __slots__ = ("tensor", "_key")

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self._key = tensor, digest(tensor)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Index) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def digest(t: torch.Tensor) -> tuple:
    return tuple(t.shape), hashlib.blake2b(t.contiguous().numpy().tobytes(), digest_size=20).digest()


@dataclass(frozen=True, slots=True)
class Signature:
    """A micro-operation on patterns: maps[i] says where the slots of operand i are among all `slots` blocks."""

    name: str
    attr: Hashable
    patterns: tuple[Pattern, ...]
    maps: tuple[Blocks, ...]
    slots: int


class Graph:
    def __init__(self) -> None:
        self.parallel = False
        self.signatures: list[Signature] = []
        self._numbers: dict[tuple, int] = {}
        self.signature: list[int] = []        # per block, as the lists below
        self.operands: list[Blocks] = []
        self.size: list[int] = []
        self.base: list[int] = []             # elements of all blocks are counted through
        self.clean: list[bool] = []           # defined wherever the reference is
        self.of_reference: list[bool] = []
        self.users: dict[int, list[int]] = defaultdict(list)      # of blocks of the reference, among those
        self._found: dict[tuple[int, Blocks], int] = {}
        self._forms: dict[tuple, int] = {}
        self._form_of: dict[int, tuple[int, Blocks]] = {}
        self.elements = FIRST

    def sign(self, name: str, attr: Hashable, patterns: tuple[Pattern, ...], maps: tuple[Blocks, ...], slots: int) -> int:
        """The number of a signature."""
        key = (name, attr, tuple([p.number for p in patterns]), maps)
        found = self._numbers.get(key)
        if found is None:
            found = self._numbers[key] = len(self.signatures)
            self.signatures.append(Signature(name, attr, patterns, maps, slots))
        return found

    def find(self, signature: int, operands: Blocks) -> int | None:
        return self._found.get((signature, operands))

    def add(self, signature: int, operands: Blocks, size: int, clean: bool) -> int:
        """A new block (not there yet)."""
        b = len(self.signature)
        self.signature.append(signature)
        self.operands.append(operands)
        self.size.append(size)
        self.base.append(self.elements)
        self.clean.append(clean or not self.parallel)
        self.of_reference.append(not self.parallel)
        self.elements += size
        if signature != LEAF:
            self._found[signature, operands] = b
            if not self.parallel:
                for x in set(operands):
                    self.users[x].append(b)
        return b

    def form(self, block: int) -> tuple[int, Blocks]:
        """The form of an open block, and its leaves."""
        found = self._form_of.get(block)
        if found is None:
            parts: list[tuple] = []
            number: dict[int, int] = {}
            for x in self.operands[block]:
                if self.of_reference[x]:
                    parts.append((LEAF, number.setdefault(x, len(number))))
                else:
                    form, leaves = self.form(x)
                    parts.append((form, tuple([number.setdefault(y, len(number)) for y in leaves])))
            key = (self.signature[block], tuple(parts))
            found = self._form_of[block] = (self._forms.setdefault(key, len(self._forms)), tuple(number))
        return found
