"""Exact arithmetic in two pairs of prime fields P = 2 q + 1, with exp and log between them and a keyed hash (not trusted: makes guesses).

A batch of elements is an int64 tensor [4, ...]: its residues modulo P0, P1, Q0, Q1. The squares modulo P have order q, so
x -> G ** x maps residues modulo q onto squares modulo P and turns sums into products; the logarithm is its inverse on squares
and reports separately whether its argument was a non-residue (-1 is one). Both P and both q are 7 modulo 8 and all primes up to
19 are squares modulo each, so roots of the small rationals that programs use exist.
"""
from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib import resources

import numpy as np
import torch

I64, F64 = torch.int64, torch.float64
P = (2147024879, 2145341519)
Q = (1073512439, 1072670759)
MODULI = P + Q
G = 4                                         # generates the squares modulo each P
_MASK64 = (1 << 64) - 1
_RANKS = 16


def _moduli(values: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(values, dtype=I64).view(-1, *([1] * d)) for d in range(_RANKS))


MOD = _moduli(MODULI)                         # MOD[d] has shape [4, 1 x d]: d is the number of element dimensions
MOD_P = _moduli(P)
MOD_Q = _moduli(Q)


# ---- hashing
def _signed(x: int) -> int:
    x &= _MASK64
    return x - (1 << 64) if x >> 63 else x


def key(seed: int, text: str) -> int:
    """A signed 64-bit key for a purpose."""
    return _signed(int.from_bytes(hashlib.blake2b(f"{seed}|{text}".encode(), digest_size=8).digest(), "big"))


_M1, _M2, _M3 = _signed(0x9E3779B97F4A7C15), _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64 on int64 tensors (arithmetic wraps)."""
    x = x + _M1
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))).mul_(_M2)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))).mul_(_M3)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


# ---- packing of pairs into 62 bits
def pack_p(res: torch.Tensor) -> torch.Tensor:
    return (res[0] << 31) | res[1]


def pack_q(q: torch.Tensor, sgn: torch.Tensor | None) -> torch.Tensor:
    """q: the two residues modulo Q0, Q1; sgn: sign bits of logarithms or None."""
    packed = (q[0] << 32) | (q[1] << 2)
    return packed if sgn is None else packed | sgn


def unpack_p(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack([packed >> 31, packed & 0x7FFFFFFF])


def unpack_q(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([packed >> 32, (packed >> 2) & 0x3FFFFFFF]), (packed & 3).to(torch.uint8)


# ---- field operations
def power(x: torch.Tensor, exponents: tuple[int, ...], mod: torch.Tensor) -> torch.Tensor:
    """x[i] ** exponents[i] modulo mod[i], exponents positive."""
    acc = None
    for bit in reversed(range(max(e.bit_length() for e in exponents))):
        if acc is None:
            acc = torch.ones_like(x)
        else:
            acc = (acc * acc).remainder_(mod)
        chosen = [i for i, e in enumerate(exponents) if e >> bit & 1]
        if len(chosen) == len(exponents):
            acc = acc.mul_(x).remainder_(mod)
        else:
            for i in chosen:
                acc[i].mul_(x[i]).remainder_(int(mod[i]))
    return acc


def sqrt(x: torch.Tensor, moduli: tuple[int, ...]) -> torch.Tensor:
    """The multiplicative root: |x| ** (1/2) times the Legendre symbol of x, so that roots of x and -x differ."""
    mod = torch.tensor(moduli, dtype=I64).view(-1, *([1] * (x.dim() - 1)))
    return power(x, tuple((3 * m - 1) // 4 for m in moduli), mod)


def inverse(x: torch.Tensor) -> torch.Tensor:
    """Inverses of [4, ...] residues, none of which is 0, by a tree of products."""
    return _inverse(x.reshape(4, -1)).reshape(x.shape)


def _inverse(x: torch.Tensor) -> torch.Tensor:
    n = x.shape[1]
    if n <= 3:
        rows = x.tolist()
        return torch.tensor([[pow(v, -1, m) for v in row] for row, m in zip(rows, MODULI)], dtype=I64).view(4, n)
    if n & 1:
        return _inverse(torch.cat([x, x.new_ones(4, 1)], 1))[:, :n]
    a, b = x[:, :n // 2], x[:, n // 2:]
    inv = _inverse((a * b).remainder_(MOD[1]))
    return torch.cat([inv * b, inv * a], 1).remainder_(MOD[1])


_LIMBS = 1 << 17                              # (2^15 + 2^16)^2 * 2^17 < 2^53


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[4, ..., m, k] @ [4, ..., k, n], equal numbers of dimensions: three float64 products of 16-bit limbs (Karatsuba)."""
    k = a.shape[-1]
    if k > _LIMBS:
        total = sum(matmul(x, y) for x, y in zip(a.split(_LIMBS, -1), b.split(_LIMBS, -2)))
        return total.remainder_(MOD[total.dim() - 1])
    mod = MOD[a.dim() - 1]
    a1, b1 = (a >> 16).to(F64), (b >> 16).to(F64)
    a0, b0 = (a & 65535).to(F64), (b & 65535).to(F64)
    high, low = (a1 @ b1).to(I64), (a0 @ b0).to(I64)
    middle = (a1.add_(a0) @ b1.add_(b0)).to(I64).sub_(high).sub_(low).remainder_(mod)
    high = (high.remainder_(mod) << 16).add_(middle).remainder_(mod)
    return (high << 16).add_(low).remainder_(mod)


