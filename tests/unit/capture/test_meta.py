"""Full-size capture: floats have sizes and no memory, integers are what they are, and what needs values is refused with its line."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from trainverify.capture.meta import KEY, VALUE, MetaFloats
from trainverify.capture.recorder import Recorder
from trainverify.capture.options import CaptureOptions
from trainverify.capture.scalars import ScalarMode
from trainverify.capture.session import capture
from trainverify.capture.spec import load_spec
from trainverify.diagnostics import Fault
from trainverify.ir.trace import ScalarRef

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "llama_405b.py"
LINES = Path(__file__).read_text().split("\n")


def record(function, accept=()):
    """The trace of a program of one rank whose floats have no values."""
    recorder = Recorder("reference", 0, 1, None, MetaFloats(), accept)
    with recorder.recording(), ScalarMode(recorder):
        result = function()
    return recorder, result


def names(recorder):
    return [c.name.split(".")[1] for c in recorder.ops]


def line_of(text):
    return 1 + next(k for k, line in enumerate(LINES) if text in line and "line_of" not in line)


def test_floats_are_on_meta_whatever_the_device_and_integers_are_real():
    def program():
        weight = torch.ones(1 << 40, 1 << 10, device="cpu")
        ids = torch.arange(4, device=weight.device)
        return weight, ids, F.embedding(ids, weight[:100]), ids.float() * 0.5, (ids > 1).to(weight.device), torch.zeros(3, dtype=torch.long, device="meta")

    _, (weight, ids, rows, halves, mask, zeros) = record(program)
    assert all(t.is_meta for t in (weight, rows, halves)) and rows.shape == (4, 1 << 10) and weight.numel() == 1 << 50
    assert ids.tolist() == [0, 1, 2, 3] and mask.tolist() == [False, False, True, True] and zeros.tolist() == [0, 0, 0]


def test_integers_of_the_sizes_of_floats_are_real():
    def program():
        x = torch.empty(2, 3)
        return torch.zeros_like(x, dtype=torch.bool), x.new_ones(4, dtype=torch.int64), torch.ones_like(x), torch.zeros_like(torch.arange(2))

    _, (mask, counts, floats, zeros) = record(program)
    assert mask.tolist() == [[False] * 3] * 2 and counts.tolist() == [1] * 4 and floats.is_meta and zeros.tolist() == [0, 0]


def test_numbers_that_python_puts_into_a_tensor_keep_their_bytes():
    recorder, made = record(lambda: torch.tensor([1.5, -2.0]) * 2)
    (call,) = recorder.ops
    assert made.is_meta and recorder.encoder.initial[call.args[0].storage]
    assert recorder.blobs[f"init.{call.args[0].storage}"].view(np.float32).tolist() == [1.5, -2.0]


def test_the_trace_is_the_one_that_values_give():
    def program():
        torch.manual_seed(0)
        x, w = torch.zeros(6, 8), torch.ones(5, 8, requires_grad=True)
        index = torch.tensor([0, 2])
        y = F.silu(x[index] @ w.t())
        y[torch.tensor([True, False])] += 1.0
        loss = F.cross_entropy(y, torch.tensor([1, 4])) + y.pow(2).mean().sqrt()
        loss.backward()
        with torch.no_grad():
            w -= 0.1 * w.grad
        return w

    recorder, _ = record(program)
    real = Recorder("reference", 0, 1, None)
    with real.recording(), ScalarMode(real):
        program()
    assert [(c.name, c.args[1:], c.outs, c.writes) for c in recorder.ops] == [(c.name, c.args[1:], c.outs, c.writes) for c in real.ops]


def test_a_mask_of_integers_says_how_many_rows_there_are():
    _, chosen = record(lambda: torch.ones(5, 7)[torch.arange(5) % 2 == 0])
    assert chosen.is_meta and chosen.shape == (3, 7)


def test_what_is_drawn_at_the_start_is_garbage_and_in_a_step_refused():
    recorder, _ = record(lambda: torch.empty(3).uniform_(-1, 1))
    assert names(recorder) == ["empty", "empty", "copy_"] and recorder.ops[-1].args[1] == recorder.ops[1].outs and not any(c.rng for c in recorder.ops)

    def step():
        recorder.spans.begin_step(1)
        return F.dropout(torch.ones(4))
    recorder = Recorder("reference", 0, 1, None, MetaFloats())
    with pytest.raises(Fault) as caught, recorder.recording():
        step()
    assert caught.value.diagnostics[0].code == "META001"


def test_a_float_that_leaves_carries_its_origin_back():
    def program():
        norm = torch.ones(3).sum().item()
        return torch.ones(2) * (1.0 / (norm + 1e-6))

    recorder, _ = record(program)
    assert [c.name for c in recorder.ops if c.name.startswith("tv.")] == ["tv.scalar.add", "tv.scalar.truediv"]
    assert isinstance(recorder.ops[-1].args[1], ScalarRef)


def branch():
    norm = torch.empty(3).sum().item()
    if norm > 2.0:                             # a branch on it
        return "taken"
    return "not taken"


def test_a_branch_on_a_float_is_refused_with_its_line():
    with pytest.raises(Fault) as caught:
        record(branch)
    (found,) = caught.value.diagnostics
    assert found.code == "META002" and found.span.line == line_of("# a branch on it")


def test_an_accepted_branch_is_not_taken_and_is_an_assumption():
    place = f"test_meta.py:{line_of('# a branch on it')}"
    recorder, result = record(branch, (place,))
    assert result == "not taken" and [n.code for n in recorder.notes] == ["ASSUME"]
    assert [c.outs for c in recorder.ops if c.name == "tv.decision"] == [False]


def skips():
    norm = torch.empty(3).sum().item()
    return "stepped" if math.isfinite(norm) else "skipped"     # a step that is skipped


def test_an_accepted_number_is_finite():
    recorder, result = record(skips, (f"test_meta.py:{line_of('# a step that is skipped')}",))
    assert result == "stepped" and [c.outs for c in recorder.ops if c.name == "tv.decision"] == [True]
    assert ["counts as true" in n.text for n in recorder.notes] == [True]


@pytest.mark.parametrize("program", [
    lambda: torch.ones(5)[torch.empty(5) > 0.5],
    lambda: int(torch.empty(5).argmax()),
    lambda: bool((torch.empty(2) > 0).all()),
    lambda: torch.arange(3).copy_(torch.empty(3)).tolist(),
    lambda: torch.zeros(3, dtype=torch.bool).scatter_(0, torch.empty(3).topk(1).indices, True).sum().item(),
    lambda: torch.ones(5)[torch.zeros(5, dtype=torch.bool).copy_(torch.empty(5))],
    lambda: torch.empty(3).nonzero(),
], ids=["mask of floats", "index", "truth", "written integers", "written mask", "index by a written mask", "nonzero"])
def test_what_needs_values_is_refused(program):
    with pytest.raises(Fault) as caught:
        record(program)
    assert caught.value.diagnostics[0].code == "META001"


@pytest.mark.parametrize("program", [
    lambda s: (torch.full((3,), s) * 3).to(torch.int64).tolist(),
    lambda s: torch.full((3,), s, dtype=torch.int64).tolist(),
    lambda s: torch.full_like(torch.ones(2), s).sum().item() > 0,
    lambda s: bool((torch.arange(3) * s).sum() > 3),
    lambda s: (torch.arange(5) > s).tolist(),
    lambda s: torch.arange(3).fill_(s).tolist(),
    lambda s: torch.arange(0, 3 * s),
    lambda s: bool(torch.tensor([s, 1.0]).sum() > 0),
    lambda s: torch.where(torch.arange(3) > 1, s, 0.0).sum().item() > 0,
    lambda s: torch._foreach_mul([torch.ones(2)], [s])[0][0].item() > 0,
    lambda s: (torch.ones(3) + s)[0].item() > 0,
], ids=["integers", "integers at once", "like", "truth", "mask", "written integers", "range", "tensor", "where", "list", "added"])
def test_a_float_that_left_has_no_value_where_it_comes_back(program):
    """Its placeholder decides no integer, no size and no branch."""
    with pytest.raises(Fault) as caught:
        record(lambda: program(torch.empty(4).sum().item()))
    assert caught.value.diagnostics[0].code in ("META001", "META002")


def test_small_floats_that_come_from_integers_alone_have_values():
    """Counts of tokens that go through floats, tables, settings: what the program decides by them is decided."""
    def program():
        counts = torch.histc(torch.tensor([0, 2, 2, 1]).float(), bins=3, min=0, max=2)
        rates = torch.linspace(0.0, 1.0, 3)
        return counts.to(torch.int64).tolist(), [r.item() for r in rates], bool((rates > 0.4).any()), rates[1].item() > 0.4, counts

    recorder, (counts, rates, some, greater, floats) = record(program)
    assert counts == [1, 1, 2] and rates == [0.0, 0.5, 1.0] and some and greater and floats.is_meta


def test_a_float_that_is_written_or_a_symbol_has_no_value_any_more():
    def written():
        x = torch.ones(3)
        x[1:].add_(torch.empty(2))
        return x.sum().item() > 2

    def resized():
        x = torch.ones(3)
        x.untyped_storage().resize_(0)
        x.untyped_storage().resize_(12)
        return x.sum().item() > 2

    for program in (written, resized):
        with pytest.raises(Fault) as caught:
            record(program)
        assert caught.value.diagnostics[0].code == "META002"


def test_a_call_is_learnt_by_its_sizes_and_not_by_its_memory():
    def program():
        x = torch.ones(4, 6)
        first, second, other = x + 1.0, x + 1.0, x.t() + 1.0
        second.mul_(2.0)
        x.mul_(2.0)
        return first, second, other

    recorder, (first, second, other) = record(program)
    assert names(recorder) == ["ones", "add", "add", "add", "mul_", "mul_"]
    assert len({t.untyped_storage()._cdata for t in (first, second, other)}) == 3 and other.stride() == (1, 6)
    assert recorder.ops[4].writes != recorder.ops[5].writes


def test_a_program_at_full_size_is_the_program_at_small_sizes():
    """The same spec: every call of every rank, but for what makes initial values."""
    def calls(full_size):
        done = capture(load_spec(EXAMPLE), CaptureOptions(steps=1, full_size=full_size, timeout=120))
        assert done.diagnostics == []
        return done, [[(c.name, [a.size for a in c.targets()]) for c in t.ops[next(k for k, c in enumerate(t.ops) if c.name == "tv.step"):]]
                      for t in (*done.reference.traces, *done.parallel.traces)]

    full, ours = calls(True)
    real, theirs = calls(False)
    assert ours == theirs
    assert all(t.meta[KEY] == VALUE for t in full.parallel.traces) and not any(name.startswith("symbol.") for name in full.reference.blobs[0])
    symbols = [[c.args[:2] for c in t.ops if c.name == "tv.symbol"] for t in full.parallel.traces]
    assert all(s == symbols[0] and len(s) == 21 for s in symbols)
    assert sum("without --full-size" in n.text for n in full.reference.traces[0].notes) == 1


def test_true_sizes_take_no_memory():
    done = capture(load_spec(EXAMPLE), CaptureOptions(steps=1, full_size=True, timeout=120, case={"size": "405b", "layers": 1}))
    assert done.diagnostics == [] and done.peak_memory < 2 << 30
    (weight,) = [c.args[2] for c in done.reference.traces[0].ops if c.name == "tv.symbol" and c.args[1] == "layers.0.mlp.gate.weight"]
    assert weight.size == (53_248, 16_384) and done.reference.traces[0].storages[weight.storage].nbytes == 4 * 53_248 * 16_384


SPEC = """
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor, init_device_mesh
import trainverify as tv

