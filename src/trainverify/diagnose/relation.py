"""What a wrong value is, in algebra: a multiple of the reference, one rank's share of a sum, a sum too many, never updated."""
from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch

from trainverify.relate.compare import Compared, Piece


@dataclass(frozen=True, slots=True)
class Relation:
    """kind: scaled, partial, partial-scaled, stale, other. text is the statement; ranks the group of a partial sum."""

    kind: str
    code: str
    text: str
    factor: Fraction | None = None
    ranks: tuple[int, ...] = ()


def relate(field, compared: Compared, groups: list[tuple[int, ...]], axis_of: dict[tuple[int, ...], str],
           before: dict[int, object]) -> Relation:
    """The simplest exact relation that holds for every wrong piece; `before` holds symbols' own values per piece rank (unchanged?)."""
    wrong = [p for p in compared.pieces if p.wrong("field")]
    factor = _common([_factor(field, p) for p in wrong])
    if factor is not None:
        return Relation("scaled", "REL003", f"parallel = {factor} x reference", factor)
    for group in groups:
        got = _partial(field, compared.pieces, group)
        if got is not None:
            name = axis_of.get(group, "")
            over = f"{name} ranks {list(group)}" if name else f"ranks {list(group)}"
            if got == 1:
                return Relation("partial", "REL002", f"reference = sum over {over} of the parallel values", Fraction(1), group)
            return Relation("partial-scaled", "REL002", f"{got} x reference = sum over {over} of the parallel values", got, group)
    if wrong and all(_same(field, p.parallel["field"], before.get(id(p))) for p in wrong):
        return Relation("stale", "REL004", "parallel = the value before the step: never updated")
    return Relation("other", "REL001", "")


def _same(field, a, b) -> bool:
    return b is not None and tuple(a.shape) == tuple(b.shape) and bool(field.equal(a, b).all())


def _common(factors: list[Fraction | None]) -> Fraction | None:
    return factors[0] if factors and factors[0] is not None and len(set(factors)) == 1 else None


def _factor(field, piece: Piece) -> Fraction | None:
    """A small rational c with parallel == c x reference on every element, checked in the field."""
    a, b = piece.reference["real"].t.reshape(-1), piece.parallel["real"].t.reshape(-1)
    return _ratio(field, a, b, piece.reference["field"], piece.parallel["field"])


def _ratio(field, a: torch.Tensor, b: torch.Tensor, fa, fb) -> Fraction | None:
    ok = torch.isfinite(a) & torch.isfinite(b) & (a.abs() > 1e-12)
    if not ok.any():
        return None
    k = int(torch.argmax(torch.where(ok, a.abs(), torch.zeros_like(a))))
    value = float(b[k] / a[k])
    guess = Fraction(value).limit_denominator(4096)
    if abs(float(guess) - value) > 1e-8 * max(1.0, abs(value)):
        return None
    return guess if bool(field.equal(fb, field.scale(fa, guess)).all()) else None


def _partial(field, pieces: list[Piece], group: tuple[int, ...]) -> Fraction | None:
    """c such that the sum over the group's pieces is c x reference (1: exactly one reduction is missing)."""
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
    return _ratio(field, first.reference["real"].t.reshape(-1), real.reshape(-1), first.reference["field"], total)
