"""How much of the bug corpus is found and explained: every spec of tests/bugs, broken and fixed, and correct programs made at random.

    python bench/bugs.py [ID ...] [--generated N] [--from SEED] [--jobs N] [--json FILE]
    python bench/bugs.py --show FILE ...

A table by class of bugs: found (REFUTED, or UNKNOWN where the spec expects that), the named line right, the class of the diagnosis right, a
repair that is verified (of those that the spec's BUG calls repairable or that got one), fixed programs that are proved, false alarms, and CPU
seconds of both programs. One process has torch loaded and forks the runs, as many at a time as there are cores; how many does not change the table.
"""
from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests" / "bugs"
sys.path.insert(0, str(TESTS))

from test_bugs import BUGS, Bug, faults, named_lines, not_equal  # noqa: E402

from trainverify.cases import Run, preload, run_all  # noqa: E402
from trainverify.engine.options import Options  # noqa: E402
from trainverify.report.model import Report  # noqa: E402

REPAIRABLE = {"multiple", "partial sum"}      # classes of what one reduction or factor mends; of the others, those that got a repair count too
CLASSES = {"A": "reduction missing", "B": "scaled wrongly", "C": "tokens counted wrongly", "D": "optimizer and clipping", "E": "tensor parallelism",
           "F": "slices, groups, peers", "G": "order and buffers", "X": "negative controls"}
GENERATED = "import sys; sys.path.insert(0, {folder!r})\nfrom generated import program\nreference, parallel, RANKS, _ = program({seed})\n"


@dataclass(frozen=True)
class Task:
    """A program to verify: broken, fixed (or a control), or generated."""

    what: str
    id: str
    function: Callable
    argument: object


def one(path: Path, case: dict, repair: bool) -> tuple[Report, float]:
    """The report, and the CPU seconds of the run with all its processes. Each run has one process for its analysis: others run beside it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    (report,) = run_all([Run(path, Options(case=case, repair=repair, jobs=1))], True, lambda text: "")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return report, round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1)


def broken(bug: Bug) -> dict:
    """What the report of the broken program gets right."""
    report, seconds = one(bug.path, {}, True)
    named = named_lines(report)
    diagnosed = {f.diagnosis for f in report.findings} - {""}
    reasons = [o.reason for o in report.outputs] + [f"{d.code} {d.message}" for d in (*report.diagnostics, *(f.diagnostic for f in report.findings))]
    repairs = [f.repair for f in report.findings if f.repair is not None]
    return {"verdict": report.verdict, "seconds": seconds,
            "found": report.verdict == "REFUTED" or bool(bug.unknown) and report.verdict == "UNKNOWN" and any(bug.unknown in r for r in reasons),
            "line": any(text in line for text in (bug.line, *bug.also) for line in named), "diagnosis": bug.diagnosis in diagnosed,
            "repairable": bug.diagnosis in REPAIRABLE or bool(repairs), "repaired": any(r.verified for r in repairs), "repair": "; ".join(map(str, repairs))}


def fixed(bug: Bug) -> dict:
    """Whether a correct program alarms, and whether it is proved."""
    report, seconds = one(bug.path, {} if bug.control else {"fixed": True}, False)
    return {"verdict": report.verdict, "alarm": alarms(report), "seconds": seconds, "why": why(report)}


def generated(seed: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder) / f"generated_{seed}.py"
        spec.write_text(GENERATED.format(folder=str(TESTS), seed=seed))
        report, seconds = one(spec, {}, False)
    return {"verdict": report.verdict, "alarm": alarms(report), "seconds": seconds, "why": why(report)}


def why(report: Report) -> str:
    """What a program that is not proved is told."""
    if report.verdict == "PROVED":
        return ""
    return "; ".join(dict.fromkeys([*(f"{d.code} {d.message}" for d in faults(report)), *(o.reason for o in report.outputs if o.verdict != "PROVED")]))[:300]


def alarms(report: Report) -> bool:
    return report.verdict in ("REFUTED", "ERROR") or bool(faults(report)) or bool(not_equal(report))


def table(rows: Sequence[dict]) -> str:
    """By class; each column as "right/of"."""
    head = f"{'class':<26} {'bugs':>5} {'found':>7} {'line':>7} {'class':>7} {'repair':>7} {'proved':>7} {'alarms':>7} {'CPU s':>7}"
    lines = [head, "-" * len(head)]
    groups = {letter: [r for r in rows if r["id"][0] == letter] for letter in CLASSES}
    for name, its in [*((f"{letter}  {CLASSES[letter]}", its) for letter, its in groups.items() if its), ("all", list(rows))]:
        bugs = [r["broken"] for r in its if r["broken"]]
        repairable = [b for b in bugs if b["repairable"]]
        cells = [f"{sum(b[what] for b in bugs)}/{len(bugs)}" for what in ("found", "line", "diagnosis")]
        cells.append(f"{sum(b['repaired'] for b in repairable)}/{len(repairable)}")
        cells.append(f"{sum(r['fixed']['verdict'] == 'PROVED' for r in its)}/{len(its)}")
        cells.append(str(sum(r["fixed"]["alarm"] for r in its)))
        lines.append(f"{name:<26} {len(bugs):>5} " + " ".join(f"{c:>7}" for c in cells) + f" {sum(b['seconds'] for b in bugs) + sum(r['fixed']['seconds'] for r in its):>7.0f}")
    return "\n".join(lines)


def misses(rows: Sequence[dict]) -> list[str]:
    """What each bug's report does not get right."""
    out = []
    for r in rows:
        b = r["broken"]
        wrong = [what for what in ("found", "line", "diagnosis") if b and not b[what]] + (["repair"] if b and b["repairable"] and not b["repaired"] else [])
        wrong += ["ALARM ON THE CORRECT PROGRAM"] if r["fixed"]["alarm"] else []
        wrong += [f"fixed is {r['fixed']['verdict']} ({r['fixed']['why']})"] if r["fixed"]["verdict"] != "PROVED" else []
        if wrong:
            out.append(f"  {r['id']}: {', '.join(wrong)}")
    return out


