"""transformers issue 39648: to make up for the average over data-parallel ranks the loss is multiplied by the number of all processes, of
which the tensor-parallel ones see the same data."""
from kit import TP_SHARDS, Net, TpMlp, clip_sharded, load, loss_of, mean_grads, mesh_of, rows_of, sharded, single, total, training, valid

RANKS = 6
BUG = {"id": "B27", "link": "https://github.com/huggingface/transformers/issues/39648", "diagnosis": "multiple",
       "line": "loss = loss_of(model(tokens), labels, \"sum\") / items * processes",
       "also": ["loss.backward()", "return total(loss, dp) / dp.size()", "p.grad /= dist.get_world_size(group)"]}
reference = single


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=3, tp=2)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    model = load(Net(mlp=lambda: TpMlp(tp)), ref.weights, tp, TP_SHARDS)
    tokens, labels = rows_of(ref.batch, dp)
    processes = dp.size() if fixed else mesh.size()

    def backward():
        items = total(valid(labels), dp)
        loss = loss_of(model(tokens), labels, "sum") / items * processes
        loss.backward()
        mean_grads(model.parameters(), dp)
        return total(loss, dp) / dp.size()

    return training(model, backward, clip=lambda ps: clip_sharded(ps, sharded(model), tp))
