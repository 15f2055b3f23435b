"""The kernel alone on the identities of sharded training steps: each right one is proved, each wrong one refuted, element by element.

    python bench/obligations.py [FAMILY ...] [--json FILE]

The statements are those of tests/unit/kernel/obligations.py: a family of formulas at a number of ranks, and a variant with one mistake. Right: all
elements proved. Wrong: every element proved or refuted, and at least one refuted. Times are CPU seconds; building the formulas is included.
"""
from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "unit"))

from kernel.expr import World  # noqa: E402
from kernel.obligations import ALL  # noqa: E402

from trainverify.kernel import Proved, Refuted  # noqa: E402


def decide(family, n: int, wrong: bool) -> dict:
    """How the kernel settles all elements of one obligation."""
    started = time.process_time()
    world = World()
    verdicts = [world.prove(reference, parallel) for reference, parallel in family(world, n, wrong)]
    proved, refuted = (sum(isinstance(v, kind) for v in verdicts) for kind in (Proved, Refuted))
    settled = proved + refuted == len(verdicts) and (refuted > 0 if wrong else refuted == 0)
    return {"elements": len(verdicts), "proved": proved, "refuted": refuted, "settled": settled, "seconds": time.process_time() - started}


def measure(families=ALL) -> list[dict]:
    return [{"family": f.__name__, "ranks": n, "right": decide(f, n, False), "wrong": decide(f, n, True)} for f, n in families]


def table(rows: list[dict]) -> str:
    head = f"{'obligation':<28} {'ranks':>5} {'elements':>8} {'right':>10} {'s':>6}   {'wrong: refuted':>15} {'proved':>7} {'s':>6}"
    lines = [head, "-" * len(head)]
    for r in rows:
        right, wrong = r["right"], r["wrong"]
        lines.append(f"{r['family']:<28} {r['ranks']:>5} {right['elements']:>8} {'proved' if right['settled'] else 'NOT PROVED':>10} {right['seconds']:>6.2f}   "
                     f"{wrong['refuted'] if wrong['settled'] else 'NOT SETTLED':>15} {wrong['proved']:>7} {wrong['seconds']:>6.2f}")
    seconds = sum(r[side]["seconds"] for r in rows for side in ("right", "wrong"))
    right, wrong = (sum(r[side]["settled"] for r in rows) for side in ("right", "wrong"))
    return "\n".join([*lines, f"{right} of {len(rows)} right ones proved, {wrong} of {len(rows)} wrong ones refuted, {seconds:.2f} CPU seconds"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="only these, such as ring_attention")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    if unknown := set(args.families) - {f.__name__ for f, _ in ALL}:
        parser.error(f"there is no {min(unknown)}")
    rows = measure([(f, n) for f, n in ALL if not args.families or f.__name__ in args.families])
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0 if all(r[side]["settled"] for r in rows for side in ("right", "wrong")) else 1


if __name__ == "__main__":
    sys.exit(main())
