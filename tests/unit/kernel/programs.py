"""Random programs in micro-operations, and other ways to compute the same (or, at times, something else)."""
from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import torch

SHAPE = (2, 2)
ANY_STEP = ("add", "sub", "mul", "neg", "exp", "maximum", "compare", "where", "rows", "total", "matmul", "matmul", "cumsum", "take", "scatter", "scale",
            "power", "sin", "positive", "constant", "inverse", "log", "sqrt", "div", "masked", "norm", "sign", "abs", "erf", "asin", "garbage")
NUMBERS = (0, 1, -1, 2, Fraction(1, 2), 0.1, math.inf, -math.inf)
POWERS = (2, 3, 0, -1, 0.5, 1.5, -0.5)


@dataclass(frozen=True)
class Step:
    kind: str
    args: tuple[int, ...]
    number: object = None
    index: tuple[int, ...] = ()
    way: int = 0                              # 0: plainly; others: another way to compute it


def program(rng: random.Random, symbols: int, length: int) -> list[Step]:
    steps = []
    for i in range(length):
        kind = rng.choice(ANY_STEP)
        if kind == "garbage" and rng.random() < 0.7 or kind in ("log", "sqrt", "inverse", "div", "asin") and rng.random() < 0.5:
            kind = "positive"
        args = tuple(rng.randrange(max(0, symbols + i - 8), symbols + i) if rng.random() < 0.7 else rng.randrange(symbols + i) for _ in range(3))
        number = {"constant": NUMBERS, "power": POWERS, "scale": (2, -1, 0, Fraction(1, 3), 1), "compare": ("gt", "ge", "lt", "le", "eq", "ne")}.get(kind)
        steps.append(Step(kind, args, rng.choice(number) if number else None, tuple(rng.randrange(5) for _ in range(4))))
    return steps


def varied(rng: random.Random, steps: list[Step], symbols: int, wrong: float) -> list[Step]:
    """Other ways for most of the steps; a share is wrong."""
    out = []
    for i, s in enumerate(steps):
        if rng.random() < wrong:
            j = rng.randrange(3)
            s = rng.choice([replace(s, args=tuple(rng.randrange(symbols + i) if k == j else a for k, a in enumerate(s.args))),
                            replace(s, kind=rng.choice(["add", "sub", "mul", "neg", "maximum", "rows", "total"])), replace(s, way=9)])
        elif rng.random() < 0.7:
            s = replace(s, way=rng.randrange(1, 9))
        out.append(s)
    return out


def play(steps: list[Step]) -> Callable:
    def f(m, *symbols):
        pool = [m.reshape(s, SHAPE) for s in symbols]
        for s in steps:
            out = _plain(m, s, pool)
            pool.append(_otherwise(m, s, pool, out) if s.way else out)
        return pool[-1]
    return f


def _plain(m, s: Step, pool: list):
    a, b, c = (pool[i] for i in s.args)
    index = torch.tensor(s.index).reshape(SHAPE)
    match s.kind:
        case "add" | "sub" | "mul" | "maximum" | "div" | "matmul":
            return getattr(m, s.kind)(a, b)
        case "neg" | "exp" | "sin" | "log" | "sqrt" | "sign" | "abs" | "erf":
            return getattr(m, s.kind)(a)
        case "inverse":
            return m.inv(a)
        case "positive":                      # in which logarithms and the like are defined
            return m.add(m.mul(a, a), m.const(Fraction(1, 2)))
        case "compare":
            return m.compare(s.number, a, b)
        case "where":
            return m.where(m.compare("gt", a, b), b, c)
        case "rows":
            return m.expand(m.sum(a, [1], True), SHAPE)
        case "total":
            return m.expand(m.reshape(m.sum(a, [0, 1]), (1, 1)), SHAPE)
        case "cumsum":
            return m.cumsum(a, 1)
        case "take":
            return m.take([a], index)
        case "scatter":
            return m.scatter_sum(a, index.clamp(max=3), b)
        case "scale":
            return m.scale(a, s.number)
        case "power":
            return m.pow(a, s.number)
        case "constant":
            return m.add(m.mul(a, m.const(0)), m.const(s.number))
        case "masked":
            held = m.where(torch.tensor([[True, False], [True, True]]), a, m.const(-math.inf))
            return m.exp(m.sub(held, m.amax(held, [1], True)))
        case "norm":
            root = m.sqrt(m.add(m.mul(a, a), m.const(s.index[0] % 2)))
            return m.mul(root, root)
        case "asin":
            return m.opaque("asin", a)
        case "garbage":
            return m.take([a, m.garbage("g", 1)], index.clamp(min=1))
    raise LookupError(s.kind)


def _otherwise(m, s: Step, pool: list, out):
    """Another way; what divides or takes a logarithm anew may be undefined where the reference is defined."""
    a, b, _ = (pool[i] for i in s.args)
    match s.kind, s.way:
        case _, 9:
            return m.scale(out, 2)
        case "add", 1 | 2:
            return m.sub(a, m.neg(b))
        case "add", 3 | 4:
            return m.sub(m.add(m.add(a, b), a), a)
        case "sub", 1 | 2:
            return m.neg(m.sub(b, a))
        case "sub", 3 | 4:
            return m.add(m.scale(b, -1), a)
        case "mul" | "div", 1:
            return m.mul(m.neg(out), m.const(-1))
        case "mul", 2 | 3:
            return m.mul(m.mul(b, m.scale(a, 3)), m.const(Fraction(1, 3)))
        case "exp", 1 | 2:
            return m.inv(m.exp(m.neg(a)))
        case "matmul", 1 | 2 | 3:
            left = [m.take([a], torch.tensor([[k, k], [k + 2, k + 2]])) for k in (1, 2)]
            right = [m.take([b], torch.tensor([[k, k + 1], [k, k + 1]])) for k in (1, 3)]
            return m.add(m.mul(right[1], left[1]), m.mul(left[0], right[0]))
        case "rows", 1 | 2:
            return m.matmul(a, m.const(1, SHAPE))
        case "log", 1 | 2:
            return m.neg(m.log(m.inv(a)))
        case "maximum", 1 | 2:
            return m.maximum(b, a)
        case "maximum", 3:
            return m.add(a, m.maximum(m.sub(b, a), m.const(0)))
        case _, 5:
            return m.add(out, m.sub(b, b))
        case _, 6:
            return m.add(m.mul(b, m.const(0)), out)
        case _, 7:
            return m.mul(out, m.mul(b, m.inv(b)))
        case _, 8:
            return m.sub(m.add(out, m.log(b)), m.log(b))
    return out
