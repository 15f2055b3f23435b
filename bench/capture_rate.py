"""What capture costs: the steps of a program as it is and while it is captured, in CPU seconds of the ranks (waiting costs none).

    python bench/capture_rate.py [SPEC.py[:NAME=VALUE,...] ...] [--steps K] [--repeat N] [--json FILE]

Plain: the same program in as many processes, with nothing recorded and communication by gloo; where gloo cannot do it, communication that moves
nothing (*). What capture adds (digests, encoding and the collectives performed for real included) is the difference. Calls per CPU second are
shown in all (the program's own time, which for DTensor and FSDP2 is most of it, included) and of what capture adds; "first": of the first step,
in which torch's caches are filled, "later": of the steps after it. A program that runs neither way plain: "-".
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch.distributed as dist  # noqa: E402
from trainverify.api import Reference  # noqa: E402
from trainverify.arguments import parser as command_line  # noqa: E402
from trainverify.capture import groups  # noqa: E402
from trainverify.capture.options import CaptureOptions  # noqa: E402
from trainverify.capture.patches import Patches  # noqa: E402
from trainverify.capture.session import Session, capture_parallel, capture_reference  # noqa: E402
from trainverify.capture.spec import load_spec  # noqa: E402
from trainverify.capture.world import run_world  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SPECS = ("examples/fsdp2_tp.py", "examples/hf_tp.py", "examples/ddp_accumulation.py", "examples/megatron_style_tp.py", "examples/pipeline_1f1b.py",
         "bench/deep_llama.py")


@contextlib.contextmanager
def gloo(rank: int, world_size: int, store: Path) -> Iterator[None]:
    """Inside, process groups are gloo's, whatever the program asks for."""
    def start(rank, world_size, init=dist.init_process_group) -> None:
        init("gloo", store=dist.FileStore(str(store), world_size), rank=rank, world_size=world_size)

    def helper(self, size, rank, members, backend, store, name, *args, **kwargs):
        kwargs.update(zip(("backend_options", "timeout", "pg_tag", "device_id", "group_desc"), args))
        kept = {k: v for k, v in kwargs.items() if k in ("timeout", "pg_tag", "group_desc")}
        return self.original_helper(size, rank, members, dist.Backend("gloo"), store, name, **kept)

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    patches = Patches()
    try:
        patches.set(groups, "init_fake", start)
        patches.set(groups._Groups, "new_helper", helper)
        yield
    finally:
        patches.restore()


def plain(make, options: CaptureOptions, store: Path | None, rank) -> bytes:
    """The CPU seconds of each step of one rank, with nothing watched."""
    session = Session("parallel" if rank.world_size > 1 else "reference", rank, options, Path("."), symbols=False)
    session.outputs = contextlib.nullcontext()
    with gloo(rank.rank, rank.world_size, store) if store else contextlib.nullcontext(), session.environment():
        training = make()
        return json.dumps([timed(training.step) for _ in range(options.steps)]).encode()


def timed(step) -> float:
    started = time.process_time()
    step()
    return time.process_time() - started


def plain_seconds(make, ranks: int, options: CaptureOptions) -> tuple[list[float] | None, str]:
    """CPU seconds of each step, of all ranks together; None if the program cannot run so. And how it communicated."""
    with tempfile.TemporaryDirectory() as folder:
        for how, store in ((("gloo", Path(folder, "store")), ("nothing", None)) if ranks > 1 else (("", None),)):
            world = run_world(ranks, partial(plain, make, options, store), timeout=options.timeout)
            if not any(d.severity in ("error", "internal") for d in world.faults):
                return [sum(step) for step in zip(*map(json.loads, world.results))], how
    return None, ""


