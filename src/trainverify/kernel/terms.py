"""Terms and obligations as plain data (trusted: it fixes what an obligation means).

A term is a node of a list in which arguments stand before their users. The meaning is over the real numbers and strict: a term
has a value iff all of its arguments have and the operation itself is defined there.

    const q              the rational q
    leaf i               the i-th universally quantified real
    add, mul, max        sum, product and greatest of one or more arguments
    dot a b c d ..       a*b + c*d + ..
    neg, scl q           -a, and q*a for a rational q
    inv                  1/a, defined for a != 0
    exp, sin, cos        total
    log                  defined for a > 0
    sqrt                 defined for a >= 0, never negative
    pow q                a^q. Integer q: a power (a^0 is 1 everywhere), a negative one needs a != 0. Else a >= 0, and a > 0 for q < 0.
    compare op           1 if `a op b` else 0; op is gt, ge, lt, le, eq or ne
    uf tag               an unknown total function of its arguments, the same for every use of the tag
"""
from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

Attr = Fraction | int | str | None

# A sign is the set of cases that are possible: negative, zero, positive.
NEGATIVE, ZERO, POSITIVE = 1, 2, 4
NONPOSITIVE, NONZERO, NONNEGATIVE, ANY = 3, 5, 6, 7

ORDERS = ("gt", "ge", "lt", "le", "eq", "ne")
COMMUTATIVE = frozenset({"add", "mul", "max", "dot"})
ARITY = {"const": 0, "leaf": 0, "neg": 1, "scl": 1, "inv": 1, "exp": 1, "log": 1, "sqrt": 1, "pow": 1, "sin": 1, "cos": 1, "compare": 2}
VARIADIC = frozenset({"add", "mul", "max", "dot", "uf"})


class Node(NamedTuple):
    kind: str
    attr: Attr
    args: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Obligation:
    """The claim: for all reals for which `lhs` and the nodes in `given` are defined and have the given signs, `rhs` is defined and equals `lhs`.

    lhs is the reference's term and rhs the parallel program's. Who states an obligation answers for `given`, pairs (node, sign).
    """

    nodes: tuple[Node, ...]
    lhs: int
    rhs: int
    given: tuple[tuple[int, int], ...] = ()

    @property
    def leaves(self) -> int:
        """One more than the highest leaf number."""
        return max((n.attr + 1 for n in self.nodes if n.kind == "leaf"), default=0)

    @property
    def roots(self) -> tuple[int, ...]:
        return (self.lhs, self.rhs, *(i for i, _ in self.given))


class Terms:
    """Builds node lists; equal nodes get one number."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._index: dict[Node, int] = {}

    def add(self, kind: str, attr: Attr = None, args: Iterable[int] = ()) -> int:
        node = Node(kind, attr, tuple(args))
        check_node(node, len(self.nodes))
        return self.intern(node)

    def intern(self, node: Node) -> int:
        """As `add`, for a node that is known to be well formed."""
        i = self._index.setdefault(node, len(self.nodes))
        if i == len(self.nodes):
            self.nodes.append(node)
        return i

    def obligation(self, lhs: int, rhs: int, given: Iterable[tuple[int, int]] = ()) -> Obligation:
        return Obligation(tuple(self.nodes), lhs, rhs, tuple(given))


def check_node(node: Node, position: int) -> None:
    """Raise ValueError unless the node is well formed at this position of its list."""
    kind, attr, args = node
    if args and not (set(map(type, args)) == {int} and min(args) >= 0 and max(args) < position):
        raise ValueError(f"node {position} ({kind}) has an argument that does not stand before it: {args}")
    if kind in ARITY:
        arity = len(args) == ARITY[kind]
    else:
        arity = kind in VARIADIC and (len(args) > 0 or kind == "uf") and (kind != "dot" or len(args) % 2 == 0)
    if kind in ("const", "scl", "pow"):
        attribute = type(attr) is Fraction
    elif kind == "leaf":
        attribute = type(attr) is int and attr >= 0
    elif kind == "compare":
        attribute = attr in ORDERS
    else:
        attribute = type(attr) is str if kind == "uf" else attr is None
    if not (arity and attribute):
        raise ValueError(f"node {position} is malformed: {kind} with attribute {attr!r} and {len(args)} arguments")


def reachable(nodes: tuple[Node, ...], roots: Iterable[int]) -> list[int]:
    """The nodes below the roots, arguments first."""
    seen = set(roots)
    stack = list(seen)
    while stack:
        for a in nodes[stack.pop()].args:
            if a not in seen:
                seen.add(a)
                stack.append(a)
    return sorted(seen)


def pairs(args: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The products of a dot."""
    return zip(args[0::2], args[1::2], strict=True)


def merged(obligation: Obligation) -> tuple[Obligation, list[int]]:
    """The same obligation with nodes that are equal up to the order of sums, products, dots and maxima made one; a node that each new one stands for.

    ValueError if the obligation is malformed; nodes that the claim does not mention are dropped unseen.
    """
    roots = obligation.roots
    if not all(type(i) is int and 0 <= i < len(obligation.nodes) for i in roots) or not all(0 < s <= ANY for _, s in obligation.given):
        raise ValueError(f"the obligation's roots are malformed: {roots}, given {obligation.given}")
    terms, new, origins = Terms(), {}, []
    for i in reachable(obligation.nodes, roots):
        kind, attr, args = node = obligation.nodes[i]
        check_node(node, i)
        args = tuple([new[a] for a in args])
        if kind == "dot":
            args = tuple(a for pair in sorted(tuple(sorted(p)) for p in pairs(args)) for a in pair)
        elif kind in COMMUTATIVE:
            args = tuple(sorted(args))
        new[i] = terms.intern(Node(kind, attr, args))
        if new[i] == len(origins):
            origins.append(i)
    given = dict.fromkeys((new[i], s) for i, s in obligation.given)
    return Obligation(tuple(terms.nodes), new[obligation.lhs], new[obligation.rhs], tuple(given)), origins


def text(obligation: Obligation) -> str:
    """One line per node, then the claim: readable, and the content that `digest` addresses."""
    lines = [f"n{i} = {n.kind}{'' if n.attr is None else f'<{n.attr}>'}({' '.join(f'n{a}' for a in n.args)})" for i, n in enumerate(obligation.nodes)]
    signs = {NEGATIVE: "< 0", ZERO: "= 0", POSITIVE: "> 0", NONPOSITIVE: "<= 0", NONZERO: "!= 0", NONNEGATIVE: ">= 0", ANY: "is defined"}
    lines += [f"given n{i} {signs[s]}" for i, s in obligation.given]
    return "\n".join([*lines, f"n{obligation.lhs} == n{obligation.rhs}", ""])


def digest(obligation: Obligation) -> str:
    """The address of an obligation's content, as 32 hexadecimal digits."""
    return hashlib.blake2b(text(obligation).encode(), digest_size=16).hexdigest()
