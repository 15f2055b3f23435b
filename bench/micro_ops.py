"""Prints the time of the field's micro-operations in microseconds, for small, middling and large values."""
import time

import torch

from trainverify.algebra.field import Field

SIZES = (16, 1000, 30000)


def cases(m: Field, n: int) -> dict:
    a, b = m.symbols("a", 0, n), m.symbols("b", n, n)
    e, rows, zero, cell = m.exp(a), m.reshape(a, (n // 8, 8)), m.const(0), m.cell(a)
    every = torch.arange(1, n + 1)
    return {
        "add": lambda: m.add(a, b), "mul": lambda: m.mul(a, b), "scale": lambda: m.scale(a, 0.1), "inv": lambda: m.inv(a),
        "sum": lambda: m.sum(rows, [-1]), "matmul": lambda: m.matmul(m.permute(rows, (1, 0)), rows), "exp": lambda: m.exp(a), "log": lambda: m.log(a),
        "sqrt": lambda: m.sqrt(a), "sin": lambda: m.sin(a), "maximum": lambda: m.maximum(a, zero), "amax": lambda: m.amax(rows, [-1]),
        "compare": lambda: m.compare("gt", a, b), "take": lambda: m.take([a], every), "load": lambda: m.load(cell, 8, (n - 8,), (1,)),
        "store, adopting": lambda: m.store(cell, 0, (n,), (1,), m.add(e, e)), "equal": lambda: m.equal(a, b),
    }


def microseconds(f, rounds: int) -> float:
    f()
    start = time.perf_counter()
    for _ in range(rounds):
        f()
    return (time.perf_counter() - start) / rounds * 1e6


def main() -> None:
    torch.set_num_threads(1)
    m = Field(1)
    columns = [cases(m, n) for n in SIZES]
    print(f"{'elements':18s}" + "".join(f"{n:>10d}" for n in SIZES))
    for name in columns[0]:
        print(f"{name:18s}" + "".join(f"{microseconds(c[name], 20 if n < 10000 else 5):10.0f}" for c, n in zip(columns, SIZES)))


if __name__ == "__main__":
    main()
