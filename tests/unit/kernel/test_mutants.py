"""One rule of the store, the folding, the claims or the sums changed at a time: the comparison with numbers must notice."""
import importlib
import inspect
import math
import sys
import types
from fractions import Fraction

import numpy as np
import pytest
import torch

from trainverify.relate.guess import Dictionary

from .numeric import FACTORS, Parts, mistakes, run

# (module, the program and the guesses that show the change, a piece of the source that occurs once, what stands there instead)
MUTANTS = {
    "neg: the sign of a constant": ("elements", "constants", "honest", "lambda a, _: -a)", "lambda a, _: a)"),
    "neg: infinities": ("elements", "infinities and values", "honest",
        "np.where(x == INF_ID, NINF_ID, np.where(x == NINF_ID, INF_ID, -1)))",
        "np.where(x == INF_ID, INF_ID, np.where(x == NINF_ID, INF_ID, -1)))"),
    "sub: y for 0 - y": ("elements", "constants and one value", "honest",
        "out[nothing] = self.neg(y[nothing], Some(prints, nothing))",
        "out[nothing] = y[nothing]"),
    "sub: the wrong operand stays": ("elements", "constants and one value", "honest",
        "np.where(y == ZERO_ID, x, np.where((x == y) & self._clean(x), ZERO_ID, -1))",
        "np.where(x == ZERO_ID, y, np.where((x == y) & self._clean(x), ZERO_ID, -1))"),
    "sub: x - x of the unclean": ("elements", "zeros of partial functions", "honest",
        "np.where((x == y) & self._clean(x), ZERO_ID, -1))\n        self._fold(out, x, y, Fraction.__sub__)",
        "np.where(x == y, ZERO_ID, -1))\n        self._fold(out, x, y, Fraction.__sub__)"),
    "sub: no order in rows": ("elements", "order", "honest",
        'self._finish("sub", None, np.stack([x, y], 1), out, prints)',
        'self._finish("sub", None, np.sort(np.stack([x, y], 1), 1), out, prints)'),
    "sub: constants": ("elements", "constants", "honest", "Fraction.__sub__", "Fraction.__add__"),
    "add: 0 wins": ("elements", "constants", "honest",
        "out = np.where(x == ZERO_ID, y, np.where(y == ZERO_ID, x, -1))",
        "out = np.where(x == ZERO_ID, x, np.where(y == ZERO_ID, x, -1))"),
    "mul: 0 times the unclean": ("elements", "zeros of partial functions", "honest",
        "np.where((x == ZERO_ID) & self._clean(y) | (y == ZERO_ID) & self._clean(x), ZERO_ID,",
        "np.where((x == ZERO_ID) | (y == ZERO_ID), ZERO_ID,"),
    "mul: -1": ("elements", "constants and one value", "honest", "out[negative] = self.neg(other, Some(prints, negative))", "out[negative] = other"),
    "mul: roots of the unclean": ("elements", "a root squared", "honest",
        "(self.store.code[x] == root) & self.store.clean[x] & (out < 0)",
        "(self.store.code[x] == root) & (out < 0)"),
    "mul: any function for a root": ("elements", "products and maxima", "honest",
        'root = self.store.operation("sqrt", None, 1)',
        'root = self.store.operation("exp", None, 1)'),
    "mul: the sign of an infinity": ("elements", "infinities and values", "honest",
        "known & (sign == NEGATIVE), _opposite(x), GARBAGE)",
        "known & (sign == NEGATIVE), x, GARBAGE)"),
    "mul: infinity times anything": ("elements", "infinities and values", "honest", "np.where(known & (sign == POSITIVE), x,", "np.where(known, x,"),
    "total: the last one stays": ("elements", "sums with zeros", "honest", "alone = rows[:, -2] == ZERO_ID", "alone = rows[:, 0] == ZERO_ID"),
    "total: pairs too early": ("elements", "sums with zeros", "honest",
        "pairs = np.flatnonzero((rows[:, -3] == ZERO_ID) & (out < 0))",
        "pairs = np.flatnonzero((rows[:, 0] == ZERO_ID) & (out < 0))"),
    "sum: infinities of both signs": ("elements", "infinities", "honest",
        "wrong = (rows == GARBAGE).any(1) | (up & down) | ((up | down) & ~others)",
        "wrong = (rows == GARBAGE).any(1) | ((up | down) & ~others)"),
    "dot: empty if one is": ("elements", "a mask", "honest",
        "none = some @ others.transpose(0, 2, 1) == 0",
        "none = some @ others.transpose(0, 2, 1) <= 1"),
    "dot: the unclean is dropped": ("elements", "a product with zeros", "honest",
        "out[none & clean[:, :, None] & tidy[:, None, :] & (out < 0)] = ZERO_ID",
        "out[none & (out < 0)] = ZERO_ID"),
    "inv: constants": ("elements", "constants and one value", "honest", "lambda a, _: 1 / a)", "lambda a, _: a)"),
    "exp: of minus infinity": ("elements", "infinities and values", "honest",
        "np.where(x == NINF_ID, ZERO_ID, np.where(x == INF_ID, INF_ID, -1)))",
        "np.where(x == NINF_ID, ONE_ID, np.where(x == INF_ID, INF_ID, -1)))"),
    "max: constants": ("elements", "constants and one value", "honest", "rows[:, 1].copy(), max)", "rows[:, 1].copy(), min)"),
    "max: the first of any": ("elements", "constants and one value", "honest",
        "np.where((out < 0) & (rows[:, 0] == rows[:, -1]), rows[:, 0], out)",
        "np.where(out < 0, rows[:, 0], out)"),
    "max: infinity is dropped": ("elements", "infinities and values", "honest",
        "np.where(up, INF_ID, np.where(none, NINF_ID, -1))",
        "np.where(up, NINF_ID, np.where(none, NINF_ID, -1))"),
    "compare: x > x": ("elements", "order", "honest", 'ONE_ID if op == "eq" else ZERO_ID, -1)', "ONE_ID, -1)"),
    "compare: no order in rows": ("elements", "order", "honest", 'if op == "eq" else [x, y], 1)', 'if op in ("eq", "gt") else [x, y], 1)'),
    "compare: infinities": ("elements", "infinities compared", "honest",
        '(a == b) if op == "eq" else (a > b)',
        '(a == b) if op == "eq" else (a >= b)'),
    "compare: of the unclean": ("elements", "zeros of partial functions", "honest",
        "out = np.where((x == y) & self._clean(x), ONE_ID",
        "out = np.where((x == y), ONE_ID"),
    "uninterpreted: infinities": ("elements", "a function of infinity", "honest",
        "np.where(((rows >= INF_ID) & (rows <= GARBAGE)).any(1), GARBAGE, -1)",
        "np.where((rows == INF_ID).any(1), ZERO_ID, -1)"),
    "store: attributes are not part of rows": ("store", "functions", "honest",
        "key = ((kind, attr), width)",
        "key = ((kind, attr if kind == 'dot' else self._attrs.setdefault(kind, attr)), width)"),
    "store: conditions are not judged": ("store", "zeros of partial functions", "honest", "if needs is not None and self.parallel:", "if False:"),
    "store: conditions of the parallel side are facts": ("store", "zeros of partial functions", "honest",
        "if needs is not None and not self.parallel:",
        "if needs is not None:"),
    "store: partial functions are total": ("store", "zeros of partial functions", "honest",
        'if kind == "uf" and self.parallel and not is_total(attr):',
        "if False:"),
    "store: log of what is not negative": ("store", "zeros of partial functions", "honest",
        '    if kind == "log":\n        return POSITIVE',
        '    if kind == "log":\n        return ANY'),
    "store: signs of differences": ("store", "signs", "honest", "s = np.stack([s[:, 0], _FLIP[s[:, 1]]], 1)", "s = np.stack([s[:, 0], s[:, 1]], 1)"),
    "store: a maximum is positive": ("store", "signs", "honest", "above = (s & (NEGATIVE | ZERO) == 0).any(1)", "above = (s & NEGATIVE == 0).any(1)"),
    "store: what reads the unclean": ("store", "zeros of partial functions", "honest",
        "clean = self.clean[rows].all(1)",
        "clean = self.clean[rows].any(1)"),
    "store: cleanness of vectors": ("store", "a product with zeros", "honest",
        "[inverse.reshape(rows.shape)].all(1)",
        "[inverse.reshape(rows.shape)].any(1)"),
    "claims: the factor is forgotten": ("claims", "multiples", "honest",
        "out[at] = reps[at] if c == 1 else self.multiples(c, reps[at])",
        "out[at] = reps[at]"),
    "claims: the inverse factor": ("claims", "multiples", "honest", "self.multiples(c, reps[at])", "self.multiples(1 / c, reps[at])"),
    "claims: the factor is not in the obligation": ("claims", "differences", "rolled", "            if c != 1:\n", "            if c == 2:\n"),
    "claims: what is not proved is merged": ("claims", "zeros of partial functions", "honest", "at = at[proved]", "at = at[proved | True]"),
    "claims: refuted is good enough": ("claims", "zeros of partial functions", "honest",
        'if isinstance(verdict, Proved):\n                ok[index], self._hopeful = True, self._effort\n                self.counts[f"proved {verdict.how}"] += len(index)',
        "if isinstance(verdict, (Proved, Refuted)):\n                ok[index] = True"),
    "claims: one row for all of its shape": ("claims", "differences", "rolled",
        "first, kind = distinct(names)\n        width =",
        "first, kind = distinct(names * 0)\n        width ="),
    "claims: what needs unfolding is proved": ("claims", "many differences", "rolled", "if pattern.unfold is None:", "if True:"),
    "patterns: any row is an instance": ("patterns", "many differences", "rolled",
        "ok = (rows[:, self.again] == rows[:, self.first]).all(1)",
        "ok = np.ones(len(rows), bool)"),
    "patterns: one equality is enough": ("patterns", "many differences", "rolled", "self.first]).all(1)", "self.first]).any(1)"),
    "patterns: of any sign": ("patterns", "a positive one of many", "aligned 0", "if self.signs is not None and ok.any():", "if False:"),
    "claims: signs are not part of names": ("claims", "a positive one", "aligned 0",
        "self.store.sign[named.rows]], 1) if partial",
        "self.store.sign[named.rows[:1]].repeat(len(rows), 0)], 1) if partial"),
    "claims: unclean leaves": ("claims", "zeros of partial functions", "honest",
        "good = np.flatnonzero(self.store.clean[rows].all(1))",
        "good = np.arange(len(rows))"),
    "written: partial functions are written out": ("written", "zeros of partial functions", "honest", 'kind == "uf" and not is_total(attr)', "False"),
    "claims: one unfolded row settles all": ("claims", "differences", "rolled", "key[2], limit, depth + 1)", "key[2], limit, depth + 1).any()"),
    "claims: unfolding forgets the factor": ("claims", "differences", "rolled", "key[2], limit, depth + 1)", "Fraction(1), limit, depth + 1)"),
    "claims: verdicts are known by shape": ("claims", "differences", "rolled",
        "at = (key, names.tobytes(), None if signs is None else signs.tobytes())",
        "at = (key, None, None)"),
    "shapes: differences are sums": ("shapes", "signs", "honest", 'terms.add("neg", None, (args[1],))', "args[1]"),
    "rename: units of any shape change places": ("rename", "differences", "rolled",
        "groups.setdefault(tuple(shapes[a] for a in unit), [])",
        "groups.setdefault(len([p for a in unit for p in places[a]]), [])"),
    "rename: differences are commutative": ("rename", "order", "aligned 0",
        "if node.kind in COMMUTATIVE:\n            units =",
        "if node.kind in COMMUTATIVE or node.kind == 'compare':\n            units ="),
    "sums: the sign of a difference": ("sums", "another sign", "aligned 0",
        "return [(c, rows[:, 0]), (-c, rows[:, 1])], rows[:0, 0]",
        "return [(c, rows[:, 0]), (c, rows[:, 1])], rows[:0, 0]"),
    "sums: coefficients of products": ("sums", "another factor", "aligned 0", "parts.append((c * store.constants[factor],", "parts.append((c,"),
    "sums: a product loses its factor": ("sums", "another factor", "aligned 0",
        "return (parts, ids[rest]) if parts else None",
        "return ([(c, rows[:, 0])], rows[:0, 0])"),
    "sums: undefined summands": ("sums", "zeros of partial functions", "honest",
        "if count > LIMIT or not store.clean[ids].all():",
        "if count > LIMIT:"),
}
KERNEL = "trainverify.kernel."