def made(model, x):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    def step():
        loss = model(x).full_tensor().sum() if hasattr(model.weight, "placements") else model(x).sum()
        loss.backward()
        optimizer.step()
        return {"loss": loss}
    return tv.Training(model, step, batch={"x": x})

def reference():
    return made(torch.nn.Linear(1 << 20, 1 << 14, bias=False), torch.ones(3, 1 << 20))

def parallel(ref, how="places"):
    if how == "checkpoint":
        ref.checkpoint()
    mesh = init_device_mesh("cpu", (2,))
    def shard(name, module, mesh):
        module.weight = torch.nn.Parameter(distribute_tensor(module.weight, mesh, [Shard(0)]))
    return made(distribute_module(torch.nn.Linear(1 << 20, 1 << 14, bias=False), mesh, shard), distribute_tensor(ref.batch["x"], mesh))
"""


def test_a_program_that_loads_nothing_holds_what_its_placements_say(tmp_path):
    (tmp_path / "spec.py").write_text(SPEC)
    done = capture(load_spec(tmp_path / "spec.py"), CaptureOptions(steps=1, full_size=True, timeout=60, ranks=2))
    assert done.diagnostics == []
    for rank, trace in enumerate(done.parallel.traces):
        (symbol,) = [c.args[2] for c in trace.ops if c.name == "tv.symbol" and c.args[0] == "weight"]
        (copy,) = [c for c in trace.ops if c.name == "aten.copy_.default" and c.args[1].storage == symbol.storage]
        assert copy.args[1].size == (1 << 13, 1 << 20) and copy.args[1].offset == rank << 33
        assert sum("placed by the verifier" in n.text for n in trace.notes) == 1


def test_there_is_no_checkpoint_of_sizes(tmp_path):
    (tmp_path / "spec.py").write_text(SPEC)
    done = capture(load_spec(tmp_path / "spec.py"), CaptureOptions(steps=1, full_size=True, timeout=60, ranks=2, case={"how": "checkpoint"}))
    assert {d.code for d in done.diagnostics} == {"META003"}


STATE = """
import torch
import trainverify as tv

