"""A choice that falls differently on the two sides though it is among the same values is said to be a tie."""
import torch

import trainverify as tv

WIDTH = 4


class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.router = torch.nn.Parameter(torch.ones(WIDTH) + torch.rand(WIDTH))
        self.experts = torch.nn.Parameter(torch.randn(2, WIDTH))


def verify(choose):
    """choose(scores) -> index in the parallel program; the reference takes the largest of two scores that float32 cannot tell apart."""
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
        return training(Experts(), torch.rand(WIDTH) + 1, lambda a, b: torch.stack((a, a + 1e-12 * b)).topk(1).indices)

    def parallel(ref):
        model = Experts()
        model.load_state_dict(ref.weights)
        return training(model, ref.batch, choose)

    return tv.verify(reference, parallel, ranks=1, steps=1, timeout=60.0)


def test_the_other_of_two_values_that_rounding_makes_equal():
    report = verify(lambda a, b: torch.stack((a.double(), a.double() + 1e-12 * b.double())).topk(1).indices)
    ties = [d for d in report.diagnostics if d.code == "REL011"]
    assert len(ties) == 1 and "topk" in ties[0].message.replace("-", "") and ties[0].span.file == __file__
    assert "chosen: [" in ties[0].notes[0]
    assert not [d for d in report.diagnostics if d.code == "REL008"]


def test_the_same_choice_in_another_order_is_no_tie():
    report = verify(lambda a, b: 1 - torch.stack((a + 1e-12 * b, a)).flip(0).flip(0).topk(1).indices)
    assert not [d for d in report.diagnostics if d.code in ("REL011", "REL008")] or report.verdict == "REFUTED"


def test_the_same_choice_is_no_tie():
    report = verify(lambda a, b: torch.stack((a, a + 1e-12 * b)).topk(1).indices)
    assert not [d for d in report.diagnostics if d.code in ("REL011", "REL008")]
