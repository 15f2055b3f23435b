"""What capture notes reaches the report, each with its line."""
import torch
import torch.distributed as dist

import trainverify as tv
from trainverify.diagnostics import Diagnostic, Span
from trainverify.engine.notes import detailed, notes_of
from trainverify.ir.trace import Note, Program, Trace

SPANS = [Span("train.py", 3, "step"), Span("train.py", 9, "step")]


def program(*ranks: list[Note]) -> Program:
    return Program([Trace("parallel", r, len(ranks), spans=SPANS, notes=notes) for r, notes in enumerate(ranks)], [{} for _ in ranks])


def test_stand_ins_are_not_run_once_per_code():
    found = notes_of(program([Note("CUDA001", 0, "Tensor.cuda()"), Note("CUDA001", 1, "to('cuda')")], [Note("CUDA001", 0, "Tensor.cuda()")]))
    assert found.not_run == ["cuda devices (they were the cpu): Tensor.cuda(), to('cuda') at train.py:3, train.py:9 [CUDA001]"]
    assert not found.warnings and not found.assumptions


def test_many_places_are_cut_short():
    found = notes_of(program([Note("CUDA001", 0, f"zeros({i})") for i in range(9)]))
    assert "zeros(3) and 5 more at train.py:3" in found.not_run[0]


def test_stand_ins_that_the_verdict_rests_on_are_assumptions():
    found = notes_of(program([Note("DIST002", 0, "ring attention"), Note("CAP007", 1, "the number 0.5"), Note("ASSUME", 0, "as the user says")]))
    assert sorted(places for _, places in found.assumptions) == [("train.py:3",), ("train.py:3",), ("train.py:9",)]
    assert any("0.5" in text for text, _ in found.assumptions) and any(text == "as the user says" for text, _ in found.assumptions)


def test_any_other_note_is_a_warning():
    found = notes_of(program([Note("CAP005", 1, "optimizer state x is a dict and is not compared")], [Note("CAP005", 1, "optimizer state x is a dict and is not compared")]),
                     program([Note("NEW", -1, "something new")]))
    assert found.warnings == [Diagnostic("CAP005", "optimizer state x is a dict and is not compared", "warning", SPANS[1], (0, 1)),
                              Diagnostic("NEW", "something new", "warning", None, (0,))]


def test_untracked_values_are_told_by_replay_with_the_details_of_capture():
    found = notes_of(program([Note("CAP006", 0, "the number 0.5 changes")]))
    assert not found.warnings
    (d,) = detailed([Diagnostic("CAP006", "untracked", span=SPANS[0])], found)
    assert d.notes == ("the number 0.5 changes",)


def test_notes_of_a_run_reach_the_report():
    def training(model, x):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run = torch.compile(model)

        def step():
            loss = run(x.cuda()).square().sum()
            loss.backward()
            for p in model.parameters():
                optimizer.state[p]["history"] = ["seen"]
            optimizer.step()
            optimizer.zero_grad()
            return {"loss": loss}
        return tv.Training(model, step, batch=x)

    def reference():
        torch.manual_seed(0)
        return training(torch.nn.Linear(3, 2), torch.randn(4, 3))

    def parallel(ref):
        dist.init_process_group("nccl")
        model = torch.nn.Linear(3, 2)
        model.load_state_dict(ref.weights)
        return training(model, ref.batch)

    report = tv.verify(reference, parallel, ranks=1, steps=1, timeout=60.0)
    for code in ("CUDA001", "CUDA005", "DIST001"):
        assert any(f"[{code}]" in text and "test_notes.py:" in text for text in report.not_run), (code, report.not_run)
    (d,) = [d for d in report.diagnostics if d.code == "CAP005"]
    assert d.severity == "warning" and "history" in d.message
    assert report.outputs and report.verdict == "PROVED"
