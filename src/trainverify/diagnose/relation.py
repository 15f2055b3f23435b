"""What a wrong output is, in algebra: a multiple, one rank's share of a sum, stale, in other places, another tensor (not trusted).

Every statement holds exactly in the field, on every element of every wrong piece that was looked at. Sums are in additive.py.
"""
from __future__ import annotations

import os
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch

from trainverify.diagnose.watch import Home, Watch
from trainverify.diagnose.words import Names, index_map
from trainverify.relate.compare import Compared, Comparison, Key, Part, Piece

LOOKED_AT = 4                                 # pieces of an output that a costly relation is tried on
UPDATED = ("parameter", "buffer", "state")


@dataclass(frozen=True, slots=True)
class Relation:
    """kind: the class of the finding; text the statement in algebra; factor of a multiple; ranks: the group of a partial sum; ratio: of
    reweighted terms, by (rank, number), how much more the reference counts each; at: the call that adds what should not be added; same: what relations of other
    outputs with the same cause have in common; fix: what to do, where that is known better than for all of its kind."""

    kind: str
    code: str
    text: str = ""
    factor: Fraction | None = None
    ranks: tuple[int, ...] = ()
    detail: str = ""
    ratio: tuple[tuple[tuple[int, int], Fraction], ...] = ()
    at: tuple[int, int] | None = None
    same: tuple = ()
    fix: str = ""


OTHER = Relation("other", "REL001")


def scaled(names: Names, factor: Fraction, what: str = "reference") -> Relation:
    if factor == 0:
        return Relation("multiple", "REL003", "parallel = 0", factor)
    name = names.of_factor(factor)
    return Relation("multiple", "REL003", f"parallel = {factor} x {what}" + (f" ({factor} = {name})" if name else ""), factor, detail=name)


def partial(names: Names, factor: Fraction, group: tuple[int, ...]) -> Relation:
    left = "reference" if factor == 1 else f"{factor} x reference"
    name = names.of_factor(factor) if factor != 1 else ""
    text = f"{left} = sum over {names.over(group)} of the parallel values" + (f" ({factor} = {name})" if name else "")
    return Relation("partial sum", "REL002", text, factor, group, names.over(group))


