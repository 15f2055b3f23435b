"""OPS of a spec: a PyTorch function as meaning, uninterpreted ops, and what the report says of both."""
import sys
from pathlib import Path

import pytest
import torch

import trainverify as tv
from trainverify.engine.options import Options
from trainverify.ops.custom import op_name
from trainverify.verify import verify_spec

SPECS = Path(__file__).parent / "specs"
sys.path.insert(0, str(SPECS))
import swiglu  # noqa: E402

ONE = Options(steps=1, timeout=60.0)


@torch.library.custom_op("tvtest::secret", mutates_args=())
def secret(x: torch.Tensor, k: int) -> torch.Tensor:
    return torch.cos(x) * k + x.sum() * 0


@torch.library.custom_op("tvtest::secret_backward", mutates_args=())
def secret_backward(grad: torch.Tensor, x: torch.Tensor, k: int) -> torch.Tensor:
    return -torch.sin(x) * k * grad


def _setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])
    ctx.k = inputs[1]


secret.register_autograd(lambda ctx, grad: (secret_backward(grad, ctx.saved_tensors[0], ctx.k), None), setup_context=_setup)


@torch.library.custom_op("tvtest::accumulate_", mutates_args=("total",))
def accumulate_(total: torch.Tensor, x: torch.Tensor) -> None:
    total.add_(x * x)


def accumulate_meaning(total, x):
    total += x ** 2


def unknown(pointwise=False):
    return [tv.op(f"tvtest::{n}", uninterpreted=True, pointwise=pointwise) for n in ("secret", "secret_backward")]


def step_of(f):
    def build(model, x):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step():
            loss = f(model(x)).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return {"loss": loss}
        return step
    return build


def compare(right, other, ops):
    def reference():
        torch.manual_seed(0)
        model, x = torch.nn.Linear(4, 3), torch.randn(5, 4)
        return tv.Training(model, step_of(right)(model, x), batch=x)

    def parallel(ref):
        model = torch.nn.Linear(4, 3)
        model.load_state_dict(ref.weights)
        return tv.Training(model, step_of(other)(model, ref.batch))
    return tv.verify(reference, parallel, ranks=1, steps=1, timeout=60.0, ops=ops)


def equal(report):
    return bool(report.outputs) and report.verdict == "PROVED"


def codes(report):
    return [d.code for d in report.diagnostics]


def assumed(report):
    return "\n".join(f"{a.text} {a.places}" for a in report.assumptions)


# ---- a function as meaning

def test_function_as_meaning():
    report = verify_spec(SPECS / "swiglu.py", ONE)
    assert equal(report), report
    assert "tvtest.fused_swiglu computes what plain computes" in assumed(report) and "swiglu.py:" in assumed(report)
    assert "tvtest.fused_swiglu_backward computes what plain_backward computes" in assumed(report)


def test_function_as_meaning_shows_a_difference():
    report = verify_spec(SPECS / "swiglu.py", Options(steps=1, timeout=60.0, case={"swapped": True}))
    assert report.verdict == "REFUTED", report


def test_wrong_meaning_is_the_specs_fault():
    ops = [tv.op("tvtest::secret", meaning=lambda x, k: torch.sin(x) * k), tv.op("tvtest::secret_backward", meaning=lambda g, x, k: g * torch.cos(x) * k)]
    report = compare(lambda h: secret(h, 2), lambda h: secret(h, 2), ops)
    assert (report.verdict, report.exit_code) == ("ERROR", 1)
    assert any(d.code == "CONF001" and d.severity == "error" and "the spec" in d.message for d in report.diagnostics)


def test_meaning_of_an_op_that_writes():
    def with_op(h):
        total = torch.zeros(5, 3)
        accumulate_(total, h.detach())
        return h * total

    def without(h):
        return h * h.detach().square()
    report = compare(without, with_op, [tv.op("tvtest::accumulate_", meaning=accumulate_meaning)])
    assert equal(report), report


