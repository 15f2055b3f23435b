"""Small pieces that the specs of real bugs share: a tiny model, its data and step, and building blocks of every form of parallelism.

Sizes differ wherever they may, every row counts another number of tokens, clipping binds and the learning rate is not 0.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import trainverify as tv

VOCAB, HIDDEN, FFN, HEADS, HEAD_DIM, LENGTH, ROWS, IGNORE = 14, 8, 18, 6, 5, 12, 6, -100
EXPERTS, TOP_K = 6, 2
MAX_NORM = 0.1


# ---- model

class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, FFN), nn.Linear(FFN, HIDDEN)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Attention(nn.Module):
    """Causal attention of `heads` heads; `attend` gets (rows, heads, sequence, head_dim)."""

    def __init__(self, heads=HEADS):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(HIDDEN, heads * HEAD_DIM) for _ in range(3))
        self.out = nn.Linear(heads * HEAD_DIM, HIDDEN, bias=False)

    def forward(self, x):
        q, k, v = (w(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for w in (self.q, self.k, self.v))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Moe(nn.Module):
    """Top-k experts of a softmax router. `run` takes all tokens and the weight of every (token, expert), 0 where not chosen."""

    def __init__(self, experts=EXPERTS, ffn=FFN):
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.w1, self.w2 = nn.Parameter(torch.randn(experts, HIDDEN, ffn) / 3), nn.Parameter(torch.randn(experts, ffn, HIDDEN) / 4)

    def route(self, x):
        scores = self.router(x).softmax(-1)
        return scores, torch.zeros_like(scores).scatter(-1, scores.topk(TOP_K).indices, 1.0)

    def forward(self, x):
        scores, chosen = self.route(x)
        return self.run(x, scores * chosen)

    def run(self, x, weights):
        """All experts that this module holds, over all tokens, by weight: (..., experts)."""
        y = torch.einsum("...h,ehf->...ef", x, self.w1).relu()
        return torch.einsum("...ef,efh,...e->...h", y, self.w2, weights)


class Block(nn.Module):
    """attention: a function that makes one, or None."""

    def __init__(self, mlp=Mlp, norm=nn.LayerNorm, attention=None):
        super().__init__()
        if attention:
            self.norm1, self.attention = norm(HIDDEN), attention()
        self.norm2, self.mlp = norm(HIDDEN), mlp()

    def forward(self, x):
        if hasattr(self, "attention"):
            x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Net(nn.Module):
    def __init__(self, mlp=Mlp, norm=nn.LayerNorm, attention=None, layers=1, tied=False):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Block(mlp, norm, attention) for _ in range(layers))
        self.norm, self.head = norm(HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.norm(self.hidden(self.embed(tokens))))

    def hidden(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


# ---- data, loss, step

def make_batch(rows=ROWS, length=LENGTH):
    """Every row counts another number of tokens than the one before it, and every token id occurs."""
    generator = torch.Generator().manual_seed(5)
    text = torch.cat([torch.randperm(VOCAB, generator=generator) for _ in range(rows)])[: rows * (length + 1)].view(rows, length + 1)
    labels = text[:, 1:].clone()
    for row in range(rows):
        labels[row, : (row * 2 + 1) % 5] = IGNORE
    return {"tokens": text[:, :-1].contiguous(), "labels": labels}


def loss_of(logits, labels, reduction="mean"):
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction=reduction)


def valid(labels):
    return (labels != IGNORE).sum()


def adamw(parameters, fused=True):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, fused=fused)


def clip(parameters):
    return nn.utils.clip_grad_norm_(parameters, MAX_NORM)


def clip_sharded(parameters, sharded, group):
    """Clips by the norm of the whole model: `sharded` are one rank's shards, everything else is replicated."""
    square = nn.utils.get_total_norm([p.grad for p in sharded]) ** 2
    dist.all_reduce(square, group=group)
    rest = [p.grad for p in parameters if not any(p is s for s in sharded)]
    norm = (square + nn.utils.get_total_norm(rest) ** 2).sqrt()
    nn.utils.clip_grads_with_norm_(parameters, MAX_NORM, norm)
    return norm


