"""One script under several settings in one run, with one table: torchtitan's own training script."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TITAN = "-m torchtitan.train --module examples.scripts.titan_config --config tiny_qwen3_moe"
FSDP = f"{TITAN} --checkpoint.initial_load_path {{dcp}} --training.local_batch_size 3 --parallelism.data_parallel_shard_degree 2"


@pytest.mark.frameworks
def test_a_lattice(tmp_path):
    out = tmp_path / "report.json"
    runs = [FSDP, f"{FSDP} --parallelism.expert_parallel_degree 2"]
    command = [sys.executable, "-m", "trainverify", "verify", "--ranks", "2", "--reference", TITAN, *[w for r in runs for w in ("--run", r)],
               "-q", "--no-repair", "--format", "json", "-o", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    reports = json.loads(out.read_text())["reports"]
    assert [(r["verdict"], r["ranks"], len(r["outputs"])) for r in reports] == [("PROVED", 2, 236)] * 2
    assert all("expert" in r["spec"] for r in reports[1:])
