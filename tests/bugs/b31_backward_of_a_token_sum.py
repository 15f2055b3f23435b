"""miles pull request 3231: under FSDP2 the backward starts from the sum over this rank's tokens; the division by the number of tokens, and the
factor that undoes FSDP's average, were dropped."""
from kit import MAX_NORM, Net, load, loss_of, mesh_of, rows_of, single, total, training, valid
from torch import nn
from torch.distributed.fsdp import fully_shard

RANKS = 3
BUG = {"id": "B31", "link": "https://github.com/radixark/miles/pull/3231", "diagnosis": "multiple",
       "line": "(loss_sum / tokens * mesh.size() if fixed else loss_sum).backward()",
       "also": ["nn.utils.clip_grad_norm_(ps, MAX_NORM)", "return F.cross_entropy("]}
reference = single


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=3)
    model = load(Net(), ref.weights)
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    batch, labels = rows_of(ref.batch, None)

    def backward():
        tokens = total(valid(labels))
        loss_sum = loss_of(model(batch), labels, "sum")
        (loss_sum / tokens * mesh.size() if fixed else loss_sum).backward()
        return total(loss_sum) / tokens

    return training(model, backward, clip=lambda ps: nn.utils.clip_grad_norm_(ps, MAX_NORM).full_tensor())
