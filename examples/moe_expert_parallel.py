"""Expert parallelism over 3 ranks: tokens travel to their top-2 experts and back by all-to-all, in splits that the
router decides.

The ranks hold different rows (data parallelism) and different experts. The loss is scaled so that the average of the
ranks' gradients is right, as DDP has it; an expert already sees the tokens of all ranks, so its gradient is their sum
and is divided on the spot.
"""
import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

import trainverify as tv
from models.llama import IGNORE, Config, Llama, random_batch, token_loss
from models.moe import MoE

RANKS = 3
CONFIG = Config()
MAX_NORM = 0.5


def reference():
    torch.manual_seed(0)
    model = Llama(CONFIG, mlp=MoE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    batch = random_batch(rows=6, length=5, vocab=CONFIG.vocab)

    def step():
        loss = token_loss(model(batch["tokens"]), batch["labels"])
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss, "grad_norm": norm}

    return tv.Training(model, step, batch=batch)


class AllToAll(torch.autograd.Function):
    """Rows to the ranks; the gradients go the same way back."""

    @staticmethod
    def forward(ctx, x, to_send, to_receive):
        ctx.splits = to_receive, to_send
        out = x.new_empty(sum(to_receive), x.shape[1])
        dist.all_to_all_single(out, x.contiguous(), to_receive, to_send)
        return out

    @staticmethod
    def backward(ctx, grad):
        return AllToAll.apply(grad, *ctx.splits), None, None


class ExpertParallelMoE(MoE):
    experts_here = MoE.number // RANKS

    def run_experts(self, x, counts):
        arriving = torch.empty_like(counts)                              # by rank they come from, then by expert
        dist.all_to_all_single(arriving, counts)
        to_send, to_receive = (n.view(RANKS, -1).sum(1).tolist() for n in (counts, arriving))
        x = AllToAll.apply(x, to_send, to_receive)
        expert = torch.arange(self.experts_here).repeat(RANKS).repeat_interleave(arriving)
        order = expert.argsort(stable=True)
        out = self.experts(x[order], arriving.view(RANKS, -1).sum(0).tolist())
        return AllToAll.apply(out[order.argsort()], to_receive, to_send)


def average_expert_grads(experts):
    """The tokens of all ranks are in these gradients already."""
    for p in experts:
        p.grad /= RANKS


def parallel(ref, moe=ExpertParallelMoE, average_expert_grads=average_expert_grads):
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    model = Llama(CONFIG, mlp=moe)
    model.load_state_dict({name: w.chunk(RANKS)[rank] if ".experts." in name else w for name, w in ref.weights.items()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    dense = [p for name, p in model.named_parameters() if ".experts." not in name]
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    tokens, labels = (ref.batch[k].chunk(RANKS)[rank] for k in ("tokens", "labels"))

    def step():
        total_tokens = (labels != IGNORE).sum()
        dist.all_reduce(total_tokens)
        loss = token_loss(model(tokens), labels, reduction="sum") / total_tokens
        (loss * RANKS).backward()
        for p in dense:
            dist.all_reduce(p.grad)
            p.grad /= RANKS
        average_expert_grads(experts)
        square = get_total_norm([p.grad for p in experts]) ** 2
        dist.all_reduce(square)
        norm = (get_total_norm([p.grad for p in dense]) ** 2 + square).sqrt()
        clip_grads_with_norm_(model.parameters(), MAX_NORM, norm)
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        dist.all_reduce(loss)
        return {"loss": loss, "grad_norm": norm}

    return tv.Training(model, step)
