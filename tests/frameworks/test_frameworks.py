"""Real frameworks through the whole tool (`make test-frameworks`; a framework that is not installed is a failure)."""
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from table import CASES, Case

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 600                                   # seconds; a hang, not a figure

pytestmark = pytest.mark.frameworks


def test_the_frameworks_are_installed_as_pinned():
    wanted = dict(re.findall(r"(?m)^([\w.-]+)==(\S+)$", (ROOT / "requirements" / "frameworks.txt").read_text()))
    found = {}
    for name in wanted:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed: run `make frameworks`"
    assert found == wanted


def verified(case: Case, folder: Path) -> dict:
    """The JSON report of one case, made in a process of its own: frameworks stay patched in theirs."""
    out = folder / "report.json"
    command = [sys.executable, "-m", "trainverify", "verify", *case.command, "-q", "--no-repair", "--format", "json", "-o", str(out)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LIMIT, stdin=subprocess.DEVNULL)
    assert out.exists(), done.stderr
    return json.loads(out.read_text())


def explained(report: dict) -> list:
    """Why a verdict is what it is, for the message of a failure."""
    return [d for d in report["diagnostics"] if d["severity"] in ("error", "internal")] or \
        [(o["kind"], o["name"], o["step"], o["verdict"], o["reason"]) for o in report["outputs"] if o["verdict"] != "PROVED"]


def lines_named(report: dict) -> list[tuple[str, str]]:
    """(file, text) of the lines that the findings name."""
    spans = [s for f in report["findings"] for s in (f["diagnostic"]["span"], *f["used_at"]) if s is not None]
    return [(s["file"], Path(s["file"]).read_text().split("\n")[s["line"] - 1].strip()) for s in spans if Path(s["file"]).is_file()]


@pytest.mark.parametrize("case", [c for c in CASES if c.quick], ids=lambda c: c.name)
def test_a_framework(case: Case, tmp_path):
    report = verified(case, tmp_path)
    assert report["verdict"] == case.expected, explained(report)
    assert report["ranks"] == case.ranks
    if case.place is not None:
        file, text = case.place
        named = lines_named(report)
        assert [n for n in named if n[0].endswith(file) and text in n[1]], named
