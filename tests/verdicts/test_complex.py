"""Complex numbers are pairs of reals: the rotary embedding in both forms is one program."""
import torch

from judge import assert_equal, assert_not_refuted, assert_refuted, is_equal, line_of, output
from pairs import compare_forward

ANGLE = torch.linspace(-2.0, 2.0, 15).reshape(5, 3)


def by_complex(h):
    turned = torch.view_as_complex(h.reshape(5, 3, 2)) * torch.polar(torch.ones(5, 3), ANGLE)
    return torch.view_as_real(turned).flatten(1)


def by_pairs(h):
    a, b = h.reshape(5, 3, 2).unbind(-1)
    c, s = ANGLE.cos(), ANGLE.sin()
    return torch.stack([a * c - b * s, a * s + b * c], -1).flatten(1)


def test_complex_against_real_form():
    assert_equal(compare_forward(by_pairs, by_complex))
    assert_equal(compare_forward(by_complex, by_pairs))


def test_complex_against_itself():
    assert_equal(compare_forward(by_complex, by_complex))


def test_turned_the_other_way():
    def conjugate(h):
        turned = torch.view_as_complex(h.reshape(5, 3, 2)) * torch.polar(torch.ones(5, 3), ANGLE).conj()
        return torch.view_as_real(turned).flatten(1)
    assert_refuted(compare_forward(by_complex, conjugate), line_of(conjugate, ".conj()"))


def test_factor_that_is_a_constant_of_another_weight():
    """1 at the weights that construction made, not at others."""
    torch.manual_seed(0)
    total = (torch.randn(6, 6).sum() + 30.0).item()

    def scaled(h):
        turned = torch.view_as_complex(h.reshape(5, 3, 2)) * torch.polar(torch.ones(5, 3), ANGLE)
        turned = turned * ((h.sum() + 30.0) / total).detach().to(torch.complex64)
        return torch.view_as_real(turned).flatten(1)

    assert_refuted(compare_forward(by_complex, scaled), line_of(scaled, "total"))


def test_factor_that_is_a_sum_divided_by_itself():
    """One of the two went through float(): a number that changes with the weights, taken for the tracked value that it equals."""
    def scaled(h):
        total = float(h.sum().detach())
        turned = torch.view_as_complex(h.reshape(5, 3, 2)) * torch.polar(torch.ones(5, 3), ANGLE)
        turned = turned * (h.sum() / total).detach().to(torch.complex64)
        return torch.view_as_real(turned).flatten(1)

    report = compare_forward(by_complex, scaled)
    assert_not_refuted(report)
    if is_equal(output(report, "loss")):
        assert any("tracked value" in a.text for a in report.assumptions), report.assumptions
