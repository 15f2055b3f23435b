"""The smallest admissible sizes, found by CP-SAT (trusted only as far as `criterion` checks them: what it returns is checked, not believed).

The full sizes satisfy every hard constraint, so there is always a solution.
"""
from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from trainverify.diagnostics import Diagnostic, Fault
from trainverify.shrink.classes import Classes
from trainverify.shrink.spaces import CAT, ONE, PICK, PRODUCT, Kept, Spaces

LEAST = 4                                     # a sum of two terms satisfies identities that longer ones do not; more is asked for where a proof needs it
WISH = 1_000_000                              # what a wish weighs that cannot be had
EFFORT = 20.0                                 # of CP-SAT's own deterministic measure, so that a run can be repeated


@dataclass(slots=True)
class Problem:
    """Atoms, and what their counts must satisfy."""

    full: set[int]                            # atoms that keep their size
    least: dict[int, int]
    equal: list[tuple[int, int]]              # spaces of one size whose counts are equal
    smaller: list[tuple[int, int]]            # atoms of one concatenation: the shorter stays shorter
    distinct: list[tuple[int, int]]           # spaces of different sizes that meet
    wished: list[tuple[int, int]]             # spaces of one size that meet: different if that can be
    multiples: list[tuple[int, int]] = field(default_factory=list)      # (space, n): its count is a multiple of n, as its size is
    other: dict[int, int] = field(default_factory=dict)       # atoms whose count must not be this one


@dataclass(slots=True)
class Sizes:
    count: dict[int, int]                     # of each atom
    merged: list[tuple[int, int]] = field(default_factory=list)     # wishes that could not be had


def atoms_of(classes: Classes) -> list[int]:
    return [s for s in classes.spaces.roots() if classes.spaces.form(s) is None and classes.spaces.size(s) > 1]


def problem(classes: Classes, required: dict[int, int], base: int = LEAST, unlike: Kept | None = None) -> Problem:
    """required: atoms whose values are indices that occur: at least so many. base: the least size of every class. unlike: an earlier choice, from
    which that of every reduced atom is to differ."""
    s = classes.spaces
    full = {a for p in s.pins for a in s.atoms(p.space)}
    reachable = {ONE, *(a for d in classes.computed for a in s.atoms(d))}
    full |= {a for a in atoms_of(classes) if a not in reachable}
    least = {a: min(s.size(a), max(base, required.get(a, 0))) for a in atoms_of(classes)}
    equal, smaller = [], []
    for tie in classes.notes.ties:
        equal += [(s.find(tie[0]), s.find(t)) for t in tie[1:]]
    for r in s.roots():
        form = s.form(r)
        if form is not None and form.kind == CAT:
            live = [p for p in dict.fromkeys(s.flat(r)) if s.size(p) > 1 and reachable.issuperset(s.atoms(p))]      # the others nobody computes with
            _siblings(s, live, equal, smaller)
    distinct, wished = _meetings(classes)
    equal = [p for p in equal if not (s.picks(p[0]) or s.picks(p[1]))]
    smaller = [p for p in smaller if not (s.picks(p[0]) or s.picks(p[1]))]
    multiples = [(s.find(d), n) for d, n in classes.notes.multiples if s.size(d) % n == 0]
    other = {} if unlike is None else {a: unlike.count(a) for a in atoms_of(classes) if a not in full and unlike.count(a) < s.size(a)}
    return Problem(full, least, list(dict.fromkeys(equal)), list(dict.fromkeys(smaller)), distinct, wished, list(dict.fromkeys(multiples)), other)


def _siblings(s: Spaces, parts: list[int], equal: list, smaller: list) -> None:
    """Parts of one concatenation: even ones stay even, uneven ones uneven."""
    by_size = defaultdict(list)
    for p in parts:
        by_size[s.size(p)].append(p)
    for alike in by_size.values():
        equal += [(alike[0], p) for p in alike[1:]]
    order = sorted(by_size)
    smaller += [(by_size[a][0], by_size[b][0]) for a, b in zip(order, order[1:])]


def _meetings(classes: Classes) -> tuple[list, list]:
    s, distinct, wished = classes.spaces, {}, {}
    for dims in {tuple(sorted({s.find(d) for d in meet} - {ONE})) for meet in classes.notes.meets}:
        for i, a in enumerate(dims):
            for b in dims[:i]:
                if s.picks(a) or s.picks(b):      # what data pick has no size that could be chosen
                    continue
                if s.size(a) != s.size(b):
                    distinct[(b, a)] = None
                elif s.size(a) > 1:
                    wished[(b, a)] = None
    return sorted(distinct), sorted(wished)


