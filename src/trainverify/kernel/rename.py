"""Canonical names for leaves, so that obligations that are equal up to renaming share one cache key (trusted).

Both entry points only permute what sums, products, dots and maxima do not order, and rename leaves one to one; so a result
claims the same as what it came from. That equal obligations get equal names is a matter of speed only: leaves are coloured by the
positions that they occupy, positions that a permutation could exchange count as one, and ties keep their order.
"""
from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from trainverify.kernel.poly import mix
from trainverify.kernel.terms import COMMUTATIVE, Node, Obligation, Terms, merged, pairs, reachable

ROUNDS = 3           # refinements of the leaves' colours
TIES = 4             # identifiers that are compared when units have equal colours


def _code(*parts: object) -> int:
    """A number below 2^64 for anything that prints."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def _units(node: Node) -> list[tuple[int, ...]]:
    """The arguments, in the groups that may change places as a whole."""
    return list(pairs(node.args)) if node.kind == "dot" else [(a,) for a in node.args]


class Colours:
    """Colours of an obligation's nodes that no renaming and no permutation under AC changes: `up` by what is below, `down` by what is above."""

    def __init__(self, nodes: Sequence[Node], order: list[int], roots: Iterable[tuple[int, int]], leaf: dict[int, int]):
        self.nodes, self.order, self.roots = nodes, order, tuple(roots)
        self.codes = {i: _code(nodes[i].kind, None if nodes[i].kind == "leaf" else nodes[i].attr) for i in order}
        self.up: dict[int, int] = {}
        self.down: dict[int, int] = {}
        self._rise(leaf)
        self._fall()

    def _rise(self, leaf: dict[int, int]) -> None:
        for i in self.order:
            node = self.nodes[i]
            if node.kind == "leaf":
                self.up[i] = mix(self.codes[i], leaf.get(i, 0))
            elif node.kind in COMMUTATIVE:
                self.up[i] = mix(self.codes[i], sum(self.unit(node, u) for u in _units(node)))
            else:
                self.up[i] = mix(self.codes[i], *(self.up[a] for a in node.args))

    def unit(self, node: Node, unit: tuple[int, ...]) -> int:
        """The colour of a group of arguments; the two sides of a product in a dot may change places."""
        return mix(sum(mix(self.up[a]) for a in unit))

    def _fall(self) -> None:
        self.down = dict.fromkeys(self.order, 0)
        for role, i in self.roots:
            self.down[i] += mix(role)
        for i in reversed(self.order):
            node = self.nodes[i]
            above = mix(self.down[i], self.codes[i], self.up[i])
            for position, unit in enumerate(_units(node)):
                place = mix(above, self.unit(node, unit) if node.kind in COMMUTATIVE else position)
                for a in unit:
                    self.down[a] += mix(place, self.up[a])

    def leaf(self, i: int) -> int:
        return mix(self.up[i], self.down[i])


def canonical(obligation: Obligation) -> tuple[Obligation, tuple[int, ...]]:
    """The obligation with canonical order and names, and the old name of each new leaf. Equal results claim the same up to renaming."""
    obligation, _ = merged(obligation)
    nodes = obligation.nodes
    order = list(range(len(nodes)))
    roots = [(1, obligation.lhs), (2, obligation.rhs), *((2 + s, i) for i, s in obligation.given)]
    colours = Colours(nodes, order, roots, {})
    leaves = [i for i in order if nodes[i].kind == "leaf"]
    kinds = 1
    for _ in range(ROUNDS):
        names = {i: colours.leaf(i) for i in leaves}
        if len(set(names.values())) == kinds:
            break
        kinds = len(set(names.values()))
        colours = Colours(nodes, order, roots, names)
    given = sorted(obligation.given, key=lambda g: (g[1], mix(colours.up[g[0]], colours.down[g[0]])))
    builder = _Numbering(nodes, colours)
    for root in (obligation.lhs, obligation.rhs, *(i for i, _ in given)):
        builder.visit(root)
    new = builder.new
    final = Obligation(tuple(builder.terms.nodes), new[obligation.lhs], new[obligation.rhs], tuple(sorted((new[i], s) for i, s in given)))
    return final, tuple(builder.old_names)