def reference(optimizer="Adagrad"):
    model = torch.nn.Linear(1 << 10, 1 << 8, bias=False)
    if optimizer == "twice":
        model.flat = torch.nn.Parameter(model.weight.data.view(-1))
    made = torch.optim.Adagrad(model.parameters(), lr=0.1, initial_accumulator_value=0.1)
    if optimizer == "loaded":
        for state in made.state.values():
            state["sum"].copy_(torch.rand(state["sum"].shape))
    def step():
        model(torch.ones(3, 1 << 10)).sum().backward()
        made.step()
    return tv.Training(model, step)

def parallel(ref, optimizer="Adagrad"):
    return reference()
"""


@pytest.mark.parametrize("how, symbols", [("Adagrad", ["weight"]), ("loaded", ["weight", "weight::sum"])])
def test_state_that_a_constructor_fills_is_a_number_and_no_symbol(tmp_path, how, symbols):
    """The parallel program's constructor fills its own."""
    (tmp_path / "spec.py").write_text(STATE)
    done = capture(load_spec(tmp_path / "spec.py"), CaptureOptions(steps=1, full_size=True, timeout=60, ranks=1, case={"optimizer": how}))
    assert [c.args[1] for c in done.reference.traces[0].ops if c.name == "tv.symbol"] == symbols