@pytest.mark.slow
@pytest.mark.parametrize(("meaning", "code", "says"), [
    (lambda x, k: torch.cos(x).sum(), "OPS004", "shape"),
    (lambda x, k: (x, x), "OPS004", "2 results"),
    (lambda x: x, "OPS004", "TypeError"),
    (lambda x, k: x * x.sum().item(), "OPS002", "in Python"),
    (lambda x, k: x * torch.rand(3), "OPS002", "random"),
    (secret, "OPS001", "no row"),
])
def test_meaning_that_cannot_be_used(meaning, code, says):
    report = compare(lambda h: h, lambda h: secret(h, 2), [tv.op("tvtest::secret", meaning=meaning), tv.op("tvtest::secret_backward", meaning=lambda g, x, k: g)])
    assert report.verdict != "REFUTED" and any(d.code == code and says in d.message for d in report.diagnostics), report.diagnostics
    assert not equal(report)


def test_tracked_scalar_as_argument():
    @torch.library.custom_op("tvtest::scaled_by", mutates_args=())
    def scaled_by(x: torch.Tensor, c: float) -> torch.Tensor:
        return x * c

    def with_op(h):
        return h + scaled_by(h.detach(), h.detach().sum().item())

    def without(h):
        return h + h.detach() * h.detach().sum()

    def other(h):
        return h + h.detach() * 1.5
    ops = [tv.op("tvtest::scaled_by", meaning=lambda x, c: c * x)]
    assert equal(compare(without, with_op, ops))
    assert not equal(compare(other, with_op, ops))


# ---- uninterpreted

def test_uninterpreted_op_on_the_same_values():
    report = compare(lambda h: secret(h * 2, 3), lambda h: secret(h + h, 3), unknown())
    assert equal(report), report
    assert "tvtest.secret is an unknown function (every result of all inputs)" in assumed(report) and "test_custom_ops.py:" in assumed(report)


@pytest.mark.parametrize("other", [lambda h: secret(h * 2.5, 3), lambda h: secret(h * 2, 4)])
def test_uninterpreted_op_on_other_values_has_no_known_meaning(other):
    report = compare(lambda h: secret(h * 2, 3), other, unknown())
    assert report.verdict == "UNKNOWN" and "OPS005" in codes(report) and not equal(report), report


@pytest.mark.slow
def test_uninterpreted_op_against_what_it_computes():
    """The recorded values agree, so that nothing is refuted; but an unknown function is not the cosine."""
    report = compare(lambda h: secret(h.detach() * 2, 3) + h, lambda h: (h.detach() * 2).cos() * 3 + h, unknown())
    assert report.verdict == "UNKNOWN" and not equal(report), report


def test_uninterpreted_op_in_parts():
    """Only what is declared pointwise may be applied to a part of the elements."""
    def in_parts(h):
        return torch.cat([secret(part, 3) for part in h.split(2)])
    report = compare(lambda h: secret(h, 3), in_parts, unknown())
    assert report.verdict == "UNKNOWN" and "OPS005" in codes(report) and not equal(report)
    assert any(d.code == "OPS005" and d.span.file.endswith("test_custom_ops.py") for d in report.diagnostics)
    assert equal(compare(lambda h: secret(h, 3), in_parts, unknown(pointwise=True)))


def test_a_difference_beside_an_uninterpreted_op_is_refuted():
    report = compare(lambda h: secret(h.detach(), 3) + h, lambda h: secret(h.detach(), 3) + 1.25 * h, unknown())
    assert report.verdict == "REFUTED", report


# ---- what a spec may say

def test_names():
    assert op_name("mylib::op") == op_name("mylib.op") == op_name("mylib::op.default") == "mylib.op"


@pytest.mark.parametrize("make", [
    lambda: tv.op("a::b"), lambda: tv.op("a::b", abs, uninterpreted=True), lambda: tv.op("a::b", abs, pointwise=True), lambda: tv.op("b", abs)])
def test_wrong_declarations(make):
    with pytest.raises(ValueError, match="tv.op"):
        make()


@pytest.mark.slow
def test_an_op_that_the_run_does_not_meet_is_no_assumption():
    report = compare(lambda h: h * 2, lambda h: h + h, unknown())
    assert equal(report) and "tvtest" not in assumed(report)