def training(model, backward, optimizer=None, clip=clip, batch=None):
    """backward() runs forward and backward, brings gradients in order, and returns the reported loss (or a dict of scalars)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or adamw(parameters)

    def step():
        reported = backward()
        reported = reported if isinstance(reported, dict) else {"loss": reported}
        if clip:
            reported["norm"] = clip(parameters)
        optimizer.step()
        optimizer.zero_grad()
        return reported

    return tv.Training(model, step, batch=batch)


def single(make=Net, loss=None, batch=None, **options):
    """The reference: one device, the whole batch, the mean over the tokens that count (or loss(model, batch))."""
    torch.manual_seed(0)
    model, batch = make(), batch or make_batch()
    loss = loss or (lambda model, batch: loss_of(model(batch["tokens"]), batch["labels"]))

    def backward():
        value = loss(model, batch)
        value.backward()
        return value

    return training(model, backward, batch=batch, **options)


# ---- ranks and shards

def mesh_of(**sizes):
    """A mesh with named axes, outermost first: mesh_of(dp=3, tp=2). Starts torch.distributed."""
    dist.init_process_group("nccl")
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def part(x, group, dim=0):
    """This rank's part of x."""
    return x.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)].contiguous()


def rows_of(batch, group):
    """This rank's rows of the batch: tokens, labels."""
    return part(batch["tokens"], group), part(batch["labels"], group)


TP_SHARDS = {"up.weight": 0, "up.bias": 0, "down.weight": 1, "q.weight": 0, "k.weight": 0, "v.weight": 0,
             "q.bias": 0, "k.bias": 0, "v.bias": 0, "out.weight": 1}
EP_SHARDS = {"w1": 0, "w2": 0}


def load(model, weights, group=None, shards=()):
    """Loads the reference's weights; of a name that ends in one of `shards` ({suffix: dim}) only this rank's part of the group."""
    dims = {name: next((shards[s] for s in shards if ("." + name).endswith("." + s)), None) for name in weights}
    model.load_state_dict({name: w if dims[name] is None else part(w, group, dims[name]) for name, w in weights.items()})
    return model


def sharded(model, shards=TP_SHARDS):
    return [p for name, p in model.named_parameters() if any(("." + name).endswith("." + s) for s in shards)]


def replicated(model, shards=TP_SHARDS):
    return [p for name, p in model.named_parameters() if not any(("." + name).endswith("." + s) for s in shards)]


def total(x, group=None):
    """The sum over a group, outside of autograd."""
    x = x.detach().clone()
    dist.all_reduce(x, group=group)
    return x


def sum_grads(parameters, group):
    for p in parameters:
        dist.all_reduce(p.grad, group=group)


def mean_grads(parameters, group):
    for p in parameters:
        dist.all_reduce(p.grad, group=group)
        p.grad /= dist.get_world_size(group)


# ---- communication with a backward

def all_gather(x, group, dim=0):
    out = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(out, x.contiguous(), group=group)
    return torch.cat(out, dim)


def reduce_scatter(x, group, dim=0):
    parts = [p.contiguous() for p in x.chunk(dist.get_world_size(group), dim)]
    out = torch.empty_like(parts[0])
    dist.reduce_scatter(out, parts, group=group)
    return out


class Copy(torch.autograd.Function):
    """The same value into a region that every rank computes a share of: identity, and a sum in the backward."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return total(grad, ctx.group), None


class Reduce(torch.autograd.Function):
    """The sum of the shares: an all-reduce, and the identity in the backward."""

    @staticmethod
    def forward(ctx, x, group):
        return total(x, group)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Gather(torch.autograd.Function):
    """The whole from its parts. The backward sums over the ranks if each computes a share from the whole, else it only cuts."""

    @staticmethod
    def forward(ctx, x, group, dim, shares):
        ctx.group, ctx.dim, ctx.shares = group, dim, shares
        return all_gather(x, group, dim)

    @staticmethod
    def backward(ctx, grad):
        return (reduce_scatter if ctx.shares else part)(grad, ctx.group, ctx.dim), None, None, None


class Scatter(torch.autograd.Function):
    """This rank's part of a whole that all ranks have; the backward gathers."""

    @staticmethod
    def forward(ctx, x, group, dim):
        ctx.group, ctx.dim = group, dim
        return part(x, group, dim)

    @staticmethod
    def backward(ctx, grad):
        return all_gather(grad, ctx.group, ctx.dim), None, None


