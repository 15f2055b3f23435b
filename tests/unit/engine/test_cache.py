"""A verdict that an earlier run reached on identical programs is recalled, and only then."""
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from trainverify import cache
from trainverify.diagnostics import Diagnostic
from trainverify.engine.options import Options
from trainverify.ir.digest import digest
from trainverify.ir.files import load_program
from trainverify.report import text
from trainverify.report.model import Report
from trainverify.verify import capture_spec, verify_dir, verify_spec

SPEC = '''
import torch
import torch.distributed as dist
import trainverify as tv

RANKS, FACTOR = 2, 1.0


def training(model, x, share=lambda loss: loss):
    def step():
        loss = share((model(x) ** 2).mean())
        loss.backward()
        return {"loss": loss}
    return step


def reference():
    torch.manual_seed(0)
    model, batch = torch.nn.Linear(3, 2), {"x": torch.randn(4, 3)}
    return tv.Training(model, training(model, batch["x"]), batch=batch)


def parallel(ref):
    dist.init_process_group("gloo")
    model = torch.nn.Linear(3, 2)
    model.load_state_dict(ref.weights)
    mine = ref.batch["x"].chunk(2)[dist.get_rank()]
    plain = training(model, mine, lambda loss: loss * FACTOR)

    def step():
        out = plain()
        for p in model.parameters():
            dist.all_reduce(p.grad, op=dist.ReduceOp.AVG)
        return {"loss": tv.local(out["loss"], reduce="mean")}
    return tv.Training(model, step)
'''
OPTIONS = Options(jobs=1, steps=1, cache=True)


@pytest.fixture
def spec(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = Path("spec.py")
    path.write_text(SPEC)
    return path


def is_recalled(report) -> bool:
    return any(p.name == "recalled" for p in report.phases)


def test_the_second_run_recalls_and_says_so(spec):
    first, second = (verify_spec(spec, OPTIONS) for _ in range(2))
    assert first.verdict == second.verdict == "PROVED" and not is_recalled(first) and is_recalled(second)
    assert "--no-cache" in text.render(second)
    same = [name for name in first.__struct_fields__ if name not in cache.OF_THE_RUN]
    assert {n: getattr(first, n) for n in same} == {n: getattr(second, n) for n in same}


def test_what_differs_is_worked_out(spec, monkeypatch):
    verify_spec(spec, OPTIONS)
    assert not is_recalled(verify_spec(spec, replace(OPTIONS, seed=1)))
    assert not is_recalled(verify_spec(spec, replace(OPTIONS, cache=False)))
    assert not is_recalled(verify_spec(spec, replace(OPTIONS, certificate=Path("c.json"))))
    spec.write_text(SPEC.replace("FACTOR = 2, 1.0", "FACTOR = 2, 1.5"))
    wrong = verify_spec(spec, OPTIONS)
    assert wrong.verdict == "REFUTED" and not is_recalled(wrong)
    again = verify_spec(spec, OPTIONS)
    assert again.verdict == "REFUTED" and is_recalled(again) and again.findings == wrong.findings
    monkeypatch.setattr(cache, "installation", lambda: "another version")
    assert not is_recalled(verify_spec(spec, OPTIONS))


def test_damage_and_faults_are_not_recalled(spec):
    verify_spec(spec, OPTIONS)
    (kept,) = cache.FOLDER.iterdir()
    kept.write_text(kept.read_text()[:-20])
    again = verify_spec(spec, OPTIONS)
    assert again.verdict == "PROVED" and not is_recalled(again)
    assert is_recalled(verify_spec(spec, OPTIONS))
    kept.unlink()
    spec.write_text(SPEC.replace('"gloo")', '"gloo"); 1 / 0'))
    assert verify_spec(spec, OPTIONS).verdict == "ERROR" and list(cache.FOLDER.iterdir()) == []


def test_what_capture_said_and_a_lost_proof(spec):
    capture_spec(spec, Path("traces"), OPTIONS)
    programs = [load_program(f"traces/{side}") for side in ("reference", "parallel")]
    told = Diagnostic("CAP002", "tags repeat", "warning")
    assert cache.key(*programs, OPTIONS, []) == cache.key(*programs, OPTIONS, []) != cache.key(*programs, OPTIONS, [told])
    lost = Report("UNKNOWN", diagnostics=[Diagnostic("PROVE001", "the process that proves was lost", "warning")])
    cache.remember("lost", lost)
    assert not cache.recall("lost", Report())
    cache.remember("open", Report("UNKNOWN"))
    assert cache.recall("open", Report())


def test_traces_on_disk_and_the_digest_of_a_program(spec):
    capture_spec(spec, Path("traces"), OPTIONS)
    assert not is_recalled(verify_dir(Path("traces"), OPTIONS)) and is_recalled(verify_dir(Path("traces"), OPTIONS))
    program, same = (load_program("traces/parallel") for _ in range(2))
    whole = digest(program)
    same.traces[0] = msgspec.structs.replace(same.traces[0], meta={**same.traces[0].meta, "argv": "another command line"})
    assert digest(same) == whole
    name = next(k for k, v in same.blobs[1].items() if v.size)
    same.blobs[1][name] = np.array(same.blobs[1][name]) + 1
    assert digest(same) != whole
    program.traces[1] = msgspec.structs.replace(program.traces[1], ops=program.traces[1].ops[:-1])
    assert digest(program) != whole
