"""A difference that the recorded inputs do not show is refuted by others that take the same decisions, and by nothing that rounding can do."""
import math

import pytest
import torch
import torch.nn.functional as F
from pairs import compare, compare_forward, update

import trainverify as tv
from trainverify.engine import inputs


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def clipped(factor):
    """Gradients are clipped to a norm that they do not have at the recorded inputs."""
    def before(parameters):
        norm = torch.stack([p.grad.square().sum() for p in parameters]).sum().sqrt() * factor
        for p in parameters:
            p.grad.mul_((1e4 / (norm + 1e-6)).clamp(max=1.0))
    return update(sgd, before)


def test_a_wrong_norm_that_does_not_clip():
    report = compare(clipped(1.0), clipped(0.5))
    assert report.verdict == "REFUTED", report.outputs
    wrong = [o for o in report.outputs if o.verdict == "REFUTED"]
    assert wrong and all("at other inputs, with the same decisions: weights and inputs times" in o.reason for o in wrong)
    (finding,) = report.findings
    assert finding.diagnostic.severity == "error" and finding.witnesses
    assert [n for n in finding.diagnostic.notes if n.startswith("the recorded inputs do not show it: differs from the reference at other inputs")]


def test_the_right_norm_that_does_not_clip():
    assert compare(clipped(1.0), clipped(1.0)).verdict == "PROVED"


def test_units_that_are_off():
    report = compare_forward(lambda y: F.relu(y - 100).sum(), lambda y: 2 * F.relu(y - 100).sum())
    assert report.verdict == "REFUTED" and "at other inputs" in str([o.reason for o in report.outputs])


def test_a_law_of_maxima_has_no_witness():
    report = compare_forward(lambda y: (y + 1).sum(), lambda y: torch.maximum(y, y + 1).sum())
    assert report.verdict == "UNKNOWN" and "no float64 witness" in str([o.reason for o in report.outputs])


def test_inputs_that_would_decide_otherwise_show_nothing():
    def forward(factor):
        def compute(y):
            total = y.sum()
            if total.item() ** 2 > 1e6:
                raise AssertionError("not at these inputs")
            return factor * F.relu(total - 2000) + total
        return compute
    report = compare_forward(forward(1.0), forward(2.0))
    assert report.verdict == "UNKNOWN" and not any(o.verdict == "REFUTED" for o in report.outputs)


@pytest.mark.parametrize("floor", [torch.floor, lambda s: int(s.item()), lambda s: math.floor(float(s)), lambda s: int(s.tolist())], ids=["tensor", "int", "float", "list"])
def test_what_python_makes_of_a_number_is_not_known_elsewhere(floor):
    """int(s) is what it was recorded as, which s is not at other inputs."""
    def forward(of):
        def compute(y):
            return (y * of(2.5 + 0.02 * y.sum())).sum()
        return compute
    report = compare_forward(forward(torch.floor), forward(floor))
    assert report.verdict == ("PROVED" if floor is torch.floor else "UNKNOWN"), [(o.kind, o.reason) for o in report.outputs]


class Attention(torch.nn.Module):
    """The gradient of the key's bias is zero, up to rounding: softmax ignores a shift. Adam makes steps of one size of whatever it is."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (torch.nn.Linear(4, 4) for _ in range(3))


@pytest.mark.parametrize("eps", [1e-8, 1e-16])
def test_rounding_that_adam_makes_large_is_no_witness(eps):
    """The parallel program writes the values' gate in a way whose equality is a law of maxima: everything differs in the field."""
    def build(gate):
        def made(model, batch):
            optimizer = torch.optim.Adam(model.parameters(), lr=0.1, eps=eps)

            def step():
                optimizer.zero_grad()
                x = gate(batch)
                weights = torch.softmax(model.query(x) @ model.key(x).T, -1)
                loss = (weights @ model.value(x)).square().sum()
                loss.backward()
                optimizer.step()
                return {"loss": loss}
            return step
        return made

    def reference():
        torch.manual_seed(0)
        model, batch = Attention(), torch.randn(5, 4)
        return tv.Training(model, build(lambda x: x + 1)(model, batch), batch=batch)

    def parallel(ref):
        model = Attention()
        model.load_state_dict(ref.weights)
        return tv.Training(model, build(lambda x: torch.maximum(x, x + 1))(model, ref.batch))
    report = tv.verify(reference, parallel, ranks=1, steps=1, timeout=60.0, repair=False)
    assert report.verdict == "UNKNOWN" and not any(o.verdict == "REFUTED" for o in report.outputs)


