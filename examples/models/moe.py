"""A mixture of experts for the Llama of this folder: top-2 routing with a selection bias, as in DeepSeek-V3."""
import torch
import torch.nn.functional as F
from torch import nn


class Experts(nn.Module):
    """SwiGLU experts, stacked: the whole model's or one rank's."""

    def __init__(self, number, hidden, ffn):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(number, hidden, ffn) * hidden ** -0.5)
        self.up = nn.Parameter(torch.randn(number, hidden, ffn) * hidden ** -0.5)
        self.down = nn.Parameter(torch.randn(number, ffn, hidden) * ffn ** -0.5)

    def forward(self, x, counts):
        """x: tokens sorted by expert; counts: how many each expert gets."""
        weights = zip(self.gate.unbind(), self.up.unbind(), self.down.unbind())
        return torch.cat([(F.silu(part @ gate) * (part @ up)) @ down
                          for part, (gate, up, down) in zip(x.split(counts), weights)])


class MoE(nn.Module):
    """Takes the place of a block's MLP."""

    number, top_k, ffn = 12, 2, 7
    experts_here = number

    def __init__(self, config):
        super().__init__()
        self.router = nn.Linear(config.hidden, self.number, bias=False)
        self.register_buffer("selection_bias", torch.linspace(-0.02, 0.02, self.number))
        self.experts = Experts(self.experts_here, config.hidden, self.ffn)

    def forward(self, x):
        tokens = x.flatten(0, 1)
        weights, chosen = self.route(tokens)
        order = chosen.flatten().argsort(stable=True)                    # slots of tokens, by expert
        counts = chosen.flatten().bincount(minlength=self.number)
        out = self.run_experts(tokens[order // self.top_k], counts)
        out = out * weights.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(tokens).index_add(0, order // self.top_k, out).view_as(x)

    def route(self, tokens):
        """For each token the weights of its experts, and which they are: the bias selects but does not weigh."""
        scores = self.router(tokens).softmax(-1)
        chosen = (scores + self.selection_bias).topk(self.top_k).indices
        weights = scores.gather(-1, chosen)
        return weights / weights.sum(-1, keepdim=True), chosen

    def run_experts(self, x, counts):
        return self.experts(x, counts.tolist())
