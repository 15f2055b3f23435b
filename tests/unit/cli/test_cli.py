"""The command line, with an engine that answers as told: arguments, streams, files, exit codes."""
import io
import json
import os
import signal
import sys
import time
import types
from pathlib import Path

import pytest
from trainverify import cli
from trainverify.diagnostics import Diagnostic, Fault
from trainverify.engine.options import Options
from trainverify.report import json_
from trainverify.report.model import OutputResult, Report


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """A fake engine in an empty folder that holds spec.py and traces/; `answer` is what it returns or raises."""
    monkeypatch.chdir(tmp_path)
    Path("spec.py").write_text("")
    Path("traces").mkdir()
    fake = types.ModuleType("trainverify.verify")
    fake.calls, fake.answer = [], Report(verdict="PROVED", versions={"trainverify": "0.1.0"}, outputs=[OutputResult("scalar", "loss", 1, (0,), "PROVED")])

    def entry(name):
        def run(*arguments):
            *arguments, progress = arguments
            fake.calls.append((name, *arguments))
            progress("capture parallel", "6 ranks")
            progress("capture parallel", "rank 3", 0.5)
            if isinstance(fake.answer, BaseException):
                raise fake.answer
            return fake.answer
        return run
    for name in ("verify_spec", "verify_dir", "capture_spec"):
        setattr(fake, name, entry(name))
    monkeypatch.setitem(sys.modules, "trainverify.verify", fake)
    return fake


def test_arguments_reach_the_engine(engine):
    argv = "verify spec.py --ranks 6 --case tp=2,sp=true --case lr=0.5,mode=1f1b --steps 3 --seed 7 --timeout 9 --accept a.py:3 --accept b.py:4 --dry-run"
    cli.main(argv.split())
    case = {"tp": 2, "sp": True, "lr": 0.5, "mode": "1f1b"}
    assert engine.calls == [("verify_spec", Path("spec.py"), Options(ranks=6, case=case, steps=3, seed=7, timeout=9.0, accept=("a.py:3", "b.py:4"), dry_run=True, cache=True))]
    assert type(case["tp"]) is int


def test_defaults(engine):
    cli.main(["verify", "spec.py"])
    assert engine.calls == [("verify_spec", Path("spec.py"), Options(cache=True))]


def test_a_folder_is_verified_from_its_traces(engine):
    cli.main(["verify", "traces"])
    assert engine.calls == [("verify_dir", Path("traces"), Options(cache=True))]


def test_capture(engine, capsys):
    engine.answer = Report(verdict="UNKNOWN", ranks=6, ops=12)
    assert cli.main(["capture", "spec.py", "-o", "out", "--ranks", "6"]) == 0
    assert engine.calls == [("capture_spec", Path("spec.py"), Path("out"), Options(ranks=6))]
    out = capsys.readouterr().out
    assert "CAPTURED: 12 operations on 6 ranks" in out and "\ntraces: out (to verify them: trainverify verify out)\n" in out


@pytest.mark.parametrize(("report", "code"), [
    (Report(verdict="PROVED"), 0),
    (Report(verdict="REFUTED"), 1),
    (Report(verdict="UNKNOWN"), 3),
    (Report(verdict="ERROR", diagnostics=[Diagnostic("RUN001", "deadlock")]), 1),
    (Report(verdict="ERROR", diagnostics=[Diagnostic("CONF001", "row disagrees", "internal")]), 4),
])
def test_exit_codes(engine, report, code):
    engine.answer = report
    assert cli.main(["verify", "spec.py"]) == code


def test_a_dry_run_is_never_a_pass(engine, capsys):
    engine.answer = Report(verdict="UNKNOWN")
    assert cli.main(["verify", "spec.py", "--dry-run"]) == 3
    assert "DRY RUN" in capsys.readouterr().out


def test_report_on_stdout_progress_on_stderr_and_the_last_report_kept(engine, capsys):
    cli.main(["verify", "spec.py", "--seed", "5"])
    out, err = capsys.readouterr()
    assert out.startswith("trainverify 0.1.0 | seed 0") and "PROVED: all 1 outputs" in out
    assert out.endswith("report: .trainverify/last.json\nrerun: trainverify verify spec.py --seed 5\n")
    assert err == "start: spec.py\ncapture parallel: 6 ranks\n"
    assert json_.decode(Path(".trainverify/last.json").read_bytes()) == engine.answer


def test_quiet(engine, capsys):
    cli.main(["verify", "spec.py", "-q"])
    assert capsys.readouterr().err == ""


def test_json_on_stdout(engine, capsys):
    cli.main(["verify", "spec.py", "--format", "json"])
    plain = json.loads(capsys.readouterr().out)
    assert plain["verdict"] == "PROVED" and plain["exit_code"] == 0 and plain["rerun"] == "trainverify verify spec.py"