class Steps:
    """Calls and CPU seconds of each captured step: what the ranks of one capture write into a folder."""

    def __init__(self, folder: Path):
        self.folder, self.training = folder, Session.training

    def __enter__(self) -> Steps:
        steps = self

        def training(session, function, args, kwargs):
            made = steps.training(session, function, args, kwargs)
            return dataclasses.replace(made, step=partial(steps.step, session, made.step))

        Session.training = training
        return self

    def __exit__(self, *error: object) -> None:
        Session.training = self.training

    def step(self, session: Session, step):
        calls, started = len(session.recorder.ops), time.process_time()
        result = step()
        with open(self.folder / f"{session.recorder.side}.{session.rank.rank}", "a") as file:
            file.write(f"{len(session.recorder.ops) - calls} {time.process_time() - started}\n")
        return result

    def of(self, side: str) -> tuple[list[int], list[float]]:
        """Of each step, over all ranks: calls, CPU seconds."""
        ranks = [[line.split() for line in file.read_text().splitlines()] for file in self.folder.glob(f"{side}.*")]
        return [sum(int(c) for c, _ in step) for step in zip(*ranks)], [sum(float(s) for _, s in step) for step in zip(*ranks)]


def row(name: str, ranks: int, stats, captured: tuple[list[int], list[float]], plain: tuple[list[float] | None, str]) -> dict:
    (calls, seconds), (own, how) = captured, plain
    return {"program": name, "processes": ranks, "calls": calls, "captured": seconds, "plain": own, "communication": how,
            "cpu_per_process": stats.cpu / ranks}


def measure(given: str, steps: int) -> list[dict]:
    path, _, case = given.partition(":")
    spec = load_spec(ROOT / path)
    case = spec.case(command_line().parse_args(["verify", str(ROOT / path), "--case", case]).case[0] if case else {})
    options = CaptureOptions(steps=steps, case=case, second_run=False)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as log, Steps(Path(log)) as watched:
        reference = capture_reference(spec, options, Path(folder))
        parallel = capture_parallel(spec, reference, case, options, Path(folder))
        if parallel.program is None:
            raise SystemExit(f"{given} cannot be captured: {parallel.diagnostics}")

        def make_parallel():
            _, weights, batch = reference.handed.build()
            return spec.parallel(Reference(weights, batch, reference.checkpoint), **case)

        return [row(f"{given} reference", 1, reference.stats, watched.of("reference"),
                    plain_seconds(lambda: spec.reference(**spec.for_reference(case)), 1, options)),
                row(f"{given} {parallel.ranks} ranks", parallel.ranks, parallel.stats, watched.of("parallel"),
                    plain_seconds(make_parallel, parallel.ranks, options))]


def rates(r: dict) -> list[str]:
    """Calls per CPU second of the first step and of the later ones: in all, and of what capture adds."""
    shown = []
    for part in (slice(0, 1), slice(1, None)):
        calls, seconds = sum(r["calls"][part]), sum(r["captured"][part])
        shown.append(f"{calls / seconds:,.0f}" if calls else "-")
        added = seconds - sum(r["plain"][part]) if r["plain"] else 0.0
        shown.append(f"{calls / added:,.0f}" if calls and added > 0 else "-")
    return shown


def table(rows: list[dict]) -> str:
    names = ("steps of", "calls", "captured s", "plain s", "first: calls/s", "of added", "later: calls/s", "of added", "CPU s/process")
    lines = ["".join(f"{n:<44}" if i == 0 else f"{n:>16}" for i, n in enumerate(names))]
    for r in rows:
        own = f"{sum(r['plain']):.2f}{'*' if r['communication'] == 'nothing' else ''}" if r["plain"] else "-"
        cells = (f"{sum(r['calls']):,}", f"{sum(r['captured']):.2f}", own, *rates(r), f"{r['cpu_per_process']:.2f}")
        lines.append(f"{r['program']:<44}" + "".join(f"{c:>16}" for c in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*", default=SPECS, metavar="SPEC.py[:NAME=VALUE,...]")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=1, help="runs of each program; the one in which capture took least is shown")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    rows = []
    for given in args.specs:
        runs = [measure(given, args.steps) for _ in range(args.repeat)]
        rows += [min(same, key=lambda r: sum(r["captured"])) for same in zip(*runs)]
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
