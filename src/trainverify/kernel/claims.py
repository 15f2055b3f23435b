"""Claims: a row's value is an earlier identifier's, or a rational multiple of it; only what is proved is merged (trusted).

A claim becomes obligations: the definitions of both sides over leaves, for all real values of the leaves. Open nodes (of the
parallel side, equal to nothing proved) are written out. If an obligation fails, leaves are unfolded, newest first; which
ones is a matter of success only. Rows of one shape are named canonically, so that equal obligations are proved once.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import count
from typing import Protocol

import numpy as np

from trainverify.kernel.linear import Shares
from trainverify.kernel.patterns import Pattern, Patterns
from trainverify.kernel.prove import Proved, Refuted, Verdict, prove
from trainverify.kernel.rename import Template, canonical_order, canonical_rows, distinct, instantiate, template
from trainverify.kernel.shapes import LEAF, Shapes
from trainverify.kernel.store import GARBAGE, I64, ZERO_ID, Store, distinct_rows, grow, is_total
from trainverify.kernel.sums import equal_sums
from trainverify.kernel.terms import ANY, Obligation, Terms, digest

INLINE = 300                                  # leaves up to which an open node is written out from the start
# Successive attempts: the leaves that unfolding may reach, and whether short operations are unfolded before long ones.
LADDER = ((300, False), (300, True), (2000, False))
SHORT = 4                                     # operands
DEPTH = 24                                    # unfoldings in a row
DEEPEST = 400                                 # operations above each other that unfolding may reach
NESTING = 120                                 # operations above each other in a written-out term
LOOK = 300                                    # identifiers at which a look for others below stops
PILOT = 4                                     # rows that are tried before all rows of a kind are unfolded
PATIENCE = 200_000                            # effort that a run may lose to claims that fail, plus half the number of identifiers; then it unfolds no more
GIVE_UP = 3                                   # failures of a kind of claim before it is not tried again
SHARES = 64                                   # summands up to which a sum may be one of shares
SUMS = 32                                     # rows of a call that are tried as long sums
CHUNK = 1 << 21                               # leaves that are named at once
SIMPLE = 1 << 20                              # constants with larger numerators or denominators are leaves


class Prints(Protocol):
    """Fingerprints of the rows of one call (guesses); None: there are none, and nothing is guessed."""

    def of(self, index: np.ndarray) -> np.ndarray | None: ...
    def divided(self, index: np.ndarray, factors: tuple[Fraction, ...]) -> np.ndarray: ...      # [factors, index]


class Guesses(Protocol):
    """Proposes what a row may equal. A wrong proposal costs time only."""

    def find(self, prints: np.ndarray) -> np.ndarray: ...
    def learn(self, prints: np.ndarray, ids: np.ndarray) -> None: ...
    def scales(self, index: np.ndarray, prints: Prints, code: int, rows: np.ndarray) -> Iterable[tuple[Fraction, np.ndarray]]: ...

    # Of fingerprints that elements have which were not proved equal:
    def ambiguous(self, prints: np.ndarray) -> np.ndarray: ...
    def find_other(self, code: int, rows: np.ndarray) -> np.ndarray: ...
    def learn_other(self, prints: np.ndarray, code: int, rows: np.ndarray, ids: np.ndarray) -> None: ...


@dataclass(frozen=True, slots=True)
class Group:
    """Rows (by index) that are terms of one shape, with their leaves [rows, leaves]."""

    shape: int
    index: np.ndarray
    leaves: np.ndarray


@dataclass(slots=True)
class Failure:
    """A kind of claim that was not proved."""

    origin: int
    parallel: bool
    kind: str
    reason: str
    rows: int
    obligation: Obligation | None = None


class TooLarge(Exception):
    """A term would have more leaves than the limit."""


class Claims:
    """Turns rows into identifiers."""

    def __init__(self, store: Store, guesses: Guesses):
        self.store, self.guesses, self.shapes = store, guesses, Shapes()
        self.failures: list[Failure] = []
        self.proofs: dict[str, Proved] = {}                      # by content
        self.counts: Counter[str] = Counter()
        self._patterns = Patterns()
        self._templates: dict[tuple[int, int, Fraction], Template] = {}
        self._verdicts: dict[tuple, tuple[Verdict, Obligation]] = {}
        self._by_content: dict[str, Verdict] = {}
        self._failed: Counter[tuple[int, int, Fraction]] = Counter()
        self._shape, self._at = np.zeros(0, np.int32), np.zeros(0, I64)
        self._pool, self._used = np.empty(1024, I64), 0
        self.wasted = self._effort = 0                           # nodes of terms, half the steps of proofs, and cells of rows by 64
        self._not_zero: set[int] = set()      # operations whose rows could not be shown to be zero though they seem to be
        self._below: dict[int, list[int]] = {}
        self._constants = 0
        self._stubborn = np.zeros(0, bool)                       # not proved to be what its fingerprint says
        self._short_first = self._too_large = self._plainly = False
        self._shares = Shares(store, self._are_sums)

    def over(self, store: Store, guesses: Guesses) -> Claims:
        """Claims over another store. What was decided stays decided: an obligation speaks of no store."""
        new = Claims(store, guesses)
        new.proofs, new._by_content, new.counts = self.proofs, self._by_content, self.counts
        return new

    def begin_program(self, patient: bool) -> None:
        """Another parallel program: its claims may fail anew, and cost again what claims that fail may cost (nothing more, if not patient)."""
        self.wasted = 0 if patient else PATIENCE
        self._failed = Counter({kind: n for kind, n in self._failed.items() if n < 0})
        self._not_zero.clear()

    # ---- rows to identifiers
    def resolve(self, kind: str, attr, rows: np.ndarray, prints: Prints) -> np.ndarray:
        """Identifiers [n] of rows [n, width]; prints answers for row numbers."""
        code = self.store.operation(kind, attr, rows.shape[1])
        ids, new, keys = self.store.known(code, rows)
        self.counts["rows"] += len(rows)
        if new.size:
            first, inverse = distinct_rows(rows[new], keys[new])
            pick = new[first]
            ids[new] = self._settled(code, rows[pick], keys[pick], pick, prints)[inverse]
        return ids

    def _settled(self, code: int, rows: np.ndarray, keys: np.ndarray, index: np.ndarray, prints: Prints) -> np.ndarray:
        """Identifiers of distinct rows that are not interned."""
        store, out, marks = self.store, np.full(len(rows), -1, I64), prints.of(index)
        self.counts["new"] += len(rows)
        if marks is None:
            return self._opened(code, rows, keys)
        unsure = np.flatnonzero(self.guesses.ambiguous(marks))
        if unsure.size:
            reps = np.full(len(rows), -1, I64)
            reps[unsure] = self.guesses.find_other(code, rows[unsure])
            self._merge(code, rows, keys, out, np.flatnonzero(reps >= 0), reps, Fraction(1))
        reps = self.guesses.find(marks)
        zero = unsure[(reps[unsure] == ZERO_ID) & (out[unsure] < 0)] if store.parallel else unsure[:0]
        skipped = zero if code in self._not_zero else zero[:0]    # the reference has what it could not show to be zero, nor could sums like these be
        tried = np.flatnonzero((reps >= 0) & (out < 0))
        self._merge(code, rows, keys, out, np.setdiff1d(tried, skipped), reps, Fraction(1))
        failed = np.flatnonzero((reps >= 0) & (out < 0))
        if (out[zero] < 0).any():
            self._not_zero.add(code)
        open_ = np.flatnonzero(out < 0)
        if store.parallel and open_.size:
            for c, reps in self.guesses.scales(index[open_], prints, code, rows[open_]):
                full = np.full(len(rows), -1, I64)
                full[open_] = reps
                self._merge(code, rows, keys, out, np.flatnonzero((full >= 0) & (out < 0)), full, c)
        if not store.parallel and open_.size:
            self._learnt(code, rows, keys, out, marks, failed)
        open_ = np.flatnonzero(out < 0)
        if open_.size:
            out[open_] = self._opened(code, rows[open_], keys[open_])
        if failed.size:
            self._sync()
            self._stubborn[out[failed]] = True
        return out

    def _learnt(self, code: int, rows, keys, out: np.ndarray, marks: np.ndarray, failed: np.ndarray) -> None:
        """Define what the reference has for the first time, and tell the guesses."""
        if failed.size:
            out[failed] = self.store.define(code, rows[failed], keys[failed])
            self.guesses.learn_other(marks[failed], code, rows[failed], out[failed])
        new = np.flatnonzero(out < 0)
        _, first, inverse = np.unique(marks[new], return_index=True, return_inverse=True)
        is_lead = np.zeros(len(new), bool)
        is_lead[first] = True
        lead, twins = new[is_lead], new[~is_lead]                # a twin is equal to an earlier row of this very call, perhaps
        out[lead] = self.store.define(code, rows[lead], keys[lead])
        self.guesses.learn(marks[lead], out[lead])
        if twins.size:
            reps = np.full(len(rows), -1, I64)
            reps[new] = out[new[first]][inverse.reshape(-1)]
            self._merge(code, rows, keys, out, twins, reps, Fraction(1))
            unequal = twins[out[twins] < 0]
            out[unequal] = self.store.define(code, rows[unequal], keys[unequal])
            self.guesses.learn_other(marks[unequal], code, rows[unequal], out[unequal])

    def _opened(self, code: int, rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """New identifiers of rows that are nothing known."""
        ids = self.store.define(code, rows, keys)
        if self.store.parallel:
            self._write_out(code, rows, ids)
        return ids

    def _merge(self, code: int, rows, keys, out: np.ndarray, at: np.ndarray, reps: np.ndarray, c: Fraction) -> None:
        """Prove the claims rows[at] = c * reps[at]; out gets the identifiers of those that are."""
        if not at.size:
            return
        proved = self.claim(code, rows[at], reps[at], c)
        at = at[proved]
        if at.size:
            out[at] = reps[at] if c == 1 else self.multiples(c, reps[at])
            self.store.identify(code, rows[at], keys[at], out[at])

    def multiples(self, c: Fraction, ids: np.ndarray) -> np.ndarray:
        """Identifiers of c * id."""
        store = self.store
        rows = np.sort(np.stack([np.full(len(ids), store.constant(c)), ids], 1), 1)
        code = store.operation("mul", None, 2)
        out, new, keys = store.known(code, rows)
        if new.size:
            first, inverse = distinct_rows(rows[new], keys[new])
            pick = new[first]
            out[new] = self._opened(code, rows[pick], keys[pick])[inverse]
        return out

    # ---- terms over leaves
    def _sync(self) -> None:
        """The arrays of shapes cover all identifiers, and constants are shapes of their own."""
        store, n = self.store, self.store.n
        if n > len(self._shape):
            old, room = len(self._shape), max(n, 2 * len(self._shape))
            self._shape, self._at, self._stubborn = grow(self._shape, room), grow(self._at, room), grow(self._stubborn, room)
            self._shape[old:], self._stubborn[old:] = LEAF, False
        if len(store.constants) > self._constants:
            for i, q in list(store.constants.items())[self._constants:]:
                if abs(q.numerator) < SIMPLE and q.denominator < SIMPLE:
                    self._shape[i] = self.shapes.constant(q)
            self._constants = len(store.constants)

    def _write_out(self, code: int, rows: np.ndarray, ids: np.ndarray) -> None:
        """Remember the terms of open nodes. Those that are too large stay leaves; so do maxima (what is subtracted before exp is
        shared by many), and functions that may be undefined: an obligation takes every uninterpreted function for total."""
        kind, attr = self.store.ops[code][0]
        if kind == "max" or kind == "uf" and not is_total(attr):
            return
        try:
            groups = self.expand(code, rows, INLINE)
        except TooLarge:
            return
        self._sync()
        for g in groups:
            if self.shapes.depth[g.shape] > NESTING:
                continue
            width, to = g.leaves.shape[1], ids[g.index]
            need = self._used + g.leaves.size
            if need > len(self._pool):
                self._pool = grow(self._pool, max(need, 2 * len(self._pool)))
            self._pool[self._used:need] = g.leaves.reshape(-1)
            self._shape[to] = g.shape
            self._at[to] = self._used + np.arange(len(to)) * width
            self._used = need

    def expand(self, code: int, rows: np.ndarray, limit: int) -> list[Group]:
        """The terms of rows, open operands written out. Raises TooLarge."""
        self._sync()
        (kind, attr), _ = self.store.ops[code]
        operands = self.store.operands(code, rows)
        attr = None if kind == "dot" else attr
        shapes = self._shape[operands]
        if not shapes.any():
            shape = self.shapes.intern(kind, attr, (LEAF,) * operands.shape[1])
            self._check(shape, limit)
            return [Group(shape, np.arange(len(rows)), operands)]
        first, inverse = distinct(shapes.astype(I64))
        out = []
        for g, i in enumerate(first):
            index = np.flatnonzero(inverse == g)
            shape = self.shapes.intern(kind, attr, tuple(shapes[i].tolist()))
            self._check(shape, limit)
            out.append(Group(shape, index, self._leaves(operands[index], shapes[i])))
        return out

    def _check(self, shape: int, limit: int) -> None:
        if self.shapes.leaves[shape] > limit or self.shapes.depth[shape] > DEEPEST:
            raise TooLarge(f"{self.shapes.leaves[shape]} leaves, {self.shapes.depth[shape]} operations deep")

    def _leaves(self, operands: np.ndarray, shapes: np.ndarray) -> np.ndarray:
        """Leaves of rows whose operands have these shapes."""
        columns = []
        for j, shape in enumerate(shapes.tolist()):
            column, width = operands[:, j], self.shapes.leaves[shape]
            if shape == LEAF:
                columns.append(column[:, None])
            elif width:
                columns.append(self._pool[self._at[column][:, None] + np.arange(width)])
        return np.concatenate(columns, 1) if columns else np.zeros((len(operands), 0), I64)

    def _definitions(self, ids: np.ndarray, limit: int) -> list[Group]:
        """The terms that define identifiers, one operation deep (open operands written out); what has no definition stays a leaf."""
        codes = self.store.code[ids]
        out = []
        for code in np.unique(codes).tolist():
            index = np.flatnonzero(codes == code)
            if not code:                      # rational numbers, and leaves for good: symbols, numbers without a rational shape
                shapes = self._shape[ids[index]]
                for s in np.unique(shapes).tolist():
                    at = index[shapes == s]
                    out.append(Group(s, at, ids[at, None] if s == LEAF else np.zeros((len(at), 0), I64)))
                continue
            rows = self.store.definition(ids[index], code)
            out += [Group(g.shape, index[g.index], g.leaves) for g in self.expand(code, rows, limit)]
        return out

    # ---- proving
    def claim(self, code: int, rows: np.ndarray, reps: np.ndarray, c: Fraction) -> np.ndarray:
        """Which rows are proved to be c times the identifiers reps."""
        self.counts["claims"] += len(rows)
        ok, before = np.zeros(len(rows), bool), self._effort
        self._sync()
        reps = np.where((reps >= 0) & (reps < self.store.n), reps, GARBAGE)      # a guess may be anything
        is_sum = self.store.ops[code][0][0] == "add" and rows.shape[1] <= SHARES
        if is_sum:
            self._sums_of_shares(rows, reps, c, ok, ((self._shape[rows] == LEAF) & self.store.is_open[rows]).any(1))     # too large to be written out
        self._by_terms(code, rows, reps, c, ok)
        if is_sum:
            self._sums_of_shares(rows, reps, c, ok, self.store.is_open[rows].any(1))
        if not ok.any():
            self.wasted += self._effort - before
        return ok

    def _sums_of_shares(self, rows: np.ndarray, reps: np.ndarray, c: Fraction, ok: np.ndarray, which: np.ndarray) -> None:
        left = np.flatnonzero(which & ~ok)
        if left.size and self._is_patient():
            before = self._shares.effort
            ok[left] = self._shares.sums(rows[left], reps[left], c)
            self._effort += self._shares.effort - before
            self.counts["proved shares"] += int(ok[left].sum())

    def _are_sums(self, rows: np.ndarray, reps: np.ndarray, c: Fraction) -> np.ndarray:
        """Which sums of rows are c times reps, written out."""
        code = self.store.operation("add", None, rows.shape[1])
        ok = (self.store.known(code, rows)[0] == reps) & (c == 1)
        left = np.flatnonzero(~ok)
        if left.size:
            shown = np.zeros(left.size, bool)
            self._by_terms(code, rows[left], reps[left], c, shown)
            ok[left] = shown
        return ok

    def _by_terms(self, code: int, rows: np.ndarray, reps: np.ndarray, c: Fraction, ok: np.ndarray) -> None:
        """Prove what is left of the claims rows = c * reps by obligations over leaves."""
        self._sync()
        simple = self.store.is_constant[reps] & (self._shape[reps] != LEAF)
        defined = np.flatnonzero((self.store.code[reps] > 0) | simple)
        for limit, self._short_first in LADDER:
            left = defined[~ok[defined]]
            if not left.size:
                break
            try:
                self._too_large = False
                right, below = self.expand(code, rows[left], limit), self._definitions(reps[left], limit)
                for ref, par, pick in _pairs(below, right, len(left)):
                    for a, b, at in _whole_leaves(ref, par, reps[left[pick]]):
                        ok[left[pick[at]]] = self._settle(a, b, c, limit, 0)
            except TooLarge:
                self._too_large = True
            if not self._too_large:
                break
        if self.store.ops[code][0][0] in ("add", "sub"):
            self._long_sums(code, rows, reps, c, ok)

    def _long_sums(self, code: int, rows: np.ndarray, reps: np.ndarray, c: Fraction, ok: np.ndarray) -> None:
        """Sums of more summands than a term may have leaves."""
        for i in np.flatnonzero(~ok)[:SUMS].tolist():
            second = Fraction(-1 if self.store.ops[code][0][0] == "sub" else 1)
            row = [(Fraction(1), rows[i, :1]), (second, rows[i, 1:])]
            ok[i] = equal_sums(self.store, [(c, reps[i:i + 1])], row)
            self.counts["proved sum"] += int(ok[i])

    def _settle(self, ref: Group, par: Group, c: Fraction, limit: int, depth: int) -> np.ndarray:
        """Which of the rows (aligned: ref.leaves[i] belongs to par.leaves[i]) are proved."""
        key, n = (ref.shape, par.shape, c), len(ref.leaves)
        ok = np.zeros(n, bool)
        if not depth and self._failed[key] >= GIVE_UP:
            self.counts["skipped"] += n
            return ok
        split = ref.leaves.shape[1]
        rows = np.concatenate([ref.leaves, par.leaves], 1)
        good = np.flatnonzero(self.store.clean[rows].all(1))
        step = max(1, CHUNK // max(1, rows.shape[1]))
        for start in range(0, len(good), step):
            at = good[start:start + step]
            ok[at] = self._settle_rows(key, rows[at], split, limit, depth)
        if not depth:
            self._failed[key] += -1000 if ok.any() else 1
        return ok

    def _settle_rows(self, key: tuple[int, int, Fraction], rows: np.ndarray, split: int, limit: int, depth: int) -> np.ndarray:
        """A few rows show what proves their kind; those that are instances of it need no names."""
        if self._plainly:
            return self._settle_new(key, rows, split, limit, depth)
        ok, left, tried = np.zeros(len(rows), bool), np.arange(len(rows)), 0
        patterns = self._patterns.of(key)
        while left.size:
            for pattern in patterns[tried:]:
                left = self._like(pattern, key, rows, left, ok, split, limit, depth)
            tried = len(patterns)
            some, left = left[:PILOT], left[PILOT:]
            ok[some] = self._settle_new(key, rows[some], split, limit, depth)
            if len(patterns) == tried:
                ok[left] = self._settle_new(key, rows[left], split, limit, depth)
                break
        return ok

    def _like(self, pattern: Pattern, key, rows: np.ndarray, left: np.ndarray, ok: np.ndarray, split: int, limit: int, depth: int) -> np.ndarray:
        """Settle the rows that fit a pattern; which are left."""
        fits = pattern.fits(rows[left], self.store.sign)
        self._effort += rows[left].size // 256
        if pattern.unfold is not None:                           # what has no definition would stay as it is, for ever
            fits &= (self.store.code[rows[left][:, pattern.order[pattern.unfold]]] > 0).all(1)
        at = left[fits]
        if not at.size or pattern.unfold is not None and depth >= DEPTH:
            return left
        if pattern.unfold is None:
            ok[at] = True
            self.counts["proved instance"] += len(at)
            return left[~fits]
        ok[at] = self._unfold_at(key, rows[at][:, pattern.order], pattern.unfold, split, limit, depth, None)
        lost = at[~ok[at]]
        if lost.size and not depth:                              # another unfolding may do; tried once, and not at every depth again
            self._plainly = True
            ok[lost] = self._settle_new(key, rows[lost], split, limit, depth)
            self._plainly = False
        return left[~fits]

    def _settle_new(self, key: tuple[int, int, Fraction], rows: np.ndarray, split: int, limit: int, depth: int) -> np.ndarray:
        ok = np.zeros(len(rows), bool)
        if not len(rows):
            return ok
        t = self._template(key)
        self._effort += rows.size // 64
        named = canonical_rows(t, rows)
        partial = self.shapes.partial[key[0]] or self.shapes.partial[key[1]]
        names = np.concatenate([named.names, self.store.sign[named.rows]], 1) if partial else named.names
        first, kind = distinct(names)
        width = rows.shape[1]
        for g, i in enumerate(first):
            index = np.flatnonzero(kind == g)
            verdict, obligation = self._decide(key, t, named.names[i], names[i, width:] if partial else None)
            if isinstance(verdict, Proved):
                ok[index] = True
                self.counts[f"proved {verdict.how}"] += len(index)
                self._patterns.learn(key, rows[i], self.store.sign if partial else None)
            elif isinstance(verdict, Refuted) or verdict.reason == "definedness":
                hit, ok[index] = self._unfold(key, named.rows[index], named.names[i], split, limit, depth, obligation)
                if ok[i]:
                    self._patterns.learn(key, rows[i], None, canonical_order(t, rows[i]), hit)
            else:
                self._fail(key, verdict.reason, len(index), obligation)
        return ok

    def _template(self, key: tuple[int, int, Fraction]) -> Template:
        if key not in self._templates:
            ref, par, c = key
            terms, positions = Terms(), count()
            lhs = self.shapes.term(terms, ref, positions)
            if c != 1:
                lhs = terms.add("scl", c, (lhs,))
            rhs = self.shapes.term(terms, par, positions)
            self._templates[key] = template(terms.obligation(lhs, rhs))
            self._effort += len(terms.nodes)
        return self._templates[key]

    def _decide(self, key, t: Template, names: np.ndarray, signs: np.ndarray | None) -> tuple[Verdict, Obligation]:
        at = (key, names.tobytes(), None if signs is None else signs.tobytes())
        if at not in self._verdicts:
            obligation = instantiate(t, names)
            if signs is not None:
                obligation = _with_signs(obligation, names, signs)
            content = digest(obligation)
            if content not in self._by_content:
                verdict = self._by_content[content] = prove(obligation)
                self._effort += len(obligation.nodes) + verdict.steps // 2
                self.counts["obligations"] += 1
                if isinstance(verdict, Proved):
                    self.proofs[content] = verdict
            self._verdicts[at] = self._by_content[content], obligation
        return self._verdicts[at]

    def _fail(self, key, reason: str, rows: int, obligation: Obligation | None) -> None:
        self.failures.append(Failure(self.store.now, self.store.parallel, self.shapes.nodes[key[1]][0], reason, rows, obligation))

    # ---- unfolding (which leaves: only a matter of success)
    def _unfold(self, key, rows: np.ndarray, names: np.ndarray, split: int, limit: int, depth: int, obligation) -> tuple[np.ndarray, np.ndarray]:
        """Replace some leaves by their definitions and settle what results: at which positions, and which rows are proved."""
        none, nowhere = np.zeros(len(rows), bool), np.zeros(0, I64)
        if not self._is_patient():
            self.counts["impatient"] += len(rows)
            return nowhere, none
        if len(rows) > 4 * PILOT:
            _, pilot = self._unfold(key, rows[:PILOT], names, split, limit, depth, obligation)
            if not pilot.any():
                return nowhere, none
        if depth >= DEPTH:
            self._fail(key, "depth", len(rows), obligation)
            return nowhere, none
        chosen = self._choice(rows[0], names, split)
        if not chosen:
            self._fail(key, "not equal", len(rows), obligation)
            return nowhere, none
        hit = np.flatnonzero(np.isin(names, list(chosen)))
        return hit, self._unfold_at(key, rows, hit, split, limit, depth, obligation)

    def _is_patient(self) -> bool:
        return self.wasted < PATIENCE + self.store.n // 2

    def _unfold_at(self, key, rows: np.ndarray, hit: np.ndarray, split: int, limit: int, depth: int, obligation: Obligation | None) -> np.ndarray:
        """Which rows are proved with the definitions of the identifiers at some positions."""
        ok = np.zeros(len(rows), bool)
        try:
            ref = self._unfolded(key[0], rows[:, :split], hit[hit < split], limit)
            par = self._unfolded(key[1], rows[:, split:], hit[hit >= split] - split, limit)
        except TooLarge:
            self._too_large = True
            self._fail(key, "size", len(rows), obligation)
            return ok
        for a, b, pick in _pairs(ref, par, len(rows)):
            ok[pick] = self._settle(a, b, key[2], limit, depth + 1)
        return ok

    def _choice(self, ids: np.ndarray, names: np.ndarray, split: int) -> set[int]:
        """Names of the newest leaf that one side alone has (or whose definition comes to such a leaf soon), and of all that are made like it.

        If both sides have the same: of the newest whose definition comes to another leaf, for only such leaves depend on each other. What a
        maximum is of seldom matters (it is subtracted before exp): those come last.
        """
        store = self.store
        by_name = dict(zip(names.tolist(), ids.tolist()))
        left, right = set(names[:split].tolist()), set(names[split:].tolist())
        every = {n for n, i in by_name.items() if store.code[i] > 0 and not self._stubborn[i]}
        open_ = {n for n in every if store.ops[store.code[by_name[n]]][0][0] != "max"}
        alone = left ^ right
        candidates = open_ & alone
        if candidates:
            strangers = {by_name[n] for n in alone}
            across = [(candidates & own, {by_name[n] for n in alone & other}) for own, other in ((left, right), (right, left))]
            joining = {n for mine, theirs in across for n in mine if self._mentions(by_name[n], theirs, 4)}
            reach = 1 if joining else 2
            both = {n for n in open_ & left & right if (reach > 1 or self._is_short(by_name[n])) and self._mentions(by_name[n], strangers, reach)}
            candidates = (joining or candidates) | both
        else:
            leaves = set(by_name.values())
            candidates = {n for n in open_ if self._mentions(by_name[n], leaves, 4)} or open_ or every
        if self._short_first:
            candidates = {n for n in candidates if self._is_short(by_name[n])} or candidates
        if not candidates:
            return set()
        newest = self._made(by_name[max(candidates, key=by_name.__getitem__)])
        return {n for n in candidates if self._made(by_name[n]) == newest}

    def _is_short(self, i: int) -> bool:
        return len(self._operands(i)) <= SHORT

    def _made(self, i: int) -> tuple:
        """The call and the operation that made an identifier; of a short operation also what its operands are, since one call can make scores
        and probabilities, both of them products."""
        store, operands = self.store, self._operands(i)
        return int(store.origin[i]), int(store.code[i]), sorted(store.code[operands].tolist()) if len(operands) <= SHORT else []

    def _mentions(self, i: int, strangers: set[int], depth: int) -> bool:
        """Whether one of some identifiers stands within so many definitions below i, as far as a short look finds."""
        seen, layer = {i}, [i]
        while depth and layer and len(seen) < LOOK:
            below = {o for j in layer for o in self._operands(j)} - seen
            if not strangers.isdisjoint(below):
                return True
            seen |= below
            layer, depth = [o for o in below if self.store.code[o] > 0], depth - 1
        return False

    def _operands(self, i: int) -> list[int]:
        if i not in self._below:
            code = int(self.store.code[i])
            self._below[i] = self.store.operands(code, self.store.definition(np.array([i]), code))[0].tolist()
        return self._below[i]

    def _unfolded(self, shape: int, leaves: np.ndarray, positions: np.ndarray, limit: int) -> list[Group]:
        """Rows of one shape with the leaves at these positions replaced by their definitions."""
        n = len(leaves)
        if not positions.size:
            return [Group(shape, np.arange(n), leaves)]
        found, codes = [], np.zeros((n, len(positions)), I64)
        for j, p in enumerate(positions.tolist()):
            groups = self._definitions(leaves[:, p], limit)
            place = np.zeros(n, I64)
            for k, g in enumerate(groups):
                codes[g.index, j], place[g.index] = k, np.arange(len(g.index))
            found.append((p, groups, place))
        first, kind = distinct(codes)
        out = []
        for k, i in enumerate(first):
            index = np.flatnonzero(kind == k)
            used = [(p, groups[codes[i, j]], place[index]) for j, (p, groups, place) in enumerate(found)]
            new = self.shapes.replace(shape, {p: g.shape for p, g, _ in used})
            self._check(new, limit)
            columns, last = [], 0
            for p, g, place in used:
                columns += [leaves[index, last:p], g.leaves[place]]
                last = p + 1
            out.append(Group(new, index, np.concatenate([*columns, leaves[index, last:]], 1)))
        return out


def _pairs(ref: list[Group], par: list[Group], n: int) -> Iterable[tuple[Group, Group, np.ndarray]]:
    """Groups of both sides over the same n rows, cut to what they have in common: (ref, par, row numbers)."""
    for a in ref:
        for b in par:
            if len(a.index) == n and len(b.index) == n:
                yield a, b, a.index
                continue
            common, i, j = np.intersect1d(a.index, b.index, assume_unique=True, return_indices=True)
            if len(common):
                yield Group(a.shape, common, a.leaves[i]), Group(b.shape, common, b.leaves[j]), common


def _whole_leaves(ref: Group, par: Group, reps: np.ndarray) -> Iterable[tuple[Group, Group, np.ndarray]]:
    """Where the other side mentions the identifier itself, it is a leaf instead of its definition."""
    itself = (par.leaves == reps[:, None]).any(1)
    if not itself.any():
        yield ref, par, np.arange(len(reps))
        return
    for at, whole in ((np.flatnonzero(itself), True), (np.flatnonzero(~itself), False)):
        if len(at):
            left = Group(LEAF, at, reps[at, None]) if whole else Group(ref.shape, at, ref.leaves[at])
            yield left, Group(par.shape, at, par.leaves[at]), at


def _with_signs(obligation: Obligation, names: np.ndarray, signs: np.ndarray) -> Obligation:
    """The obligation for leaves of which signs are known."""
    known = {int(n): int(s) for n, s in zip(names, signs) if s != ANY}
    given = tuple((i, known[node.attr]) for i, node in enumerate(obligation.nodes) if node.kind == "leaf" and node.attr in known)
    return replace(obligation, given=given)