def solve(classes: Classes, wanted: Problem) -> Sizes:
    """The counts of all atoms, as small as can be."""
    try:
        from ortools.sat.python import cp_model
    except ImportError as e:
        raise Fault(Diagnostic("SHAPE001", "shape reduction needs OR-tools, which is not installed", fix="pip install trainverify[shapes]")) from e
    s, model = classes.spaces, cp_model.CpModel()
    count: dict[int, object] = {}

    def of(x: int):
        x = s.find(x)
        if x not in count:
            count[x] = _variable(model, s, x, wanted, of)
        return count[x]

    for a, b in wanted.equal:
        model.add(of(a) == of(b))
    for a, b in wanted.smaller:
        model.add(of(a) < of(b))
    for a, b in wanted.distinct:
        model.add(of(a) != of(b))
    for a, n in wanted.other.items():
        model.add(of(a) != n)
    for a, n in wanted.multiples:
        model.add(of(a) == n * model.new_int_var(1, s.size(a) // n, ""))
    merged = []
    for a, b in wanted.wished:
        same = model.new_bool_var("")
        model.add(of(a) != of(b)).only_enforce_if(same.negated())
        merged.append((same, (a, b)))
    price = _prices(classes, wanted)
    model.minimize(sum(price[a] * of(a) for a in atoms_of(classes)) + WISH * sum(b for b, _ in merged))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.max_deterministic_time = EFFORT
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        raise Fault(Diagnostic("SHAPE002", f"no smaller sizes were found ({solver.status_name(status)})", fix="verify without --reduce"))
    found = Sizes({a: solver.value(of(a)) for a in atoms_of(classes)}, [pair for b, pair in merged if solver.value(b)])
    check(s, wanted, found)
    return found


def _prices(classes: Classes, wanted: Problem) -> dict[int, int]:
    """For each atom, what one more index of it adds to the work of all calls, in thousandths of what the dearest one adds."""
    s, work = classes.spaces, Counter()
    reachable = {ONE, *(a for d in classes.computed for a in s.atoms(d))}
    for spaces, times in classes.notes.work:
        dims = [d for d in map(s.find, spaces) if d != ONE]
        if all(reachable.issuperset(s.atoms(d)) for d in dims):      # the others are evaluated once, at their size
            work[tuple(sorted(dims))] += times
    count = {a: s.size(a) if a in wanted.full else wanted.least[a] for a in atoms_of(classes)}
    added: Counter = Counter()
    for dims, times in work.items():
        now = times * math.prod(counted(s, d, count) for d in dims)
        for a in {a for d in set(dims) for a in s.atoms(d)} & count.keys():
            more = {**count, a: count[a] + 1}
            added[a] += times * math.prod(counted(s, d, more) for d in dims) - now
    dearest = max((n for a, n in added.items() if a not in wanted.full), default=1)
    return {a: 1 + round(1000 * added[a] / dearest) for a in count}


def counted(s: Spaces, x: int, count: dict[int, int]) -> int:
    """How many indices of a space are kept, if so many of each atom are."""
    x = s.find(x)
    form = s.form(x)
    if form is None:
        return count.get(x, s.size(x))
    if form.kind == PICK:                     # as many of its rows as of those that it is picked from
        return max(1, s.size(x) * counted(s, form.parts[0], count) // s.size(form.parts[0]))
    counts = [counted(s, p, count) for p in form.parts]
    return math.prod(counts) if form.kind == PRODUCT else sum(counts)


def _variable(model, s: Spaces, x: int, wanted: Problem, of: Callable):
    form, n = s.form(x), s.size(x)
    if form is None:
        if n <= 1 or x in wanted.full:
            return model.new_constant(n)
        return model.new_int_var(wanted.least[x], n, f"c{x}")
    if form.kind == PICK:
        return model.new_int_var(0, n, f"k{x}")
    parts = [of(p) for p in form.parts]
    if form.kind == CAT:
        return sum(parts)
    whole = model.new_int_var(1, n, f"p{x}")
    model.add_multiplication_equality(whole, parts)
    return whole


def check(s: Spaces, wanted: Problem, found: Sizes) -> None:
    """What the solver returned satisfies what was asked; anything else is our own bug."""
    def of(x: int) -> int:
        return counted(s, x, found.count)

    bad = [x for x, n in found.count.items() if not (n == s.size(x) if x in wanted.full else wanted.least[x] <= n <= s.size(x))]
    bad += [p for p in wanted.equal if of(p[0]) != of(p[1])] + [p for p in wanted.smaller if of(p[0]) >= of(p[1])]
    bad += [p for p in wanted.distinct if of(p[0]) == of(p[1])] + [a for a, n in wanted.other.items() if of(a) == n]
    bad += [a for a, n in wanted.multiples if of(a) % n]
    if bad:
        raise AssertionError(f"sizes that do not satisfy their constraints: {bad[:5]}")
