"""The algebra of contracts: elements are named by the blocks that they come from (trusted).

One replay of both programs, in which equal operations on equal patterns are looked up. What a parallel value is in the reference's terms is
a theorem, proved once for all blocks of its form: 126 equal layers cost one, and ranks that do the same cost nothing more.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import torch

from trainverify.algebra.base import Number
from trainverify.algebra.fieldvalue import FieldValue, broadcast
from trainverify.algebra.real import Real
from trainverify.algebra.terms import TermValue
from trainverify.contracts.docket import Docket
from trainverify.contracts.evaluate import Evaluator
from trainverify.contracts.graph import FIRST, LEAF, Graph, Index, digest
from trainverify.contracts.guess import Guesses, Numbers
from trainverify.contracts.patterns import CONSTANT, I32, I64, UNKNOWN, Blocks, Pattern, Patterns, bits, contents, through
from trainverify.contracts.predict import Predictor
from trainverify.contracts.theorems import Theorem, Theorems
from trainverify.kernel.store import sign_of
from trainverify.kernel.terms import ANY


class Value:
    """A pattern over blocks, or a constant (whose pattern is made when asked for)."""

    __slots__ = ("shape", "pattern", "blocks", "constant")

    def __init__(self, shape: tuple[int, ...], pattern: Pattern | None, blocks: Blocks, constant: TermValue | None = None):
        self.shape, self.pattern, self.blocks, self.constant = shape, pattern, blocks, constant

    def __repr__(self) -> str:
        return f"Value({self.constant or self.pattern}, blocks={self.blocks})"


def held(num: torch.Tensor) -> TermValue:
    """A constant with these float64 contents."""
    return TermValue(FieldValue(tuple(num.shape), num=num))


class Cell:
    """A flat buffer."""

    __slots__ = ("value",)

    def __init__(self, value: Value):
        self.value = value


class Contracts:
    """firsts: the number of each symbol block's first symbol. values: of all symbols, as recorded (float64). factors: likely ones."""

    name = "terms"

    def __init__(self, seed: int, firsts: Sequence[int], values: np.ndarray, factors: Sequence[Fraction], docket: Docket):
        self.patterns, self.graph = Patterns(), Graph()
        self.evaluator = Evaluator(seed, self.patterns, self.graph, factors)
        self._constants = self.evaluator.constants
        self._results: dict[tuple[int, Blocks], Value] = {}
        self._firsts = np.array([*firsts, len(values)], I64)
        real = Real(None)
        parts = np.split(values, self._firsts[1:-1]) if len(firsts) else []
        self.numbers = Numbers(self.graph, real, [real.data(torch.from_numpy(part)) for part in parts])
        self.theorems = Theorems(self.graph, self.evaluator, Guesses(self.graph, self.numbers, factors), Predictor(real), docket)
        for n in np.diff(self._firsts).tolist():
            self.graph.add(LEAF, (), n, True)
        self.nodes = Nodes(self.graph, self.evaluator.field.constants.meaning)

    def begin_side(self, side: str) -> None:
        self.graph.parallel = side == "parallel"
        self.evaluator.begin_side(side)

    def at(self, rank: int, index: int, span: int, phase: str = "") -> None:
        """The replay's place, which roundings of constants note."""
        self.evaluator.field.at(rank, index, span, phase)

    # ---- values
    def pattern(self, v: Value) -> Pattern:
        if v.pattern is None:
            places = bits(v.constant.f.num)
            if len(places) and (places == places[0]).all():
                v.pattern = self.patterns.everywhere(v.shape, int(places[0]))
            else:
                v.pattern = self.patterns.make(v.shape, np.full(len(places), CONSTANT, I32), places)[0]
        return v.pattern

    def _made(self, p: Pattern, blocks: Blocks) -> Value:
        if p.slots or (p.place == UNKNOWN).any():
            return Value(p.shape, p, blocks)
        return Value(p.shape, p, (), held(contents(p.place).reshape(p.shape)))

    def _constant(self, v: TermValue) -> Value:
        return Value(tuple(v.shape), None, (), v)

    def _operation(self, name: str, attr, *values: Value, plainly: bool = False) -> Value:
        """The result of a micro-operation, not all of whose operands are constants. plainly: not to be looked for in the reference."""
        patterns = tuple([self.pattern(v) for v in values])
        blocks, maps = self.patterns.merge(*[v.blocks for v in values])
        signature = self.graph.sign(name, attr, patterns, maps, len(blocks))
        found = self._results.get((signature, blocks))
        if found is None:
            found = self._results[signature, blocks] = self._new(signature, blocks, plainly)
        return found

    def _new(self, signature: int, blocks: Blocks, plainly: bool) -> Value:
        out = self.evaluator.outcome(signature, blocks)
        if not out.new:
            return self._made(out.pattern, tuple([blocks[u] for u in out.used]))
        block = self.graph.find(signature, blocks)      # a factor's product may be there
        if block is None:
            block = self.graph.add(signature, blocks, out.size, out.clean)
        held = (*blocks, block)
        value = Value(out.pattern.shape, out.pattern, tuple([held[u] for u in out.used]))
        if not self.graph.parallel or plainly:
            return value
        found = self.theorems.about(block)
        return value if found is None else self._replaced(value, block, *found)

    def _replaced(self, value: Value, block: int, theorem: Theorem, blocks: Blocks) -> Value:
        """The value with the block's elements as the theorem has them."""
        whole = self._made(theorem.pattern, blocks)
        if theorem.factor != 1:
            whole = self._operation("mul", None, self.const(theorem.factor), whole, plainly=True)
        open_ = theorem.open
        at = value.blocks.index(block)
        merged, (mine, theirs) = self.patterns.merge(value.blocks, whole.blocks)
        p, q = value.pattern, self.pattern(whole)

        def make():
            slot, place = through(p, mine).copy(), p.place.copy()
            here = p.slot == at
            if open_ is not None:
                here &= ~np.isin(p.place, open_)
            slot[here], place[here] = through(q, theirs)[p.place[here]], q.place[p.place[here]]
            return value.shape, slot, place
        r, used = self.patterns.joined(("replaced", p.number, at, q.number, mine, theirs, None if open_ is None else open_.tobytes()), make)
        return self._made(r, tuple([merged[u] for u in used]))

    # ---- constants
    def const(self, x: Number, shape: Sequence[int] = ()) -> Value:
        return self._constant(self._constants.const(x, shape))

    def data(self, t: torch.Tensor) -> Value:
        return self._constant(self._constants.data(t))

    def is_const(self, a: Value) -> bool:
        return a.constant is not None

    def to_float(self, a: Value) -> torch.Tensor | None:
        return None if a.constant is None else a.constant.f.num

    def _apply(self, name: str, attr, *values: Value) -> Value:
        if all(v.constant is not None for v in values):
            operands = [v.constant for v in values]
            if name in ("sum", "amax", "amin"):
                return self._constant(getattr(self._constants, name)(operands[0], *attr))
            if name in ("compare", "opaque"):
                return self._constant(getattr(self._constants, name)(attr, *operands))
            return self._constant(getattr(self._constants, name)(*operands, *([] if attr is None else [attr])))
        return self._operation(name, attr, *values)

    # ---- ring
    def add(self, a, b):
        return self._apply("add", None, a, b)

    def sub(self, a, b):
        return self._apply("sub", None, a, b)

    def neg(self, a):
        return self._apply("neg", None, a)

    def mul(self, a, b):
        return self._apply("mul", None, a, b)

    def inv(self, a):
        return self._apply("inv", None, a)

    def div(self, a, b):
        return self._apply("div", None, a, b)

    def scale(self, a, c: Number):
        return self.mul(a, self.const(c))

    def sum(self, a, dims: Sequence[int] | None = None, keepdim: bool = False):
        return self._apply("sum", (None if dims is None else tuple(dims), keepdim), a)

    def cumsum(self, a, dim: int):
        return self._apply("cumsum", dim, a)

    def matmul(self, a, b):
        return self._apply("matmul", None, a, b)

    # ---- functions
    def exp(self, a):
        return self._apply("exp", None, a)

    def log(self, a):
        return self._apply("log", None, a)

    def sqrt(self, a):
        return self._apply("sqrt", None, a)

    def pow(self, a, q: Number):
        return self._apply("pow", q, a)

    def power(self, a, b):
        return self._apply("power", None, a, b)

    def sin(self, a):
        return self._apply("sin", None, a)

    def cos(self, a):
        return self._apply("cos", None, a)

    def erf(self, a):
        return self._apply("erf", None, a)

    def opaque(self, tag: str, *args):
        return self._apply("opaque", tag, *args)

    # ---- order
    def maximum(self, a, b):
        return self._apply("maximum", None, a, b)

    def minimum(self, a, b):
        return self._apply("minimum", None, a, b)

    def amax(self, a, dims: Sequence[int] = (), keepdim: bool = False):
        return self._apply("amax", (tuple(dims), keepdim), a)

    def amin(self, a, dims: Sequence[int] = (), keepdim: bool = False):
        return self._apply("amin", (tuple(dims), keepdim), a)

    def peak(self, a, dims):
        return None

    def compare(self, op: str, a, b):
        return self._apply("compare", op, a, b)

    def where(self, mask, a, b):
        if not isinstance(mask, torch.Tensor):
            if mask.constant is None:
                return self._operation("where", None, mask, a, b)
            mask = mask.constant.f.num != 0
        if a.constant is not None and b.constant is not None:
            return self._constant(self._constants.where(mask, a.constant, b.constant))
        shape = broadcast(tuple(mask.shape), a.shape, b.shape)
        x, y = self.expand(a, shape), self.expand(b, shape)
        p, q = self.pattern(x), self.pattern(y)
        merged, (mine, theirs) = self.patterns.merge(x.blocks, y.blocks)

        def make():
            chosen = mask.expand(shape).reshape(-1).numpy()
            return shape, np.where(chosen, through(p, mine), through(q, theirs)), np.where(chosen, p.place, q.place)
        r, used = self.patterns.joined(("where", digest(mask), p.number, q.number, mine, theirs), make)
        return self._made(r, tuple([merged[u] for u in used]))

    def sign(self, a):
        return self._apply("sign", None, a)

    def abs(self, a):
        return self._apply("abs", None, a)

    # ---- movement
    def _moved(self, a: Value, key: tuple, move: Callable[[torch.Tensor], torch.Tensor]) -> Value:
        p, used = self.patterns.moved(self.pattern(a), key, move)
        return self._made(p, tuple([a.blocks[u] for u in used]))

    def reshape(self, a, shape: Sequence[int]):
        shape = tuple(shape)
        if shape == a.shape:
            return a
        if a.constant is not None:
            return self._constant(self._constants.reshape(a.constant, shape))
        return self._moved(a, ("reshape", shape), lambda t: t.reshape(shape))

    def permute(self, a, dims: Sequence[int]):
        dims = tuple(dims)
        if a.constant is not None:
            return self._constant(self._constants.permute(a.constant, dims))
        return self._moved(a, ("permute", dims), lambda t: t.permute(dims))

    def expand(self, a, shape: Sequence[int]):
        shape = tuple(shape)
        if shape == a.shape:
            return a
        if a.constant is not None:
            return self._constant(self._constants.expand(a.constant, shape))
        return self._moved(a, ("expand", shape), lambda t: t.expand(shape))

    def take(self, sources: Sequence[Value], index: torch.Tensor):
        if all(s.constant is not None for s in sources):
            return self._constant(self._constants.take([s.constant for s in sources], index))
        patterns = [self.pattern(s) for s in sources]
        merged, maps = self.patterns.merge(*[s.blocks for s in sources])

        def make():
            slot = np.concatenate([np.full(1, CONSTANT, I32), *(through(p, slots) for p, slots in zip(patterns, maps))])
            place = np.concatenate([np.zeros(1, I64), *(p.place for p in patterns)])
            at = index.reshape(-1).numpy()
            return tuple(index.shape), slot[at], place[at]
        p, used = self.patterns.joined(("take", digest(index), tuple([p.number for p in patterns]), maps), make)
        return self._made(p, tuple([merged[u] for u in used]))

    def scatter_sum(self, base, index: torch.Tensor, src):
        if base.constant is not None and src.constant is not None:
            return self._constant(self._constants.scatter_sum(base.constant, index, src.constant))
        return self._operation("scatter_sum", Index(index), base, src)

    def cast(self, a, dtype: str):
        return a

    def stack(self, values: Sequence[Value]):
        n = math.prod(values[0].shape)
        return self.take(values, torch.arange(1, 1 + n * len(values)).reshape(len(values), *values[0].shape))

    # ---- memory cells
    def symbols(self, name: str, first: int, n: int):
        if not n:
            return self._constant(self._constants.const(0, (0,)))
        low = int(np.searchsorted(self._firsts, first, side="right")) - 1
        if self._firsts[low] == first and self.graph.size[low] == n:
            return Value((n,), self.patterns.block((n,)), (low,))
        numbers = np.arange(first, first + n)
        slot = np.searchsorted(self._firsts, numbers, side="right") - 1
        p, used = self.patterns.make((n,), slot, numbers - self._firsts[slot])
        return Value((n,), p, used)

    def garbage(self, key: str, n: int):
        return Value((n,), self.patterns.everywhere((n,), UNKNOWN), ())

    def cell(self, flat: Value) -> Cell:
        return Cell(flat)

    def load(self, cell: Cell, offset: int, size: Sequence[int], stride: Sequence[int]) -> Value:
        size, stride, v = tuple(size), tuple(stride), cell.value
        if v.constant is not None:
            num = v.constant.f.num.reshape(-1).contiguous().as_strided(size, stride, offset).clone()
            return self._constant(held(num))
        return self._moved(v, ("load", offset, size, stride), lambda t: t.as_strided(size, stride, offset))

    def store(self, cell: Cell, offset: int, size: Sequence[int], stride: Sequence[int], v: Value) -> Cell:
        """A new cell: what was loaded, or is held as a copy, stays as it is."""
        size, stride, old = tuple(size), tuple(stride), cell.value
        n = old.shape[0]
        if old.constant is not None and v.constant is not None:
            num = old.constant.f.num.reshape(-1).clone()
            num.as_strided(size, stride, offset).copy_(v.constant.f.num)
            return Cell(self._constant(held(num)))
        p, q = self.pattern(old), self.pattern(v)
        merged, (mine, theirs) = self.patterns.merge(old.blocks, v.blocks)

        def make():
            at = torch.arange(n).as_strided(size, stride, offset).reshape(-1).numpy()
            slot, place = through(p, mine).copy(), p.place.copy()
            slot[at], place[at] = through(q, theirs), q.place
            return (n,), slot, place
        r, used = self.patterns.joined(("store", offset, size, stride, p.number, q.number, mine, theirs), make)
        return Cell(self._made(r, tuple([merged[u] for u in used])))

    # ---- comparison of results
    def ids(self, v: Value) -> torch.Tensor:
        """A number per element: equal numbers are equal values. Constants have negative ones."""
        p = self.pattern(v)
        bases = np.array([*(self.graph.base[b] for b in v.blocks), 0], I64)
        out = bases[p.slot] + p.place
        fixed = p.slot == CONSTANT
        if fixed.any():
            values, inverse = np.unique(p.place[fixed], return_inverse=True)
            out[fixed] = np.array([self.nodes.number(x) for x in values.tolist()], I64)[inverse.reshape(-1)]
        return torch.from_numpy(out).reshape(p.shape)

    def equal(self, a, b) -> torch.Tensor:
        """Proved equal: the same element, of a number that is defined wherever the reference is."""
        x, y = torch.broadcast_tensors(self.ids(a), self.ids(b))
        return (x == y) & torch.from_numpy(self.nodes.clean[x.numpy()])

    def fingerprint(self, v) -> torch.Tensor:
        return self.ids(v)