def test_symbols_of_one_memory_are_refused(tmp_path):
    (tmp_path / "spec.py").write_text(STATE)
    done = capture(load_spec(tmp_path / "spec.py"), CaptureOptions(steps=1, full_size=True, timeout=60, ranks=1, case={"optimizer": "twice"}))
    assert {d.code for d in done.diagnostics} == {"SPEC010"}


FIXED = """
import torch
import trainverify as tv

def training(model, batch):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    def step():
        (model(batch["x"]) * batch["table"][:, :1]).sum().backward()
        optimizer.step()
    return tv.Training(model, step, batch=batch)

def reference(rows=8):
    return training(torch.nn.Linear(1 << 10, 1 << 8), {"x": torch.ones(rows, 1 << 10), "table": tv.fixed(torch.arange(rows * 16).reshape(rows, 16).float().cos())})

def parallel(ref, rows=8):
    return training(torch.nn.Linear(1 << 10, 1 << 8), ref.batch)
"""


@pytest.mark.parametrize("rows, code", [(8, None), (1 << 14, "META001")])
def test_floats_of_the_batch_that_are_no_symbols_keep_their_values_or_are_refused(tmp_path, rows, code):
    (tmp_path / "spec.py").write_text(FIXED)
    done = capture(load_spec(tmp_path / "spec.py"), CaptureOptions(steps=1, full_size=True, timeout=60, ranks=1, case={"rows": rows}))
    assert [d.code for d in done.diagnostics] == [code] * (code is not None)
    if code is None:
        (trace,), (blobs,) = done.parallel.traces, done.parallel.blobs
        (table,) = [c.args[1] for c in trace.ops if c.name == "tv.data" and "table" in c.args[0]]
        held = torch.from_numpy(blobs[f"init.{table.storage}"].copy()).view(torch.float32)
        assert torch.equal(held, torch.arange(rows * 16).float().cos())
