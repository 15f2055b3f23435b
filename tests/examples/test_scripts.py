"""The training scripts of examples/scripts, which know nothing of the tool: proved, and refuted with the line of their bug."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FSDP2 = "examples/scripts/train_fsdp2.py"
LLAMA = "examples/scripts/train_llama_hf.py"
TRAINER = "examples/scripts/train_hf_trainer.py --max_steps 3 --per_device_train_batch_size"


def verified(tmp_path, reference, ranks, *parallel):
    """Exit code and report of the command line, run as a user runs it."""
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "trainverify", "verify", "-q", "--no-cache", "--no-repair", "--ranks", str(ranks), "--reference", reference,
               "--format", "json", "-o", str(report), "--", *parallel]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900)
    assert report.exists(), done.stderr
    return done.returncode, json.loads(report.read_text())


def outputs(report):
    return {(o["kind"], o["name"]): o["verdict"] for o in report["outputs"]}


@pytest.mark.slow
def test_fsdp2(tmp_path):
    code, report = verified(tmp_path, FSDP2, 3, FSDP2, "--batch-size", "2", "--load", "{checkpoint}")
    assert (code, report["verdict"], report["bound"]) == (0, "PROVED", [29, 29])
    held = outputs(report)
    assert set(held.values()) == {"PROVED"} and {("scalar", "loss"), ("scalar", "norm")} <= set(held)
    assert {kind for kind, _ in held} == {"scalar", "gradient", "parameter", "state"}


@pytest.mark.corpus
@pytest.mark.parametrize("arguments", [("--rows", "2"), ("--model", "{checkpoint}", "--tp")])
def test_hugging_face(tmp_path, arguments):
    code, report = verified(tmp_path, LLAMA, 2, LLAMA, *arguments)
    assert (code, report["verdict"], report["bound"]) == (0, "PROVED", [21, 21])
    placed = [a["text"] for a in report["assumptions"] if a["text"].startswith("weights were placed")]
    assert len(placed) == ("--model" not in arguments)


@pytest.mark.corpus
def test_hugging_face_trainer(tmp_path):
    code, report = verified(tmp_path, f"{TRAINER} 4", 2, *TRAINER.split(), "2")
    assert (code, report["verdict"], report["bound"]) == (0, "PROVED", [12, 12])
    assert len([o for o in report["outputs"] if o["kind"] == "scalar"]) >= 4


@pytest.mark.corpus
def test_a_trainer_that_counts_tokens_on_each_rank(tmp_path):
    code, report = verified(tmp_path, f"{TRAINER} 4", 2, *TRAINER.split(), "2", "--average_tokens_across_devices", "False")
    assert (code, report["verdict"]) == (1, "REFUTED") and report["findings"][0]["diagnostic"]["code"] == "REL013"


@pytest.mark.corpus
@pytest.mark.parametrize(("script", "ranks", "arguments", "file"), [
    (FSDP2, 3, ("--batch-size", "2", "--load", "{checkpoint}", "--loss", "local"), "train_fsdp2.py"),
    (LLAMA, 2, ("--rows", "2", "--count", "microbatch"), "loss_utils.py")])
def test_bugs(tmp_path, script, ranks, arguments, file):
    code, report = verified(tmp_path, script, ranks, script, *arguments)
    assert (code, report["verdict"]) == (1, "REFUTED")
    (finding,) = report["findings"]
    assert finding["diagnostic"]["code"] == "REL013" and Path(finding["diagnostic"]["span"]["file"]).name == file
    # A loss that rank 0 alone reads may be a share: it is never what refutes.
    assert {v for (kind, _), v in outputs(report).items() if kind == "scalar"} == {"UNKNOWN"}
