"""The proof as a part of a run: beside it or in it, kept, asked about, withheld, and lost."""
import os
import pickle
import signal
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import trainverify as tv
from trainverify import cli
from trainverify.algebra import terms
from trainverify.certify.certificate import obligation_of, read_certificate, recheck, write_certificate
from trainverify.engine import analysis
from trainverify.diagnostics import Diagnostic, Fault
from trainverify.engine.beside import Beside, Lost, Unsent
from trainverify.engine.options import Options
from trainverify.relate.guess import Dictionary
from trainverify.report.json_ import encode
from trainverify.verify import capture_spec, verify_dir, verify_spec

SPEC = '''
import torch
import torch.distributed as dist
import torch.nn.functional as F
import trainverify as tv

RANKS = 2


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(5, 6), torch.nn.Linear(6, 4, bias=False)


def step_of(model, forward, loss_of):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step():
        loss = loss_of(forward(model))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss}
    return step


def reference():
    torch.manual_seed(0)
    model, batch = Net(), {"x": torch.randn(3, 5), "y": torch.tensor([0, 2, 3])}
    forward = lambda m: m.down(F.silu(m.up(batch["x"])))
    return tv.Training(model, step_of(model, forward, lambda z: F.cross_entropy(z, batch["y"])), batch=batch)


class Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad


def parallel(ref, scale=1.0):
    dist.init_process_group("gloo")
    half = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
    model = Net()
    model.up.weight = torch.nn.Parameter(ref.weights["up.weight"][half].clone())
    model.up.bias = torch.nn.Parameter(ref.weights["up.bias"][half].clone())
    model.down.weight = torch.nn.Parameter(ref.weights["down.weight"][:, half].clone())
    x, y = ref.batch["x"], ref.batch["y"]
    forward = lambda m: Reduce.apply(m.down(F.silu(m.up(x)))) * scale

    def loss_of(z):
        e = (z - z.detach().amax(-1, keepdim=True)).exp()
        return -(e[torch.arange(3), y] / e.sum(-1)).log().mean()
    return tv.Training(model, step_of(model, forward, loss_of))
'''


