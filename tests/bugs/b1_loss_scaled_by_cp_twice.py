"""Megatron-LM issue 673: with context parallelism the loss was multiplied by the number of context-parallel ranks, to make up for the
average that follows. With a loss per token that average is left out (gradients are summed and divided by all tokens), and the
factor stayed."""
from kit import Attention, ContextAttention, Net, cp_shares, load, loss_of, make_batch, mesh_of, single, sum_grads, total, training, valid

RANKS = 6
BUG = {"id": "B1", "link": "https://github.com/NVIDIA/Megatron-LM/issues/673", "diagnosis": "multiple",
       "line": "(loss_sum * scale).backward()",
       "also": ["p.grad /= tokens", "sum_grads(model.parameters(), group)", "return F.cross_entropy(",
                "return nn.utils.clip_grad_norm_(parameters, MAX_NORM)"]}


def reference():
    return single(lambda: Net(attention=Attention), batch=make_batch(8, 6))


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=2, cp=3)
    dp, cp, group = mesh.get_group("dp"), mesh.get_group("cp"), mesh._flatten("dp_cp").get_group()
    model = load(Net(attention=lambda: ContextAttention(cp)), ref.weights)
    inputs, labels = cp_shares(ref.batch, dp, cp)
    scale = 1 if fixed else cp.size()

    def backward():
        loss_sum = loss_of(model(inputs), labels, "sum")
        (loss_sum * scale).backward()
        tokens = total(valid(labels), group)
        sum_grads(model.parameters(), group)
        for p in model.parameters():
            p.grad /= tokens
        return total(loss_sum, group) / tokens

    return training(model, backward)
