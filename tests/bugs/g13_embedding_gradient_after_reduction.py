"""Megatron-LM issue 1012: to keep the last pipeline stage busy its output layer puts off the gradients of its weight, but these were
computed after the reduction over the data-parallel ranks had been launched. The weight's gradient stays this rank's own."""
import torch
from kit import Net, Stage, clip_stage, gpipe, loss_of, make_batch, mesh_of, rows_of, single, sum_grads, total, training, valid

RANKS = 6
MICROBATCHES = 2
BUG = {"id": "G13", "link": "https://github.com/NVIDIA/Megatron-LM/issues/1012", "diagnosis": "partial sum",
       "line": "finish_embedding_wgrad_compute()", "also": ["weight.grad += grad.flatten(0, 1).T @ x.flatten(0, 1)", "sum_grads("]}


def reference():
    return single(lambda: Net(layers=2), batch=make_batch(rows=12, length=10))


class DeferredLinear(torch.autograd.Function):
    """Keeps what the weight's gradient is made from for later."""

    @staticmethod
    def forward(ctx, x, weight, deferred):
        ctx.save_for_backward(x, weight)
        ctx.deferred = deferred
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        ctx.deferred.append((x, grad))
        return grad @ weight, None, None


class DeferringStage(Stage):
    def __init__(self, *args):
        super().__init__(*args)
        self.deferred = []

    def forward(self, x):
        if not self.last:
            return super().forward(x)
        for layer in self.layers.values():
            x = layer(x)
        return DeferredLinear.apply(self.norm(x), self.head.weight, self.deferred)


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=3, pp=2)
    dp, pp = mesh.get_group("dp"), mesh.get_group("pp")
    stage = DeferringStage(pp.rank(), 2, 2).take(ref.weights)
    tokens, labels = rows_of(ref.batch, dp)
    microbatches = list(zip(tokens.chunk(MICROBATCHES), labels.chunk(MICROBATCHES)))

    def finish_embedding_wgrad_compute():
        if stage.last:
            weight = stage.head.weight
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            for x, grad in stage.deferred:
                weight.grad += grad.flatten(0, 1).T @ x.flatten(0, 1)
            stage.deferred.clear()

    def backward():
        num_tokens = total(valid(labels), dp)
        losses = gpipe(stage, microbatches, lambda y, t: loss_of(y, t, "sum") / num_tokens)
        if fixed:
            finish_embedding_wgrad_compute()
        sum_grads([p for p in stage.parameters() if p.grad is not None], dp)
        if not fixed:
            finish_embedding_wgrad_compute()
        return {"loss": total(sum(losses), dp)} if stage.last else {}

    return training(stage, backward, clip=lambda ps: clip_stage(ps, ps, pp))
