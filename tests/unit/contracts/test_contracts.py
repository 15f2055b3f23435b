"""Proofs by contracts: equal layers cost one, nothing wrong is proved, whatever is guessed."""
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from trainverify.contracts import algebra, docket, evaluate, guess, theorems
from trainverify.contracts.docket import Docket, Here
from trainverify.contracts.patterns import CONSTANT, Patterns, contents
from trainverify.engine import analysis
from trainverify.engine.analysis import survey
from trainverify.engine.contracts import prove_by_contracts
from trainverify.engine.options import Options
from trainverify.engine.passes import replay_both
from trainverify.engine.proof import Lineages, Proof
from trainverify.ir.files import load_program
from trainverify.kernel.store import Store
from trainverify.kernel.terms import digest
from trainverify.ops.standard import standard_table
from trainverify.relate.symbols import Symbols
from trainverify.verify import capture_spec

SPEC = '''
import torch
import torch.distributed as dist
import torch.nn.functional as F
import trainverify as tv

RANKS = 2


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(4, 6, bias=False), torch.nn.Linear(6, 4, bias=False)


def net(layers):
    torch.manual_seed(0)
    return torch.nn.ModuleList(Layer() for _ in range(layers))


def step_of(model, block, share=1.0):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step():
        x = batch()["x"]
        for k, layer in enumerate(model):
            x = x + block(k, layer, x)
        loss = x.square().mean()
        (loss * share).backward()
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss}
    return step


def batch():
    return {"x": torch.arange(12.0).reshape(3, 4).sin()}


def reference(layers=2):
    model = net(layers)
    return tv.Training(model, step_of(model, lambda k, m, x: m.down(F.silu(m.up(x)))), batch=batch())


class Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad


def parallel(ref, layers=2, wrong=""):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    half = slice(3 * rank, 3 * rank + 3)
    model = net(layers)
    for k, layer in enumerate(model):
        up, down = ref.weights[f"{k}.up.weight"], ref.weights[f"{k}.down.weight"]
        other = slice(3 * (1 - rank), 3 * (1 - rank) + 3) if wrong == "slice" and k == layers - 1 else half
        layer.up.weight = torch.nn.Parameter(up[half].clone())
        layer.down.weight = torch.nn.Parameter(down[:, other].clone())

    def block(k, m, x):
        last = k == layers - 1
        if wrong == "sigmoid" and last:
            h = m.up(Enter.apply(x))
            return Leave.apply(m.down(h * h.sigmoid() * h.sigmoid()))
        if wrong == "silu in two":
            h = m.up(Enter.apply(x))
            return Leave.apply(m.down(h * h.sigmoid()))
        enter = (lambda x: x) if wrong == "no reduction backward" and last else Enter.apply
        leave = (lambda x: x) if wrong == "no reduction" and last else Leave.apply
        if wrong == "garbage" and last:
            x = x + 0 * torch.empty(4)
        return leave(m.down(F.silu(m.up(enter(x)))))
    return tv.Training(model, step_of(model, block, 2.0 if wrong == "scaled" else 1.0))
'''


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    path = tmp_path_factory.mktemp("contracts") / "spec.py"
    path.write_text(SPEC)
    return path


def captured(spec: Path, **case):
    out = spec.parent / "-".join(map(str, ("traces", *case.values())))
    if not out.exists():
        report = capture_spec(spec, out, Options(case=case, steps=2))
        assert not [d for d in report.diagnostics if d.severity == "error"]
    return load_program(out / "reference"), load_program(out / "parallel")


def prove(reference, parallel):
    found = survey(reference, parallel).comparison
    return prove_by_contracts(reference, parallel, standard_table(), Symbols(reference), 3, lambda *a, **k: None,
                              lambda: Lineages(found.ref_lineage, found.lineage))


def numbers(m: algebra.Contracts, v: algebra.Value) -> np.ndarray:
    """A value's elements at the recorded inputs."""
    p = m.pattern(v)
    out = np.zeros(len(p.slot))
    for k, block in enumerate(v.blocks):
        at = p.slot == k
        out[at] = m.numbers.of(block)[p.place[at]]
    fixed = p.slot == CONSTANT
    out[fixed] = contents(p.place[fixed]).numpy()
    return out


