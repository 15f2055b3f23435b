"""Maxima as flattened sets of fingerprints: max(max(a, b), c) is max(a, b, c), and max(a, a) is a (not trusted: makes guesses).

Only the sets live here; the field turns a set's hash into a value. A member is the 62-bit fingerprint of an operand; members that
are known constants are reduced to their largest.
"""
from __future__ import annotations

import numpy as np
import torch

from trainverify.kernel.hashtable import HashTable
from trainverify.algebra.primes import mix

NONE = torch.iinfo(torch.int64).max           # padding; sorts last


class MaxSets:
    def __init__(self, hash_key: int):
        self._key = hash_key
        self._at = HashTable(width=2)         # fingerprint of a maximum -> (batch, row)
        self._batches: list[np.ndarray] = []
        self._constants: dict[int, float] = {}

    def note_constants(self, prints: torch.Tensor, values: torch.Tensor) -> None:
        """Fingerprints of constant operands, so that max(x, 0, 1) is max(x, 1)."""
        pairs = torch.stack([prints.reshape(-1), values.reshape(-1).view(torch.int64)]).unique(dim=1)
        self._constants.update(zip(pairs[0].tolist(), pairs[1].view(torch.float64).tolist()))

    def members(self, prints: torch.Tensor) -> torch.Tensor:
        """[...] fingerprints to [..., width] members, padded with NONE."""
        flat = prints.reshape(-1).numpy()
        found, at = self._at.get(flat)
        if not found.any():
            return prints.unsqueeze(-1)
        batches = np.unique(at[found, 0])
        width = max(self._batches[b].shape[1] for b in batches)
        out = np.full((len(flat), width), NONE, dtype=np.int64)
        out[:, 0] = flat
        for b in batches:
            rows = found & (at[:, 0] == b)
            out[rows, :self._batches[b].shape[1]] = self._batches[b][at[rows, 1]]
        return torch.from_numpy(out).reshape(*prints.shape, width)

    def union(self, members: torch.Tensor) -> torch.Tensor:
        """[rows, n] members with repetitions to sorted sets [rows, width]."""
        if self._constants:
            members = self._largest_constant(members)
        s = members.sort(dim=-1).values
        repeated = torch.zeros_like(s, dtype=torch.bool)
        repeated[:, 1:] = s[:, 1:] == s[:, :-1]
        s = s.masked_fill(repeated, NONE).sort(dim=-1).values
        width = int((s != NONE).sum(-1).max()) if s.numel() else 1
        return s[:, :max(width, 1)].contiguous()

    def constant_of(self, members: torch.Tensor) -> torch.Tensor:
        """float64 values of members that are known constants, nan elsewhere."""
        known = np.fromiter(self._constants, dtype=np.int64, count=len(self._constants))
        order = np.argsort(known)
        known, values = known[order], np.fromiter(self._constants.values(), dtype=np.float64, count=len(known))[order]
        if not len(known):
            return torch.full(members.shape, float("nan"), dtype=torch.float64)
        at = np.searchsorted(known, members.numpy()).clip(max=len(known) - 1)
        return torch.from_numpy(np.where(known[at] == members.numpy(), values[at], np.nan))

    def _largest_constant(self, members: torch.Tensor) -> torch.Tensor:
        values = self.constant_of(members)
        constant = ~values.isnan()
        if not constant.any():
            return members
        largest = torch.where(constant, values, float("-inf")).amax(-1, keepdim=True)
        return members.masked_fill(constant & (values < largest), NONE)

    def hash(self, sets: torch.Tensor) -> torch.Tensor:
        """One 64-bit hash per set, whatever the order and padding."""
        return mix(torch.where(sets == NONE, 0, mix(sets ^ self._key)).sum(-1))

    def register(self, prints: torch.Tensor, sets: torch.Tensor) -> None:
        """Remembers which values are maxima of which sets."""
        if prints.numel():
            rows = np.stack([np.full(prints.numel(), len(self._batches)), np.arange(prints.numel())], 1)
            self._batches.append(sets.numpy())
            self._at.put(prints.reshape(-1).contiguous().numpy(), rows)