def test_a_perturbation_that_moves_as_much_as_the_difference_is_noise(monkeypatch):
    """The measure itself: with a perturbation as large as the difference, nothing is a witness."""
    monkeypatch.setattr(inputs, "NUDGE", 1e-2)
    monkeypatch.setattr(inputs, "NUDGE_ROUNDED", 1e-2)
    assert compare(clipped(1.0), clipped(0.5)).verdict == "UNKNOWN"


def test_what_saturation_leaves_of_a_gradient_is_no_witness():
    """Far out, 1 - tanh(y)^2 is 0 in float64 and 1 / cosh(y)^2 is not; a law of maxima makes the two differ in the field, and Adam without eps
    makes steps of one size of both."""
    class Tanh(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y, other):
            ctx.save_for_backward(y)
            ctx.other = other
            return torch.tanh(y)

        @staticmethod
        def backward(ctx, g):
            (y,) = ctx.saved_tensors
            if ctx.other:
                e = torch.exp(-2 * y.abs())
                return g * 4 * e / (1 + torch.maximum(e, e - 1)) ** 2, None
            return g * (1 - torch.tanh(y) ** 2), None

    def build(other):
        def made(model, batch):
            optimizer = torch.optim.Adam(model.parameters(), lr=0.1, eps=1e-30)

            def step():
                optimizer.zero_grad()
                loss = Tanh.apply(model(batch["x"]), other).sum()
                loss.backward()
                optimizer.step()
                return {"loss": loss}
            return step
        return made
    report = compare(build(False), build(True))
    assert report.verdict == "UNKNOWN" and not any(o.verdict == "REFUTED" for o in report.outputs), [(o.kind, o.reason) for o in report.outputs]


def test_what_underflows_and_is_scaled_up_again_is_no_witness():
    """exp(-y) exp(y) is 1, and 0 times infinity or a large number in float64 far out."""
    def forward(other):
        def compute(y):
            e = torch.exp(-y.square())
            top = torch.maximum(e, e - 1) if other else e
            return (torch.exp(y.square().clamp(max=700.0)) * (top if other else torch.exp(-y.square()))).sum()
        return compute
    report = compare_forward(forward(False), forward(True))
    assert report.verdict == "UNKNOWN" and not any(o.verdict == "REFUTED" for o in report.outputs)


def test_noise_of_an_operation():
    m = inputs.Shaken(lambda numbers: torch.ones(len(numbers)), 2.0 ** -20, 1)
    value = m.data(torch.tensor([-1e4, -800.0, 0.0, 2.0]))
    e = m.exp(value).t
    assert 0 < abs(float(e[0])) < 1e-300 and 0 < abs(float(e[1])) < 1e-300 and float(e[2]) != 1.0 and abs(float(e[2]) - 1) < 2.0 ** -19
    difference = m.sub(m.exp(m.data(torch.zeros(5))), m.exp(m.data(torch.zeros(5)))).t
    assert bool((difference != 0).all()) and float(difference.abs().max()) < 2.0 ** -18
    zero = m.data(torch.zeros(3))
    assert torch.equal(m.mul(zero, m.data(torch.full((3,), 7.0))).t, zero.t) and torch.equal(m.maximum(zero, m.neg(zero)).t, zero.t)