@pytest.mark.parametrize("case", [{}, {"wrong": "silu in two"}], ids=str)
def test_right_programs_are_proved_and_what_is_replaced_is_the_same_number(spec, case, monkeypatch):
    replaced, plain = [], algebra.Contracts._replaced

    def checked(self, value, block, theorem, blocks):
        out = plain(self, value, block, theorem, blocks)
        replaced.append(theorem)
        np.testing.assert_allclose(numbers(self, out), numbers(self, value), rtol=1e-9, atol=1e-13)
        return out
    monkeypatch.setattr(algebra.Contracts, "_replaced", checked)
    proof = prove(*captured(spec, layers=3, **case))
    assert proof is not None and len(proof.proved) > 30 and len(replaced) > 10


@pytest.mark.parametrize("wrong", ["sigmoid", "slice", "no reduction", "no reduction backward", "garbage", "scaled"])
def test_wrong_programs_are_not_proved(spec, wrong):
    assert prove(*captured(spec, layers=3, wrong=wrong)) is None


def test_equal_layers_cost_one(spec):
    few, many = (prove(*captured(spec, layers=n)) for n in (4, 8))
    assert few is not None and many is not None
    assert many.counts["theorems"] == few.counts["theorems"] and many.counts["applied"] > few.counts["applied"] + 20


@pytest.mark.parametrize("wrong", ["sigmoid", *(pytest.param(w, marks=pytest.mark.slow) for w in ("slice", "scaled", ""))])
def test_guesses_decide_nothing(spec, monkeypatch, wrong):
    """Blocks guessed at random: what is proved then is still right, and wrong programs are not proved."""
    plain = guess.Guesses.likely

    def random(self, block, leaves):
        chosen = np.random.default_rng(block)
        held = [b for b in range(len(self._graph.signature)) if self._graph.of_reference[b] and self._graph.operands[b]]
        for factor in (Fraction(1), Fraction(2)):
            yield factor, set(chosen.choice(held, 3).tolist())
        yield from plain(self, block, leaves)
    monkeypatch.setattr(guess.Guesses, "likely", random)
    assert (prove(*captured(spec, layers=2, wrong=wrong)) is None) == bool(wrong)


def test_a_program_that_needs_too_much_is_left_to_the_other_proof(spec, monkeypatch):
    monkeypatch.setattr(docket, "EFFORT", 10)
    assert prove(*captured(spec, layers=2)) is None


def test_patterns_move_as_tensors_do():
    patterns = Patterns()
    p = patterns.block((2, 3))
    moved, used = patterns.moved(p, ("permute", (1, 0)), lambda t: t.permute(1, 0))
    assert moved.shape == (3, 2) and used == (0,) and moved.place.tolist() == torch.arange(6).reshape(2, 3).t().reshape(-1).tolist()
    assert patterns.moved(p, ("permute", (1, 0)), None)[0] is moved      # remembered
    both, used = patterns.make((3,), np.array([5, CONSTANT, 2]), np.array([0, 0, 7]))
    assert both.slots == 2 and used == (5, 2) and both.slot.tolist() == [0, CONSTANT, 1]
    assert patterns.make((3,), np.array([9, CONSTANT, 4]), np.array([0, 0, 7]))[0] is both


@pytest.mark.parametrize("number, held", [
    (Fraction(1, 3), True), (Fraction(-5, 7), True), (Fraction(0), True), (Fraction(3), True), (Fraction(1, 10), True),
    (Fraction(10 ** 20 + 1, 3 * 10 ** 20), False), (Fraction(2 ** 60 + 1), False), (1 + Fraction(1, 10 ** 30), False), (Fraction(1, 10 ** 400), False),
    (Fraction(10 ** 400), False)], ids=str)
