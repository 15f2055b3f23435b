"""What a reference computes from its weights before it returns follows the symbols."""
import copy

import pytest
import torch
from torch import nn

import trainverify as tv
from capture.check import replayed
from trainverify.capture.options import CaptureOptions
from trainverify.capture.session import capture_reference
from trainverify.capture.spec import spec_of


def flat(model):
    return torch.cat([p.detach().reshape(-1).double() for p in model.parameters()])


def copied(model):
    return flat(copy.deepcopy(model))


def cloned(model):
    clones = [p.detach().clone() for p in model.parameters()]
    return torch.cat([c.reshape(-1) for c in clones]).double()


def reference_of(derive):
    def reference():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
        derived = derive(model)

        def step():
            return {f"difference {i}": d for i, d in enumerate(derived - flat(model))}

        return tv.Training(model, step)

    return reference


def captured(reference):
    return capture_reference(spec_of(reference, lambda ref: None, 1), CaptureOptions(steps=1, timeout=60))


@pytest.mark.parametrize("derive", [flat, copied, cloned])
def test_copies_of_weights_are_copies_of_symbols(derive):
    done = captured(reference_of(derive))
    assert not done.diagnostics
    world = replayed(done.program)
    outputs = [o for o in world.machines[0].outputs if o.kind == "scalar"]
    assert len(outputs) == 14 and all(float(o.native) == 0 for o in outputs)
    names = [c.args[1] for c in done.program.traces[0].ops if c.name == "tv.symbol"]
    assert sorted(names) == ["0.bias", "0.weight", "1.bias", "1.weight"]


def test_a_reference_that_reads_nothing_runs_once():
    done = captured(reference_of(lambda model: torch.zeros(14).double()))
    kinds = [c.name for c in done.program.traces[0].ops]
    assert kinds.index("tv.symbol") > max(i for i, k in enumerate(kinds) if k == "aten.uniform_.default")


def test_a_weight_that_is_written_later_when_the_reference_runs_again_is_a_fault():
    def derive(model):
        copy = flat(model)
        if not torch.equal(copy, flat(expected)):      # symbols are there: the second run
            model[0].bias.data.zero_()
        return copy

    torch.manual_seed(0)
    expected = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    done = captured(reference_of(derive))
    assert [d.code for d in done.diagnostics] == ["SPEC010"]
