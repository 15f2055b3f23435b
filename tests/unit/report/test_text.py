"""The text report, as a person sees it, for every kind of outcome."""
import io
import re
from pathlib import Path

import pytest
from trainverify.diagnostics import Diagnostic, Span
from trainverify.report import text
from trainverify.report.model import Assumption, Binding, Finding, Operand, OutputResult, Phase, Report, Witness

from . import reports

UNBREAKABLE = ("rerun: ", "  --> ")


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[3])


@pytest.mark.parametrize("name", reports.ALL)
def test_report_reads_as_before(name, snapshot):
    assert text.render(reports.ALL[name](), saved=".trainverify/last.json") == snapshot


@pytest.mark.parametrize("name", reports.ALL)
def test_report_fits_80_ascii_columns_and_ends_with_the_rerun(name):
    rendered = text.render(reports.ALL[name](), saved=".trainverify/last.json")
    assert rendered.isascii()
    assert [line for line in rendered.split("\n") if len(line) > 80 and not line.startswith(UNBREAKABLE)] == []
    assert rendered.rstrip("\n").split("\n")[-1].startswith("rerun: trainverify verify spec.py")


def long_report() -> Report:
    """Everything is long or many at once: paths, names, shapes, layouts, ranks, values, lines."""
    path = "/opt/" + "a_rather_long_folder_name/" * 5 + "train_step.py"
    here = Span("tests/unit/report/fixtures/norm.py", 13, "SomeVeryLongClassName.forward_with_a_long_name", phase="backward", step=12, microbatch=3)
    far = Span(path, 1234, "VeryLongClassName.very_long_method_name", "layers.0", "backward", 1, ((path, 77, "step"), ("train.py", 5, "main")))
    name = "module.language_model.encoder.layers.{}.self_attention.query_key_value.lora_adapter.weight"
    layout = "shard(data_parallel) x shard(tensor_parallel) x replicate(pipeline_parallel)"
    ranks = tuple(range(0, 512, 2))
    many = Witness(name.format(3) + ".grad[1234, 567, 89], step 1", -1.23456789e-12, tuple((r, r * 1.00000001e-7 - 1) for r in range(64)))
    d = Diagnostic("REL001", "a message of some length " * 6, "error", far, ranks, ("a note that is long " * 8, f"rank 3: at {path}:12"), "a way out " * 20)
    finding = Finding(d, "aten._scaled_dot_product_flash_attention_for_cpu_backward.default", tuple(name.format(i) for i in range(0, 40, 3)), (far, here), "algebra " * 30,
                      tuple(Operand(f"input {i}", (2, 1024, 16, 128), "float32", "lineage " * 12) for i in range(12)), 3, (many,))
    rows = [OutputResult(k, name.format(i) + ("::exp_avg" if k == "state" else ""), 1, ranks, v, "reason " * 14, layout, "algebra " * 9)
            for k in text.KINDS for v in ("REFUTED", "UNKNOWN") for i in range(0, 9, 2)]
    return Report("REFUTED", path, {"tensor_parallel_size": 4, "schedule": "interleaved_1f1b"}, 512, "dp=8 x pp=4 x cp=2 x ep=4 x tp=2 x extra=1 x more=1", 2, 0, rows,
                  [finding, Finding(Diagnostic("REL002", "short", span=here, ranks=(0,)))], [Diagnostic("CAP001", "w " * 60, "note", far)],
                  [Diagnostic("WEAK001", "weak " * 40, "warning", far)], [Assumption("A3", "rounding " * 20, (f"{path}:1", "b.py:2") * 4)], ["not run " * 20],
                  [Binding(name.format(0), r, (4096, 4096), name.format(0) + "[0:4096, 0:4096] and a part of another", 10, 9) for r in range(3)], (1, 1),
                  "samples " * 20, "equal " * 20, [Phase("a phase", 1.0, "detail " * 9)] * 6, 10**9, 10**12, 10**12, 10**6, "trainverify verify " + path)


@pytest.mark.parametrize("saved", ["", "/opt/" + "a_rather_long_folder_name/" * 5 + "last.json"])
def test_only_what_cannot_be_broken_is_wider_than_80_columns(saved):
    rendered = text.render(long_report(), saved=saved)
    wide = [line for line in rendered.split("\n") if len(line) > 80 and not line.startswith("rerun: ")]
    assert [line for line in wide if max(map(len, line.split())) < 60] == []


@pytest.mark.parametrize(("name", "code"), [("proved", 0), ("equal_in_field", 3), ("refuted", 1), ("mixed_unknown", 3), ("cannot_run", 1),
                                            ("internal", 4), ("dry_run", 3), ("captured", 0)])
def test_exit_code(name, code):
    assert reports.ALL[name]().exit_code == code


@pytest.mark.parametrize(("code", "said"), [("SPEC003", "the spec cannot be used"), ("FILE001", "the traces cannot be read"), ("RUN001", "the program cannot run"),
                                            ("FILE006", "a file that was asked for cannot be written")])
def test_an_error_says_what_is_impossible(code, said):
    assert f"\nERROR: {said}\n" in text.render(Report(verdict="ERROR", diagnostics=[Diagnostic(code, "m")]))


def test_the_verdict_stands_on_the_first_screen():
    for make in reports.ALL.values():
        first = text.render(make()).split("\n")[:8]
        assert any(line.startswith(("PROVED: ", "REFUTED: ", "UNKNOWN: ", "ERROR: ", "DRY RUN: ", "CAPTURED: ")) for line in first)


def test_evidence_is_named_where_it_speaks_for_an_output():
    for reason, named in ((f"{reports.EVIDENCE}; no proof", True), ("3 elements have no known meaning: see OPS001", False)):
        rendered = text.render(Report(verdict="UNKNOWN", evidence=reports.EVIDENCE, outputs=[OutputResult("scalar", "loss", 1, (0,), "UNKNOWN", reason)]))
        assert ("  evidence  " in rendered) is named and ("equal, but no proof" in rendered) is named


