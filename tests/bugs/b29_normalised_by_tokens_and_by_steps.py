"""unsloth-zoo pull request 1023: with gradient accumulation the loss is already divided by the tokens of all microbatches, and the branch that
divides by the number of accumulation steps is taken as well."""
from contextlib import nullcontext

from kit import Net, load, loss_of, make_batch, mesh_of, rows_of, single, total, training, valid
from torch.nn.parallel import DistributedDataParallel

RANKS = 2
BUG = {"id": "B29", "link": "https://github.com/unslothai/unsloth-zoo/pull/1023", "diagnosis": "multiple",
       "line": "loss = loss / steps", "also": ["(loss * 2).backward()", "return nn.utils.clip_grad_norm_(parameters, MAX_NORM)"]}
STEPS = 3


def reference():
    return single(batch=make_batch(12, 8))


def normalised(loss_sum, items, steps, fixed):
    loss = loss_sum if items is None else loss_sum / items
    if items is None or not fixed:
        loss = loss / steps
    return loss


def parallel(ref, fixed=False):
    mesh_of(dp=2)
    model = DistributedDataParallel(load(Net(), ref.weights))
    parts = list(zip(*(t.chunk(STEPS) for t in rows_of(ref.batch, None))))

    def backward():
        items, losses = total(sum(valid(labels) for _, labels in parts)), 0
        for i, (tokens, labels) in enumerate(parts):
            with model.no_sync() if i < STEPS - 1 else nullcontext():
                loss = normalised(loss_of(model(tokens), labels, "sum"), items, STEPS, fixed)
                (loss * 2).backward()
            losses += loss.detach()
        return total(losses)

    return training(model.module, backward)