class Nodes:
    """What is known of elements by their numbers, under the names that the kernel's store has for it."""

    def __init__(self, graph: Graph, meaning: Callable):
        self._graph, self._meaning = graph, meaning
        self._bases, self._clean = np.zeros(0, I64), np.zeros(1, bool)
        self._numbers: dict[int, int] = {}
        self._finite = [False]
        self.constants: dict[int, Fraction] = {}

    def number(self, place: int) -> int:
        """The number of a constant, by its bits."""
        found = self._numbers.get(place)
        if found is None:
            found = self._numbers[place] = -len(self._finite)
            x = contents(np.array([place], I64)).item()
            self._finite.append(math.isfinite(x))
            meaning = self._meaning(abs(x)) if math.isfinite(x) else None
            if meaning is not None and meaning[1] == 1:
                self.constants[found] = meaning[0] if x > 0 else -meaning[0]
        return found

    @property
    def clean(self) -> Nodes:
        """Whether elements are defined wherever the reference is: nodes.clean[numbers]."""
        if len(self._bases) < len(self._graph.base):
            self._bases, self._clean = np.array(self._graph.base, I64), np.array([*self._graph.clean, False], bool)      # the last: no block
        return self

    def __getitem__(self, ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(ids)
        fixed = ids < 0
        owner = np.searchsorted(self._bases, np.where(fixed, FIRST, ids), side="right") - 1
        return np.where(fixed, np.array(self._finite)[np.where(fixed, -ids, 0)], self._clean[owner])

    @property
    def sign(self) -> Signs:
        return Signs(self.constants)


class Signs:
    """Signs of constants; of other elements nothing is known."""

    def __init__(self, constants: dict[int, Fraction]):
        self._constants = constants

    def __getitem__(self, i: int) -> int:
        return sign_of(self._constants[i]) if i in self._constants else ANY
