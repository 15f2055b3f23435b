"""Documents stay true: links lead somewhere, commands parse, Python compiles, named files and codes exist."""
import os
import re
import shlex
import textwrap
from pathlib import Path

import pytest
from trainverify import arguments, explain
from trainverify.report.model import Report

ROOT = Path(__file__).parents[3]
DOCUMENTS = [ROOT / "README.md", ROOT / "SOUNDNESS.md", *sorted((ROOT / "docs").glob("*.md"))]
document = pytest.mark.parametrize("file", DOCUMENTS, ids=lambda f: f.name)


def blocks(text):
    """Indented code blocks, dedented."""
    return [textwrap.dedent(b).strip("\n") for b in re.findall(r"(?m)(?:^(?:    .*|[ \t]*)\n)+", text) if b.strip()]


@document
def test_links_lead_somewhere(file):
    targets = re.findall(r"\]\(([^)#]+)\)", file.read_text())
    assert [t for t in targets if "://" not in t and not (file.parent / t).exists()] == []


@document
def test_commands_parse(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("spec.py").write_text("")
    Path("spec.cert").write_text("")
    Path("traces").mkdir()
    Path("examples").symlink_to(ROOT / "examples")
    commands = [line.split("  #")[0] for b in blocks(file.read_text()) for line in b.split("\n") if re.match(r"trainverify [a-z]", line)]
    commands += [c for c in re.findall(r"`(trainverify (?:verify|capture|explain) [^`]+)`", file.read_text()) if not re.search(r"\b[A-Z]{4,}\b(?![0-9])", c)]
    for c in commands:
        arguments.parser().parse_args(shlex.split(c)[1:])


@document
def test_python_compiles(file):
    for b in blocks(file.read_text()):
        if re.match(r"(import|from|def|return)\b", b):
            compile("def block():\n" + textwrap.indent(b, "    ") + "\n    yield" if b.startswith("return") else b, file.name, "exec")


@document
def test_named_codes_and_make_targets_exist(file):
    text = file.read_text()
    assert set(re.findall(r"\b[A-Z]{3,6}[0-9]{3}\b", text)) <= set(explain.codes())
    targets = set(re.findall(r"(?m)^([\w-]+):", (ROOT / "Makefile").read_text()))
    assert set(re.findall(r"(?m)(?:^    |`)make ([\w-]+)", text)) <= targets


@document
def test_ascii(file):
    assert file.read_text().isascii()


def test_every_report_field_is_described():
    text = (ROOT / "docs" / "reports.md").read_text()
    described = set(re.findall(r"`(\w+)`", text.split("## JSON")[1].split("## From Python")[0]))
    named_above = {"spec", "case", "ranks", "mesh", "steps", "seed", "evidence", "mode"}
    assert set(Report.__struct_fields__) - named_above <= described


def test_assumptions_that_the_engine_names_are_explained():
    """The codes A1.. in engine/build.py and the table in SOUNDNESS.md are the same list."""
    named = set(re.findall(r'Assumption\("(A\d+)"', (ROOT / "src/trainverify/engine/build.py").read_text()))
    table = set(re.findall(r"(?m)^\| (A\d+) ", (ROOT / "SOUNDNESS.md").read_text()))
    assert named and named <= table


def test_ci_and_makefile():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    script = (ROOT / ".ci" / "run").read_text()
    assert script.index("make test\n") < script.index("make test-all\n")