def mutated(what: str) -> Parts:
    """The classes of the kernel with one rule changed; all modules that use it are loaded anew, under the same names."""
    module, _, _, old, new = MUTANTS[what]
    changed = importlib.import_module(KERNEL + module)
    source = inspect.getsource(changed)
    assert source.count(old) == 1, f"the source changed: {old!r} occurs {source.count(old)} times"
    made: dict[str, types.ModuleType] = {}
    for name in ("patterns", "rename", "shapes", "store", "sums", "written", "claims", "elements"):
        text = source.replace(old, new) if name == module else inspect.getsource(importlib.import_module(KERNEL + name))
        made[name] = loaded(KERNEL + name, text, {KERNEL + k: m for k, m in made.items()})
    made["store"].Store._attrs = {}           # for the mutant that takes the first attribute of a kind for that of all
    return Parts(made["store"].Store, made["claims"].Claims, made["elements"].Elements)


def loaded(name: str, source: str, instead: dict[str, types.ModuleType]) -> types.ModuleType:
    """A module of this source, to which other modules are the given ones."""
    module = types.ModuleType(name)
    kept = {k: sys.modules[k] for k in (*instead, name)}
    try:
        sys.modules.update(instead, **{name: module})
        exec(compile(source, f"<mutant of {name}>", "exec"), module.__dict__)
    finally:
        sys.modules.update(kept)
    return module


