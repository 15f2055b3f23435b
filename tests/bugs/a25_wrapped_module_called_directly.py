"""Reported at https://x.com/jxmnop/status/1778520637193240892 (ranks out of sync): the training loop calls the module inside of
DistributedDataParallel, so that the wrapper never prepares its reduction and every rank keeps its own gradients."""
from kit import Net, load, loss_of, mesh_of, rows_of, single, total, training, valid
from torch.nn.parallel import DistributedDataParallel

RANKS = 3
BUG = {"id": "A25", "link": "https://x.com/jxmnop/status/1778520637193240892", "diagnosis": "partial sum",
       "line": "return nn.utils.clip_grad_norm_(parameters, MAX_NORM)", "also": ["(loss * 3).backward()", "loss = loss_of(call(tokens)",
                                                                                "return self.head(self.norm(self.hidden(self.embed(tokens))))"]}
reference = single


def parallel(ref, fixed=False):
    mesh_of(dp=3)
    model = load(Net(), ref.weights)
    wrapped = DistributedDataParallel(model)
    call = wrapped if fixed else wrapped.module
    tokens, labels = rows_of(ref.batch, None)

    def backward():
        loss = loss_of(call(tokens), labels, "sum") / total(valid(labels))
        (loss * 3).backward()
        return total(loss)

    return training(model, backward)