def test_json_in_a_file_and_text_on_stdout(engine, capsys):
    cli.main(["verify", "spec.py", "--format", "json", "-o", "report.json"])
    assert json_.decode(Path("report.json").read_bytes()).verdict == "PROVED"
    assert "PROVED: all 1 outputs" in capsys.readouterr().out


@pytest.mark.parametrize(("form", "start"), [("junit", "<?xml"), ("github", "::notice title=PROVED"), ("sarif", "{")])
def test_further_formats_on_stdout_and_in_a_file(engine, capsys, form, start):
    cli.main(["verify", "spec.py", "--format", form])
    printed = capsys.readouterr().out
    assert printed.startswith(start)
    cli.main(["verify", "spec.py", "--format", form, "-o", "report"])
    assert Path("report").read_text() == printed and "PROVED: all 1 outputs" in capsys.readouterr().out


def test_what_the_spec_prints_goes_to_stderr(engine, capsys):
    def chatty(path, options, progress):
        print("hello")
        return engine.answer
    engine.verify_spec = chatty
    cli.main(["verify", "spec.py", "-q", "--format", "json"])
    out, err = capsys.readouterr()
    assert json.loads(out)["verdict"] == "PROVED" and err == "hello\n"


def test_the_rerun_command_leaves_out_where_the_report_goes(engine):
    cli.main(["verify", "spec.py", "-q", "--format", "json", "-o", "report.json", "--case", "name=a b"])
    assert engine.answer.rerun == "trainverify verify spec.py --case 'name=a b'"


@pytest.mark.parametrize("argv", [
    [], ["verify", "gone.py"], ["verify", "notes.txt"], ["verify", "spec.py", "--ranks", "0"], ["verify", "spec.py", "--steps", "x"], ["verify", "spec.py", "--seed", "-1"],
    ["verify", "spec.py", "--case", "tp"], ["verify", "spec.py", "--timeout", "-1"], ["verify", "spec.py", "--timeout", "nan"],
    ["verify", "spec.py", "--accept", "file.py"], ["verify", "spec.py", "--format", "xml"], ["capture", "spec.py"], ["capture", "traces", "-o", "x"], ["prove", "spec.py"],
])
def test_usage_errors_are_2_and_say_so_on_stderr(engine, capsys, argv):
    Path("notes.txt").write_text("")
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and "error: " in err and engine.calls == []


def test_usage_errors_are_short_and_narrow(engine, capsys):
    for argv in (["verify", "spec.py", "--format", "xml"], ["verfy", "spec.py"], []):
        with pytest.raises(SystemExit):
            cli.main(argv)
        err = capsys.readouterr().err
        assert err.startswith("trainverify") and "--help` shows the arguments\n" in err and max(map(len, err.split("\n"))) <= 80 and err.count("\n") <= 3


@pytest.mark.parametrize(("argv", "told"), [
    (["capture", "spec.py", "-o", "file"], "file is no folder"), (["capture", "spec.py", "-o", "file/sub"], "file is no folder"),
    (["verify", "spec.py", "-o", "gone/report.txt"], "there is no folder gone"), (["verify", "spec.py", "-o", "traces"], "traces: is a folder"),
    (["verify", "spec.py", "--certificate", "file/c"], "there is no folder file"), (["verify", "spec.py", "--counterexample", "gone/c.py"], "there is no folder gone"),
    (["verify", "spec.py", "--dump-unknown", "file"], "file is no folder"), (["recheck", "gone"], "gone: no such file"), (["recheck", "traces"], "traces: is a folder")])
def test_what_cannot_be_written_or_read_is_told_before_anything_runs(engine, capsys, argv, told):
    Path("file").write_text("")
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    err = " ".join(capsys.readouterr().err.replace(str(Path.cwd()) + "/", "").split())
    assert stop.value.code == 2 and told in err and engine.calls == []


@pytest.mark.parametrize(("argv", "told"), [
    ("verify spec.py --dry-run --certificate c", "--certificate needs a comparison"), ("verify spec.py --dry-run --dump-unknown d", "--dump-unknown needs a comparison"),
    ("verify spec.py --dry-run --self-test", "--self-test needs a comparison"), ("verify spec.py --all-cases --self-test", "--self-test is for one run of one spec"),
    ("verify --certificate c", "--certificate is for one run of one spec"), ("verify spec.py --all-cases --second-opinion z3", "--second-opinion is for one run of one spec"),
    ("verify traces --ranks 4", "--ranks is for a capture"), ("verify traces --case tp=2", "--case is for a capture"), ("verify traces --steps 1", "--steps is for")])
