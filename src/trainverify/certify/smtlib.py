"""An obligation as an SMT-LIB 2 script that asserts the negation of its claim, so `unsat` proves it (untrusted: written apart from the kernel's rules).

The script says: the reference's term and the hypotheses are defined and have the given signs, and the parallel term is undefined
or differs. Rational operations, max and comparisons, division and roots are exact: a quotient or a root is a fresh number with
its defining equation. exp, log, sin, cos and powers of high degree are unknown functions with true statements about the terms
that occur. So `unsat` always means that the claim holds; `sat` means something only where nothing is abstracted (`in_theory`).
"""
from __future__ import annotations

import heapq
from collections.abc import Iterable
from fractions import Fraction

from trainverify.kernel.terms import NEGATIVE, NONNEGATIVE, NONPOSITIVE, NONZERO, POSITIVE, ZERO, Node, Obligation, pairs, reachable

DEGREE = 16            # powers and roots up to this are written out
EXPONENT = 8           # multiples in an exponent up to this become powers of exp
ABSTRACT = frozenset({"exp", "log", "sin", "cos", "high power"})     # parts whose meaning the script gives only in part
SIGNS = {NEGATIVE: "(< {} 0.0)", ZERO: "(= {} 0.0)", POSITIVE: "(> {} 0.0)", NONPOSITIVE: "(<= {} 0.0)", NONZERO: "(not (= {} 0.0))",
         NONNEGATIVE: "(>= {} 0.0)"}
ORDERS = {"gt": "(> {} {})", "ge": "(>= {} {})", "lt": "(< {} {})", "le": "(<= {} {})", "eq": "(= {} {})", "ne": "(not (= {} {}))"}


def parts(obligation: Obligation) -> frozenset[str]:
    """What the obligation uses beyond polynomials: division, root, power, max, compare, function, exp, log, sin, cos, high power."""
    return frozenset(part for i in reachable(obligation.nodes, obligation.roots) if (part := _part(obligation.nodes[i])))


def in_theory(obligation: Obligation) -> bool:
    """Whether the script has the obligation's exact meaning, so that a solver's `sat` means a counterexample."""
    return not parts(obligation) & ABSTRACT


def _part(node: Node) -> str:
    if node.kind == "pow":
        if max(abs(node.attr.numerator), node.attr.denominator) > DEGREE:
            return "high power"
        return "root" if node.attr.denominator > 1 else "division" if node.attr < 0 else "power"
    names = {"inv": "division", "sqrt": "root", "max": "max", "compare": "compare", "uf": "function"}
    return names.get(node.kind, node.kind if node.kind in ABSTRACT else "")


def script(obligation: Obligation, comments: Iterable[str] = (), functions: bool = True) -> str:
    """The whole script, with check-sat. Without functions, their values are unknowns that nothing relates: a weaker script."""
    return _Script(obligation, functions).text(comments)


def name_of(node: int) -> str:
    """The constant that holds the value of a node that applies an uninterpreted function."""
    return f"n{node}"


def number(q: Fraction | int) -> str:
    """A rational as a term of sort Real."""
    q = Fraction(q)
    size = f"{abs(q.numerator)}.0" if q.denominator == 1 else f"(/ {abs(q.numerator)}.0 {q.denominator}.0)"
    return f"(- {size})" if q < 0 else size


def symbol(tag: str, arity: int) -> str:
    """The name of an uninterpreted function; different tags have different names."""
    safe = "".join(c if c.isascii() and c.isprintable() and c not in "|\\%" else "".join(f"%{b:02x}" for b in c.encode()) for c in tag)
    return f"|uf {arity} {safe}|"


def product(factors: list[str]) -> str:
    return factors[0] if len(factors) == 1 else f"(* {' '.join(factors)})" if factors else "1.0"


def power(x: str, e: int) -> str:
    return product([x] * e)


