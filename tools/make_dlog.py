"""Writes src/trainverify/algebra/dlog.npz: logarithms of the primes up to sqrt(P), by baby and giant steps (about ten seconds)."""
from pathlib import Path

import numpy as np

from trainverify.algebra.primes import G, P, Q

LIMIT, BABY = 46350, 1 << 20


def primes_below(n: int) -> np.ndarray:
    sieve = np.ones(n, dtype=bool)
    sieve[:2] = False
    for i in range(2, int(n ** 0.5) + 1):
        if sieve[i]:
            sieve[i * i::i] = False
    return np.flatnonzero(sieve).astype(np.int64)


def logarithms(values: np.ndarray, p: int, q: int) -> np.ndarray:
    """Exponents e with G ** e = value modulo p; every value is a square."""
    baby = np.ones(1, dtype=np.int64)
    while len(baby) < BABY:
        baby = np.concatenate([baby, baby * pow(G, len(baby), p) % p])
    order = np.argsort(baby)
    baby = baby[order]
    giant = pow(pow(G, BABY, p), -1, p)
    out, todo, current = np.full(len(values), -1, dtype=np.int64), np.arange(len(values)), values.copy()
    for step in range(q // BABY + 1):
        at = np.searchsorted(baby, current).clip(max=BABY - 1)
        hit = baby[at] == current
        out[todo[hit]] = (order[at[hit]] + step * BABY) % q
        todo, current = todo[~hit], current[~hit] * giant % p
        if not len(todo):
            return out
    raise RuntimeError(f"no logarithm modulo {p} for {values[todo]}")


def main() -> None:
    primes = primes_below(LIMIT)
    logs, signs = [], []
    for p, q in zip(P, Q):
        sign = np.array([pow(int(x), q, p) != 1 for x in primes])
        logs.append(logarithms(np.where(sign, p - primes, primes), p, q))
        signs.append(sign)
    path = Path(__file__).parent.parent / "src/trainverify/algebra/dlog.npz"
    np.savez_compressed(path, primes=primes.astype(np.int32), logs=np.array(logs, dtype=np.int32), signs=np.array(signs, dtype=np.uint8))


if __name__ == "__main__":
    main()