class _Numbering:
    """Rebuilds terms in canonical order; leaves are numbered as they are met."""

    def __init__(self, nodes: Sequence[Node], colours: Colours):
        self.nodes, self.colours = nodes, colours
        self.terms = Terms()
        self.new: dict[int, int] = {}
        self.old_names: list[int] = []
        self._names: dict[int, int] = {}
        self._arranged: dict[int, list[int]] = {}

    def visit(self, root: int) -> None:
        stack = [root]
        while stack:
            i = stack[-1]
            if i in self.new:
                stack.pop()
                continue
            if i not in self._arranged:
                self._arranged[i] = self._arrange(i)
            waiting = [a for a in self._arranged[i] if a not in self.new]
            if waiting:
                stack += reversed(waiting)
                continue
            stack.pop()
            self.new[i] = self._rebuild(i)

    def _arrange(self, i: int) -> list[int]:
        """The arguments in the order of their colours, then of the numbers that they already have."""
        node = self.nodes[i]
        if node.kind not in COMMUTATIVE:
            return list(node.args)
        late = len(self.nodes)
        units = [sorted(u, key=lambda a: (self._colour(a), self.new.get(a, late))) for u in _units(node)]
        units.sort(key=lambda u: ([self._colour(a) for a in u], [self.new.get(a, late) for a in u]))
        return [a for u in units for a in u]

    def _colour(self, i: int) -> int:
        return mix(self.colours.up[i], self.colours.down[i])

    def _rebuild(self, i: int) -> int:
        node = self.nodes[i]
        if node.kind == "leaf":
            if node.attr not in self._names:
                self._names[node.attr] = len(self.old_names)
                self.old_names.append(node.attr)
            return self.terms.add("leaf", self._names[node.attr])
        return self.terms.add(node.kind, node.attr, [self.new[a] for a in self._arranged[i]])


# ---- many rows of one structure
@dataclass(frozen=True, slots=True)
class Template:
    """An obligation whose leaf k stands for position k of a row of identifiers; equal identifiers are one leaf.

    groups: positions [nodes, units, places]: the units of a node are subterms that may change places with each other; the
    nodes of one array do not overlap, and inner ones come first. Those of the side with smaller units' numbers stand first, in
    groups[0]; ties of the other side's are decided by the order that it has then.
    classes: for each position a colour that is the same wherever such an exchange could bring it.
    """

    form: Obligation
    groups: tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]
    classes: np.ndarray


@dataclass(frozen=True, slots=True)
class Named:
    """rows: the identifiers, rearranged; names: the same with identifiers numbered as they occur in their row (int64)."""

    rows: np.ndarray
    names: np.ndarray


def template(form: Obligation) -> Template:
    """Find what may be exchanged: equal subterms of one sum, product, dot or maximum, of which each node is used once."""
    nodes, order = form.nodes, reachable(form.nodes, form.roots)
    uses = dict.fromkeys(order, 0)
    for i in (*form.roots, *(a for j in order for a in nodes[j].args)):
        uses[i] += 1
    leaves = {nodes[i].attr: i for i in order if nodes[i].kind == "leaf"}
    if len(leaves) != sum(nodes[i].kind == "leaf" for i in order) or set(leaves) != set(range(len(leaves))):
        raise ValueError("a template has one leaf node for each of its positions 0..n-1")
    colours = Colours(nodes, order, [(1, form.lhs), (2, form.rhs), *((2 + s, i) for i, s in form.given)], {})
    places: dict[int, tuple[int, ...] | None] = {}       # positions below a node in its own order; None if something below is shared
    shapes: dict[int, int] = {}
    heights: dict[int, int] = {}
    known: dict[tuple, int] = {}
    batches: dict[tuple[bool, int, int, int], list] = {}
    right = set(reachable(nodes, [form.rhs]))
    for i in order:
        node = nodes[i]
        private = [a for a in node.args if places[a] is not None and uses[a] == 1]
        below = tuple(p for a in private for p in places[a]) if len(private) == len(node.args) else None
        places[i] = (node.attr,) if node.kind == "leaf" else below
        shape = (node.kind, None if node.kind == "leaf" else node.attr, *(shapes[a] for a in node.args))
        shapes[i] = known.setdefault(shape, len(known))
        heights[i] = max((heights[a] + 2 for a in node.args), default=0)
        if node.kind in COMMUTATIVE:
            units = [u for u in _units(node) if set(u) <= set(private)]
            if node.kind == "dot":
                for a, b in units:
                    if shapes[a] == shapes[b] and places[a]:
                        batches.setdefault((i in right, heights[i] - 1, 2, len(places[a])), []).append([places[a], places[b]])
            for group in _alike(units, places, shapes):
                batches.setdefault((i in right, heights[i], len(group), len(group[0])), []).append(group)
    classes = np.array([colours.leaf(leaves[k]) for k in range(len(leaves))], dtype=np.uint64)
    sides = tuple(tuple(np.array(batches[k], dtype=np.int64) for k in sorted(batches) if k[0] == side) for side in (False, True))
    return Template(form, tuple(sorted(sides, key=lambda side: max((g.shape[1] for g in side), default=1))), classes)


def _alike(units: list[tuple[int, ...]], places: dict[int, tuple[int, ...] | None], shapes: dict[int, int]) -> list[list[list[int]]]:
    """The positions of units in groups of equal shape."""
    groups: dict[tuple, list[list[int]]] = {}
    for unit in units:
        groups.setdefault(tuple(shapes[a] for a in unit), []).append([p for a in unit for p in places[a]])
    return [g for g in groups.values() if len(g) > 1 and g[0]]


def canonical_rows(t: Template, rows: np.ndarray) -> Named:
    """Rows [n, positions] of identifiers, arranged and named: rows with equal names claim the same up to renaming."""
    rows = np.array(rows, dtype=np.int64)
    _arrange(t, rows, [rows])
    return Named(rows, rename(rows))


