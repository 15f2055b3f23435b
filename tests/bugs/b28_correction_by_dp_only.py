"""SkyRL pull request 1420: FSDP averages gradients over data- and context-parallel ranks together. The factor that undoes the average took the
data-parallel ranks only, and the reported loss counted the context-parallel ones twice."""
from kit import MAX_NORM, Attention, ContextAttention, Net, cp_shares, load, loss_of, make_batch, mesh_of, single, total, training, valid
from torch import nn
from torch.distributed.fsdp import fully_shard

RANKS = 6
BUG = {"id": "B28", "link": "https://github.com/NovaSky-AI/SkyRL/pull/1420", "diagnosis": "multiple",
       "line": "(loss * correction).backward()", "also": ["nn.utils.clip_grad_norm_(ps, MAX_NORM)", "return total(loss, everyone) * counted"]}


def reference():
    return single(lambda: Net(attention=Attention), batch=make_batch(8, 6))


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=2, cp=3)
    dp, cp, both = mesh.get_group("dp"), mesh.get_group("cp"), mesh._flatten("dp_cp")
    everyone = both.get_group()
    model = load(Net(attention=lambda: ContextAttention(cp)), ref.weights)
    fully_shard(model, mesh=both)
    tokens, labels = cp_shares(ref.batch, dp, cp)
    correction, counted = (both.size(), 1) if fixed else (dp.size(), cp.size())

    def backward():
        loss = loss_of(model(tokens), labels, "sum") / total(valid(labels), everyone)
        (loss * correction).backward()
        return total(loss, everyone) * counted

    return training(model, backward, clip=lambda ps: nn.utils.clip_grad_norm_(ps, MAX_NORM).full_tensor())
