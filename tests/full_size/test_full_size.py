"""From the command line's options to the verdict: programs at the true sizes of Llama 3.1 405B, one layer of it."""
from pathlib import Path

import pytest

from trainverify.engine.options import Options
from trainverify.verify import verify_spec

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
OPTIONS = {"steps": 1, "reduce": True, "full_size": True, "timeout": 600.0}


@pytest.mark.slow
def test_one_layer_at_its_true_sizes_is_proved():
    report = verify_spec(EXAMPLES / "llama_405b.py", Options(case={"size": "405b", "layers": 1}, **OPTIONS))
    assert report.verdict == "PROVED" and len(report.outputs) == 25 and report.peak_memory < 3 << 30
    sizes = {c.size: c.reduced for c in report.reduction.classes}
    assert sizes[16_384] <= 16 and sizes[6_656] <= 16
    assert any("without --full-size" in a.text for a in report.assumptions)


@pytest.mark.corpus
def test_a_bug_on_one_rank_is_refuted_with_its_line():
    path = EXAMPLES / "wrong" / "llama_405b_one_rank.py"
    report = verify_spec(path, Options(case={"size": "405b", "layers": 2, "layer": 1, "rank": 5}, repair=False, **OPTIONS))
    assert report.verdict == "REFUTED"
    first = report.findings[0].diagnostic.span
    line = path.read_text().split("\n")[first.line - 1]
    assert first.file.endswith("llama_405b_one_rank.py") and "F.silu(up) * gate" in line


@pytest.mark.frameworks
def test_torchtitan_at_its_true_sizes_is_proved():
    pytest.importorskip("torchtitan")
    report = verify_spec(EXAMPLES / "frameworks" / "torchtitan_llama3_405b.py", Options(case={"size": "405b", "layers": 2}, **OPTIONS))
    assert report.verdict == "PROVED" and len(report.outputs) == 43
