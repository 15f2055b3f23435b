"""Tensor and sequence parallelism written by hand, as Megatron-LM does it: 2 ranks.

Activations are (sequence, batch, hidden), sharded over the sequence outside of the linear layers. Queries, keys and
values are one fused weight, gate and up another. The norm weights are replicated but each rank sees only its part of
the sequence, so their gradients are summed over the ranks.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import trainverify as tv
from models.llama import IGNORE, Config, Llama, RMSNorm, apply_rope, random_batch, rope_table, token_loss

RANKS = 2
CONFIG = Config()
MAX_NORM = 0.5


def reference():
    torch.manual_seed(0)
    model = Llama(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    batch = random_batch(rows=3, length=8, vocab=CONFIG.vocab)

    def step():
        loss = token_loss(model(batch["tokens"]), batch["labels"])
        loss.backward()
        norm = sum_of_squares(model.parameters()).sqrt().item()
        scale_gradients(model.parameters(), norm)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss, "grad_norm": norm}

    return tv.Training(model, step, batch=batch)


def sum_of_squares(parameters):
    return torch.stack([p.grad.pow(2).sum() for p in parameters]).sum()


def scale_gradients(parameters, norm):
    coefficient = MAX_NORM / (norm + 1e-6)
    if coefficient < 1.0:
        for p in parameters:
            p.grad.mul_(coefficient)


def shard(x, dim=0):
    """This rank's part of a full tensor."""
    return x.chunk(dist.get_world_size(), dim)[dist.get_rank()]


def all_gather(x, async_op=False):
    out = x.new_empty(x.shape[0] * dist.get_world_size(), *x.shape[1:])
    work = dist.all_gather_into_tensor(out, x.contiguous(), async_op=async_op)
    return (out, work) if async_op else out


