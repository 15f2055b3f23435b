"""How many index variables a proved obligation has (trusted): the part of the soundness criterion that can only be checked after the proof.

A reduced program proves identities between sums of few terms. Such an identity holds for sums of any length if each class has at least as many
indices as its monomials have index variables: the free ones, and one for each sum that is multiplied into a monomial. Sums are recognised
by their form: terms of an addition that are alike but for their leaves.
"""
from __future__ import annotations

from collections import Counter

from trainverify.kernel.terms import Obligation, reachable

CLEARED = {"inv", "sqrt", "log"}              # what is brought to the other side multiplies it


def sums(obligation: Obligation) -> int:
    """The sums whose indices one monomial can have, after denominators are cleared."""
    nodes = obligation.nodes
    count: dict[int, int] = {}
    form: dict[int, int] = {}
    known: dict[tuple, int] = {}
    divides = False
    for i in reachable(nodes, [obligation.lhs, obligation.rhs]):
        kind, attr, args = nodes[i]
        divides |= kind in CLEARED or (kind == "pow" and attr < 0)
        key = (kind, None if kind == "leaf" else attr, tuple(sorted(form[a] for a in args)))
        form[i] = known.setdefault(key, len(known))
        if kind in ("add", "max", "dot"):
            count[i] = _summed(kind, args, count, form)
        elif kind == "mul":
            count[i] = sum(count[a] for a in args)
        elif kind == "pow" and attr.denominator == 1:
            count[i] = max(1, abs(int(attr))) * count[args[0]]
        else:
            count[i] = max((count[a] for a in args), default=0)
    left, right = count[obligation.lhs], count[obligation.rhs]
    return left + right if divides else max(left, right)


def _summed(kind: str, args: tuple[int, ...], count: dict[int, int], form: dict[int, int]) -> int:
    """One more for terms that occur several times."""
    terms = [((form[a], form[b]), count[a] + count[b]) for a, b in zip(args[::2], args[1::2])] if kind == "dot" else [((form[a],), count[a]) for a in args]
    alike = Counter(tuple(sorted(f)) for f, _ in terms)
    return max((n + (alike[tuple(sorted(f))] > 1) for f, n in terms), default=0)


def index_variables(obligations: list[Obligation], free: int) -> int:
    """The most index variables of one class in any obligation; free: those that an element of a result can have."""
    return free + max((sums(o) for o in obligations), default=0)
