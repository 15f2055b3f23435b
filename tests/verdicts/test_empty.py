"""A tensor without elements is no reason to stop."""
import torch
import trainverify as tv
from trainverify.verify import verify


def training(model, batch, start):
    def step():
        loss = model(torch.cat([start(), batch["x"]])).square().mean()
        loss.backward()
        return {"loss": loss}
    return tv.Training(model, step, batch=batch)


def reference():
    torch.manual_seed(0)
    return training(torch.nn.Linear(3, 2), {"x": torch.randn(4, 3)}, lambda: torch.empty(0, 3))


def parallel(ref):
    model = torch.nn.Linear(3, 2)
    model.load_state_dict(ref.weights)
    return training(model, ref.batch, lambda: torch.tensor([], dtype=torch.float32).reshape(0, 3))


def test_a_value_that_python_made_of_nothing():
    report = verify(reference, parallel, ranks=1, steps=1)
    assert report.verdict == "PROVED", report.diagnostics


def drawing(ref=None):
    """An initialisation that draws nothing, as that of a shard without elements does."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    if ref is not None:
        model.load_state_dict(ref.weights)
    drawn = torch.nn.init.trunc_normal_(torch.empty(0, 3))
    return training(model, ref.batch if ref is not None else {"x": torch.randn(4, 3)}, lambda: drawn)


def test_nothing_that_is_drawn():
    report = verify(drawing, drawing, ranks=1, steps=1)
    assert report.verdict == "PROVED", report.diagnostics