def test_every_output_that_is_not_equal_is_named_with_its_reason():
    reasons = {"layers.0.a": "no partner", "layers.1.a": "no partner", "head.b": "never written back"}
    outs = [OutputResult("parameter", n, 1, (0,), "UNKNOWN", why) for n, why in reasons.items()]
    outs += [OutputResult("parameter", "c", 1, (0,), "PROVED"), OutputResult("parameter", "d", 1, (0,), "REFUTED", "", "", "2 x the reference")]
    rendered = text.render(Report(verdict="REFUTED", outputs=outs))
    for said in ("layers.0-1.a", "no partner", "head.b", "never written back", "2 x the reference", "step 1: d"):
        assert said in rendered


def test_states_of_which_none_is_missing_are_named_by_key():
    outs = [OutputResult("state", f"{w}::{key}", step, (0,), "REFUTED" if key != "step" and (key, w, step) != ("m", "b", 2) else "PROVED")
            for step in (1, 2) for w in ("a", "b") for key in ("m", "v", "step")]
    rendered = text.render(Report(verdict="REFUTED", outputs=outs))
    assert "      step 1: all m, all v; step 2: all v, a::m\n" in rendered
    assert "optimizer state           12   none found (m, v, step)\n" in rendered


def test_reasons_that_differ_in_a_number_stand_together():
    outs = [OutputResult("gradient", f"layers.{i}.w", 1, (0,), "UNKNOWN", f"{n} elements differ") for i, n in enumerate((40, 500, 40))]
    rendered = text.render(Report(outputs=[*outs, OutputResult("gradient", "b", 1, (0,), "PROVED")]))
    assert "40 to 500 elements differ\n      step 1: layers.0-2.w\n" in rendered and rendered.count("elements differ") == 1


def test_proved_is_said_only_by_the_verdict():
    """A report whose outputs are all proved but whose verdict is not does not read as a pass."""
    report = reports.proved()
    report.verdict = "UNKNOWN"
    assert not any(line.startswith("PROVED") for line in text.render(report).split("\n"))


def test_operands_that_are_alike_stand_together():
    operands = [Operand(f"input {i}", (4,), "float32", "agrees" if i < 3 else "") for i in range(4)]
    finding = Finding(Diagnostic("REL001", "m"), operands=(*operands, Operand("result", (), "float32", "new")))
    rendered = text.render(Report(verdict="REFUTED", findings=[finding]))
    assert "   = inputs 0-2:  [4] float32, agrees\n   = input 3:     [4] float32\n   = result:      [] float32, new\n" in rendered


def test_a_counterexample_shows_some_of_many_values():
    witness = Witness("loss", 0.0, tuple((r, float(r)) for r in range(20)))
    rendered = text.render(Report(verdict="REFUTED", findings=[Finding(Diagnostic("REL001", "m"), witnesses=(witness,))]))
    assert "rank 7: 7   and 12 other values" in " ".join(rendered.split("\n")).replace("        and", "   and") and "rank 8" not in rendered


def test_a_note_does_not_repeat_the_line_above_it():
    span = Span("tests/unit/report/fixtures/norm.py", 13, "f")
    notes = ("tests/unit/report/fixtures/norm.py:13 in f: return x", "tests/unit/report/fixtures/norm.py:13 in g: return x")
    assert "in f: return" not in "\n".join(text.diagnostic_lines(Diagnostic("RUN009", "m", span=span, notes=notes)))
    gone = Diagnostic("RUN009", "m", span=Span("gone.py", 1, "f"), notes=("gone.py:1 in f: return x",))
    assert "in f: return x" in "\n".join(text.diagnostic_lines(gone))


@pytest.mark.parametrize(("span", "ranks", "place"), [
    (Span("gone.py", 3, "f", phase=""), (), "gone.py:3 in f"), (Span("gone.py", 3, "f", phase=""), (1,), "gone.py:3 in f (rank 1)"),
    (Span("tests/unit/report/fixtures/norm.py", 0, "", phase=""), (), "tests/unit/report/fixtures/norm.py")])
def test_a_place_says_what_is_known_of_it(span, ranks, place):
    assert text.diagnostic_lines(Diagnostic("RUN009", "m", span=span, ranks=ranks)) == ["error[RUN009]: m", f"  --> {place}"]


def test_nan_and_equal_ranks_in_a_counterexample():
    witness = Witness("loss, step 1", 2.5, ((0, float("nan")), (1, 3.0), (2, float("nan"))))
    finding = Finding(Diagnostic("REL010", "a NaN that the reference lacks"), witnesses=(witness,))
    assert "reference: 2.5   ranks 0,2: NaN   rank 1: 3" in text.render(Report(verdict="REFUTED", findings=[finding]))


def test_names_that_are_not_ascii_do_not_break_the_report():
    report = Report(verdict="ERROR", diagnostics=[Diagnostic("SPEC001", "no such file: Gr\u00f6\u00dfe.py", span=Span("gr\u00f6\u00dfe.py", 1, "f"))])
    assert text.render(report).isascii()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_colour_only_on_a_terminal_that_wants_it(monkeypatch):
    rendered = text.render(reports.refuted())
    for variable in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    plain, coloured, refused = io.StringIO(), Terminal(), Terminal()
    text.show(rendered, plain)
    text.show(rendered, coloured)
    monkeypatch.setenv("NO_COLOR", "1")
    text.show(rendered, refused)
    assert plain.getvalue() == refused.getvalue() == rendered
    assert "\x1b[" in coloured.getvalue()
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured.getvalue()) == rendered
