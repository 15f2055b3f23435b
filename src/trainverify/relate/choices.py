"""Which of the parallel program's decisions the reference's imply: by identifiers, for proofs (trusted).

The theorem holds where the reference takes its recorded decisions. A parallel decision follows from them if the very same numbers
decide it: the same comparison of two identifiers, the same row to choose from with the same elements chosen in the same order, the
same element cast or tested with the same outcome. Integers and Python values that come out of a decision need no decision of their own.
"""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from trainverify.algebra.base import Complex
from trainverify.algebra.terms import Terms
from trainverify.kernel.store import ZERO_ID
from trainverify.kernel.terms import NEGATIVE, POSITIVE
from trainverify.relate.decisions import CHOOSES, Idle
from trainverify.replay.machine import Decision
from trainverify.replay.run import World

Fact = tuple                                  # a question that numbers answered; its answer is the value in a dict


def undecided(reference: World, parallel: World, terms: Terms) -> list[tuple[int, Decision]]:
    """The parallel decisions (with their ranks) that do not follow from the reference's."""
    known: dict[Fact, object] = {}
    for machine in reference.machines:
        for d in machine.decisions:
            known.update(_facts(terms, d))
    out, is_idle = [], Idle()
    for machine in parallel.machines:
        for d in machine.decisions:
            if not is_idle(machine, d) and not _by_constants(terms, d) and not all(_holds(terms, fact, answer, known) for fact, answer in _facts(terms, d)):
                out.append((machine.rank, d))
    return out


def _by_constants(terms: Terms, d: Decision) -> bool:
    """Whether a mask was read or cast that is the same for all values of the symbols: `isfinite` of what is defined, a root that is below 0."""
    values = d.operands.get(terms.name, ())
    if d.kind not in ("mask", "cast") or len(values) != 1 or isinstance(values[0], (torch.Tensor, Complex)):
        return False
    ids = terms.ids(values[0]).reshape(-1).tolist()
    answers = d.outcome.reshape(-1).tolist() if isinstance(d.outcome, torch.Tensor) else [d.outcome]
    constants = terms.nodes.constants
    return len(ids) == len(answers) and all(i in constants and constants[i] == a for i, a in zip(ids, answers))


def _holds(terms: Terms, fact: Fact, answer: object, known: dict[Fact, object]) -> bool:
    if known.get(fact) == answer:
        return True
    return fact[0] == "gt" and _by_sign(terms, fact[1], fact[2]) == answer


def _by_sign(terms: Terms, x: int, y: int) -> bool | None:
    """Whether x > y, as far as signs and constants tell."""
    store = terms.nodes
    if not (store.clean[x] and store.clean[y]):
        return None
    if x in store.constants and y in store.constants:
        return store.constants[x] > store.constants[y]
    if y == ZERO_ID:
        s = store.sign[x]
        return True if s == POSITIVE else False if not s & POSITIVE else None
    if x == ZERO_ID:
        s = store.sign[y]
        return True if s == NEGATIVE else False if not s & NEGATIVE else None
    return None


def _facts(terms: Terms, d: Decision) -> Iterator[tuple[Fact, object]]:
    """What a decision asked and was answered. Each fact names every number that the answer depends on; numbers that may be undefined
    make a fact of their own, which nothing implies."""
    operands = [part for v in d.operands.get(terms.name, ()) for part in ((v.re, v.im) if isinstance(v, Complex) else (v,))]
    ids = [terms.ids(v).numpy() for v in operands if not isinstance(v, torch.Tensor)]
    if not all(terms.nodes.clean[i].all() for i in ids):
        yield ("undefined", d.rank, d.call.index), object()
        return
    name, _, op = d.kind.partition(":")
    if name == "compare" and len(ids) == 2:
        yield _comparison(op, *(int(i.reshape(-1)[0]) for i in ids), bool(d.outcome))
    elif name in CHOOSES and len(ids) == 1 and isinstance(d.outcome, torch.Tensor) and ids[0].ndim:
        yield from _chosen(d.kind, ids[0], d.outcome)
    elif len(ids) == 1 and isinstance(d.outcome, torch.Tensor) and tuple(d.outcome.shape) == ids[0].shape and name in ("cast", "mask"):
        for i, answer in zip(ids[0].reshape(-1).tolist(), d.outcome.reshape(-1).tolist()):
            yield (d.kind, i), answer
    else:
        yield (d.kind, *(i.tobytes() for i in ids), *(i.shape for i in ids)), _plain(d.outcome)


def _comparison(op: str, x: int, y: int, answer: bool) -> tuple[Fact, object]:
    """As a question x > y or x == y."""
    if op in ("lt", "le"):
        x, y, op = y, x, {"lt": "gt", "le": "ge"}[op]
    if op == "ge":
        return ("gt", y, x), not answer
    if op == "gt":
        return ("gt", x, y), answer
    return ("eq", min(x, y), max(x, y)), answer == (op == "eq")


def _chosen(kind: str, ids: np.ndarray, outcome: torch.Tensor) -> Iterator[tuple[Fact, object]]:
    """Rows to choose from, in any order, with the elements chosen; where a row holds an element twice, the positions count too."""
    n = ids.shape[-1]
    rows = ids.reshape(-1, n)
    chosen = outcome.reshape(len(rows), -1).numpy() if len(rows) else np.zeros((0, 1), np.int64)
    for row, at in zip(rows, chosen):
        order = np.sort(row)
        if (order[1:] == order[:-1]).any():
            yield (kind, "in order", row.tobytes()), at.tobytes()
        else:
            yield (kind, order.tobytes()), row[at].tobytes()


def _plain(outcome: object) -> object:
    if isinstance(outcome, torch.Tensor):
        return (tuple(outcome.shape), outcome.numpy().tobytes())
    return repr(outcome)
