"""Cost of whole runs: one command line per spec, in a process of its own, measured from outside (wall clock, CPU of all processes, memory).

    python bench/run.py [SPEC.py[:ARG ARG ...] ...] [--repeat N] [--json FILE]

Memory is PSS summed over the process and all its descendants, sampled; ops, elements and the rate of capture are what the report says.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SPECS = ("examples/ddp_accumulation.py", "examples/megatron_style_tp.py", "examples/fsdp2_tp.py", "examples/hf_tp.py", "examples/pipeline_1f1b.py",
         "examples/ring_attention.py", "examples/moe_expert_parallel.py", "bench/deep_llama.py:--steps 1")
SAMPLE = 0.2                                  # seconds between looks at memory: a look costs the kernel a walk over the page tables


def descendants(root: int) -> list[int]:
    """The process and all processes below it, at this moment."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                parents[int(entry)] = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue                      # it ended in between
    found, grown = {root}, True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        found, grown = found | more, bool(more)
    return sorted(found)


def pss(root: int) -> int:
    """Proportional set size of a process tree in bytes."""
    total = 0
    for pid in descendants(root):
        try:
            found = re.search(r"(?m)^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text())
        except OSError:
            continue
        total += int(found[1]) * 1024 if found else 0
    return total


def run(spec: str) -> dict:
    """One verification; what it cost and what its report says."""
    path, _, extra = spec.partition(":")
    return {"spec": spec, **measure([str(ROOT / path), *shlex.split(extra)])[0]}


def measure(arguments: list[str]) -> tuple[dict, dict]:
    """`trainverify verify` with these arguments: what it cost, and its report."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        command = [sys.executable, "-m", "trainverify", "verify", *arguments, "-q", "--format", "json", "-o", str(out)]
        started = time.perf_counter()
        with open(Path(folder) / "log", "w+") as log:
            process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            peak = 0
            while True:
                pid, status, use = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    break
                peak = max(peak, pss(process.pid))
                time.sleep(SAMPLE)
            process.returncode = os.waitstatus_to_exitcode(status)
            wall = time.perf_counter() - started
            log.seek(0)
            text = log.read()
        report = json.loads(out.read_text()) if out.exists() else None
    if report is None:
        sys.exit(f"{shlex.join(command)} gave no report (exit code {process.returncode}):\n{text}")
    details = " ".join(p["detail"] for p in report["phases"])
    rates = re.findall(r"([\d,]+) per CPU second", details)
    row = {"verdict": report["verdict"], "exit_code": process.returncode, "wall": wall, "cpu": use.ru_utime + use.ru_stime, "peak_memory": peak,
           "ops": report["ops"], "elements": report["elements"], "capture_rate": int(rates[-1].replace(",", "")) if rates else None,
           "phases": {p["name"]: round(p["seconds"], 2) for p in report["phases"]}}
    return row, report


def table(rows: list[dict]) -> str:
    """The rows for reading, phases below them."""
    head = f"{'spec':<36} {'verdict':<8} {'wall s':>7} {'CPU s':>7} {'PSS GB':>7} {'ops':>9} {'elements':>12} {'captured ops/CPU s':>19}"
    lines = [head, "-" * len(head)]
    for r in rows:
        rate = f"{r['capture_rate']:,}" if r["capture_rate"] else "-"
        lines.append(f"{r['spec']:<36} {r['verdict']:<8} {r['wall']:>7.1f} {r['cpu']:>7.1f} {r['peak_memory'] / 1e9:>7.2f} {r['ops']:>9,} {r['elements']:>12,} {rate:>19}")
        lines.append("    " + ", ".join(f"{name} {seconds}" for name, seconds in r["phases"].items()))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", metavar="SPEC.py[:ARGS]")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each spec; the fastest is shown")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    specs = args.specs or [s for s in SPECS if (ROOT / s.partition(":")[0]).exists()]
    rows = [min((run(s) for _ in range(args.repeat)), key=lambda r: r["wall"]) for s in specs]
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
