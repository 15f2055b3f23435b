"""torchtitan PR 3575: the policy trainer of its RL example cleared the gradients inside the function that runs one microbatch. Of the
accumulated microbatches only the last one's gradient reached the optimizer."""
from kit import Net, load, loss_of, make_batch, mesh_of, rows_of, single, total, training, valid
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import clip_grad_norm_

RANKS = 2
MICROBATCHES = 3
BUG = {"id": "G1", "link": "https://github.com/pytorch/torchtitan/pull/3575", "diagnosis": "additive term",
       "line": "model.zero_grad()", "also": ["loss.backward()", "return clip_grad_norm_(parameters, 0.1).full_tensor()"]}


def reference():
    return single(batch=make_batch(rows=12, length=10))


def clip(parameters):
    return clip_grad_norm_(parameters, 0.1).full_tensor()


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=2)
    model = load(Net(), ref.weights)
    fully_shard(model, mesh=mesh)
    tokens, labels = rows_of(ref.batch, None)

    def forward_backward(inputs, target, num_tokens):
        if not fixed:
            model.zero_grad()
        loss = loss_of(model(inputs), target, "sum") / num_tokens * RANKS
        loss.backward()
        return loss.detach()

    def backward():
        num_tokens = total(valid(labels))
        losses = [forward_backward(x, y, num_tokens) for x, y in zip(tokens.chunk(MICROBATCHES), labels.chunk(MICROBATCHES))]
        return total(sum(losses)) / RANKS

    return training(model, backward, clip=clip)
