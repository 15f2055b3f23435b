"""Wrong sums: terms that the reference weighs differently, a term too many, a term that is missing (not trusted).

The terms of a value are known from the traces (terms.py). Weights are guessed by least squares in float64 and checked in the field.
"""
from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from trainverify.diagnose.relation import Relation, Relations, due_places, output_words, ratio
from trainverify.diagnose.terms import MOST_TERMS, Term
from trainverify.diagnose.watch import GOOD
from trainverify.diagnose.words import ranks_text
from trainverify.relate.compare import Compared, Piece

LOOKED_AT = 4


@dataclass(slots=True)
class Shares:
    """Distinct terms of one piece (labels: rank and number on it, of each copy), with their values at the piece's places."""

    terms: list[Term]
    labels: list[list[tuple[int, int]]]
    field: list
    real: list[torch.Tensor]


class Sums:
    def __init__(self, relations: Relations):
        self.r, self.field, self.watch, self.names = relations, relations.field, relations.watch, relations.names

    def of(self, c: Compared) -> Relation | None:
        """What is wrong with one output as a sum; None if nothing was found."""
        wrong = [p for p in c.pieces if p.wrong("field")][:LOOKED_AT]
        for find in (self._weighed, self._one_term):
            found = [find(c, p) for p in wrong]
            if found and all(f is not None and f.kind == found[0].kind for f in found):
                return found[0]
        return None

    # ---- weights
    def _weighed(self, c: Compared, p: Piece) -> Relation | None:
        for wide in (False, True):            # its own terms, then also what other ranks and microbatches made
            shares = self.shares(p, wide)
            if shares is None or len(shares.terms) < (1 if wide else 2):
                continue
            due = self._solve(shares, p.reference)
            here = self._solve(shares, p.parallel) if due is not None else None
            if due is not None and here is not None and due != here:
                return self._compared(c, p, shares, here, due)
        return None

    def _compared(self, c: Compared, p: Piece, shares: Shares, here: list[Fraction], due: list[Fraction]) -> Relation | None:
        """What two sets of weights of the same terms amount to."""
        missing = [i for i, (a, b) in enumerate(zip(here, due)) if not a and b]
        extra = [i for i, (a, b) in enumerate(zip(here, due)) if a and not b]
        factors = {b / a for a, b in zip(here, due) if a and b}
        labels = tuple((label, b / a) for its, a, b in zip(shares.labels, here, due) if a for label in its)
        if len(factors) > 1:
            uneven = len(set(here)) > len(set(due))   # the terms are right, and added wrongly
            culprit = max((i for i, b in enumerate(due) if b), key=lambda i: abs(here[i] / due[i]))
            return Relation("reweighted", "REL013", self._weights_text(shares, here, due), ratio=labels, at=shares.terms[culprit].taken if uneven else None,
                            same=("reweighted", labels), fix=_reduced_again(labels))
        same = (tuple(shares.labels[i][0] for i in missing), tuple(shares.labels[i][0] for i in extra))
        lost, more = self._made(c, shares, missing), self._made(c, shares, extra)
        own = [t.taken for t, a in zip(shares.terms, here) if a and t.rank == p.rank and t.taken is not None]
        if missing and extra:
            elsewhere = self._over_other_ranks(shares, missing, extra, here, due)
            if elsewhere is not None:
                return elsewhere
            return Relation("stale", "REL015", f"parallel has {more} in place of {lost}", detail=f"value of other shares: {more} in place of {lost}",
                            at=shares.terms[extra[0]].taken, same=("stale", same))
        if extra:
            return Relation("additive term", "REL014", f"parallel = reference + {more}", detail=f"a term too many: {more}",
                            at=shares.terms[extra[0]].taken, same=("additive term", same))
        if missing and p.rank not in {shares.terms[i].rank for i in missing}:
            return Relation("partial sum", "REL002", f"reference = parallel + {lost}", detail=lost, at=own[-1] if own else None, same=("partial sum", len(missing)))
        if missing:
            return Relation("additive term", "REL014", f"reference = parallel + {lost}", detail=f"a term is missing: {lost}", at=own[-1] if own else None,
                            same=("additive term", same))
        return None

    def _over_other_ranks(self, shares: Shares, missing: list[int], extra: list[int], here: list[Fraction], due: list[Fraction]) -> Relation | None:
        """Where what is too many and what is missing are the same calls' shares, of other ranks: a reduction over another group."""
        def made(which):
            return sorted((shares.labels[i][0][1], self._place(shares.terms[i].node, False)) for i in which)

        def ranks(weights):
            return tuple(sorted({rank for its, w in zip(shares.labels, weights) if w for rank, _ in its}))
        its, its_due = ranks(here), ranks(due)
        if made(missing) != made(extra) or its == its_due:
            return None
        words = f"{self.names.over(its)} in place of {self.names.over(its_due)}"
        return Relation("wrong group", "REL002", f"parallel = sum over {self.names.over(its)} of the shares; reference = sum over {self.names.over(its_due)}", ranks=its_due,
                        detail=words, at=shares.terms[extra[0]].taken, same=("wrong group",))

    def _made(self, c: Compared, shares: Shares, which: list[int]) -> str:
        """"share 2 of ranks 0-1, made at model.py:57 (backward)" """
        ranks: dict[tuple, list[int]] = defaultdict(list)     # (number, place) -> ranks
        for i in which:
            (rank, number), node = shares.labels[i][0], shares.terms[i].node
            ranks[(number + 1, self._when(node, c.key[2]) + self._place(node, False))].append(rank)
        several = self.names.world > 1
        told = [f"share {number}" + (f" of {ranks_text(its)}" if several else "") + f", made {place}" for (number, place), its in ranks.items()]
        return " and ".join(told[:3]) + (f" and {len(told) - 3} more" if len(told) > 3 else "")

    def _solve(self, shares: Shares, target) -> list[Fraction] | None:
        """Rational weights with target == sum of weight x term, exactly in the field."""
        real = target["real"].t.reshape(-1)
        matrix = torch.stack(shares.real, 1)
        n, k = matrix.shape
        size = matrix.abs().max(0).values
        if not k or n < k or not bool(torch.isfinite(matrix).all()) or not bool((size > 0).all()):
            return None
        got = torch.linalg.lstsq(matrix / size, real[:, None], driver="gelsd")
        if int(got.rank) < k:
            return None
        weights = [Fraction(float(x / s)).limit_denominator(4096) for x, s in zip(got.solution[:, 0], size)]
        return weights if self._is_sum(shares, weights, target) else None

    def _is_sum(self, shares: Shares, weights: list[Fraction], target) -> bool:
        total = None
        for v, w in zip(shares.field, weights):
            part = self.field.scale(v, w)
            total = part if total is None else self.field.add(total, part)
        return bool(self.field.equal(total, self.field.reshape(target["field"], total.shape)).all())

    def explained_by(self, c: Compared, known: Relation) -> bool:
        """Whether an output (a loss) is wrong by the same weights as others that a relation was found for."""
        factors = dict(known.ratio)
        for p in [p for p in c.pieces if p.wrong("field")][:LOOKED_AT]:
            shares = self.shares(p)
            if shares is None or any(label not in factors for its in shares.labels for label in its):
                return False
            weights = [factors[its[0]] for its in shares.labels]
            totals = [Fraction(len(its)) for its in shares.labels]
            if not any(self._is_sum(shares, [w * t * g for w, t in zip(weights, totals)], p.reference)
                       and self._is_sum(shares, [t * g for t in totals], p.parallel) for g in self._scales(p, shares)):
                return False
        return bool(factors)

    def _scales(self, p: Piece, shares: Shares) -> list[Fraction]:
        """The constant between the sum of the terms and the parallel value."""
        total = sum(float(v.sum()) * len(its) for v, its in zip(shares.real, shares.labels))
        here = float(p.parallel["real"].t.sum())
        return [Fraction(here / total).limit_denominator(4096)] if total and math.isfinite(here / total) else []

    def shares(self, p: Piece, wide: bool = False) -> Shares | None:
        """The terms of a piece with their values, equal ones together; None if they are not known. wide: and what might be terms."""
        terms = self._terms(p)
        if wide:
            more = self.watch.others.get((p.recorded.rank, p.recorded.call.index), [])
            if not terms or not more or len(terms) + len(more) > MOST_TERMS:
                return None
            known = {t.key for t in terms}
            terms = sorted([*terms, *(t for t in more if t.key not in known)], key=lambda t: (t.rank, t.node))
        number: dict[int, int] = defaultdict(int)
        found: dict[bytes, int] = {}
        out = Shares([], [], [], [])
        for t in terms:
            label = (t.rank, number[t.rank])
            number[t.rank] += 1
            held = self.watch.kept("parallel", t)
            if held is None:
                return None
            at = torch.from_numpy(p.at)
            n = int(np.prod(held["field"].shape, dtype=np.int64))
            if not len(p.at) or int(p.at.max()) >= n:
                return None
            value = self.field.take([held["field"]], at + 1)
            if self.field.is_const(value) and not bool(held["real"].t.any()):
                continue                      # what a sum began with
            key = self.field.fingerprint(value).numpy().tobytes()
            if key in found:
                out.labels[found[key]].append(label)
                continue
            found[key] = len(out.terms)
            out.terms.append(t)
            out.labels.append([label])
            out.field.append(value)
            out.real.append(held["real"].t.reshape(-1)[at])
        return out if out.terms else None

    def _terms(self, p: Piece) -> list[Term]:
        """Of what the output names; of a scalar that is declared a share, of every rank's."""
        rec = p.recorded
        if not rec.declare:
            return self.watch.terms.get((rec.rank, rec.call.index), [])
        out = []
        for m in self.r.comparison.parallel.machines:
            for other in m.outputs:
                if (other.kind, other.name, other.step, other.declare, other.group) == (rec.kind, rec.name, rec.step, rec.declare, rec.group):
                    out += self.watch.terms.get((other.rank, other.call.index), [])
        return out

    def _weights_text(self, shares: Shares, here: list[Fraction], due: list[Fraction]) -> str:
        flat = [its[0] for its in shares.labels]
        ranks = sorted({rank for rank, _ in flat})
        several = len({n for _, n in flat}) > 1
        if not several:
            who = f"the shares of ranks {ranks}"
        elif len(ranks) == 1:
            who = f"the {len(flat)} terms (microbatches) of rank {ranks[0]}"
        else:
            who = f"the {len(flat)} terms of ranks {ranks} (microbatches, by rank)"
        return f"{who} count {_proportion(here)}; in the reference {_proportion(due)}"

    # ---- one term
    def _one_term(self, c: Compared, p: Piece) -> Relation | None:
        """reference - parallel, as a multiple of something that has a name."""
        gap = self.field.sub(p.reference["field"], self.field.reshape(p.parallel["field"], p.reference["field"].shape))
        real = p.reference["real"].t.reshape(-1) - p.parallel["real"].t.reshape(-1)
        for words, value, floats in self._named(c, p):
            got = ratio(self.field, floats, real, value, self.field.reshape(gap, value.shape))
            if got is not None and got != 0:
                return _additive(got, words)
        prints = self.field.fingerprint(gap).reshape(-1).numpy()
        if self._is_value(prints):
            return _additive(Fraction(1), self._home_words(prints))
        back = self.field.fingerprint(self.field.neg(gap)).reshape(-1).numpy()
        if self._is_value(back):
            return _additive(Fraction(-1), self._home_words(back))
        return self._made_here(c, p, prints, Fraction(1)) or self._made_here(c, p, back, Fraction(-1))

    def _named(self, c: Compared, p: Piece):
        """Values of the reference at this piece's places: of the same tensor at any time, in any role."""
        kind, name, step = c.key
        base = name.split("::")[0]
        places = torch.from_numpy(due_places(p)) + 1
        n = int(places.max()) if len(places) else 0
        if len(p.numbers):
            at = torch.from_numpy(p.numbers)
            yield f"{base} before the first step", self.field.take([self.r.comparison.every["field"]], at + 1), \
                self.r.comparison.every["real"].t.reshape(-1)[at]
        for key, other in self.r.comparison.compared.items():
            values = other.reference.values
            if key == c.key or key[1].split("::")[0] != base or key[2] > step or "field" not in values:
                continue
            if int(np.prod(values["field"].shape, dtype=np.int64)) >= n and values["field"].shape == c.reference.values["field"].shape:
                yield output_words(key), self.field.take([values["field"]], places), values["real"].t.reshape(-1)[places - 1]

    def _is_value(self, prints: np.ndarray) -> bool:
        return bool((prints != self.watch.zero).any() and self.watch.among(prints).all())

    def _home_words(self, prints: np.ndarray) -> str:
        home = self.watch.home(prints)
        return "a value of the reference" if home is None else self.r.home_words(home[0])

    def _made_here(self, c: Compared, p: Piece, prints: np.ndarray, sign: Fraction) -> Relation | None:
        """A term that the parallel program computes, and that is too many or never arrives."""
        counts = prints[prints != self.watch.zero]
        if not len(counts):
            return None
        for node, results in self.watch.printed.items():
            if node[0] == p.rank and self.watch.status.get(node, GOOD) != GOOD:
                for ref, held in results:
                    if len(held) >= len(counts) and counts[0] in held and np.isin(counts, held).all():
                        return _additive(sign, "the value made at " + self._place(node))
        return None

    def _when(self, node, step: int) -> str:
        span = self.watch.flow.span(node)
        return f"in step {span.step} at " if span is not None and 0 < span.step < step else "at "

    def _place(self, node, ranks: bool = True) -> str:
        span = self.watch.flow.span(node)
        name = self.watch.flow.call(node).name
        if span is None or not span.file:
            return name
        return f"{span}" + (" (backward)" if span.phase == "backward" else "") + (f" on rank {node[0]}" if ranks and self.names.world > 1 else "")


