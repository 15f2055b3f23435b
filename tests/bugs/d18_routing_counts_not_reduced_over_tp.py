"""torchtitan PR 4154: the selection bias of a router moves by how many tokens each expert got. The counts were summed over data and
context ranks before the optimizer's step, but with sequence parallelism each tensor-parallel rank routes its own tokens: the
bias followed local counts and differed between the ranks."""
import torch
from kit import EXPERTS, TOP_K, Moe, Net, adamw, load, loss_of, mesh_of, part, rows_of, single, sum_grads, total, training, valid

RANKS = 6
BUG = {"id": "D18", "link": "https://github.com/pytorch/torchtitan/pull/4154", "diagnosis": "other",
       "line": "tokens_per_expert = total(", "also": ["moe.expert_bias.add_("]}


class BalancedMoe(Moe):
    def __init__(self):
        super().__init__()
        self.register_buffer("expert_bias", torch.zeros(EXPERTS))
        self.tokens_per_expert = torch.zeros(EXPERTS)

    def route(self, x):
        scores = self.router(x).softmax(-1)
        chosen = torch.zeros_like(scores).scatter(-1, (scores + self.expert_bias).topk(TOP_K).indices, 1.0)
        self.tokens_per_expert += chosen.detach().flatten(0, -2).sum(0)
        return scores, chosen


def balanced(model, groups):
    """An optimizer that moves the biases before each step."""
    def update_expert_bias(*_):
        for layer in model.layers:
            moe, tokens_per_expert = layer.mlp, layer.mlp.tokens_per_expert
            for group in groups:
                tokens_per_expert = total(tokens_per_expert, group)
            delta = 0.01 * torch.sign(tokens_per_expert.mean() - tokens_per_expert)
            moe.expert_bias.add_(delta - delta.mean())
            moe.tokens_per_expert.zero_()

    optimizer = adamw(model.parameters())
    optimizer.register_step_pre_hook(update_expert_bias)
    return optimizer


def reference():
    torch.manual_seed(0)
    model = Net(BalancedMoe)
    return single(lambda: model, optimizer=balanced(model, []))


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=3, tp=2)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    model = load(Net(BalancedMoe), ref.weights)
    optimizer = balanced(model, [dp, tp] if fixed else [dp])
    tokens, labels = (part(t, tp, 1) for t in rows_of(ref.batch, dp))

    def backward():
        loss = loss_of(model(tokens), labels, "sum") / total(valid(labels))
        loss.backward()
        sum_grads(model.parameters(), None)
        return total(loss)

    return training(model, backward, optimizer)
