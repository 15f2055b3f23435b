"""sparseml pull request 135 (also espnet issue 4136): DistributedDataParallel averages gradients over the ranks, and the loss, a mean on each rank,
is multiplied by their number all the same."""
from kit import Net, load, loss_of, make_batch, mesh_of, rows_of, single, total, training
from torch.nn.parallel import DistributedDataParallel

RANKS = 3
BUG = {"id": "B30", "link": "https://github.com/neuralmagic/sparseml/pull/135", "diagnosis": "multiple",
       "line": "loss *= scale", "also": ["loss.backward()", "return nn.utils.clip_grad_norm_(parameters, MAX_NORM)"]}


def mean_of_means(model, batch):
    return sum(loss_of(model(t), y) for t, y in zip(batch["tokens"].chunk(RANKS), batch["labels"].chunk(RANKS))) / RANKS


def reference():
    return single(loss=mean_of_means, batch=make_batch(6, 9))


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=3)
    model = DistributedDataParallel(load(Net(), ref.weights))
    tokens, labels = rows_of(ref.batch, None)
    scale = 1 if fixed else mesh.size()

    def backward():
        loss = loss_of(model(tokens), labels)
        reported = total(loss) / mesh.size()
        loss *= scale
        loss.backward()
        return reported

    return training(model.module, backward)
