"""Floats that leave tensors for Python and come back: tracked, or what depends on them is not equal."""
import io
import math
import pickle

import pytest
import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_

from judge import assert_equal, assert_not_equal, assert_not_refuted, assert_refuted, assert_unknown, codes, line_of, summary
from pairs import compare, compare_forward, sgd, update

MAX_NORM = 0.5


def clipped(parameters):
    clip_grad_norm_(parameters, MAX_NORM)


def clipped_by_item(parameters):
    norm = sum(p.grad.square().sum() for p in parameters).sqrt().item()
    coefficient = MAX_NORM / (norm + 1e-6)
    if coefficient < 1.0:
        for p in parameters:
            p.grad.mul_(coefficient)


def test_clip_by_item_on_both_sides():
    def by_power(parameters):
        total = 0.0
        for p in parameters:
            total += p.grad.norm(2).item() ** 2.0
        coefficient = MAX_NORM / (total ** 0.5 + 1e-6)
        if coefficient < 1.0:
            for p in parameters:
                p.grad.mul_(coefficient)
    assert_equal(compare(update(sgd, clipped_by_item), update(sgd, by_power)))


def test_clip_by_item_against_clip_grad_norm():
    """The factor is right; the branch is one that the reference, which takes a minimum, does not make."""
    report = compare(update(sgd, clipped), update(sgd, clipped_by_item))
    assert_not_refuted(report)
    assert_unknown(report, "REL008", line_of(clipped_by_item, "if coefficient"))


def test_clip_by_another_norm():
    def by_largest(parameters):
        norm = max(p.grad.abs().max().item() for p in parameters)
        for p in parameters:
            p.grad.mul_(MAX_NORM / (norm + 1e-6))
    assert_refuted(compare(update(sgd, clipped_by_item), update(sgd, by_largest)), line_of(by_largest, "mul_"), line_of(by_largest, "max()"))


def test_minimum_in_python():
    def by_clamp(h):
        c = torch.clamp(0.5 / (h.detach().norm() + 1e-6), max=1.0)
        return (h * c).square().sum()

    def by_min(h):
        c = min(0.5 / (h.detach().norm().item() + 1e-6), 1.0)
        return (h * c).square().sum()

    report = compare_forward(by_clamp, by_min)
    assert_not_refuted(report)
    assert_equal(compare_forward(by_min, by_min))


def by_tensor(h):
    return h.square().sum() * h.detach().square().sum().sqrt()


@pytest.mark.parametrize("how", ["math.sqrt", "power", "torch.tensor", "new_tensor", "full", "setitem", "torch.tensor list", "numpy sqrt"])
def test_ways_through_python(how):
    import numpy as np

    def through(h):
        s = h.detach().square().sum().item()
        loss = h.square().sum()
        if how == "math.sqrt":
            return loss * math.sqrt(s)
        if how == "power":
            return loss * s ** 0.5
        if how == "torch.tensor":
            return loss * torch.tensor(s).sqrt()
        if how == "new_tensor":
            return loss * h.new_tensor([s]).sqrt()[0]
        if how == "full":
            return loss * torch.full((), s).sqrt()
        if how == "setitem":
            box = torch.zeros(3)
            box[1] = s
            return loss * box.sum().sqrt()
        if how == "torch.tensor list":
            return loss * torch.tensor([0.0, s]).sum().sqrt()
        return loss * float(np.sqrt(s))

    report = compare_forward(by_tensor, through)
    if how == "numpy sqrt":
        assert_not_refuted(report)             # numpy's functions lose the origin
    else:
        assert_equal(report)


STRIPPED = {
    "float of a tensor": lambda t: float(t),
    "float of item": lambda t: float(t.item()),
    "tolist": lambda t: t.reshape(1).tolist()[0],
    "numpy": lambda t: t.numpy().item(),
    "text": lambda t: float(repr(t.item())),
    "integer ratio": lambda t: (lambda a, b: a / b)(*t.item().as_integer_ratio()),
}


@pytest.mark.parametrize("strip", STRIPPED.values(), ids=STRIPPED.keys())
def test_stripped_value_is_no_constant(strip):
    """Two functions of the weights that give the same number here, not everywhere."""
    def right(h):
        return h.square().sum() * strip(h.detach().max())

    def wrong(h):
        return h.square().sum() * strip(h.detach().clamp(min=-99).max())

    report = compare_forward(right, wrong)
    assert_not_equal(report, "loss")
    assert_not_refuted(report)


def test_stripped_value_is_not_the_constant_that_it_is_here():
    def right(h):
        return h.square().sum() * float(h.detach().max() > -99)

    def wrong(h):
        return h.square().sum() * 1.0

    assert_not_refuted(compare_forward(right, wrong))


def test_stripped_value_after_a_decision_that_falls_differently():
    """With other weights the program takes other elements: what it does from there on can still not be taken for constant."""
    def some(h):
        return h[(h.detach() * 1e4).long() % 2 == 0].square().sum()

    def right(h):
        return some(h) * float(f"{h.detach().max().item()!r}")

    def wrong(h):
        return some(h) * float(f"{h.detach().clamp(min=-99).max().item()!r}")

    report = compare_forward(right, wrong)
    assert_not_equal(report, "loss")
    assert_not_refuted(report)


class Adam(torch.optim.Optimizer):
    """AdamW's update without weight decay, by hand, with the step counted in a tensor and read by item()."""

    def __init__(self, parameters, correction):
        super().__init__(parameters, dict(lr=0.01))
        self.correction = correction

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if not state:
                state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            state["step"] += 1
            state["exp_avg"].mul_(0.9).add_(p.grad, alpha=0.1)
            state["exp_avg_sq"].mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
            step = state["step"].item()
            first, second = self.correction(step)
            p.sub_(0.01 / first * state["exp_avg"] / (state["exp_avg_sq"].sqrt() / math.sqrt(second) + 1e-8))


def torch_adam(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0, foreach=False)


def test_bias_correction_by_the_step():
    def mine(parameters):
        return Adam(parameters, lambda step: (1 - 0.9 ** step, 1 - 0.999 ** step))
    assert_equal(compare(update(torch_adam), update(mine), steps=2))


def test_bias_correction_by_a_stale_step():
    def mine(parameters):
        return Adam(parameters, lambda step: (1 - 0.9 ** 1, 1 - 0.999 ** 1))
    assert_refuted(compare(update(torch_adam), update(mine), steps=2), line_of(Adam, "p.sub_"))


# -- tensors whose bytes leave and come back

def by_save(g):
    file = io.BytesIO()
    torch.save({"g": g}, file)
    file.seek(0)
    return torch.load(file)["g"]


def by_pickle(g):
    return pickle.loads(pickle.dumps(torch.nn.Parameter(g))).detach()


def by_object_collective(g):
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, g)
    return found[0]


@pytest.mark.slow
@pytest.mark.parametrize("way", [by_save, by_pickle, by_object_collective])
def test_a_gradient_that_is_saved_and_loaded_is_no_constant(way):
    """The recorded inputs alone do not tell it from a constant: neither a proof nor a difference at other inputs may rest on that."""
    def after(parameters):
        for p in parameters:
            p.grad = way(p.grad)
    report = compare(update(sgd), update(sgd, after), ranks=2)
    assert_not_equal(report, "w")
    assert_not_refuted(report)
    assert "CAP006" in codes(report), summary(report)


def test_saved_gradients_on_both_sides_are_not_proved():
    def after(parameters):
        for p in parameters:
            p.grad = by_save(p.grad)
    report = compare(update(sgd, after), update(sgd, after))
    assert_not_equal(report, "w")
    assert_not_refuted(report)