# ---- the corpus: small programs, of which each rule matters to one
def both(f):
    return f, f


def alone(f):
    """The parallel side's; the reference is defined everywhere."""
    return lambda m, x, y: m.exp(x), f


def beside(f):
    """The same beside exp y, of which it may claim to be."""
    return lambda m, x, y: (m.exp(x), m.exp(y)), f


def partial(m):
    return m.inv, m.log, m.sqrt, lambda v: m.opaque("asin", v)


def zeros(m, x):
    return m.mul(x, m.const(0))


def hidden(m, x, v):
    """A constant that is an identifier like any other."""
    return m.add(zeros(m, x), m.const(v))


def many(m, x, y):
    """Twelve pairs, more than the rows of a claim that are looked at one by one."""
    return m.take([x], 1 + torch.arange(12) // 4), m.take([y], 1 + torch.arange(12) % 4)


def a_positive_one(pairs):
    """Only x[0] is known to be positive."""
    def reference(m, x, y):
        a, b = pairs(m, x, y)
        return m.log(m.take([x], torch.tensor([1]))), m.mul(a, m.exp(b))

    def parallel(m, x, y):
        a, b = pairs(m, x, y)
        return m.sqrt(m.mul(m.mul(a, m.exp(b)), m.mul(a, m.exp(b))))
    return reference, parallel


def differences(pairs):
    def reference(m, x, y):
        a, b = pairs(m, x, y)
        return m.sub(m.mul(a, b), m.mul(m.exp(a), m.exp(b)))

    def parallel(m, x, y):
        a, b = pairs(m, x, y)
        return m.sub(m.exp(m.add(a, b)), m.mul(a, b)), m.sub(m.mul(b, a), m.exp(m.add(b, a)))
    return reference, parallel


CORPUS = {
    "constants": both(lambda m, x, y: m.exp(m.add(m.neg(hidden(m, x, 2)), m.sub(hidden(m, x, 3), hidden(m, x, 5))))),
    "constants and one value": both(lambda m, x, y: (m.inv(hidden(m, x, 4)), m.maximum(hidden(m, x, 2), hidden(m, x, 3)), m.sub(zeros(m, x), y),
                                                     m.sub(y, zeros(m, x)), m.mul(y, hidden(m, x, -1)))),
    "order": both(lambda m, x, y: (m.sub(x, y), m.sub(y, x), m.compare("gt", x, y), m.compare("gt", y, x), m.compare("gt", x, x), m.compare("eq", x, x))),
    "products and maxima": both(lambda m, x, y: (m.mul(m.exp(x), m.exp(x)), m.maximum(x, y), m.maximum(y, m.exp(x)), m.amax(m.stack([x, y, m.exp(x)]), [0]))),
    "sums with zeros": both(lambda m, x, y: (m.sum(m.stack([zeros(m, x), x, y]), [0]), m.sum(m.stack([zeros(m, x), x, y, m.exp(y)]), [0]),
                                             m.sum(m.stack([zeros(m, x), zeros(m, x), y]), [0]))),
    "infinities": alone(lambda m, x, y: [m.add(hidden(m, x, a), hidden(m, x, b)) for a in (math.inf, 2) for b in (-math.inf, math.inf)]),
    "infinities and values": both(lambda m, x, y: [m.neg(hidden(m, x, math.inf)), m.exp(hidden(m, x, -math.inf)), m.maximum(x, hidden(m, x, math.inf)),
                                                   m.add(x, hidden(m, x, -math.inf)), m.mul(hidden(m, x, math.inf), hidden(m, x, -2))]),
    "infinity times a value": alone(lambda m, x, y: m.mul(hidden(m, x, math.inf), y)),
    "infinities compared": both(lambda m, x, y: [m.compare(op, hidden(m, x, a), hidden(m, x, b)) for op in ("gt", "eq")
                                                 for a in (math.inf, 0) for b in (math.inf, -math.inf)]),
    "a function of infinity": alone(lambda m, x, y: m.opaque("atan", hidden(m, x, math.inf))),
    "garbage": alone(lambda m, x, y: (m.opaque("atan", m.garbage("g", 4)), m.opaque("atan2", x, m.garbage("g", 4)), m.add(x, m.garbage("g", 4)),
                                      m.add(hidden(m, x, math.inf), m.garbage("g", 4)))),
    "functions": both(lambda m, x, y: (m.opaque("atan", x), m.opaque("sinh", x), m.opaque("erfc", x), m.compare("eq", x, y))),
    "a mask": both(lambda m, x, y: m.matmul(m.where(torch.tensor([[True, False], [True, True]]), m.reshape(x, (2, 2)), m.const(0)), m.reshape(y, (2, 2)))),
    "zeros of partial functions": beside(lambda m, x, y: [m.add(m.exp(y), z) for f in partial(m)
                                                          for z in (zeros(m, f(x)), m.sub(f(x), f(x)), m.compare("gt", f(x), f(x)))]),
    "partial functions cancel": beside(lambda m, x, y: [m.sub(m.add(m.exp(y), f(x)), f(x)) for f in partial(m)]),
    "a root squared": beside(lambda m, x, y: m.mul(m.sqrt(x), m.sqrt(x))),
    "a product with zeros": beside(lambda m, x, y: m.add(m.exp(y), m.reshape(m.matmul(m.reshape(m.inv(m.sub(x, y)), (2, 2)), m.const(0, (2, 2))), (4,)))),
    "signs": beside(lambda m, x, y: [m.add(m.exp(y), zeros(m, f)) for f in (m.log(m.maximum(x, m.const(0))), m.log(m.sub(m.exp(x), m.exp(y))))]),
    "a sum with an inverse": beside(lambda m, x, y: m.add(m.exp(y), zeros(m, m.add(x, m.inv(y))))),
    "a product with inverses": beside(lambda m, x, y: m.add(m.exp(y), m.expand(zeros(m, m.sum(m.matmul(m.reshape(m.inv(x), (2, 2)),
                                                                                                       m.reshape(y, (2, 2))))), (4,)))),
    "multiples": (lambda m, x, y: m.exp(m.mul(x, y)),
                  lambda m, x, y: [m.scale(m.mul(m.exp(m.mul(y, x)), m.exp(m.sub(m.mul(y, x), m.mul(x, y)))), c) for c in (2, Fraction(1, 2), 3, -1)]),
    "multiples of sums": (lambda m, x, y: m.sum(m.mul(x, y)),
                          lambda m, x, y: (m.sum(m.mul(m.scale(x, 2), y)), m.sum(m.mul(m.scale(x, 3), y)), m.neg(m.sum(m.mul(x, y))))),
    "a positive one": a_positive_one(lambda m, x, y: (x, y)),
    "a positive one of many": a_positive_one(many),
    "differences": differences(lambda m, x, y: (x, y)),
    "many differences": differences(many),
    "another pair": (lambda m, x, y: m.add(m.exp(y), m.sin(x)), lambda m, x, y: m.add(m.exp(x), m.sin(y))),
    "the other way round": (lambda m, x, y: m.compare("gt", x, y), lambda m, x, y: m.compare("gt", y, x)),
    "another sign": (lambda m, x, y: m.add(m.add(x, y), m.exp(x)), lambda m, x, y: m.add(m.sub(x, y), m.exp(x))),
    "another factor": (lambda m, x, y: m.add(m.add(x, y), m.exp(x)), lambda m, x, y: m.add(m.add(m.scale(x, 2), y), m.exp(x))),
    "a sum of products": (lambda m, x, y: m.add(m.mul(x, y), m.exp(x)), lambda m, x, y: m.add(m.mul(x, m.exp(y)), m.exp(x))),
    "in other words": (lambda m, x, y: m.exp(m.add(m.mul(x, y), m.exp(x))), lambda m, x, y: m.mul(m.exp(m.mul(y, x)), m.exp(m.exp(x)))),
}


class Aligned(Dictionary):
    """Whatever a call asks for is what an earlier call of as many elements gave, `back` calls ago; factors are wrong."""

    def __init__(self, store, back: int):
        super().__init__(store, FACTORS)
        self.back, self.calls = back, []

    def learn(self, prints: np.ndarray, ids: np.ndarray) -> None:
        super().learn(prints, ids)
        self.calls.append(ids)

    def ambiguous(self, prints: np.ndarray) -> np.ndarray:
        return np.zeros(len(prints), bool)

    def learn_other(self, prints: np.ndarray, code: int, rows: np.ndarray, ids: np.ndarray) -> None:
        self.calls.append(ids)

    def find(self, prints: np.ndarray) -> np.ndarray:
        calls = [ids for ids in self.calls if len(ids) == len(prints)]
        return calls[-1 - self.back % len(calls)] if calls else super().find(prints)

    def scales(self, index: np.ndarray, prints, code: int, rows: np.ndarray):
        for c in self.factors:
            yield c, super().find(prints.of(index))


class Rolled(Dictionary):
    """Right about the first element of a call, and about each other one what is right of its neighbour; of factors nothing is right."""

    def find(self, prints: np.ndarray) -> np.ndarray:
        out = super().find(prints)
        out[1:] = np.roll(out[1:], 1)
        return out

    def scales(self, index: np.ndarray, prints, code: int, rows: np.ndarray):
        for c in self.factors:
            yield c, super().find(prints.of(index))


GUESSES = {"honest": lambda store: Dictionary(store, FACTORS), "rolled": lambda store: Rolled(store, FACTORS),
           **{f"aligned {k}": lambda store, k=k: Aligned(store, k) for k in range(3)}}


def mistake(parts: Parts, program: str, guesses: str) -> str:
    found = mistakes(run(*CORPUS[program], (4, 4), parts=parts, points=11, guesses=GUESSES[guesses]))
    return found[0] if found else ""


@pytest.mark.parametrize("guesses", GUESSES)
def test_the_kernel_as_it_is_makes_no_mistake(guesses):
    for name in CORPUS:
        assert mistake(Parts(), name, guesses) == "", name


@pytest.mark.parametrize("what", MUTANTS)
def test_mutants_are_noticed(what):
    assert mistake(mutated(what), *MUTANTS[what][1:3])
