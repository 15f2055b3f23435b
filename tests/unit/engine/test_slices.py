"""The part of a program that an output needs: what is left computes the same, and nothing that Python asked before is lost."""
from pathlib import Path

import pytest
import torch

from trainverify.algebra.real import Real
from trainverify.diagnose.trial import needed
from trainverify.engine.analysis import analyse
from trainverify.engine.options import Options
from trainverify.engine.slices import part
from trainverify.ir.files import load_program
from trainverify.ops.standard import standard_table
from trainverify.relate.symbols import Binder, Symbols
from trainverify.replay.digests import Digests
from trainverify.replay.machine import Hooks
from trainverify.replay.run import replay
from trainverify.verify import capture_spec

SPEC = '''
import torch
import torch.distributed as dist
import trainverify as tv

RANKS = 2


def training(a, b, step):
    model = torch.nn.Module()
    model.a, model.b = a, b
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def whole():
        out = step(model)
        optimizer.step()
        optimizer.zero_grad()
        return out
    return tv.Training(model, whole)


def reference():
    torch.manual_seed(0)
    a, b = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)
    x = torch.randn(5, 3)
    model = training(a, b, lambda m: _loss(m.a(x), m.b, x))
    return tv.Training(model.model, model.step, batch={"x": x})


def _loss(h, b, x):
    loss = b(h.tanh()).square().sum()
    if x.abs().sum().item() > 1e6:                   # a decision that every later call rests on
        loss = loss * 2
    loss.backward()
    return {"loss": loss.detach()}


def resized(t):
    """A copy in memory that was given back meanwhile, as FSDP2 does."""
    out = t.clone()
    storage = out.untyped_storage()
    n = storage.size()
    storage.resize_(0)
    storage.resize_(n)
    return out.copy_(t)


def parallel(ref, factor=1.0):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    a, b = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)
    a.load_state_dict({k[2:]: v for k, v in ref.weights.items() if k[0] == "a"})
    b.load_state_dict({k[2:]: v for k, v in ref.weights.items() if k[0] == "b"})
    x = ref.batch["x"]

    def step(m):
        if rank == 0:
            resized(x).exp_()                            # nothing needs it
            h = m.a(resized(x))
            dist.send(h.detach(), 1)
            grad = torch.empty_like(h)
            dist.recv(grad, 1)
            h.backward(grad * factor)
            for p in m.b.parameters():
                p.grad = torch.zeros_like(p)
            out = {}
        else:
            h = torch.empty(5, 4)
            dist.recv(h, 0)
            out = _loss(h.requires_grad_(), m.b, x)
            dist.send(h.grad, 0)
            for p in m.a.parameters():
                p.grad = torch.zeros_like(p)
        for work in [dist.all_reduce(p.grad, async_op=True) for p in m.parameters()]:
            work.wait()
        return out
    return training(a, b, step)
'''


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slices")
    (folder / "spec.py").write_text(SPEC)
    capture_spec(folder / "spec.py", folder / "traces", Options(case={"factor": 3.0}))
    return [load_program(folder / "traces" / side) for side in ("reference", "parallel")]


def replayed(program, symbols):
    """Outputs by rank and index; the replay looks at every byte that was read."""
    m, digests = Real(symbols.real_values), Digests()
    binder = Binder(symbols, [m])
    hooks = Hooks(symbol=binder.symbol, bind=binder.bind, before=(digests.before,), after=(digests.after,), waited=(digests.waited,))
    world = replay(program, [m], standard_table(()), hooks)
    assert not digests.diagnostics
    return {(o.rank, o.call.index): o for machine in world.machines for o in machine.outputs}


def test_each_output_alone_is_what_it_is_in_the_whole(programs):
    reference, parallel = programs
    symbols = Symbols(reference)
    whole = replayed(parallel, symbols)
    sizes = {}
    for place, output in whole.items():
        sliced = part(parallel, [place])
        found = replayed(sliced, symbols)
        assert list(found) == [place]
        assert torch.equal(found[place].values["real"].t, output.values["real"].t)
        sizes[output.kind, output.step] = sum(len(t.ops) for t in sliced.traces)
    assert sizes["gradient", 1] < sizes["gradient", 2] < sum(len(t.ops) for t in parallel.traces)


def test_what_python_asked_stays(programs):
    _, parallel = programs
    last = next((t.rank, c.index) for t in reversed(parallel.traces) for c in reversed(t.ops) if c.name == "tv.output" and c.args[0] == "scalar")
    kept = [c.name for t in part(parallel, [last]).traces if t.rank == last[0] for c in t.ops]
    asked = [c.name for t in parallel.traces if t.rank == last[0] for c in t.ops[:last[1]] if c.name == "tv.decision"]
    assert asked and kept.count("tv.decision") == len(asked)


def test_of_a_program_that_differs_the_rest_is_proved_from_its_part(programs):
    """And the prover that did it proves another program."""
    reference, parallel = programs
    analysis = analyse(reference, parallel)
    verdicts = {j.key: j.verdict for j in analysis.judgements}
    assert verdicts["gradient", "a.weight", 1] == "REFUTED"
    assert verdicts["gradient", "b.weight", 1] == verdicts["scalar", "loss", 1] == verdicts["parameter", "b.bias", 1] == "PROVED"
    assert set(verdicts.values()) == {"PROVED", "REFUTED"}
    lineages = analysis.first.comparison
    again = analysis.prover.prove(parallel, (), lambda *a: None, lambda: lineages)
    assert {k for k, v in verdicts.items() if v == "PROVED"} == again.proved


def test_trials_keep_memory_that_is_resized_only_where_they_use_it(programs):
    """The smaller parts of counterexamples: killed writes may be missing, a storage that nobody made yet cannot be resized."""
    reference, parallel = programs
    symbols = Symbols(reference)
    whole = replayed(parallel, symbols)
    m = Real(symbols.real_values)
    for place, output in whole.items():
        binder = Binder(symbols, [m])
        world = replay(needed(parallel, [place]), [m], standard_table(()), Hooks(symbol=binder.symbol, bind=binder.bind))
        (found,) = [o for machine in world.machines for o in machine.outputs if (o.rank, o.call.index) == place]
        assert torch.equal(found.values["real"].t, output.values["real"].t)
