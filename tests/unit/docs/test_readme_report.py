"""The report in the README is a real one. `pytest -m slow tests/unit/docs --snapshot-update` writes it anew."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[3] / "README.md"
BLOCK = re.compile(r"(?s)<!-- report: (\S+) -->\n(.*?)\n<!-- end -->")
COST = re.compile(r"\d+(?:\.\d+)? (?:s|GB|MB)\b")   # differs from run to run


def excerpt(report: str) -> str:
    """What the README shows: the header, the verdict and the first cause, then the last lines; indented as a code block."""
    sections = report.rstrip().split("\n\n")
    shown = [*sections[:3], *[s for s in sections[3:4] if s.startswith("  counterexample")], "...", sections[-1]]
    return "\n".join(f"    {line}".rstrip() for line in "\n\n".join(shown).split("\n"))


def stable(text: str) -> str:
    """Without cost, the build of torch, and where lines were broken because of them."""
    return re.sub(r"\s+", " ", COST.sub("#", text).replace("+cpu", ""))


@pytest.mark.slow
def test_the_report_in_the_readme_is_what_the_run_prints(request, tmp_path):
    spec, written = BLOCK.search(README.read_text()).groups()
    done = subprocess.run([sys.executable, "-m", "trainverify", "verify", spec, "-q"], cwd=README.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    found = excerpt(done.stdout)
    if request.config.getoption("update_snapshots"):
        README.write_text(BLOCK.sub(lambda m: f"<!-- report: {spec} -->\n{found}\n<!-- end -->", README.read_text()))
        written = found
    assert stable(written) == stable(found)
