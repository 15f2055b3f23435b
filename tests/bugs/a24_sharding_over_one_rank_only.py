"""verl issue 7493: the workers' mesh has an axis of replicas and one of shards. With fsdp_size=1 the model was sharded over the axis of
size 1 alone, and nothing brought the gradients of the replicas together."""
from kit import MAX_NORM, Net, load, loss_of, mesh_of, rows_of, single, total, training, valid
from torch import nn
from torch.distributed.fsdp import fully_shard

RANKS = 3
BUG = {"id": "A24", "link": "https://github.com/verl-project/verl/issues/7493", "diagnosis": "partial sum",
       "line": "(loss * mesh.size()).backward()", "also": ["nn.utils.clip_grad_norm_(parameters, MAX_NORM)", "x = x + self.mlp",
                                                           "return self.head(self.norm(self.hidden(self.embed(tokens))))"]}
reference = single


def parallel(ref, fixed=False):
    mesh = mesh_of(ddp=3, fsdp=1)
    model = load(Net(), ref.weights)
    fully_shard(model, mesh=mesh if fixed else mesh["fsdp"])
    tokens, labels = rows_of(ref.batch, None)

    def backward():
        loss = loss_of(model(tokens), labels, "sum") / total(valid(labels))
        (loss * mesh.size()).backward()
        return total(loss)

    return training(model, backward, clip=lambda ps: nn.utils.clip_grad_norm_(ps, MAX_NORM).full_tensor())
