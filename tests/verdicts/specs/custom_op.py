"""A custom op with a row from the spec: x * factor, and its derivative."""
import torch

import trainverify as tv
from trainverify.ops.table import OpRow

RANKS = 1


@torch.library.custom_op("specs::scaled", mutates_args=())
def scaled(x: torch.Tensor, factor: int) -> torch.Tensor:
    return x * factor


scaled.register_autograd(lambda ctx, grad: (scaled(grad, ctx.factor), None),
                         setup_context=lambda ctx, inputs, output: setattr(ctx, "factor", inputs[1]))

OPS = [OpRow("specs.scaled", lambda m, x, factor: m.scale(x, factor), "pointwise", "this file")]


def training(f):
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def on(x):
        def step():
            loss = f(model(x)).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return {"loss": loss}
        return step
    return model, on


def reference():
    torch.manual_seed(0)
    model, step_on = training(lambda h: h * 2)
    x = torch.randn(5, 4)
    return tv.Training(model, step_on(x), batch=x)


def parallel(ref, factor: int = 2):
    model, step_on = training(lambda h: scaled(h, factor))
    model.load_state_dict(ref.weights)
    return tv.Training(model, step_on(ref.batch))
