"""What capture costs: the steps of a program as it is and while it is captured, in CPU seconds of the ranks (waiting costs none).

    python bench/capture_rate.py [SPEC.py[:NAME=VALUE,...] ...] [--steps K] [--repeat N] [--json FILE]

Plain: the same program in the same processes, with nothing recorded and collectives that move nothing. What capture adds (digests, encoding
and the collectives performed for real included) is the difference; calls per second are shown of all that the ranks compute, and of what
capture adds. A program whose control flow depends on what collectives bring may not run plain: "-".
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from trainverify.api import Reference  # noqa: E402
from trainverify.arguments import parser as command_line  # noqa: E402
from trainverify.capture.options import CaptureOptions  # noqa: E402
from trainverify.capture.session import Session, capture_parallel, capture_reference  # noqa: E402
from trainverify.capture.spec import load_spec  # noqa: E402
from trainverify.capture.world import run_world  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SPECS = ("examples/fsdp2_tp.py", "examples/hf_tp.py", "examples/ddp_accumulation.py", "examples/megatron_style_tp.py", "examples/pipeline_1f1b.py", "bench/deep_llama.py")


def plain(make, options, rank) -> bytes:
    """The CPU seconds of the steps of one rank, with nothing watched."""
    session = Session("parallel" if rank.world_size > 1 else "reference", rank, options, Path("."), symbols=False)
    session.outputs = contextlib.nullcontext()
    with session.environment():
        training = make()
        started = time.process_time()
        for _ in range(options.steps):
            training.step()
        return repr(time.process_time() - started).encode()


def plain_seconds(make, ranks: int, options: CaptureOptions) -> float | None:
    """Of all ranks together; None if the program cannot run so."""
    world = run_world(ranks, partial(plain, make, options), timeout=options.timeout)
    return None if any(d.severity in ("error", "internal") for d in world.faults) else sum(float(r) for r in world.results)


def row(name: str, ranks: int, stats, own: float | None) -> dict:
    return {"program": name, "calls": stats.stepped_ops, "captured": stats.stepped_cpu, "plain": own, "rate": stats.ops_per_second,
            "added_rate": None if own is None else stats.stepped_ops / max(stats.stepped_cpu - own, 1e-9), "cpu_per_rank": stats.cpu / ranks}


def measure(given: str, steps: int) -> list[dict]:
    path, _, case = given.partition(":")
    spec = load_spec(ROOT / path)
    case = spec.case(command_line().parse_args(["verify", str(ROOT / path), "--case", case]).case[0] if case else {})
    options = CaptureOptions(steps=steps, case=case, second_run=False)
    with tempfile.TemporaryDirectory() as folder:
        reference = capture_reference(spec, options, Path(folder))
        parallel = capture_parallel(spec, reference, case, options, Path(folder))
        if parallel.program is None:
            raise SystemExit(f"{given} cannot be captured: {parallel.diagnostics}")

        def make_parallel():
            _, weights, batch = reference.handed.build()
            return spec.parallel(Reference(weights, batch, reference.checkpoint), **case)

        return [row(f"{given} reference", 1, reference.stats, plain_seconds(lambda: spec.reference(**spec.for_reference(case)), 1, options)),
                row(f"{given} {parallel.ranks} ranks", parallel.ranks, parallel.stats, plain_seconds(make_parallel, parallel.ranks, options))]


def table(rows: list[dict]) -> str:
    head = f"{'steps of':<40} {'calls':>8} {'captured s':>11} {'plain s':>8} {'calls/s':>9} {'of what capture adds':>21} {'CPU s/process':>14}"
    lines = [head, "-" * len(head)]
    for r in rows:
        own, added = (f"{r['plain']:.2f}", f"{r['added_rate']:,.0f}") if r["plain"] is not None else ("-", "-")
        lines.append(f"{r['program']:<40} {r['calls']:>8,} {r['captured']:>11.2f} {own:>8} {r['rate']:>9,.0f} {added:>21} {r['cpu_per_rank']:>14.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", default=SPECS, metavar="SPEC.py[:NAME=VALUE,...]")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=1, help="runs of each program; the one in which capture took least is shown")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    rows = []
    for given in args.specs:
        runs = [measure(given, args.steps) for _ in range(args.repeat)]
        rows += [min(same, key=lambda r: r["captured"]) for same in zip(*runs)]
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
