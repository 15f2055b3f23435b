"""Marks of rows by how they were computed (untrusted): they tell apart what fingerprints cannot, such as many different ways to write zero.

A mark is the row's value where the reference's identifiers are independent random residues, but for sums and multiples of others and powers of numbers,
and where every function but sums, products and powers is a hash. Rows that are equal as polynomials in such identifiers have equal marks, and so have those
of which factors stand inside a root here and outside there (a second moment over its bias correction, before or after the root).
"""
from __future__ import annotations

import hashlib
from fractions import Fraction

import numpy as np

from trainverify.kernel.store import I64, Store, grow

P = np.array([[2147483647], [2147483629]], I64)
_MIX = np.uint64(0xBF58476D1CE4E5B9)


class Structure:
    """Residues per identifier, as far as they were asked for."""

    def __init__(self, store: Store):
        self._store = store
        self._res, self._known = np.zeros((0, 2), np.int32), np.zeros(0, bool)

    def of_rows(self, code: int, rows: np.ndarray) -> np.ndarray:
        """[2, n] residues of rows of one operation."""
        operands = self._store.operands(code, rows)
        self._learn(operands)
        return self._evaluated(code, operands)

    def _learn(self, ids: np.ndarray) -> None:
        """Residues of identifiers and of all that they are made of: what the reference has is an atom."""
        store, layers = self._store, []
        if store.n > len(self._known):
            old, room = len(self._known), max(store.n, 2 * len(self._known))
            self._res, self._known = grow(self._res, room), grow(self._known, room)
            self._known[old:] = False
        while True:
            ids = np.unique(ids)
            ids = ids[~self._known[ids]]
            codes, below = store.code[ids], [np.zeros(0, I64)]
            for code in np.unique(codes).tolist():
                mine = ids[codes == code]
                operands = store.operands(code, store.definition(mine, code)) if code else mine[:, None]
                written = store.is_open[mine] | self._is_linear(code, operands)
                self._set(mine[~written], self._atoms(mine[~written]))
                layers.append((code, mine[written], operands[written]))
                below.append(operands[written].reshape(-1))
            ids = np.concatenate(below)
            if not ids.size:
                break
        for code, mine, operands in reversed(layers):
            new = np.flatnonzero(~self._known[mine])
            self._set(mine[new], self._evaluated(code, operands[new]))

    def _is_linear(self, code: int, operands: np.ndarray) -> np.ndarray:
        kind = self._store.ops[code][0][0]
        if kind == "mul":
            return self._store.is_constant[operands].any(1)
        if kind in ("pow", "sqrt", "inv"):    # the root of a number is a number
            return self._store.is_constant[operands].all(1)
        return np.full(len(operands), kind in ("add", "sub", "neg"))

    def _set(self, ids: np.ndarray, residues: np.ndarray) -> None:
        self._res[ids], self._known[ids] = residues.T, True

    def _atoms(self, ids: np.ndarray) -> np.ndarray:
        out = _spread(ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        for i in np.flatnonzero(self._store.is_constant[ids]).tolist():
            out[:, i:i + 1] = _rational(self._store.constants[int(ids[i])])
        return out

    def _evaluated(self, code: int, operands: np.ndarray) -> np.ndarray:
        (kind, attr), _ = self._store.ops[code]
        columns = [self._res[operands[:, j]].T.astype(I64) for j in range(operands.shape[1])]
        if kind == "add":
            return sum(columns[1:], columns[0]) % P
        if kind == "sub":
            return (columns[0] - columns[1]) % P
        if kind == "neg":
            return -columns[0] % P
        if kind == "mul":
            return columns[0] * columns[1] % P
        if kind == "dot":
            return sum(a * b % P for a, b in zip(columns[0::2], columns[1::2])) % P
        power = Fraction(-1) if kind == "inv" else Fraction(1, 2) if kind == "sqrt" else attr if kind == "pow" else None
        if power is not None:
            return _powers(columns[0], power)
        salt = np.uint64(int.from_bytes(hashlib.blake2b(repr((kind, attr)).encode(), digest_size=8).digest(), "little"))
        hashes = [packed(c).astype(np.uint64) for c in columns]
        if kind == "max":
            return _spread(sum((_mixed(h + salt) for h in hashes), np.zeros(len(operands), np.uint64)))
        out = np.full(len(operands), salt)
        for h in hashes:
            out = _mixed(out ^ h)
        return _spread(out)


def packed(residues: np.ndarray) -> np.ndarray:
    """[n] keys of [2, n] residues."""
    return (residues[0] << 31) | residues[1]


def divided(residues: np.ndarray, c: Fraction) -> np.ndarray:
    """Residues of the same values over c."""
    return residues * _rational(1 / c) % P


def _rational(q: Fraction) -> np.ndarray:
    return np.array([[q.numerator * pow(q.denominator, -1, p) % p] for p in P[:, 0].tolist()], I64)


def _powers(x: np.ndarray, q: Fraction) -> np.ndarray:
    """x^q of residues [2, n]. A root is another power, which is multiplicative as roots are, but of which no power is x: sqrt(x^2) is not x."""
    root = 1 if q.denominator == 1 else int.from_bytes(hashlib.blake2b(b"root %d" % q.denominator, digest_size=4).digest(), "little") | 1
    out = np.ones_like(x)
    for k, p in enumerate(P[:, 0].tolist()):
        exponent, base = q.numerator * root % (p - 1), x[k]
        while exponent:
            if exponent & 1:
                out[k] = out[k] * base % p
            base, exponent = base * base % p, exponent >> 1
    return out


def _mixed(h: np.ndarray) -> np.ndarray:
    h = (h ^ (h >> np.uint64(31))) * _MIX
    return h ^ (h >> np.uint64(29))


def _spread(h: np.ndarray) -> np.ndarray:
    """[2, n] residues from [n] hashes."""
    return np.stack([_mixed(h + np.uint64(k)) % P[k].astype(np.uint64) for k in (0, 1)]).astype(I64)
