"""Theorems that others prove while the replay goes on: whatever is claimed, lost or late, what counts is what one process finds."""
import os
import random
import signal
from collections import deque
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from trainverify.algebra.real import Real
from trainverify.contracts import docket, predict, task
from trainverify.contracts.docket import Again, Docket, Here, Lost, work
from trainverify.contracts.graph import Signature
from trainverify.contracts.patterns import CONSTANT, Pattern
from trainverify.contracts.task import Operation, Task, packed, prove, unpacked
from trainverify.engine import analysis
from trainverify.engine import executor as executors
from trainverify.engine.contracts import prove_by_contracts
from trainverify.engine.analysis import survey
from trainverify.engine.options import Options
from trainverify.engine.pool import Pool
from trainverify.engine.proof import Lineages
from trainverify.kernel.terms import digest
from trainverify.ops.standard import standard_table
from trainverify.relate.symbols import Symbols
from trainverify.report.json_ import encode
from trainverify.verify import verify_spec

from .test_contracts import SPEC, captured


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    path = tmp_path_factory.mktemp("docket") / "spec.py"
    path.write_text(SPEC)
    return path


class Late:
    """Does nothing before somebody waits for it; then one task, drawn at random."""

    waits = False

    def __init__(self, seed: int = 0, work=work):
        self._work, self._draw = work, random.Random(seed)
        self._queue, self._done, self.all = [], deque(), []

    def submit(self, task, urgent):
        self.all.append(task)
        self._queue.append((len(self.all), task))
        return len(self.all)

    def done(self):
        while self._done:
            yield self._done.popleft()

    def wait(self):
        if self._queue:
            ticket, data = self._queue.pop(self._draw.randrange(len(self._queue)))
            self._done.append((ticket, self._work(data)))

    def close(self):
        pass


def proof_of(programs, by):
    reference, parallel = programs
    found = survey(reference, parallel).comparison
    once = iter([Lineages(found.ref_lineage, found.lineage)])            # as a process beside is told them
    return prove_by_contracts(reference, parallel, standard_table(), Symbols(reference), 3, lambda *a, **k: None, lambda: next(once), by)


def told(proof):
    return None if proof is None else (proof.proved, proof.counts, [digest(o) for o in proof.obligations], proof.rounding)


@pytest.fixture(scope="module")
def plain(spec):
    return told(proof_of(captured(spec, layers=2), Here()))


@pytest.mark.parametrize("seed", [0, 1])
def test_theorems_in_any_order_make_the_same_proof(spec, plain, seed):
    assert plain is not None and told(proof_of(captured(spec, layers=2), Late(seed))) == plain


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["slice", "sigmoid", "scaled"])
def test_wrong_programs_are_not_proved_under_claims(spec, wrong):
    assert proof_of(captured(spec, layers=2, wrong=wrong), Late()) is None


def corrupted(monkeypatch, every: int) -> None:
    """Claims say something else of one element, here and there."""
    right = predict.Predictor.claim

    def claim(self, asked):
        said = right(self, asked)
        if said is None or (len(asked.mine) + sum(asked.sizes) + len(said[0])) % every:
            return said
        slot, place = said[0].copy(), said[1].copy()
        slot[0], place[0] = (CONSTANT, 0) if slot[0] != CONSTANT else (0, 0)
        return slot, place
    monkeypatch.setattr(predict.Predictor, "claim", claim)