def test_a_number_is_held_as_float64_only_if_that_means_the_number(number, held):
    m = algebra.Contracts(0, [], np.zeros(0), (), Docket(Here()))
    store = Store()
    fixed, places = m.evaluator.places(store, np.array([store.constant(number)]))
    assert fixed.tolist() == [held]
    if held:
        assert contents(places).item() == float(number) and m.nodes.constants.get(m.nodes.number(int(places[0]))) == number


def test_constants_need_no_blocks():
    m = algebra.Contracts(0, [], np.zeros(0), (), Docket(Here()))
    assert m.equal(m.const(3), m.const(3)).item() and not m.equal(m.const(3), m.const(4)).item()


def test_a_product_by_a_factor_is_one_block(monkeypatch):
    """What a theorem makes of a block may be the operation that made it."""
    m = algebra.Contracts(0, [0], np.arange(1.0, 4.0), (Fraction(2),), Docket(Here()))
    x = m.symbols("x", 0, 3)
    m.begin_side("parallel")
    theorem = theorems.Theorem(0, (), (), m.pattern(x), (0,), Fraction(2), None)
    monkeypatch.setattr(m.theorems, "about", lambda block: (theorem, (0,)))
    double = m.mul(m.const(2), x)
    assert len(m.graph.signature) == 2 and double.blocks == m.mul(m.const(2), x).blocks


@pytest.fixture
def deep(monkeypatch):
    """Every program counts as one of many calls."""
    monkeypatch.setattr(analysis, "DEEP", 0)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_deep_program_is_proved_without_a_field(spec, deep, jobs):
    found = analysis.analyse(*captured(spec, layers=3), jobs=jobs)
    assert found.first.field is None and found.second is None and len(found.judgements) > 30
    assert {j.verdict for j in found.judgements} == {"PROVED"}
    slowly = analysis.analyse(*captured(spec, layers=3), in_field=True)
    assert slowly.first.field is not None and [j.key for j in slowly.judgements] == [j.key for j in found.judgements]
    assert [(r.value, r.representative) for r in slowly.rounding] == [(r.value, r.representative) for r in found.rounding]
    assert found.facts.keys() == slowly.facts.keys() and found.coverage.text("") == slowly.coverage.text("")
    assert [d.code for d in found.diagnostics] == [d.code for d in slowly.diagnostics]


@pytest.mark.parametrize("wrong", ["sigmoid", "scaled"])
def test_what_float64_shows_outweighs_a_proof_by_contracts(spec, deep, wrong, monkeypatch):
    """A prover that proves everything: outputs that differ at the recorded inputs are looked at in the field."""
    programs = captured(spec, layers=3, wrong=wrong)

    def everything(reference, parallel, table, symbols, seed, progress, lineages, executor):
        return Proof(frozenset((c.kind, c.name, c.step) for c in replay_both(reference, parallel, table, symbols, None, progress).reference.machines[0].outputs))
    monkeypatch.setattr(analysis, "prove_by_contracts", everything)
    found = analysis.analyse(*programs)
    assert found.first.field is not None and "REFUTED" in {j.verdict for j in found.judgements}
    right = analysis.analyse(*captured(spec, layers=3))       # such a prover would be believed of a program that agrees
    assert right.first.field is None


def test_places_that_are_accepted_for_nothing_are_told_of_deep_programs(spec, deep):
    found = analysis.analyse(*captured(spec, layers=3), accept=("spec.py:1",))
    assert found.first.field is None and [d.code for d in found.diagnostics if d.code == "ACC001"]


def test_operations_share_no_store(spec, monkeypatch):
    programs = captured(spec, layers=3)
    plain = prove(*programs)
    monkeypatch.setattr(evaluate, "ROOM", 0)                  # a new store for each operation that is tried
    alone = prove(*programs)
    assert alone is not None and alone.proved == plain.proved and alone.counts["theorems"] == plain.counts["theorems"]
    assert {o for o in map(digest, alone.obligations)} == {o for o in map(digest, plain.obligations)} and alone.counts["obligations"] == plain.counts["obligations"]
    for wrong in ("sigmoid", "slice", "garbage"):
        assert prove(*captured(spec, layers=3, wrong=wrong)) is None
