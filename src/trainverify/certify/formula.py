"""An obligation in ordinary notation, for people (not trusted)."""
from __future__ import annotations

from collections import Counter
from fractions import Fraction

from trainverify.kernel.terms import ANY, NEGATIVE, NONNEGATIVE, NONPOSITIVE, NONZERO, POSITIVE, ZERO, Obligation, pairs, reachable

WIDTH = 60             # longer terms get a line and a name of their own
ORDERS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "eq": "==", "ne": "!="}
SIGNS = {NEGATIVE: "< 0", ZERO: "== 0", POSITIVE: "> 0", NONPOSITIVE: "<= 0", NONZERO: "!= 0", NONNEGATIVE: ">= 0", ANY: "is defined"}
SUM, PRODUCT, ATOM = range(3)                # how tightly a term holds together


def formula(obligation: Obligation) -> str:
    """What is named, what is given, and the claim. Terms that occur more than once are named t<node>, leaves x<number>; [a > b] is 1 or 0."""
    writer = _Writer(obligation)
    claim = f"{writer.inside(obligation.lhs, SUM)} == {writer.inside(obligation.rhs, SUM)}"
    given = [f"given {writer.inside(i, SUM)} {SIGNS[s]}" for i, s in obligation.given]
    return "\n".join([*writer.lines, *given, claim, ""])


class _Writer:
    """The written form of each node: the text and how tightly it holds."""

    def __init__(self, obligation: Obligation):
        self.nodes = obligation.nodes
        order = reachable(obligation.nodes, obligation.roots)
        below = Counter(a for i in order for a in self.nodes[i].args)
        uses = below + Counter(set(obligation.roots))
        self.lines: list[str] = []
        self.texts: dict[int, tuple[str, int]] = {}
        for i in order:
            written, level = self._write(i)
            if self.nodes[i].kind not in ("const", "leaf") and (uses[i] > 1 or (below[i] and len(written) > WIDTH)):
                self.lines.append(f"t{i} = {written}")
                written, level = f"t{i}", ATOM
            self.texts[i] = written, level

    def inside(self, i: int, level: int) -> str:
        """Node i as part of a term, in brackets if it holds less tightly than the level."""
        written, own = self.texts[i]
        return written if own >= level else f"({written})"

    def _write(self, i: int) -> tuple[str, int]:
        kind, attr, args = self.nodes[i]
        match kind:
            case "const":
                return str(attr), SUM if attr < 0 else ATOM if attr.denominator == 1 else PRODUCT
            case "leaf":
                return f"x{attr}", ATOM
            case "add":
                return self._sum([self.inside(a, SUM) for a in args]), SUM
            case "mul":
                return " * ".join(self.inside(a, PRODUCT) for a in args), PRODUCT
            case "dot":
                return self._sum([f"{self.inside(a, PRODUCT)} * {self.inside(b, PRODUCT)}" for a, b in pairs(args)]), SUM
            case "neg":
                return f"-{self.inside(args[0], PRODUCT)}", SUM
            case "scl":
                return f"{attr} * {self.inside(args[0], PRODUCT)}", SUM if attr < 0 else PRODUCT
            case "inv":
                return f"1/{self.inside(args[0], ATOM)}", PRODUCT
            case "pow":
                return f"{self.inside(args[0], ATOM)}^{_exponent(attr)}", ATOM
            case "compare":
                return f"[{self.inside(args[0], SUM)} {ORDERS[attr]} {self.inside(args[1], SUM)}]", ATOM
        return f"{attr if kind == 'uf' else kind}({', '.join(self.inside(a, SUM) for a in args)})", ATOM

    def _sum(self, parts: list[str]) -> str:
        return parts[0] + "".join(f" - {p[1:]}" if p.startswith("-") else f" + {p}" for p in parts[1:])


def _exponent(q: Fraction) -> str:
    return str(q) if q.denominator == 1 and q >= 0 else f"({q})"
