"""verl issue 7493: the mesh has an axis of replicas and one of shards, and fsdp_size=1 makes the latter's size 1. Hybrid sharding then falls back
to no sharding, and FSDP reduces gradients over the axis of shards alone, so that the replicas are never brought together."""
from kit import Net, load, loss_of, mesh_of, rows_of, single, total, training, valid
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

RANKS = 3
BUG = {"id": "A24", "link": "https://github.com/verl-project/verl/issues/7493", "diagnosis": "partial sum",
       "line": "(loss * mesh.size()).backward()", "also": ["return nn.utils.clip_grad_norm_(parameters, MAX_NORM)",
                                                           "return self.head(self.norm(self.hidden(self.embed(tokens))))"]}
reference = single


def parallel(ref, fixed=False):
    mesh = mesh_of(ddp=3, fsdp=1)
    strategy = ShardingStrategy.NO_SHARD if fixed else ShardingStrategy.HYBRID_SHARD
    model = FullyShardedDataParallel(load(Net(), ref.weights), device_mesh=mesh["ddp"] if fixed else mesh, sharding_strategy=strategy,
                                     use_orig_params=True)
    tokens, labels = rows_of(ref.batch, None)

    def backward():
        loss = loss_of(model(tokens), labels, "sum") / total(valid(labels))
        (loss * mesh.size()).backward()
        return total(loss)

    return training(model, backward)
