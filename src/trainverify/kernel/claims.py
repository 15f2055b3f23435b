"""Claims: a row's value is an earlier identifier's, or a rational multiple of it; only what is proved is merged (trusted).

A claim becomes obligations: the definitions of both sides over leaves, for all real values of the leaves. Open nodes (of the
parallel side, equal to nothing proved) are written out. If an obligation fails, leaves are unfolded, newest first; which
ones is a matter of success only. Rows of one shape are named canonically, so that equal obligations are proved once.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import count
from typing import Protocol

import numpy as np

from trainverify.kernel.choice import Choice
from trainverify.kernel.linear import Shares
from trainverify.kernel.patterns import Pattern, Patterns
from trainverify.kernel.prove import Proved, Refuted, Verdict, prove
from trainverify.kernel.rename import Template, canonical_order, canonical_rows, distinct, instantiate, template
from trainverify.kernel.store import GARBAGE, I64, ZERO_ID, Store, distinct_rows
from trainverify.kernel.sums import equal_sums
from trainverify.kernel.terms import ANY, Obligation, Terms, digest
from trainverify.kernel.written import Group, TooLarge, Written, pairs, whole_leaves

# Successive attempts: the leaves that unfolding may reach, and whether short operations are unfolded before long ones.
LADDER = ((300, False), (300, True), (2000, False))
DEPTH = 24                                    # unfoldings in a row
PILOT = 4                                     # rows that are tried before all rows of a kind are unfolded
PATIENCE = 200_000                            # effort that a run may lose to claims that fail, plus half the number of identifiers; then it unfolds no more
# Effort that one claim may cost in a row without that any of its rows is proved: of the parallel program (sums over many ranks take 100,000 before
# the first is); of the reference, where a claim that fails loses nothing but that its twins are two identifiers; and that something is zero
# which the reference could not show to be zero.
ALONE, ALONE_IN_REFERENCE, ALONE_AS_ZERO = 250_000, 10_000, 5_000
GIVE_UP = 3                                   # failures of a kind of claim before it is not tried again
SHARES = 64                                   # summands up to which a sum may be one of shares
SUMS = 32                                     # rows of a call that are tried as long sums
CHUNK = 1 << 21                               # leaves that are named at once


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


@dataclass(slots=True)
class Failure:
    """A kind of claim that was not proved."""

    origin: int
    parallel: bool
    kind: str
    reason: str
    rows: int
    obligation: Obligation | None = None


class Claims:
    """Turns rows into identifiers."""

    def __init__(self, store: Store, guesses: Guesses, decide: Callable[[Obligation], Verdict] | None = None):
        """decide: `prove` (the default), or what remembers its verdicts."""
        self.store, self.guesses = store, guesses
        self._written, self._choice = Written(store), Choice(store)
        self.failures: list[Failure] = []
        self.proofs: dict[str, Proved] = {}                      # by content
        self.counts: Counter[str] = Counter()
        self._patterns = Patterns()
        self._templates: dict[tuple[int, int, Fraction], Template] = {}
        self._verdicts: dict[tuple, tuple[Verdict, Obligation]] = {}
        self._by_content: dict[str, Verdict] = {}
        self._prove = decide
        self._failed: Counter[tuple[int, int, Fraction]] = Counter()
        self.wasted = self._effort = 0                           # nodes of terms, half the steps of proofs, and cells of rows by 64
        self._hopeful = 0                                        # the effort when this claim began, or when something of it was last proved
        self._alone = ALONE
        self._not_zero: set[int] = set()      # operations whose rows could not be shown to be zero though they seem to be
        self._short_first = self._too_large = self._plainly = False
        self._shares = Shares(store, self._are_sums)

    @property
    def tried(self) -> tuple[str, ...]:
        """Digests of all obligations."""
        return tuple(self._by_content)

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
        self._merge(code, rows, keys, out, np.setdiff1d(tried, zero), reps, Fraction(1))
        self._merge(code, rows, keys, out, np.setdiff1d(zero, skipped), reps, Fraction(1), ALONE_AS_ZERO)
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
        self._choice.stubborn.update(out[failed].tolist())
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
            self._written.write_out(code, rows, ids)
        return ids

    def _merge(self, code: int, rows, keys, out: np.ndarray, at: np.ndarray, reps: np.ndarray, c: Fraction, alone: int | None = None) -> None:
        """Prove the claims rows[at] = c * reps[at]; out gets the identifiers of those that are. alone: what they may cost in a row, if that is less than usual."""
        if not at.size:
            return
        self._alone = alone if alone is not None else ALONE if self.store.parallel else ALONE_IN_REFERENCE
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

    # ---- proving
    def claim(self, code: int, rows: np.ndarray, reps: np.ndarray, c: Fraction) -> np.ndarray:
        """Which rows are proved to be c times the identifiers reps."""
        self.counts["claims"] += len(rows)
        ok, before = np.zeros(len(rows), bool), self._effort
        self._hopeful = before
        reps = np.where((reps >= 0) & (reps < self.store.n), reps, GARBAGE)      # a guess may be anything
        is_sum = self.store.ops[code][0][0] == "add" and rows.shape[1] <= SHARES
        if is_sum:
            self._sums_of_shares(rows, reps, c, ok, (self._written.is_leaf(rows) & self.store.is_open[rows]).any(1))     # too large to be written out
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
        simple = self.store.is_constant[reps] & ~self._written.is_leaf(reps)
        defined = np.flatnonzero((self.store.code[reps] > 0) | simple)
        for limit, self._short_first in LADDER:
            left = defined[~ok[defined]]
            if not left.size:
                break
            try:
                self._too_large = False
                right, below = self._written.expand(code, rows[left], limit), self._written.definitions(reps[left], limit)
                for ref, par, pick in pairs(below, right, len(left)):
                    for a, b, at in whole_leaves(ref, par, reps[left[pick]]):
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
        partial = self._written.shapes.partial[key[0]] or self._written.shapes.partial[key[1]]
        names = np.concatenate([named.names, self.store.sign[named.rows]], 1) if partial else named.names
        first, kind = distinct(names)
        width = rows.shape[1]
        for g, i in enumerate(first):
            index = np.flatnonzero(kind == g)
            verdict, obligation = self._decide(key, t, named.names[i], names[i, width:] if partial else None)
            if isinstance(verdict, Proved):
                ok[index], self._hopeful = True, self._effort
                self.counts[f"proved {verdict.how}"] += len(index)
                self._patterns.learn(key, rows[i], self.store.sign if partial else None)
            elif isinstance(verdict, Refuted) and _is_sign_only(verdict):        # sqrt(x x) is not x: what x is made of seldom says its sign
                self._fail(key, "sign", len(index), obligation)
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
            lhs = self._written.shapes.term(terms, ref, positions)
            if c != 1:
                lhs = terms.add("scl", c, (lhs,))
            rhs = self._written.shapes.term(terms, par, positions)
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
                verdict = self._by_content[content] = (self._prove or prove)(obligation)
                self._effort += len(obligation.nodes) + verdict.steps // 2
                self.counts["obligations"] += 1
                if isinstance(verdict, Proved):
                    self.proofs[content] = verdict
            self._verdicts[at] = self._by_content[content], obligation
        return self._verdicts[at]

    def _fail(self, key, reason: str, rows: int, obligation: Obligation | None) -> None:
        self.failures.append(Failure(self.store.now, self.store.parallel, self._written.shapes.nodes[key[1]][0], reason, rows, obligation))

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
        chosen = self._choice.among(rows[0], names, split, self._short_first)
        if not chosen:
            self._fail(key, "not equal", len(rows), obligation)
            return nowhere, none
        hit = np.flatnonzero(np.isin(names, list(chosen)))
        return hit, self._unfold_at(key, rows, hit, split, limit, depth, obligation)

    def _is_patient(self) -> bool:
        return self.wasted < PATIENCE + self.store.n // 2 and self._effort - self._hopeful < self._alone

    def _unfold_at(self, key, rows: np.ndarray, hit: np.ndarray, split: int, limit: int, depth: int, obligation: Obligation | None) -> np.ndarray:
        """Which rows are proved with the definitions of the identifiers at some positions."""
        ok = np.zeros(len(rows), bool)
        try:
            ref = self._written.unfolded(key[0], rows[:, :split], hit[hit < split], limit)
            par = self._written.unfolded(key[1], rows[:, split:], hit[hit >= split] - split, limit)
        except TooLarge:
            self._too_large = True
            self._fail(key, "size", len(rows), obligation)
            return ok
        for a, b, pick in pairs(ref, par, len(rows)):
            ok[pick] = self._settle(a, b, key[2], limit, depth + 1)
        return ok


def _is_sign_only(refuted: Refuted) -> bool:
    """Whether the sides differ by nothing but their signs."""
    return refuted.rhs is not None and refuted.lhs != 0 and abs(refuted.lhs + refuted.rhs) <= 1e-9 * abs(refuted.lhs)


def _with_signs(obligation: Obligation, names: np.ndarray, signs: np.ndarray) -> Obligation:
    """The obligation for leaves of which signs are known."""
    known = {int(n): int(s) for n, s in zip(names, signs) if s != ANY}
    given = tuple((i, known[node.attr]) for i, node in enumerate(obligation.nodes) if node.kind == "leaf" and node.attr in known)
    return replace(obligation, given=given)