def run(tasks: Sequence[Task], jobs: int, file: Path | None = None) -> list[dict]:
    """What each task gives, in order; so many at a time, in forks of this process. file: gets each as soon as it is there, one a line."""
    preload()
    if file is not None:
        file.write_text("")
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        futures = [pool.submit(made, task) for task in tasks]
        for i, (task, future) in enumerate(zip(tasks, futures), 1):
            future.add_done_callback(lambda done, words=f"{i} of {len(tasks)}: {task.what} {task.id}": said(words, done, file))
        return [f.result() for f in futures]


def made(task: Task) -> dict:
    return {"what": task.what, "id": task.id, **task.function(task.argument)}


def said(words: str, done: Future, file: Path | None) -> None:
    if done.cancelled() or done.exception() is not None:
        return
    print(f"{words}: {done.result()['verdict']}, {done.result()['seconds']} s", file=sys.stderr, flush=True)
    if file is not None:
        with file.open("a") as out:
            out.write(json.dumps(done.result()) + "\n")


def tasks_of(chosen: Sequence[Bug], seeds: Sequence[int]) -> list[Task]:
    out = [Task(what, b.id.upper(), function, b) for b in chosen for what, function in (("broken", broken), ("fixed", fixed)) if what == "fixed" or not b.control]
    return out + [Task("generated", str(seed), generated, seed) for seed in seeds]


def shown(results: Sequence[dict]) -> str:
    """The tables of results; of several of the same program, the last."""
    found = {(r["what"], r["id"]): r for r in results}
    order = [b.id.upper() for b in BUGS]
    ids = sorted({id for what, id in found if what == "fixed"}, key=order.index)
    rows = [{"id": id, "broken": found.get(("broken", id)), "fixed": found[("fixed", id)]} for id in ids]
    programs = [r for r in found.values() if r["what"] == "generated"]
    lines = [table(rows), "", "missed:", *(misses(rows) or ["  nothing"])] if rows else []
    lines += ["", "repairs:", *(f"  {r['id']}: {r['broken']['repair']}" for r in rows if r["broken"] and r["broken"]["repair"])] if rows else []
    if programs:
        lines += ["", f"{sum(m['alarm'] for m in programs)} of {len(programs)} generated correct programs alarm; {sum(m['verdict'] == 'PROVED' for m in programs)} are proved;"
                  f" {sum(m['seconds'] for m in programs):.0f} CPU seconds"]
        lines += [f"  seed {m['id']}: {m['verdict']}: {m['why']}" for m in programs if m["verdict"] != "PROVED"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ids", nargs="*", metavar="ID", help="bugs, as in tests/bugs, or a class by its letter (default: all)")
    parser.add_argument("--generated", type=int, default=200, metavar="N", help="correct programs made at random (default: 200)")
    parser.add_argument("--from", type=int, default=0, metavar="SEED", dest="start", help="the first of them (default: 0)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="runs at a time (default: one for each core)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here, each as soon as it is there")
    parser.add_argument("--show", type=Path, nargs="+", metavar="FILE", help="only print the tables of what earlier runs wrote with --json")
    args = parser.parse_args()
    if args.show:
        return print(shown([json.loads(line) for file in args.show for line in file.read_text().splitlines()]))
    started = time.perf_counter()
    chosen = [b for b in BUGS if not args.ids or {b.id.upper(), b.id.upper()[0]} & {i.upper() for i in args.ids}]
    results = run(tasks_of(chosen, range(args.start, args.start + args.generated)), args.jobs, args.json)
    print(shown(results))
    print(f"\n{time.perf_counter() - started:.0f} seconds, {args.jobs} at a time")


if __name__ == "__main__":
    main()