class ReduceScatter(torch.autograd.Function):
    """Each rank's part of the sum of the shares; the backward gathers."""

    @staticmethod
    def forward(ctx, x, group, dim):
        ctx.group, ctx.dim = group, dim
        return reduce_scatter(x, group, dim)

    @staticmethod
    def backward(ctx, grad):
        return all_gather(grad, ctx.group, ctx.dim), None, None


class AllToAll(torch.autograd.Function):
    """Splits dimension `cut`, sends part i to rank i, and joins what arrives along `join`."""

    @staticmethod
    def forward(ctx, x, group, cut, join):
        ctx.group, ctx.cut, ctx.join = group, cut, join
        parts = [p.contiguous() for p in x.chunk(dist.get_world_size(group), cut)]
        arrived = [torch.empty_like(p) for p in parts]
        dist.all_to_all(arrived, parts, group=group)
        return torch.cat(arrived, join)

    @staticmethod
    def backward(ctx, grad):
        return AllToAll.apply(grad, ctx.group, ctx.join, ctx.cut), None, None, None


# ---- tensor and sequence parallelism

class TpMlp(nn.Module):
    """Column then row parallel. sequence: the activations outside are this rank's part of the sequence (dimension 1)."""

    def __init__(self, tp, sequence=False):
        super().__init__()
        self.tp, self.sequence, own = tp, sequence, FFN // dist.get_world_size(tp)
        self.up, self.down = nn.Linear(HIDDEN, own), nn.Linear(own, HIDDEN)

    def forward(self, x):
        x = Gather.apply(x, self.tp, 1, True) if self.sequence else Copy.apply(x, self.tp)
        y = F.linear(F.gelu(self.up(x)), self.down.weight)
        y = ReduceScatter.apply(y, self.tp, 1) if self.sequence else Reduce.apply(y, self.tp)
        return y + self.down.bias