@pytest.fixture
def spec(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("spec.py")
    path.write_text(SPEC)
    return path


def plain(report):
    """The report without what depends on the clock and the machine."""
    report.seconds, report.peak_memory, report.phases, report.rerun = 0.0, 0, [], ""
    return encode(report)


def test_one_process_and_two_give_the_same_report(spec, monkeypatch):
    monkeypatch.setattr(analysis, "WORTH_A_PROCESS", 0)
    started = []
    monkeypatch.setattr(analysis, "Beside", lambda work: started.append(Beside(work)) or started[-1])
    one, two = verify_spec(spec, Options(jobs=1, steps=1)), verify_spec(spec, Options(jobs=2, steps=1))
    assert len(started) == 1 and one.verdict == "PROVED"
    assert plain(one) == plain(two)


def test_a_lost_process_proves_nothing(spec, monkeypatch):
    monkeypatch.setattr(analysis, "WORTH_A_PROCESS", 0)

    def killed(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)
    monkeypatch.setattr(analysis, "prove_programs", killed)
    report = verify_spec(spec, Options(jobs=2, steps=1))
    assert report.verdict == "UNKNOWN" and "PROVE001" in {d.code for d in report.diagnostics}
    assert all(o.verdict == "UNKNOWN" and o.reason.endswith("see PROVE001") for o in report.outputs)


def test_what_a_process_raises_is_raised_here():
    def work(told, progress):
        raise ZeroDivisionError(told())
    with pytest.raises(ZeroDivisionError, match="seven") as caught:
        Beside(work).answer("seven", lambda *a: None)
    assert "in work" in caught.value.__notes__[0]


class Unsendable(Exception):
    """Cannot be pickled."""

    def __reduce__(self):
        raise TypeError("not across processes")


class Unreadable(Exception):
    """Can be pickled, and not be read again."""

    def __init__(self, what, where):
        super().__init__(f"{what} in {where}")


@pytest.mark.parametrize("error", [Unsendable("seven"), Unreadable("seven", "heaven")], ids=lambda e: type(e).__name__)
def test_an_exception_that_cannot_be_handed_over_is_told_in_words(error):
    def work(told, progress):
        told()
        raise error
    with pytest.raises(Unsent, match=f"{type(error).__name__}: seven") as caught:
        Beside(work).answer(1, lambda *a: None)
    assert "in work" in caught.value.__notes__[0]


def test_an_answer_that_cannot_be_handed_over_is_an_error():
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        Beside(lambda told, progress: (told(), lambda: 0)).answer(1, lambda *a: None)


def test_what_a_process_raised_before_it_was_told_anything_is_not_lost():
    def work(told, progress):
        raise ZeroDivisionError("early")
    beside = Beside(work)
    beside._process.join()
    with pytest.raises(ZeroDivisionError, match="early"):
        beside.answer(1, lambda *a: None)


def test_an_eof_inside_the_work_is_an_error_of_it():
    def work(told, progress):
        told()
        raise EOFError("a file ends")
    with pytest.raises(EOFError, match="a file ends"):
        Beside(work).answer(1, lambda *a: None)


def test_a_fault_stays_a_fault():
    fault = Fault(Diagnostic("REL001", "differs", ranks=(1,)))

    def work(told, progress):
        raise fault
    with pytest.raises(Fault) as caught:
        Beside(work).answer(1, lambda *a: None)
    assert caught.value.diagnostics == fault.diagnostics


def test_an_error_of_the_proof_is_our_own(spec, monkeypatch, capsys):
    monkeypatch.setattr(analysis, "WORTH_A_PROCESS", 0)

    def raising(*arguments):
        raise Unsendable("no such row")
    monkeypatch.setattr(analysis, "prove_programs", raising)
    assert cli.main(["verify", "spec.py", "--steps", "1", "-q"]) == 4
    told = capsys.readouterr().err
    assert "internal error" in told and "Unsendable: no such row" in told and "PROVE001" not in told
    assert "in raising" in (Path(".trainverify") / "internal-error.txt").read_text()


def test_an_answer_and_its_progress():
    seen = []

    def work(told, progress):
        for i in range(1000):
            progress("prove", "side", i / 1000)
        return told() + 1
    assert Beside(work).answer(41, lambda *a: seen.append(a)) == 42
    assert 10 < len(seen) <= 41


def test_a_process_that_is_closed_ends():
    beside = Beside(lambda told, progress: told())
    beside.close()
    with pytest.raises(Lost):
        beside.answer(1, lambda *a: None)


class Random(Dictionary):
    """Proposes any identifier at all."""

    def __init__(self, store, factors=()):
        super().__init__(store, factors)
        self.rng, self.n = np.random.default_rng(0), 1

    def learn(self, prints, ids):
        super().learn(prints, ids)
        self.n = max(self.n, int(ids.max()) + 1) if len(ids) else self.n

    def find(self, prints):
        right = super().find(prints)
        return np.where(self.rng.random(len(prints)) < 0.5, right, self.rng.integers(0, self.n, len(prints)))

    def ambiguous(self, prints):
        return self.rng.random(len(prints)) < 0.2

    def find_other(self, code, rows):
        return self.rng.integers(0, self.n, len(rows))

    def scales(self, index, prints, code, rows):
        yield Fraction(3), self.rng.integers(0, self.n, len(index))


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_wrong_guesses_prove_nothing_that_is_wrong(spec, monkeypatch, scale):
    """With half of the proposals random, what is proved is a part of what honest guesses prove."""
    options = Options(jobs=1, steps=1, case={"scale": scale})
    honest = {(o.kind, o.name) for o in verify_spec(spec, options).outputs if o.verdict == "PROVED"}
    monkeypatch.setattr("trainverify.engine.prove.Dictionary", Random)
    monkeypatch.setattr("trainverify.kernel.claims.PATIENCE", 20_000)       # most claims are false
    report = verify_spec(spec, options)
    assert {(o.kind, o.name) for o in report.outputs if o.verdict == "PROVED"} <= honest
    assert report.verdict in (("PROVED", "UNKNOWN") if scale == 1.0 else ("REFUTED",))


def test_certificate_second_opinion_and_dump(spec, capsys):
    options = Options(jobs=1, steps=1, certificate=Path("proof.json"), second_opinion="z3", dump_unknown=Path("open"))
    report = verify_spec(spec, options)
    assert report.verdict == "PROVED"
    (phase,) = [p for p in report.phases if p.name == "second opinion"]
    assert "z3" in phase.detail and "disagrees" not in phase.detail
    held = read_certificate("proof.json")
    assert held.obligations and any("casts between float types" in a for a in held.assumptions) and held.made["verdict"] == "PROVED"
    assert recheck("proof.json").accepted and Path("open").is_dir()
    assert cli.main(["recheck", "-q", "proof.json"]) == 0
    assert f"{len(held.obligations)} obligations, every one is proved again" in capsys.readouterr().out
    text = Path("proof.json").read_text()
    Path("proof.json").write_text(text.replace('"lhs":', '"lhs": ', 1).replace("add", "mul", 1))
    assert cli.main(["recheck", "-q", "proof.json"]) == 1
    assert "CERT001" in capsys.readouterr().out


def test_a_certificate_with_its_traces_is_the_theorem(spec, capsys):
    for case in ({}, {"scale": 1.5}):
        capture_spec(spec, Path(f"traces{len(case)}"), Options(steps=1, case=case))
    report = verify_dir(Path("traces0"), Options(jobs=1, certificate=Path("proof.json")))
    assert report.verdict == "PROVED" and report.outputs
    assert cli.main(["recheck", "-q", "proof.json", "--traces", "traces0"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"PROVED, {len(report.outputs)} of {len(report.outputs)} outputs follow" in out and "its outputs equal the reference's" in out
    assert cli.main(["recheck", "-q", "proof.json", "--traces", "traces1"]) == 1
    assert "CERT004" in capsys.readouterr().out
    held = read_certificate("proof.json")
    fewer = [obligation_of(e) for e in held.obligations[1:]]
    write_certificate("short.json", fewer, held.assumptions, held.made)
    assert cli.main(["recheck", "-q", "short.json"]) == 0
    assert cli.main(["recheck", "-q", "short.json", "--traces", "traces0"]) == 1
    assert "CERT005" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        cli.main(["recheck", "-q", "proof.json", "--traces", "nowhere"])


def test_a_kernel_that_proves_too_much_is_contradicted(spec, monkeypatch):
    """If an obligation among the proved is false, the second opinion makes the run our error."""
    def prove(*arguments):
        proof = original(*arguments)
        proof.obligations = [replace(o, lhs=o.rhs, rhs=o.lhs) if i else _false(o) for i, o in enumerate(proof.obligations)]
        return proof

    def _false(o):
        from trainverify.kernel.terms import Terms
        t = Terms()
        x = t.add("leaf", 0)
        return t.obligation(x, t.add("neg", None, (x,)))
    original = analysis.prove_programs
    monkeypatch.setattr(analysis, "prove_programs", prove)
    report = verify_spec(spec, Options(jobs=1, steps=1, second_opinion="z3"))
    assert report.verdict == "ERROR" and report.exit_code == 4
    assert any(d.code == "SMT002" and d.severity == "internal" for d in report.diagnostics)


def test_a_reference_that_is_undefined_proves_nothing():
    def reference():
        torch.manual_seed(0)
        model, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
        return tv.Training(model, step_of(model, x), batch=x)

    def step_of(model, x):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step():
            h = model(x)
            loss = torch.where(h.detach() > 0, torch.log(h.detach()), h).square().mean() + h.sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return {"loss": loss}
        return step

    def parallel(ref):
        model = torch.nn.Linear(3, 2)
        model.load_state_dict(ref.weights)
        return tv.Training(model, step_of(model, ref.batch))
    report = tv.verify(reference, parallel, ranks=1, steps=1, timeout=60.0)
    assert report.verdict == "UNKNOWN" and "REL016" in {d.code for d in report.diagnostics}
    assert all(o.reason.endswith("see REL016") for o in report.outputs)


def test_identifiers_say_what_they_are():
    assert terms.Terms.name == "terms" and "torch" not in sys.modules["trainverify.kernel.store"].__dict__