# ---- exponential and logarithm
@lru_cache(maxsize=1)
def _exp_tables() -> tuple[torch.Tensor, torch.Tensor]:
    """Flattened [2, 2^15] tables of G ** j and of G ** (j * 2^15)."""
    def powers(base: int, p: int) -> torch.Tensor:
        t = torch.ones(1, dtype=I64)
        while t.numel() < 1 << 15:
            t = torch.cat([t, (t * pow(base, t.numel(), p)).remainder_(p)])
        return t
    low = torch.cat([powers(G, p) for p in P])
    high = torch.cat([powers(pow(G, 1 << 15, p), p) for p in P])
    return low, high


def exp(q: torch.Tensor) -> torch.Tensor:
    """[2, ...] residues modulo Q to G ** q modulo P."""
    low, high = _exp_tables()
    mod, off = MOD_P[q.dim() - 1], torch.tensor([0, 1 << 15]).view(2, *([1] * (q.dim() - 1)))
    return (low.take((q & 32767).add_(off)) * high.take((q >> 15).add_(off))).remainder_(mod)


_BOUND = 46341                                # at least sqrt(P)


@lru_cache(maxsize=1)
def _log_tables() -> tuple[torch.Tensor, torch.Tensor]:
    """Flattened [2, _BOUND + 1]: logarithms of the integers (sign dropped), and whether they are non-residues."""
    with resources.files(__package__).joinpath("dlog.npz").open("rb") as f:
        stored = np.load(f, allow_pickle=False)
        primes, logs, signs = stored["primes"], stored["logs"].astype(np.int64), stored["signs"].astype(np.int64)
    back = exp(torch.from_numpy(logs)).numpy()
    expected = np.where(signs == 1, np.array(P)[:, None] - primes, primes)
    if not (back == expected).all():
        raise RuntimeError("dlog.npz does not hold the logarithms of the primes; regenerate it with tools/make_dlog.py")
    n = _BOUND + 1
    factor = np.zeros(n, dtype=np.int64)      # index of the smallest prime factor
    for i in range(len(primes) - 1, -1, -1):
        if primes[i] < n:
            factor[primes[i]::primes[i]] = i
    total, sign, rest = np.zeros((2, n), dtype=np.int64), np.zeros((2, n), dtype=np.int64), np.arange(n)
    while (rest > 1).any():
        at = np.flatnonzero(rest > 1)
        f = factor[rest[at]]
        total[:, at] += logs[:, f]
        sign[:, at] ^= signs[:, f]
        rest[at] //= primes[f]
    total %= np.array(Q)[:, None]
    return torch.from_numpy(total.reshape(-1)), torch.from_numpy(sign.reshape(-1))


def log(p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[2, ...] nonzero residues modulo P to (logarithm modulo Q, 1 where the residue is no square).

    Half of Euclid's algorithm writes z = a / b with |a|, |b| <= sqrt(P) (Thue), whose logarithms are tabulated.
    """
    table, signs = _log_tables()
    d = p.dim() - 1
    r1, r0 = p.to(F64), MOD_P[d].to(F64).expand(p.shape)
    t0, t1 = torch.zeros_like(r1), torch.ones_like(r1)
    while True:
        active = r1 > _BOUND
        if not active.any():
            break
        quotient = (r0 / r1).floor_()
        r0, r1 = torch.where(active, r1, r0), torch.where(active, r0 - quotient * r1, r1)
        t0, t1 = torch.where(active, t1, t0), torch.where(active, t0 - quotient * t1, t1)
    off = torch.tensor([0, _BOUND + 1]).view(2, *([1] * d))
    a, b = r1.to(I64).add_(off), t1.abs().to(I64).add_(off)
    logs = (table.take(a) - table.take(b)).remainder_(MOD_Q[d])
    return logs, signs.take(a) ^ signs.take(b) ^ (t1 < 0).to(I64)


# ---- exact dyadics
@lru_cache(maxsize=1)
def _powers_of_two() -> torch.Tensor:
    """[4, 2200]: 2 ** (column - 1150)."""
    rows = []
    for m in MODULI:
        row = [pow(2, -1150, m)]
        while len(row) < 2200:
            row.append(2 * row[-1] % m)
        rows.append(row)
    return torch.tensor(rows, dtype=I64)


def dyadic(x: torch.Tensor) -> torch.Tensor:
    """Residues [4, ...] of finite float64 values, exactly."""
    mantissa, exponent = torch.frexp(x)
    whole = (mantissa * 2.0 ** 53).to(I64)
    scale = _powers_of_two()[:, (exponent.to(I64) + (1150 - 53)).reshape(-1)].reshape(4, *x.shape)
    return whole.remainder(MOD[x.dim()]).mul_(scale).remainder_(MOD[x.dim()])


def spread(h: torch.Tensor, keys: torch.Tensor, moduli: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Independent residues from one 64-bit hash per element: keys has one entry per component."""
    d = h.dim()
    return mix(h.unsqueeze(0) ^ keys.view(-1, *([1] * d))).remainder_(moduli[d])