@pytest.mark.parametrize("most", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_claims_that_are_wrong_cost_time_and_nothing_else(spec, plain, monkeypatch, most):
    corrupted(monkeypatch, 3)
    monkeypatch.setattr(docket, "MOST_AGAIN", most)
    replays, begin = [], Docket.begin
    monkeypatch.setattr(Docket, "begin", lambda self: (replays.append(0), begin(self))[1])
    late = proof_of(captured(spec, layers=2), Late())
    assert late.proved == plain[0] and told(late)[2] == plain[2]
    assert (len(replays) > 1) == bool(most)
    assert told(late) == told(proof_of(captured(spec, layers=2), Here()))
    for wrong in () if most else ("sigmoid", "no reduction"):
        assert proof_of(captured(spec, layers=2, wrong=wrong), Late()) is None


@pytest.mark.slow
def test_claims_that_are_wrong_everywhere_prove_nothing_wrong(spec, monkeypatch):
    corrupted(monkeypatch, 1)
    assert proof_of(captured(spec, layers=2), Late()) is not None
    assert proof_of(captured(spec, layers=2, wrong="slice"), Late()) is None


@pytest.fixture(scope="module")
def tasks(spec) -> list[bytes]:
    proof_of(captured(spec, layers=2), late := Late())
    return late.all


def test_a_task_is_the_same_after_a_journey_and_depends_on_nothing_else(tasks):
    assert len(tasks) > 20 and len(set(tasks)) == len(tasks)
    first = [prove(unpacked(t)) for t in tasks]
    task.remembered.cache_clear()
    for data, result in reversed(list(zip(tasks, first))):
        again = work(data)
        assert (again.holds, again.numbers, again.counts, again.tried, again.proved) == (result.holds, result.numbers, result.counts, result.tried, result.proved)
        assert (again.slot == result.slot).all() and (again.place == result.place).all() and (again.hit == result.hit).all()
    assert sum(r.holds for r in first) > 20


def test_an_operation_stands_after_what_it_is_of(tasks):
    for data in tasks:
        asked = unpacked(data)
        bad = asked.mine[-1]
        late = task.Operation(bad.signature, (len(asked.sizes) + len(asked.steps) + len(asked.mine),) * len(bad.operands), bad.size)
        broken = replace(asked, mine=(*asked.mine[:-1], late))
        with pytest.raises(ValueError, match="does not stand before it"):
            unpacked(packed(broken))


def test_a_claim_about_what_is_not_there_does_not_hold(tasks):
    asked = [a for a in map(unpacked, tasks) if a.claim is not None and a.claim[0][0] != CONSTANT]
    for a, (which, value) in zip(asked, [(0, 99), (0, -7), (1, 10 ** 6), (1, -1)]):
        claim = tuple(part.copy() for part in a.claim)
        claim[which][0] = value
        assert prove(a).holds and not prove(replace(a, claim=claim)).holds


@pytest.mark.parametrize("name", ["maximum", "minimum"])
def test_the_largest_of_numbers_is_not_said_to_be_one_of_them(name):
    def of(name, *operands):
        whole = Pattern(0, (4,), np.zeros(4, np.int32), np.arange(4), 1)
        return Operation(Signature(name, None, (whole,) * len(operands), tuple((i,) for i in range(len(operands))), len(operands)), operands, 4)
    predictor, ask = predict.Predictor(Real(lambda *a: None)), lambda *mine: Task(3, (), (4, 4), (), (), mine, Fraction(1), None, ())
    assert predictor.claim(ask(of(name, 0, 1))) is None
    slot, place = predictor.claim(ask(of("neg", 1), of("neg", 2)))
    assert slot.tolist() == [1] * 4 and place.tolist() == [0, 1, 2, 3]


def test_nothing_counts_before_it_is_discharged(tasks):
    """What a replay assumed is asked for at its end."""
    data = next(t for t in tasks if unpacked(t).claim is not None)
    asked = unpacked(data)
    book = Docket(late := Late())
    book.begin()
    assert book.ask(asked, assume=True) is None and len(late.all) == 1
    book.close()
    assert book.ask(asked).holds
    slot, place = (a.copy() for a in asked.claim)
    place[:] = np.roll(place, 1) if len(set(place.tolist())) > 1 else place + 1
    book.begin()
    assert book.ask(replace(asked, claim=(slot, place)), assume=True) is None
    with pytest.raises(Again):
        book.close()


# ---- processes
def normal(report) -> str:
    report.phases, report.seconds, report.peak_memory, report.rerun = [], 0.0, 0, ""
    return encode(report)


@pytest.fixture
def deep(monkeypatch):
    monkeypatch.setattr(analysis, "DEEP", 0)


@pytest.mark.slow
def test_one_process_and_more_give_the_same_report(spec, deep):
    reports = [verify_spec(spec, Options(case={"layers": 2}, jobs=jobs, steps=1)) for jobs in (1, 2, 3, 4)]
    details = {p.detail for r in reports for p in r.phases if p.name == "prove"}
    assert reports[0].verdict == "PROVED" and len(details) == 1 and "distinct obligations" in details.pop()
    assert len({normal(r) for r in reports}) == 1


@pytest.mark.slow
def test_theorems_that_are_lost_are_told_and_the_rest_is_proved_without_them(spec, deep, monkeypatch):
    def killed(data: bytes):
        if unpacked(data).mine[-1].signature.name == "matmul":
            os.kill(os.getpid(), signal.SIGKILL)
        return work(data)
    monkeypatch.setattr(executors, "Pool", lambda _, workers: Pool(killed, workers))
    proof = proof_of(captured(spec, layers=2), Pool(killed, 2))
    assert proof is not None and not proof.proved and [d.code for d in proof.diagnostics] == ["PROVE002"] and "SIGKILL" in proof.diagnostics[0].message
    monkeypatch.setattr(analysis, "prove_programs", lambda *a: analysis.Proof())
    found = analysis.analyse(*captured(spec, layers=2), jobs=3)
    assert {j.verdict for j in found.judgements} == {"UNKNOWN"} and "PROVE002" in {d.code for d in found.diagnostics}


def test_a_lost_theorem_leaves_its_block_open(spec):
    def lost(data: bytes):
        return Lost("its process was ended by SIGKILL")
    proof = proof_of(captured(spec, layers=2), Late(work=lost))
    assert not proof.proved and [d.code for d in proof.diagnostics] == ["PROVE002"]