def reduce_scatter(x):
    out = x.new_empty(x.shape[0] // dist.get_world_size(), *x.shape[1:])
    dist.reduce_scatter_tensor(out, x.contiguous())
    return out


class ColumnLinear(torch.autograd.Function):
    """The whole sequence times this rank's rows of the weight; the sequence is gathered again for the backward."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(all_gather(x), weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        gathered, work = all_gather(x, async_op=True)
        grad_input = reduce_scatter(grad @ weight)            # meanwhile
        work.wait()
        grad_weight = grad.flatten(0, 1).T @ gathered.flatten(0, 1)
        return grad_input, grad_weight


class ReduceScatter(torch.autograd.Function):
    """Sum over the ranks, each keeping its part of the sequence."""

    @staticmethod
    def forward(ctx, x):
        return reduce_scatter(x)

    @staticmethod
    def backward(ctx, grad):
        return all_gather(grad)


class VocabularyLoss(torch.autograd.Function):
    """Cross-entropy of every token, from logits of this rank's part of the vocabulary."""

    @staticmethod
    def forward(ctx, logits, labels):
        largest = logits.amax(-1, keepdim=True)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        logits = logits - largest
        local = labels - dist.get_rank() * logits.shape[-1]
        elsewhere = (local < 0) | (local >= logits.shape[-1])
        index = local.masked_fill(elsewhere, 0).unsqueeze(-1)
        target = logits.gather(-1, index).squeeze(-1).masked_fill(elsewhere, 0.0)
        dist.all_reduce(target)
        exponentials = logits.exp()
        total = exponentials.sum(-1)
        dist.all_reduce(total)
        ctx.save_for_backward(exponentials / total.unsqueeze(-1), index, elsewhere)
        return total.log() - target

    @staticmethod
    def backward(ctx, grad):
        probabilities, index, elsewhere = ctx.saved_tensors
        hit = torch.ones_like(grad).masked_fill(elsewhere, 0.0).unsqueeze(-1)
        return probabilities.scatter_add(-1, index, -hit) * grad.unsqueeze(-1), None


class ParallelBlock(nn.Module):
    def __init__(self, config, column_linear):
        super().__init__()
        world = dist.get_world_size()
        self.config, self.column_linear = config, column_linear
        heads, kv_heads = config.heads // world, config.kv_heads // world
        self.attention_norm = RMSNorm(config.hidden)
        self.qkv = nn.Parameter(torch.empty((heads + 2 * kv_heads) * config.head_dim, config.hidden))
        self.wo = nn.Parameter(torch.empty(config.hidden, heads * config.head_dim))
        self.mlp_norm = RMSNorm(config.hidden)
        self.gate_up = nn.Parameter(torch.empty(2 * config.ffn // world, config.hidden))
        self.down = nn.Parameter(torch.empty(config.hidden, config.ffn // world))

    def forward(self, x, cos, sin):
        x = x + ReduceScatter.apply(F.linear(self.attend(self.attention_norm(x), cos, sin), self.wo))
        gate, up = self.column_linear.apply(self.mlp_norm(x), self.gate_up).chunk(2, dim=-1)
        return x + ReduceScatter.apply(F.linear(F.silu(gate) * up, self.down))

    def attend(self, x, cos, sin):
        group = self.config.heads // self.config.kv_heads
        qkv = self.column_linear.apply(x, self.qkv)                                    # (s, b, this rank's heads)
        qkv = qkv.unflatten(-1, (-1, group + 2, self.config.head_dim)).permute(1, 2, 3, 0, 4)
        q, k, v = qkv.split((group, 1, 1), dim=2)                                      # (b, kv head, group, s, d)
        q, k = apply_rope(q, cos, sin).flatten(1, 2), apply_rope(k, cos, sin)
        k, v = (t.expand(-1, -1, group, -1, -1).flatten(1, 2) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.permute(2, 0, 1, 3).flatten(2)


class ParallelLlama(nn.Module):
    column_linear = ColumnLinear

    def __init__(self, config):
        super().__init__()
        self.config = config
        vocab = config.vocab // dist.get_world_size()
        self.embed = nn.Parameter(torch.empty(vocab, config.hidden))
        self.layers = nn.ModuleList(ParallelBlock(config, self.column_linear) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden)
        self.head = nn.Parameter(torch.empty(vocab, config.hidden))

    def forward(self, tokens, labels):
        """The sum of the losses of all tokens; both arguments are (sequence, batch)."""
        cos, sin = rope_table(torch.arange(tokens.shape[0]), self.config.head_dim)
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = self.column_linear.apply(self.norm(x), self.head)
        return (VocabularyLoss.apply(logits, labels) * (labels != IGNORE)).sum()

    def embedding(self, tokens):
        local = tokens - dist.get_rank() * self.embed.shape[0]
        elsewhere = (local < 0) | (local >= self.embed.shape[0])
        x = F.embedding(local.masked_fill(elsewhere, 0), self.embed)
        return ReduceScatter.apply(x.masked_fill(elsewhere.unsqueeze(-1), 0.0))

    def load(self, weights):
        """Take this rank's part of the reference's weights."""
        own = {"embed": shard(weights["embed.weight"]), "head": shard(weights["head.weight"]),
               "norm.weight": weights["norm.weight"]}
        for i in range(self.config.layers):
            layer = f"layers.{i}"
            q, k, v, o = (weights[f"{layer}.attention.w{x}.weight"] for x in "qkvo")
            gate, up, down = (weights[f"{layer}.mlp.{x}.weight"] for x in ("gate", "up", "down"))
            own |= {f"{layer}.qkv": self.fuse_qkv(q, k, v), f"{layer}.wo": shard(o, dim=1),
                    f"{layer}.gate_up": self.fuse_gate_up(gate, up), f"{layer}.down": shard(down, dim=1)}
            own |= {f"{layer}.{x}.weight": weights[f"{layer}.{x}.weight"] for x in ("attention_norm", "mlp_norm")}
        self.load_state_dict(own)

    def fuse_qkv(self, q, k, v):
        """For each key-value head of this rank: its query heads, its key, its value."""
        groups = torch.cat([w.unflatten(0, (self.config.kv_heads, -1)) for w in (q, k, v)], dim=1)
        return shard(groups).flatten(0, 1)

    def fuse_gate_up(self, gate, up):
        return torch.cat((shard(gate), shard(up)))

    def norm_weights(self):
        return [p for name, p in self.named_parameters() if name.endswith("norm.weight")]

    def sync_norm_grads(self):
        """Sum the shares that each rank computed from its part of the sequence."""
        for p in self.norm_weights():
            dist.all_reduce(p.grad)

    def grad_norm(self):
        """The norm over the whole model: replicated parameters count once."""
        replicated = set(self.norm_weights())
        first = dist.get_rank() == 0
        square = sum_of_squares([p for p in self.parameters() if first or p not in replicated])
        dist.all_reduce(square)
        return square.sqrt().item()


def parallel(ref, model_class=ParallelLlama):
    dist.init_process_group("nccl")
    model = model_class(CONFIG)
    model.load(ref.weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    tokens, labels = (ref.batch[k].T.contiguous() for k in ("tokens", "labels"))

    def step():
        loss = model(tokens, labels) / (labels != IGNORE).sum()
        loss.backward()
        model.sync_norm_grads()
        norm = model.grad_norm()
        scale_gradients(model.parameters(), norm)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss, "grad_norm": norm}

    return tv.Training(model, step)
