"""JUnit, GitHub and SARIF: what machines read says what the report says, in every kind of outcome, whatever characters it holds."""
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from trainverify.diagnostics import Diagnostic, Span
from trainverify.report import formats, github, junit, sarif
from trainverify.report.model import Finding, OutputResult, Report, Suite

from . import reports
from .validate import problems

ROOT = str(Path(__file__).parents[3])
SARIF = json.loads((Path(__file__).parent / "fixtures" / "sarif-2.1.0-parts.schema.json").read_text())
NASTY = "50% of\r\n<b>&\"it\"</b>: a,b ]]> \x1b[31mred\x00 Gr\u00f6\u00dfe \U0001f600"


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def nasty() -> Report:
    """Every text of the report holds characters that some format has to escape."""
    span = Span(f"{ROOT}/a b,c%d:{NASTY[7:]}.py", 3, NASTY, stack=(("/usr/lib/x.py", 1, NASTY), (f"{ROOT}/README.md", 2, "<module>")))
    d = Diagnostic("REL002", NASTY, "error", span, (0,), (NASTY,), NASTY)
    outputs = [OutputResult("scalar", NASTY, 1, (0,), "REFUTED", NASTY, NASTY, NASTY, 0), OutputResult("gradient", NASTY, 1, (0,), "UNKNOWN", NASTY)]
    return Report(verdict="REFUTED", spec=f"{NASTY}.py", case={"x": NASTY}, outputs=outputs, findings=[Finding(d, algebra=NASTY)], diagnostics=[d], rerun=NASTY)


ALL = {**reports.ALL, "nasty": nasty}
every = pytest.mark.parametrize("name", ALL)


@pytest.mark.parametrize("form", ["junit", "github", "sarif"])
@every
def test_it_is_ascii_ends_in_a_newline_and_is_the_same_again(form, name):
    made = formats.render(form, ALL[name](), ROOT)
    assert made.isascii() and made.endswith("\n") and made == formats.render(form, ALL[name](), ROOT)


@pytest.mark.parametrize("form", ["junit", "github", "sarif"])
def test_times_are_the_only_thing_that_differs_between_runs(form):
    slow, fast = reports.refuted(), reports.refuted()
    slow.seconds, slow.peak_memory, slow.phases = 99.5, 7, []
    assert re.sub(r' time="[\d.]+"', "", formats.render(form, slow, ROOT)) == re.sub(r' time="[\d.]+"', "", formats.render(form, fast, ROOT))


# ---- JUnit

def parsed(*made):
    return ElementTree.fromstring(junit.render(made))


@every
def test_junit_counts_are_those_of_its_cases(name):
    top = parsed(ALL[name](), ALL["proved"]())
    for node in (top, *top):
        cases = list(node.iter("testcase"))
        for key, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert int(node.get(key)) == sum(c.find(tag) is not None for c in cases)
        assert int(node.get("tests")) == len(cases) > 0


def test_junit_has_one_case_per_group_whatever_the_verdict():
    names = {make: [c.get("name") for c in parsed(reports.ALL[make]()).iter("testcase")] for make in ("proved", "equal_in_field", "refuted")}
    assert names["proved"] == names["equal_in_field"] and set(names["proved"]) == set(names["refuted"])
    assert names["proved"][:3] == ["both programs run", "loss, step 1", "grad_norm, step 1"] and "optimizer state, step 2" in names["proved"]


@pytest.mark.parametrize(("name", "tags"), [("proved", set()), ("equal_in_field", {"failure"}), ("refuted", {"failure"}), ("cannot_run", {"error"}),
                                            ("internal", {"error"}), ("mixed_unknown", {"failure"}), ("dry_run", {"skipped"}), ("captured", {"skipped"})])
def test_junit_outcomes(name, tags):
    assert {e.tag for c in parsed(reports.ALL[name]()).iter("testcase") for e in c} == tags


def test_junit_failures_carry_the_diagnosis():
    cases = {c.get("name"): c.find("failure") for c in parsed(reports.refuted()).iter("testcase")}
    failure = cases["gradients, step 1"]
    assert failure.get("message") == "5 of 12 differ: REL002 gradient is one rank's share; the sum over tp is missing at tests/unit/report/fixtures/norm.py:13"
    assert failure.get("type") == "REFUTED"
    for said in ("--> tests/unit/report/fixtures/norm.py:13", "counterexample", "layers.0-1.norm1.weight"):
        assert said in failure.text
    assert cases["loss, step 1"].get("type") == "UNKNOWN"


