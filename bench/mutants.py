"""Mutation score: bugs are planted in recorded programs that equal their reference, and each mutant is verified, proofs and all.

    python bench/mutants.py [SPEC.py[:CASE] ...] [--most N] [--seed S] [--kind KIND ...] [--fast] [--jobs N] [--json FILE]

A table by kind: mutants that run, those that change no output (a replay in float64 decides it), and of those that do, how many are REFUTED, how
many UNKNOWN. One that changes an output which is PROVED is printed with all that is known of it, and the exit code is 1. As many programs at a time as
there are cores; how many does not change the table.
"""
from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from trainverify.diagnose.score import NotEqual, Scored, scored
from trainverify.ir.files import load_program

ROOT = Path(__file__).resolve().parents[1]
SPECS = ("examples/ddp_accumulation.py", "examples/megatron_style_tp.py", "examples/moe_expert_parallel.py", "examples/ring_attention.py",
         "tests/programs/tensor_parallel.py:how=by_dtensor", "tests/programs/sequences.py:how=ulysses", "tests/programs/losses.py:how=rows",
         "tests/programs/data_parallel.py:how=hsdp", "tests/programs/pipelines.py:how=gpipe", "tests/programs/sharding.py:how=uneven",
         "tests/bugs/a1_norm_grad_not_reduced_under_sp.py:fixed=true", "tests/bugs/c2_mean_per_rank_then_average.py:fixed=true",
         "tests/bugs/d4_replicated_weight_marked_as_sharded.py:fixed=true", "tests/bugs/g8_unbalanced_gradients_accumulate_shifted.py:fixed=true")
COLUMNS = ("mutants", "invalid", "same", "REFUTED", "UNKNOWN", "PROVED")


def rows(spec: str, seed: int, most: int, kinds: tuple[str, ...], kernel: bool) -> Iterator[dict]:
    """The mutants of one program, each as soon as it is scored. The capture runs in a process of its own: specs may import different modules of one name."""
    path, _, case = spec.partition(":")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "trainverify", "capture", str(ROOT / path), "-q", "-o", "traces", *(["--case", case] if case else [])]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise NotEqual(f"it cannot be captured:\n{done.stdout}{done.stderr}")
        reference, parallel = (load_program(Path(folder) / "traces" / side) for side in ("reference", "parallel"))
    started = time.process_time()
    for s in scored(reference, parallel, seed, most, kinds, kernel=kernel):
        yield {"spec": spec, **row(s), "seconds": round(time.process_time() - started, 1)}
        started = time.process_time()


def said(spec: str, seed: int, most: int, kinds: tuple[str, ...], kernel: bool) -> list[dict]:
    """The mutants of one program, each told as it comes; none where no bugs can be planted."""
    found: list[dict] = []
    try:
        for r in rows(spec, seed, most, kinds, kernel):
            found.append(r)
            where = f"{r['place'] or 'no line'}, ranks {r['ranks']} ({spec})"
            print(f"{r['seconds']:6.1f} s  {r['result']:<8} {r['kind']}: {r['text']} at {where}", file=sys.stderr, flush=True)
    except NotEqual as e:
        print(f"{spec}: no bugs can be planted: {e}", file=sys.stderr)
    return found


def row(s: Scored) -> dict:
    m = s.mutation
    return {"kind": m.kind, "text": m.text, "place": str(m.span or ""), "ranks": list(m.ranks), "result": s.result, "verdict": s.verdict, "changed": s.changed,
            "wrongly": [list(k) for k in s.wrongly], "nodes": [list(n) for n in m.nodes]}


def table(found: Sequence[dict]) -> str:
    """By kind; the score is the share of REFUTED among the mutants that change an output."""
    head = f"{'kind':<22} " + " ".join(f"{c:>8}" for c in COLUMNS) + f" {'score':>7}"
    lines = [head, "-" * len(head)]
    kinds = sorted({r["kind"] for r in found})
    for name, its in [*((k, [r for r in found if r["kind"] == k]) for k in kinds), ("all", list(found))]:
        count = Counter(r["result"] for r in its)
        changed = count["REFUTED"] + count["UNKNOWN"] + count["PROVED"]
        cells = [len(its), *(count[c] for c in COLUMNS[1:])]
        score = f"{100 * count['REFUTED'] // changed}%" if changed else "-"
        lines.append(f"{name:<22} " + " ".join(f"{c:>8}" for c in cells) + f" {score:>7}")
    return "\n".join(lines)


def failures(found: Sequence[dict]) -> list[dict]:
    """Mutants that change an output which is proved."""
    return [r for r in found if r["result"] == "PROVED"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", metavar="SPEC.py[:CASE]", default=SPECS)
    parser.add_argument("--most", type=int, default=20, metavar="N", help="mutants of each program, of all kinds in turn (default: 20)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="chooses the mutants (default: 0)")
    parser.add_argument("--kind", action="append", default=[], help="only this kind (may be repeated)")
    parser.add_argument("--fast", action="store_true", help="no proof where every changed output differs in the field already")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="programs at a time (default: one for each core)")
    args = parser.parse_args()
    started = time.perf_counter()
    with ProcessPoolExecutor(min(args.jobs, len(args.specs)), multiprocessing.get_context("fork")) as pool:
        each = [pool.submit(said, spec, args.seed, args.most, tuple(args.kind), not args.fast) for spec in args.specs]
        found = [r for its in each for r in its.result()]
    print(table(found))
    unknown = [r for r in found if r["result"] == "UNKNOWN"]
    print(f"\n{len(found)} mutants of {len(args.specs)} programs: {sum(r['seconds'] for r in found):.0f} CPU seconds, {time.perf_counter() - started:.0f} seconds")
    print("\nnot refuted:\n" + ("\n".join(f"  {r['spec']}: {r['text']} at {r['place']}, ranks {r['ranks']}" for r in unknown) or "  nothing"))
    for r in failures(found):
        print(f"\nPROVED, AND ITS OUTPUT IS CHANGED: {json.dumps(r, indent=2)}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    return 1 if failures(found) or not found else 0


if __name__ == "__main__":
    sys.exit(main())