def _additive(missing: Fraction, words: str) -> Relation:
    """reference = parallel + missing x words."""
    factor = "" if abs(missing) == 1 else f"{abs(missing)} x "
    if missing > 0:
        return Relation("additive term", "REL014", f"reference = parallel + {factor}{words}", detail=f"a term is missing: {factor}{words}")
    return Relation("additive term", "REL014", f"parallel = reference + {factor}{words}", detail=f"a term too many: {factor}{words}")


def _proportion(weights: list[Fraction]) -> str:
    """Weights as the smallest whole numbers in the same proportion: "5 : 3"."""
    common = math.lcm(*(w.denominator for w in weights))
    whole = [int(w * common) for w in weights]
    divisor = math.gcd(*whole) or 1
    shown = [str(w // divisor) for w in whole]
    return " : ".join(shown[:8]) + (f" : ... {len(shown) - 8} more" if len(shown) > 8 else "")


def _reduced_again(ratio: tuple[tuple[tuple[int, int], Fraction], ...]) -> str:
    """What to do where on every rank each microbatch counts n times as much as the next: its gradient is summed again with every later one."""
    weights: dict[int, list[Fraction]] = {}
    for (rank, _), due in sorted(ratio):
        weights.setdefault(rank, []).append(1 / due if due else Fraction(0))
    steps = {a / b if b else Fraction(0) for its in weights.values() for a, b in zip(its, its[1:]) if a != b}      # one microbatch may have several terms
    if len(steps) != 1 or (n := steps.pop()) < 2 or n.denominator != 1:
        return ""
    return f"each gradient is summed {n}-fold again with every later microbatch: reduce once, after the last of them, or only what is new"