def test_junit_says_when_nothing_was_compared():
    case = list(parsed(Report(verdict="UNKNOWN")).iter("testcase"))[1]
    assert case.find("failure").get("message") == "no output was compared"


@pytest.mark.parametrize("name", ["refuted", "mixed_unknown", "cannot_run", "internal"])
def test_junit_reads_as_before(name, snapshot):
    assert junit.render([reports.ALL[name]()]) == snapshot


# ---- GitHub

def annotations(report, root=ROOT):
    """(level, properties, message) as the runner decodes them."""
    def decode(text):
        for code, char in (("%3A", ":"), ("%2C", ","), ("%0D", "\r"), ("%0A", "\n"), ("%25", "%")):
            text = text.replace(code, char)
        return text
    out = []
    for line in github.render([report], root).splitlines():
        level, given, message = re.fullmatch(r"::(error|warning|notice) ([^\r\n]*?)::(.*)", line).groups()
        out.append((level, {k: decode(v) for k, v in (p.split("=", 1) for p in given.split(","))}, decode(message)))
    return out


@every
def test_github_lines_are_commands(name):
    assert all(set(p) <= {"file", "line", "title"} and p["title"] and m for _, p, m in annotations(ALL[name]()))


def test_github_annotates_the_line_of_the_cause():
    level, given, message = annotations(reports.refuted())[0]
    assert level == "error" and given == {"file": "tests/unit/report/fixtures/norm.py", "line": "13", "title": "REL002: spec.py[tp=2]"}
    assert message.startswith("error[REL002]: gradient is one rank's share") and "counterexample" in message


def test_github_decodes_to_what_was_meant():
    _, given, message = annotations(nasty())[0]
    assert given["line"] == "2" or given["file"].startswith("a b,c%d:")
    assert "50% of" in message and "a,b ]]>" in message and "\x1b" not in message


def test_github_paths_are_seen_from_the_checkout(tmp_path):
    inside = Span(str(tmp_path / "sub" / "train.py"), 4, "f", stack=((str(tmp_path / "main.py"), 9, "g"),))
    library = Span("/usr/lib/torch/nn.py", 4, "f", stack=((str(tmp_path / "main.py"), 9, "g"),))
    outside = Span("/usr/lib/torch/nn.py", 4, "f")
    report = Report(verdict="ERROR", diagnostics=[Diagnostic("RUN001", "m", span=s) for s in (inside, library, outside, None)])
    found = [(p.get("file"), p.get("line")) for _, p, _ in annotations(report, str(tmp_path))]
    assert found[:4] == [("sub/train.py", "4"), ("main.py", "9"), (None, None), (None, None)]


def test_github_puts_errors_first_and_says_what_no_cause_explains():
    report = reports.mixed_unknown()
    report.outputs += [OutputResult("buffer", "b", 1, (0,), "REFUTED", "3 elements differ")]
    levels = [level for level, _, _ in annotations(report)[:-1]]
    assert levels == sorted(levels) and levels[0] == "error"
    assert any("3 elements differ\nb" in m for _, _, m in annotations(report)) and any("tv.local" in m for _, _, m in annotations(report))


def test_github_says_once_what_several_runs_say():
    suite = [reports.refuted(), reports.refuted(), reports.equal_in_field()]
    for report, tp in zip(suite, (2, 3, 4), strict=True):
        report.case = {"tp": tp}
    made = github.render(suite, ROOT)
    assert made.count("error[REL002]") == 1 and "REL002%3A spec.py[tp=2] and 1 more run::" in made and "WEAK011%3A spec.py[tp=2] and 2 more runs::" in made
    assert [made.count(f"REFUTED%3A spec.py[tp={tp}]::") for tp in (2, 3)] == [1, 1]


@pytest.mark.parametrize(("name", "level"), [("proved", "notice"), ("refuted", "error"), ("equal_in_field", "warning"), ("internal", "error")])
def test_github_closes_with_the_verdict(name, level):
    found, given, message = annotations(reports.ALL[name]())[-1]
    assert found == level and given["title"] == f"{reports.ALL[name]().verdict}: spec.py[tp=2]" and "\nrerun: trainverify verify" in message


