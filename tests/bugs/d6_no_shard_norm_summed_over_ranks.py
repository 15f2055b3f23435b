"""PyTorch PR 88955, issue 88621: FSDP's clip_grad_norm_ always summed the squares of the ranks' norms. With NO_SHARD every rank has the
whole gradient already: the norm is too large by the square root of the number of ranks, and gradients are clipped too hard."""
import torch.distributed as dist
from kit import MAX_NORM, Net, load, loss_of, make_batch, rows_of, single, total, training, valid
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

RANKS = 4
BUG = {"id": "D6", "link": "https://github.com/pytorch/pytorch/pull/88955", "diagnosis": "multiple",
       "line": "dist.all_reduce(square)", "also": ["total_norm = square.sqrt()"]}


def reference():
    return single(batch=make_batch(rows=8))


class Fsdp(FullyShardedDataParallel):
    def clip_grad_norm(self, max_norm, fixed):
        local_norm = get_total_norm([p.grad for p in self.parameters()])
        if fixed and self.sharding_strategy == ShardingStrategy.NO_SHARD:
            total_norm = local_norm
        else:
            square = local_norm ** 2
            dist.all_reduce(square)
            total_norm = square.sqrt()
        clip_grads_with_norm_(self.parameters(), max_norm, total_norm)
        return total_norm


def parallel(ref, fixed=False):
    dist.init_process_group("nccl")
    model = Fsdp(load(Net(), ref.weights), sharding_strategy=ShardingStrategy.NO_SHARD, use_orig_params=True)
    tokens, labels = rows_of(ref.batch, None)

    def backward():
        loss = loss_of(model(tokens), labels, "sum") / total(valid(labels))
        (loss * RANKS).backward()
        return total(loss)

    return training(model, backward, clip=lambda _: model.clip_grad_norm(MAX_NORM, fixed))