class Relations:
    """Tries the simplest classes first; the answer for an output is remembered."""

    def __init__(self, field, comparison: Comparison, watch: Watch):
        self.field, self.comparison, self.watch, self.names = field, comparison, watch, watch.names
        self._shelf: dict[Key, tuple[np.ndarray, np.ndarray]] = {}
        self._own = {(r.rank, r.kind, r.name, r.step): r for m in comparison.parallel.machines for r in m.outputs}

    def simple(self, c: Compared) -> Relation:
        """Of one output: everything but sums of terms."""
        wrong = [p for p in c.pieces if p.wrong("field")]
        if not wrong:
            return OTHER
        factor = _common([self._factor(p) for p in wrong])
        if factor == 0 and c.key[0] == "state":
            return Relation("never updated", "REL004", "parallel = 0, as before the step")
        return (scaled(self.names, factor) if factor is not None else None) or self._partial(c) or self._stale(c, wrong) or self._elsewhere(c, wrong) or OTHER

    # ---- before clipping
    def unclipped(self, c: Compared) -> Compared | None:
        """The same output before both sides multiplied it by a number that depends on symbols; None if that is not known, or neither did."""
        right = self.watch.unclipped("reference", (c.reference.rank, c.reference.call.index))
        pieces = []
        for p in c.pieces:
            left = self.watch.unclipped("parallel", (p.rank, p.recorded.call.index))
            if left is None and right is None or not isinstance(p.reference, Part) or not isinstance(p.parallel, Part):
                return None
            a = p.reference.values if right is None else self.watch.kept("reference", right.term)
            b = p.parallel.values if left is None else self.watch.kept("parallel", left.term)
            if a is None or b is None:
                return None
            raw = replace(p, reference=Part(p.reference.algebras, a, p.reference.index), parallel=Part(p.parallel.algebras, b, p.parallel.index),
                          equal={}, recorded=p.recorded)
            raw.equal["field"] = self.field.equal(raw.parallel["field"], raw.reference["field"])
            pieces.append(raw)
        return replace(c, pieces=pieces) if pieces else None

    # ---- multiples and shares
    def _factor(self, piece: Piece) -> Fraction | None:
        """A small rational c with parallel == c x reference on every element, checked in the field."""
        return ratio(self.field, piece.reference["real"].t, piece.parallel["real"].t, piece.reference["field"], piece.parallel["field"])

    def _partial(self, c: Compared) -> Relation | None:
        """c such that the sum over a group's pieces is c x reference (1: exactly one reduction is missing)."""
        wrong = {p.rank for p in c.pieces if p.wrong("field")}
        for group in [*sorted(self.names.groups, key=len), *self._holders(c, wrong)]:
            got = _sum_over(self.field, c.pieces, group) if set(group) <= wrong else None
            if got is not None:
                return partial(self.names, got, group)
        return None

    def _holders(self, c: Compared, wrong: set[int]) -> list[tuple[int, ...]]:
        """The first rank of each of the different values: groups that should have been made need not exist."""
        first: dict[bytes, int] = {}
        for p in sorted((p for p in c.pieces if p.rank in wrong), key=lambda p: p.rank):
            first.setdefault(self.field.fingerprint(p.parallel["field"]).numpy().tobytes(), p.rank)
        group = tuple(sorted(first.values()))
        return [group] if len(group) > 1 and group not in self.names.groups else []

    # ---- other times
    def _stale(self, c: Compared, wrong: list[Piece]) -> Relation | None:
        kind, name, step = c.key
        if kind in UPDATED and all(self._same(p, self._before(p, step)) for p in wrong):
            return Relation("never updated", "REL004", "parallel = the value before the step")
        for (k, n, s), other in self.comparison.compared.items():
            if (k, n) == (kind, name) and s != step and all(self._same(p, self._reference_at(p, other)) for p in wrong):
                return Relation("stale", "REL015", f"parallel = the reference's value of step {s}", detail=f"of step {s}")
        return None

    def _before(self, p: Piece, step: int):
        """This rank's own value before the step."""
        rec = p.recorded
        old = self._own.get((rec.rank, rec.kind, rec.name, step - 1))
        if old is not None and old.ref is not None and rec.ref is not None and old.ref.size == rec.ref.size:
            return self.field.take([old.values["field"]], torch.from_numpy(p.at) + 1)
        if step == 1 and rec.kind == "parameter" and len(p.numbers):
            return self.field.take([self.comparison.every["field"]], torch.from_numpy(p.numbers) + 1)
        return None

    def _reference_at(self, p: Piece, other: Compared):
        """The elements of another output of the reference, of the same shape, at this piece's places."""
        rec = other.reference
        if "field" not in rec.values or int(np.prod(rec.values["field"].shape, dtype=np.int64)) < int(due_places(p).max()) + 1:
            return None
        return self.field.take([rec.values["field"]], torch.from_numpy(due_places(p)) + 1)

    def _same(self, p: Piece, v) -> bool:
        return v is not None and tuple(v.shape) == tuple(p.parallel["field"].shape) and bool(self.field.equal(p.parallel["field"], v).all())

    # ---- other places
    def _elsewhere(self, c: Compared, wrong: list[Piece]) -> Relation | None:
        """Every element is one of some output of the reference, at another place or of another tensor."""
        kind, name, step = c.key
        prints = [self.field.fingerprint(p.parallel["field"]).reshape(-1).numpy() for p in wrong[:LOOKED_AT]]
        if not all((x != self.watch.zero).any() and self.watch.among(x).all() for x in prints):
            return None
        order = sorted(self.comparison.compared, key=lambda k: (k != c.key, k[0] != kind, k[2] != step))
        for key in order:
            if self.comparison.compared[key].reference.values and all(self._on_shelf(key, x) for x in prints):
                return self._moved(c, key, wrong[0], prints[0])
        return None

    def inside(self, c: Compared) -> Relation:
        """Every element is one of some result inside the reference, which is no output of it."""
        wrong = [p for p in c.pieces if p.wrong("field")][:LOOKED_AT]
        homes = [self.watch.home(self.field.fingerprint(p.parallel["field"]).reshape(-1).numpy()) for p in wrong]
        if not homes or any(h is None or h[0] != homes[0][0] for h in homes):
            return OTHER
        words = self.home_words(homes[0][0])
        return Relation("other tensor", "REL012", f"parallel = values of {words}", detail=f"of {words}")

    def _on_shelf(self, key: Key, prints: np.ndarray) -> bool:
        held, _ = self._held(key)
        return bool(np.isin(prints[:1], held).all() and np.isin(prints, held).all())

    def _held(self, key: Key) -> tuple[np.ndarray, np.ndarray]:
        if key not in self._shelf:
            self._shelf[key] = np.unique(self.field.fingerprint(self.comparison.compared[key].reference.values["field"]).reshape(-1).numpy(), return_index=True)
        return self._shelf[key]

    def _moved(self, c: Compared, key: Key, p: Piece, prints: np.ndarray) -> Relation:
        if key != c.key:
            what = output_words(key)
            if key[:2] == c.key[:2]:
                return Relation("stale", "REL015", f"parallel = values of {what}", detail=f"of step {key[2]}")
            return Relation("other tensor", "REL012", f"parallel = values of {what}", detail=f"of {what}")
        held, flats = self._held(key)
        rec = c.reference
        counts = prints != self.watch.zero
        at = flats[np.searchsorted(held, prints[counts])]
        words = index_map(at, due_places(p)[counts], rec.ref.size if rec.ref is not None else ())
        return Relation("permutation", "REL012", "parallel = the reference's elements in other places: " + words, detail="in other places: " + words)


    def home_words(self, home: Home) -> str:
        """Where the reference computes a value."""
        if home.call < 0:
            return "an input of the reference"
        machine = self.comparison.reference.machines[0]
        call = machine.trace.ops[home.call]
        span = machine.span(call)
        name = call.name.removeprefix("aten.").rsplit(".", 1)[0]
        if span is None or not span.file:
            return f"the reference's {name}"
        return f"the reference's {name} at {os.path.basename(span.file)}:{span.line}" + (" (backward)" if span.phase == "backward" else "")


