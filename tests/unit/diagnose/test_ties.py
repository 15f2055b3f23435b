"""A choice that falls differently on the two sides though it is among the same values: a tie withholds the verdict, another choice does not."""
import pytest
import torch

import trainverify as tv

WIDTH = 4


class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.router = torch.nn.Parameter(torch.ones(WIDTH) + torch.rand(WIDTH))
        self.experts = torch.nn.Parameter(torch.randn(2, WIDTH))


def close(a, b, gap=1e-12):
    """Two scores that float32 cannot tell apart."""
    return torch.stack((a, a + gap * b))


def verify(choose, expect=lambda a, b: close(a, b).topk(1).indices):
    """choose(a, b) -> the index of one of two experts in the parallel program; expect(a, b) in the reference."""
    def training(model, x, chosen):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step():
            score = (model.router * x).sum()
            loss = (model.experts[chosen(score, score.square())] * x).sum()
            loss.backward()
            optimizer.step()
        return tv.Training(model, step, batch=x)

    def reference():
        torch.manual_seed(0)
        return training(Experts(), torch.rand(WIDTH) + 1, expect)

    def parallel(ref):
        model = Experts()
        model.load_state_dict(ref.weights)
        return training(model, ref.batch, choose)

    return tv.verify(reference, parallel, ranks=1, steps=1, timeout=60.0)


def ties(report):
    return [d for d in report.diagnostics if d.code == "REL011"]


def assert_withheld(report):
    """The outputs differ, which nobody can be blamed for."""
    assert report.verdict == "UNKNOWN" and report.exit_code == 3 and report.findings == []
    assert any(o.verdict == "UNKNOWN" and "REL011" in o.reason for o in report.outputs)
    assert len(ties(report)) == 1 and ties(report)[0].severity == "warning"
    assert not [d for d in report.diagnostics if d.severity == "error"]


def test_the_other_of_two_values_that_rounding_makes_equal():
    report = verify(lambda a, b: close(a.double(), b.double()).topk(1).indices)
    assert_withheld(report)
    assert "topk" in ties(report)[0].message.replace("-", "") and ties(report)[0].span.file == __file__
    assert "chosen: [" in ties(report)[0].notes[0]


def test_scores_that_sixteen_bits_make_equal_before_they_are_compared_in_float32():
    assert_withheld(verify(lambda a, b: close(a, b, 1e-4).topk(1).indices,
                           expect=lambda a, b: close(a.bfloat16(), b.bfloat16(), 1e-4).float().topk(1).indices))


def test_a_branch_at_a_tie():
    def larger(score):
        return 1 if score[1].item() > score[0].item() else 0
    assert_withheld(verify(lambda a, b: larger(close(a.double(), b.double())), expect=lambda a, b: larger(close(a, b))))


@pytest.mark.parametrize("choose", [
    lambda a, b: close(a, b, 0.1).topk(1, largest=False).indices,
    lambda a, b: close(a, b, 0.1).argmin(),
    lambda a, b: close(a, b, 0.1).flip(0).topk(1).indices], ids=["smallest", "minimum", "flipped"])
def test_another_choice_among_the_same_values_is_wrong(choose):
    report = verify(choose, expect=lambda a, b: close(a, b, 0.1).topk(1).indices)
    assert report.verdict == "REFUTED" and ties(report) == []


def test_a_choice_by_other_values_is_wrong():
    report = verify(lambda a, b: close(a, -b, 0.1).topk(1).indices, expect=lambda a, b: close(a, b, 0.1).topk(1).indices)
    assert report.verdict == "REFUTED" and ties(report) == []


def test_a_bug_at_a_tie_that_falls_alike():
    report = verify(lambda a, b: 1 - close(a, b).topk(1).indices)
    assert report.verdict == "REFUTED" and ties(report) == []


def test_the_same_choice_is_no_tie():
    report = verify(lambda a, b: close(a, b).topk(1).indices)
    assert report.verdict == "PROVED" and not [d for d in report.diagnostics if d.code in ("REL011", "REL008")]
