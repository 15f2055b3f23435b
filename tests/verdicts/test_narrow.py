"""Checkpoints of 16 bit weights, of which more are equal by chance than differ: which is which is found all the same."""
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import trainverify as tv
from judge import assert_equal, assert_refuted, codes, summary

ROWS, COLUMNS = 40, 60


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows, self.out = nn.Embedding(ROWS, COLUMNS), nn.Linear(COLUMNS, 2, bias=False)

    def forward(self, ids):
        return self.out(self.rows(ids))


def verify(dtype, change=lambda weights: weights):
    """The parallel program reads the checkpoint in halves of columns, and change(weights) is what it loads."""
    def training(model, batch):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step():
            loss = model(batch["ids"]).float().square().sum()
            loss.backward()
            print(loss.item())                # has everything captured once more, with other values
            optimizer.step()
        return tv.Training(model, step, batch=batch)

    def reference():
        torch.manual_seed(0)
        return training(Table().to(dtype), {"ids": torch.arange(0, ROWS, 7)})

    def parallel(ref):
        weights = load_file(ref.checkpoint() + "/model.safetensors")
        weights["rows.weight"] = torch.cat(change(weights["rows.weight"]).chunk(2, 1), 1)
        model = Table().to(dtype)
        model.load_state_dict(weights)
        return training(model, ref.batch)

    return tv.verify(reference, parallel, ranks=1, steps=1, timeout=60.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
def test_a_checkpoint_with_more_weights_than_values(dtype):
    report = verify(dtype)
    assert_equal(report)
    assert "CAP002" not in codes(report) and any(p.name == "capture digits" for p in report.phases), summary(report)


@pytest.mark.slow
def test_weights_in_another_order_are_others():
    def rolled(weights):
        weights = weights.clone()
        weights[7] = weights[7].roll(1)
        return weights
    report = verify(torch.bfloat16, rolled)
    assert_refuted(report)
    assert "CAP002" not in codes(report), summary(report)