def test_github_says_why_equal_outputs_do_not_pass():
    told = "equal at 2 field points, error <= 2^-40; no proof that aten.mul.Tensor on rank 0"
    assert [level for level, _, message in annotations(reports.equal_in_field()) if message.startswith(told)] == ["warning"]


# ---- SARIF

def log(*made):
    return json.loads(sarif.render(made, ROOT))


@every
def test_sarif_fits_its_schema(name):
    assert problems(log(ALL[name](), reports.refuted()), SARIF, SARIF["definitions"]) == []


def test_the_sarif_schema_refuses_what_is_not_sarif():
    for path, bad in ((("version",), "2.0"), (("runs", 0, "results", 0, "level"), "fatal"), (("runs", 0, "results", 0, "message"), {}), (("runs", 0, "surplus"), 1),
                      (("runs", 0, "results", 0, "locations", 0, "physicalLocation", "region", "startLine"), 0), (("runs", 0, "tool"), {}), (("$schema",), "a b")):
        good = log(reports.refuted())
        *outer, last = path
        holder = good
        for key in outer:
            holder = holder[key]
        holder[last] = bad
        assert problems(good, SARIF, SARIF["definitions"]), path


@every
def test_sarif_rules_are_those_of_the_results(name):
    (run,) = log(ALL[name]())["runs"]
    rules = [r["id"] for r in run["tool"]["driver"]["rules"]]
    assert all(rules[r["ruleIndex"]] == r["ruleId"] for r in run["results"]) and set(rules) == {r["ruleId"] for r in run["results"]}


def test_sarif_has_a_result_for_what_is_only_equal_where_that_is_the_verdict():
    (unproved,), beside = ([r["message"]["text"] for r in log(made)["runs"][0]["results"] if r["ruleId"] == "UNKNOWN"] for made in (reports.equal_in_field(), reports.refuted()))
    assert "no proof that aten.mul.Tensor on rank 0" in unproved and beside == []


def test_sarif_names_the_line_of_the_cause(snapshot):
    plain = log(reports.refuted())
    result = plain["runs"][0]["results"][0]
    assert result["ruleId"] == "REL002" and result["level"] == "error"
    assert result["locations"][0]["physicalLocation"] == {"artifactLocation": {"uri": "tests/unit/report/fixtures/norm.py"}, "region": {"startLine": 13}}
    for rule in plain["runs"][0]["tool"]["driver"]["rules"]:
        assert rule.pop("help")["text"].startswith(f"# {rule['id']}: ")
        rule.pop("shortDescription")
    assert json.dumps(plain, indent=1) == snapshot


def test_sarif_texts_hold_no_accidental_placeholders_and_links():
    d = Diagnostic("REL002", "layers.{0,2}.w = f[i](x) and [a][0]", span=Span(f"{ROOT}/train.py", 3, "f"))
    text = log(Report(verdict="REFUTED", findings=[Finding(d)]))["runs"][0]["results"][0]["message"]["text"]
    assert text.startswith("layers.{{0,2}}.w = f\\[i\\](x) and [a][0].\n")


def test_sarif_keeps_our_own_faults_out_of_the_results():
    (run,) = log(reports.internal())["runs"]
    assert run["results"] == [] and run["invocations"][0]["executionSuccessful"] is False
    assert "aten.silu" in run["invocations"][0]["toolExecutionNotifications"][0]["message"]["text"]


def test_sarif_fingerprints_follow_the_function_and_not_the_line():
    def fingerprint(line, code="REL002", function="f"):
        d = Diagnostic(code, f"message {line}", span=Span(f"{ROOT}/train.py", line, function))
        return log(Report(verdict="REFUTED", spec="spec.py", findings=[Finding(d)]))["runs"][0]["results"][0]["partialFingerprints"]
    assert fingerprint(3) == fingerprint(5) != fingerprint(3, function="g") != fingerprint(3, code="REL003")


@pytest.mark.parametrize("form", ["junit", "github", "sarif"])
def test_a_suite_holds_every_run(form):
    suite = Suite([reports.refuted(), reports.cannot_run(), reports.proved()])
    suite.reports[1].case = {"tp": 3}
    made = formats.render(form, suite, ROOT)
    assert "spec.py[tp=2]" in made and "spec.py[tp=3]" in made