class _Script:
    """Collects the lines of one script. Names: x3 a leaf, n5 a node, i5 exp(-n5), r5 the root that a power of node 5 is made from."""

    def __init__(self, obligation: Obligation, functions: bool):
        self.obligation, self.nodes, self.functions = obligation, obligation.nodes, functions
        self.order = reachable(obligation.nodes, obligation.roots)
        self.assumed = set(reachable(obligation.nodes, [obligation.lhs, *(i for i, _ in obligation.given)]))
        self.names: dict[int, str] = {}
        self.declared: dict[str, str] = {}                # declarations, by name
        self.lines: list[str] = []
        self.conditions: list[str] = []                   # of the parallel term's definedness
        self.stated: set[str] = set()                     # terms of which a fact is written
        for i in self.order:
            self.names[i] = self._node(i)
        self._facts_of_log()

    def text(self, comments: Iterable[str]) -> str:
        o = self.obligation
        given = [f"(assert {SIGNS[s].format(self.names[i])})" for i, s in o.given if s in SIGNS]
        wrong = [f"(not {c})" for c in dict.fromkeys(self.conditions)] + [f"(not (= {self.names[o.lhs]} {self.names[o.rhs]}))"]
        claim = wrong[0] if len(wrong) == 1 else "\n  ".join(["(or", *wrong]) + ")"
        return "\n".join([*(f"; {line}" for comment in comments for line in comment.splitlines()), "(set-logic QF_UFNRA)", *self.declared.values(),
                          *self.lines, *given, "; the claim fails: the parallel term is undefined, or differs", f"(assert {claim})", "(check-sat)", ""])

    # ---- lines
    def declare(self, name: str, arity: int = 0) -> str:
        self.declared.setdefault(name, f"(declare-fun {name} ({' '.join(['Real'] * arity)}) Real)")
        return name

    def fact(self, statement: str) -> None:
        self.lines.append(f"(assert {statement})")

    def partial(self, i: int, condition: str, statement: str = "") -> None:
        """Node i has a value only under the condition; the statement holds if so."""
        if i in self.assumed:
            self.fact(condition)
        else:
            self.conditions.append(condition)
        if statement:
            self.fact(statement if i in self.assumed else f"(=> {condition} {statement})")

    # ---- nodes
    def _node(self, i: int) -> str:
        """The name of a node's value, once its lines are written."""
        kind, attr, args = self.nodes[i]
        a = [self.names[x] for x in args]
        match kind:
            case "const":
                return number(attr)
            case "leaf":
                return self.declare(f"x{attr}")
            case "uf":
                return self._application(i, a)
            case "add":
                return self._define(i, f"(+ {' '.join(a)})") if len(a) > 1 else a[0]
            case "mul":
                return self._define(i, product(a)) if len(a) > 1 else a[0]
            case "dot":
                products = [f"(* {self.names[x]} {self.names[y]})" for x, y in pairs(args)]
                return self._define(i, f"(+ {' '.join(products)})" if len(products) > 1 else products[0])
            case "neg":
                return self._define(i, f"(- {a[0]})")
            case "scl":
                return self._define(i, f"(* {number(attr)} {a[0]})")
            case "compare":
                return self._define(i, f"(ite {ORDERS[attr].format(*a)} 1.0 0.0)")
            case "max":
                return self._max(i)
            case "inv" | "sqrt" | "pow":
                return self._power(i, a[0], {"inv": Fraction(-1), "sqrt": Fraction(1, 2)}.get(kind, attr))
            case "exp":
                return self._define(i, self._exp(args[0]))
            case "log":
                return self._log(i, a[0])
            case "sin" | "cos":
                self._circle(a[0])
                return self._define(i, f"({self.declare('real_' + kind, 1)} {a[0]})")
        raise ValueError(f"no SMT-LIB meaning for {kind}")

    def _define(self, i: int, term: str) -> str:
        self.lines.append(f"(define-fun n{i} () Real {term})")
        return f"n{i}"

    def _application(self, i: int, a: list[str]) -> str:
        n = self.declare(name_of(i))
        if self.functions:
            term = " ".join([self.declare(symbol(self.nodes[i].attr, len(a)), len(a)), *a])
            self.fact(f"(= {n} ({term}))" if a else f"(= {n} {term})")
        return n

    def _max(self, i: int) -> str:
        """The greatest of all operands of nested maxima, in the order of their numbers, so that maxima of one set look the same."""
        operands, stack = set(), [i]
        while stack:
            kind, _, args = self.nodes[k := stack.pop()]
            if kind == "max":
                stack += args
            else:
                operands.add(k)
        names = list(dict.fromkeys(self.names[k] for k in sorted(operands)))
        best = names[0]
        for k, x in enumerate(names[1:], 1):
            name = f"n{i}" if k == len(names) - 1 else f"n{i}.{k}"
            self.lines.append(f"(define-fun {name} () Real (ite (>= {best} {x}) {best} {x}))")
            best = name
        return best

    def _power(self, i: int, a: str, q: Fraction) -> str:
        """a^q, exactly: a root r is the number >= 0 with r^d = a, an inverse the number n with a^e * n = 1."""
        condition = f"(not (= {a} 0.0))" if q.denominator == 1 else f"({'>' if q < 0 else '>='} {a} 0.0)"
        total = q.denominator == 1 and q >= 0
        if max(abs(q.numerator), q.denominator) > DEGREE:
            n = self._define(i, f"({self.declare(f'|real_pow {q}|', 1)} {a})")
            return n if total else self._about(i, condition, f"({'>=' if q > 0 else '>'} {n} 0.0)" if q.denominator > 1 else f"(not (= {n} 0.0))")
        if total:
            return self._define(i, power(a, q.numerator))
        if q.denominator == 1:
            base, root = a, ""
        else:
            base = self.declare(f"r{i}" if q.numerator != 1 else f"n{i}")
            root = f"(>= {base} 0.0) (= {power(base, q.denominator)} {a})"
        if q.numerator == 1:
            return self._about(i, condition, f"(and {root})")
        if q > 0:
            self.partial(i, condition, f"(and {root})")
            return self._define(i, power(base, q.numerator))
        equation = f"(= (* {power(base, -q.numerator)} {self.declare(f'n{i}')}) 1.0)"
        return self._about(i, condition, f"(and {root} {equation})" if root else equation)

    def _about(self, i: int, condition: str, statement: str) -> str:
        self.partial(i, condition, statement)
        return f"n{i}"

    # ---- functions that are not algebraic
    def _exp(self, i: int) -> str:
        """exp of node i, as a product of exp(k) and exp(-k) for the nodes k that it is a sum of."""
        factors = [f for k, e in self._multiples(i).items() for f in [self._above(k) if e > 0 else self._below(k)] * abs(e)]
        return product(factors)

    def _above(self, k: int) -> str:
        """exp(k): an unknown function that is positive, or what k is the logarithm of."""
        if self.nodes[k].kind == "log":
            return self.names[self.nodes[k].args[0]]
        value = f"({self.declare('real_exp', 1)} {self.names[k]})"
        if value not in self.stated:
            self.stated.add(value)
            self.fact(f"(> {value} 0.0)")
        return value

    def _below(self, k: int) -> str:
        """exp(-k)."""
        value, name = self._above(k), f"i{k}"
        if name not in self.declared:
            equation = f"(= (* {value} {self.declare(name)}) 1.0)"
            guarded = self.nodes[k].kind == "log" and k not in self.assumed
            self.fact(f"(=> (> {value} 0.0) {equation})" if guarded else equation)
        return name

    def _multiples(self, root: int) -> dict[int, int]:
        """Node `root` as a sum of integer multiples of nodes that are no such sums themselves."""
        out, waiting = {root: 1}, [-root]              # users come before their arguments, so each node is split once
        while waiting:
            i = -heapq.heappop(waiting)
            kind, attr, args = self.nodes[i]
            e = out[i]
            if kind == "add" or kind == "neg" or (kind == "scl" and attr.denominator == 1 and abs(attr * e) <= EXPONENT):
                del out[i]
                for a in args:
                    if a not in out:
                        out[a] = 0
                        heapq.heappush(waiting, -a)
                    out[a] += e * (attr.numerator if kind == "scl" else -1 if kind == "neg" else 1)
            elif kind == "const" and not attr:
                del out[i]
        out = {i: e for i, e in sorted(out.items()) if e}
        return out if all(abs(e) <= EXPONENT for e in out.values()) else {root: 1}

    def _log(self, i: int, a: str) -> str:
        n = self._define(i, f"({self.declare('real_log', 1)} {a})")
        self.partial(i, f"(> {a} 0.0)")
        return n

    def _facts_of_log(self) -> None:
        """log undoes exp. Where a logarithm in the exponent is undefined, its exp is what stands under it: then only if that is positive."""
        for i in self.order if "real_log" in self.declared else ():
            if self.nodes[i].kind == "exp":
                statement = f"(= (real_log {self.names[i]}) {self.names[self.nodes[i].args[0]]})"
                doubtful = any(self.nodes[k].kind == "log" and k not in self.assumed for k in self._multiples(self.nodes[i].args[0]))
                self.fact(f"(=> (> {self.names[i]} 0.0) {statement})" if doubtful else statement)

    def _circle(self, x: str) -> None:
        sin, cos = (f"({self.declare(name, 1)} {x})" for name in ("real_sin", "real_cos"))
        if sin not in self.stated:
            self.stated.add(sin)
            self.fact(f"(= (+ (* {sin} {sin}) (* {cos} {cos})) 1.0)")