def canonical_order(t: Template, row: np.ndarray) -> np.ndarray:
    """Which position of a row stands at each position when it is arranged."""
    rows, order = np.array(row, dtype=np.int64)[None], np.arange(len(row))[None]
    _arrange(t, rows, [rows, order])
    return order[0]


def _arrange(t: Template, rows: np.ndarray, moved: list[np.ndarray]) -> None:
    """Exchange units in all of `moved` (rows among them), until those of `rows` are in order."""
    first, second = t.groups
    if not rows.size or not (first or second):
        return
    colours = _row_colours(t.classes, rows)
    for group in first:
        _sort_units(group, colours, rows, [*moved, colours])
    if first and second:
        ranks = _ranks(rows, first)
        for group in second:
            _sort_units(group, colours, ranks, [*moved, colours, ranks])
        return
    for group in second:
        _sort_units(group, colours, rows, [*moved, colours])


def _ranks(rows: np.ndarray, groups: tuple[np.ndarray, ...]) -> np.ndarray:
    """Identifiers numbered as they occur in the positions of these groups, then elsewhere."""
    there = np.zeros(rows.shape[1], bool)
    for group in groups:
        there[group.reshape(-1)] = True
    order = np.concatenate([np.flatnonzero(there), np.flatnonzero(~there)])
    ranks = np.empty_like(rows)
    ranks[:, order] = rename(rows[:, order])
    return ranks


def instantiate(t: Template, names: np.ndarray) -> Obligation:
    """The obligation of one row of names."""
    terms, new = Terms(), {}
    for i in reachable(t.form.nodes, t.form.roots):
        kind, attr, args = t.form.nodes[i]
        new[i] = terms.add(kind, int(names[attr]) if kind == "leaf" else attr, [new[a] for a in args])
    return Obligation(tuple(terms.nodes), new[t.form.lhs], new[t.form.rhs], tuple((new[i], s) for i, s in t.form.given))


def distinct(names: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first row of each kind, and for every row which kind it is."""
    if not names.shape[1] or (names == names[:1]).all():
        return np.zeros(min(1, len(names)), np.int64), np.zeros(len(names), np.int64)
    names = np.ascontiguousarray(names)
    keys = names.view(np.dtype((np.void, names.dtype.itemsize * names.shape[1]))).reshape(-1)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first, inverse.reshape(-1)


def rename(rows: np.ndarray) -> np.ndarray:
    """Each identifier's number in the order of first occurrence in its row."""
    n, length = rows.shape
    if not length:
        return np.zeros((n, 0), np.int64)
    order = np.argsort(rows, 1, kind="stable")
    sorted_ = np.take_along_axis(rows, order, 1)
    starts = np.ones((n, length), bool)
    starts[:, 1:] = sorted_[:, 1:] != sorted_[:, :-1]
    columns = np.arange(length)[None]
    start = np.maximum.accumulate(np.where(starts, columns, 0), 1)
    first = np.empty((n, length), np.int64)
    np.put_along_axis(first, order, np.take_along_axis(order, start, 1), 1)
    rank = np.cumsum(first == columns, 1) - 1
    return np.take_along_axis(rank, first, 1).astype(np.int64)


def _row_colours(classes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """For every position the sum of the classes of all positions that hold its identifier (uint64, wrapping)."""
    n, length = rows.shape
    order = np.argsort(rows, 1, kind="stable")
    sorted_ = np.take_along_axis(rows, order, 1)
    starts = np.ones((n, length), bool)
    starts[:, 1:] = sorted_[:, 1:] != sorted_[:, :-1]
    run = (np.cumsum(starts.reshape(-1)) - 1).reshape(n, length)
    totals = np.zeros(run[-1, -1] + 1, np.uint64)
    np.add.at(totals, run, _spread(classes)[order])
    out = np.empty((n, length), np.uint64)
    np.put_along_axis(out, order, totals[run], 1)
    return out


def _spread(x: np.ndarray) -> np.ndarray:
    """A well-spread function of uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)


def _sort_units(group: np.ndarray, colours: np.ndarray, ties: np.ndarray, moved: list[np.ndarray]) -> None:
    """Exchange the units of each node of a group, row by row, into the order of their colours, then of `ties`: in all of `moved`."""
    weights = _spread(np.arange(1, group.shape[2] + 1, dtype=np.uint64))
    tints = colours[:, group]
    keys = [(_spread(tints) * weights).sum(3, dtype=np.uint64), *np.moveaxis(ties[:, group[..., :TIES]], 3, 0)]
    order = np.argsort(keys[-1], 2, kind="stable")
    for key in reversed(keys[:-1]):
        order = np.take_along_axis(order, np.argsort(np.take_along_axis(key, order, 2), 2, kind="stable"), 2)
    flat, order = group.reshape(-1), order[..., None]
    for a in moved:
        a[:, flat] = np.take_along_axis(a[:, group], order, 2).reshape(len(a), -1)