def test_options_that_would_do_nothing_are_refused(engine, capsys, argv, told):
    assert cli.main(argv.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and told in " ".join(err.split()) and engine.calls == []


def test_options_are_written_out(engine, capsys):
    with pytest.raises(SystemExit):
        cli.main(["verify", "spec.py", "--form", "json"])
    assert "unrecognized arguments: --form json" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", "verify", "capture", "lineage", "recheck", "ops", "explain"])
def test_help_fits_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and out.isascii() and max(map(len, out.split("\n"))) <= 80 and ("exit codes:\n  0 " in out) is (command not in ("ops", "explain"))


def test_a_fault_that_leaves_the_engine_is_a_report(engine, capsys):
    engine.answer = Fault(Diagnostic("SPEC001", "spec.py has no parallel()", fix="define parallel(ref)"))
    assert cli.main(["verify", "spec.py"]) == 1
    out = capsys.readouterr().out
    assert "ERROR: the spec cannot be used" in out and "error[SPEC001]: spec.py has no parallel()" in out and "define parallel(ref)" in out


def test_our_own_exception_is_4_and_keeps_its_traceback(engine, capsys):
    engine.answer = ZeroDivisionError("oops")
    assert cli.main(["verify", "spec.py"]) == 4
    out, err = capsys.readouterr()
    assert out == "" and "our fault" in err and "ZeroDivisionError: oops" in err and ".trainverify/internal-error.txt" in err and "Traceback" not in err
    assert "Traceback" in Path(".trainverify/internal-error.txt").read_text()


def test_debug_prints_the_traceback(engine, capsys):
    engine.answer = ZeroDivisionError("oops")
    assert cli.main(["verify", "spec.py", "--debug"]) == 4
    assert "Traceback" in capsys.readouterr().err
    assert engine.calls[0][2].keep


def test_debug_says_where_the_traces_are(engine, capsys):
    cli.main(["verify", "spec.py", "--debug"])
    assert "\ntraces: .trainverify/traces (to verify them: trainverify verify .trainverify/traces)\n" in capsys.readouterr().out


def test_an_interrupt_is_130_in_one_line(engine, capsys):
    engine.answer = KeyboardInterrupt()
    assert cli.main(["verify", "spec.py", "-q"]) == 130
    assert capsys.readouterr() == ("", "trainverify: interrupted\n")


def test_sigterm_ends_in_order_too(engine, capsys):
    left = []

    def run(path, options, progress):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            left.append("in order")
    engine.verify_spec = run
    assert cli.main(["verify", "spec.py", "-q"]) == 143 and left == ["in order"]
    assert capsys.readouterr() == ("", "trainverify: terminated\n")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_folder_that_cannot_be_written_costs_the_file_and_not_the_verdict(engine, capsys):
    Path(".trainverify").write_text("in the way")
    assert cli.main(["verify", "spec.py", "-q"]) == 0
    out, err = capsys.readouterr()
    assert "PROVED" in out and "last.json" not in out and "cannot write .trainverify" in err


def test_an_output_that_can_no_longer_be_written_is_2_but_shows_the_report(engine, capsys):
    def run(path, options, progress):
        Path("out").rmdir()
        return engine.answer
    engine.verify_spec = run
    Path("out").mkdir()
    assert cli.main(["verify", "spec.py", "-q", "-o", "out/report.txt"]) == 2
    out, err = capsys.readouterr()
    assert "PROVED" in out and "cannot write out/report.txt" in err


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_live_progress_only_on_a_terminal(engine, monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    import threading
    before = threading.active_count()
    assert cli.main(["verify", "spec.py"]) == 0
    assert "capture parallel" in screen.getvalue() and "\r" in screen.getvalue()
    assert threading.active_count() == before
    assert "PROVED" in capsys.readouterr().out


def test_explain_lists_and_shows_pages(capsys):
    assert cli.main(["explain"]) == 0
    listed = capsys.readouterr().out
    assert "REL002    partial: " in listed
    assert cli.main(["explain", "rel002"]) == 0
    assert capsys.readouterr().out.startswith("# REL002: ")


@pytest.mark.parametrize("code", ["REL999", "nonsense", "../cli", ""])
def test_explain_of_an_unknown_code_is_2(capsys, code):
    assert cli.main(["explain", code]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "no page for" in err


def test_a_reader_that_leaves_is_no_internal_error(tmp_path):
    import subprocess
    shell = f"{sys.executable} -m trainverify explain | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() in ("0", "141") and done.stderr == ""


@pytest.mark.parametrize(("redirection", "code", "told"), [
    (">/dev/full", "2", "trainverify: cannot write to stdout: No space left on device\n"), (">&-", "0", ""), ("<&- >&- 2>&-", "0", "")])
def test_a_stdout_that_is_closed_or_full_is_no_internal_error(tmp_path, redirection, code, told):
    import subprocess
    shell = f"({sys.executable} -m trainverify explain {redirection}); echo $?"
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == (code, told) and not (tmp_path / ".trainverify").exists()