def due_places(p: Piece) -> np.ndarray:
    """Flat positions in the reference's tensor of the elements that a piece must hold."""
    return p.reference.index.numpy() - 1 if isinstance(p.reference, Part) else np.arange(len(p.at))


def output_words(key: Key) -> str:
    kind, name, step = key
    noun = {"gradient": f"the gradient of {name}", "parameter": f"the updated {name}", "state": name.replace("::", "."), "scalar": name}.get(kind, f"{kind} {name}")
    return f"{noun}, step {step}"


def _common(factors: list[Fraction | None]) -> Fraction | None:
    return factors[0] if factors and factors[0] is not None and len(set(factors)) == 1 else None


def ratio(field, a: torch.Tensor, b: torch.Tensor, fa, fb) -> Fraction | None:
    """A small rational c with b == c x a on every element, guessed from float64 and checked in the field."""
    a, b = a.reshape(-1), b.reshape(-1)
    ok = torch.isfinite(a) & torch.isfinite(b) & (a.abs() > 1e-12)
    if not ok.any():
        return None
    k = int(torch.argmax(torch.where(ok, a.abs(), torch.zeros_like(a))))
    value = float(b[k] / a[k])
    guess = Fraction(value).limit_denominator(4096)
    if abs(float(guess) - value) > 1e-8 * max(1.0, abs(value)):
        return None
    return guess if bool(field.equal(fb, field.scale(fa, guess)).all()) else None


def _sum_over(field, pieces: list[Piece], group: tuple[int, ...]) -> Fraction | None:
    mine = {p.rank: p for p in pieces}
    if len(group) < 2 or not set(group) <= set(mine):
        return None
    parts = [mine[r] for r in group]
    first = parts[0]
    if any(len(p.numbers) != len(first.numbers) or (p.numbers != first.numbers).any() for p in parts):
        return None
    total, real = first.parallel["field"], first.parallel["real"].t
    for p in parts[1:]:
        total, real = field.add(total, p.parallel["field"]), real + p.parallel["real"].t
    return ratio(field, first.reference["real"].t, real, first.reference["field"], total)