class TpAttention(Attention):
    """This rank's heads; the activations outside are whole."""

    def __init__(self, tp):
        super().__init__(HEADS // dist.get_world_size(tp))
        self.tp = tp

    def forward(self, x):
        return Reduce.apply(super().forward(Copy.apply(x, self.tp)), self.tp)


class SequenceNet(Net):
    """Sequence parallelism: embedding, norms and residuals see this rank's part of the sequence, the head sees all of it."""

    def __init__(self, tp, **options):
        super().__init__(**options)
        self.tp = tp

    def forward(self, tokens):
        x = self.norm(self.hidden(self.embed(part(tokens, self.tp, 1))))
        return self.head(Gather.apply(x, self.tp, 1, False))


def mark(*parameters):
    """Says that the gradient is a share of this rank's part of the sequence; `finalize` looks for the mark."""
    for p in parameters:
        p.sequence_parallel = True


def finalize(model, tp, dp):
    """After the backward: sums the gradients of marked parameters over tp, and all gradients over dp."""
    marked = [p for p in model.parameters() if getattr(p, "sequence_parallel", False)]
    sum_grads(marked, tp)
    sum_grads(model.parameters(), dp)


def tp_training(ref, model, dp, tp, after=None, shards=TP_SHARDS):
    """Every dp rank trains on its rows; after() brings the gradients together (by default, sums over dp)."""
    tokens, labels = rows_of(ref.batch, dp)

    def backward():
        loss = loss_of(model(tokens), labels, "sum") / total(valid(labels), dp)
        loss.backward()
        after() if after else sum_grads(model.parameters(), dp)
        return total(loss, dp)

    return training(model, backward, clip=lambda ps: clip_sharded(ps, sharded(model, shards), tp))


# ---- context parallelism

class ContextAttention(Attention):
    """This rank's part of the sequence as queries, the keys and values of all of it."""

    def __init__(self, cp):
        super().__init__()
        self.cp = cp

    def attend(self, q, k, v):
        k, v = Gather.apply(k, self.cp, 2, True), Gather.apply(v, self.cp, 2, True)
        mask = part(torch.ones(k.shape[2], k.shape[2], dtype=torch.bool).tril(), self.cp)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def cp_shares(batch, dp, cp):
    """This rank's rows, and of them its part of the sequence: tokens, labels."""
    return [part(x, cp, 1) for x in rows_of(batch, dp)]


# ---- expert parallelism

class EpMoe(Moe):
    """Every rank has its own tokens and its own experts: all tokens travel to all ranks, which return the sum over experts."""

    def __init__(self, ep):
        super().__init__(EXPERTS // dist.get_world_size(ep))
        self.ep = ep

    def run(self, x, weights):
        x, weights = Gather.apply(x, self.ep, 0, True), Gather.apply(weights, self.ep, 0, True)
        y = super().run(x, weights.chunk(dist.get_world_size(self.ep), -1)[dist.get_rank(self.ep)])
        return ReduceScatter.apply(y, self.ep, 0)


def ep_training(ref, model, ep, reduce_experts, shards=EP_SHARDS):
    """Data parallel over all ranks, experts over ep: losses count world times and dense gradients are averaged, as DDP has it. What
    reduce_experts(parameters) does to the experts' gradients, which cover the tokens of all ep ranks, is the caller's."""
    tokens, labels = rows_of(ref.batch, None)
    experts, dense = ([p for p in ps if p.requires_grad] for ps in (sharded(model, shards), replicated(model, shards)))

    def backward():
        loss = loss_of(model(tokens), labels, "sum") / total(valid(labels))
        (loss * dist.get_world_size()).backward()
        mean_grads(dense, None)
        reduce_experts(experts)
        return total(loss)

    return training(model, backward, clip=lambda ps: clip_sharded(ps, experts, ep))


# ---- pipelines

class Stage(nn.Module):
    """Stage `rank` of `n`: an equal share of the layers, the embedding in the first, norm and head in the last."""

    def __init__(self, rank, n, layers, mlp=Mlp):
        super().__init__()
        self.first, self.last = rank == 0, rank == n - 1
        each = layers // n
        self.layers = nn.ModuleDict({str(rank * each + i): Block(mlp) for i in range(each)})
        if self.first:
            self.embed = nn.Embedding(VOCAB, HIDDEN)
        if self.last:
            self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, x):
        x = self.embed(x) if self.first else x
        for layer in self.layers.values():
            x = layer(x)
        return self.head(self.norm(x)) if self.last else x

    def take(self, weights):
        """Loads this stage's part of the reference's weights."""
        self.load_state_dict({k: weights[k] for k in self.state_dict()})
        return self


def clip_stage(parameters, counted, pp):
    """Clips by the norm over all stages; `counted` are the parameters that count on this one (a tied copy does not)."""
    square = nn.utils.get_total_norm([p.grad for p in counted]) ** 2
    dist.all_reduce(square, group=pp)
    norm = square.sqrt()
    nn.utils.clip_grads_with_norm_(parameters, MAX_NORM, norm)
    return norm


def gpipe(stage, microbatches, loss_of_microbatch):
    """All forwards, then all backwards; the neighbours in the world are the next stages. Returns the losses (the last stage's)."""
    rank = dist.get_rank()
    kept, losses = [], []
    for tokens, labels in microbatches:
        x = tokens
        if not stage.first:
            x = torch.empty(*tokens.shape, HIDDEN)
            dist.recv(x, rank - 1)
            x.requires_grad_()
        y = stage(x)
        if stage.last:
            y = loss_of_microbatch(y, labels)
            losses.append(y.detach())
        else:
            dist.send(y.detach(), rank + 1)
        kept.append((x, y))
    for x, y in kept:
        grad = None
        if not stage.last:
            grad = torch.empty_like(y)
            dist.recv(grad, rank + 1)
        y.backward(grad)
        if not stage.first:
            dist.send(x.grad, rank - 1)
    return losses
