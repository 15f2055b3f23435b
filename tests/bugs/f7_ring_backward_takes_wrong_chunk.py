"""Megatron-LM issue 1464 (TransformerEngine issue 1557): the backward of attention with a ring of keys and values gave wrong gradients of
queries, keys and values, up to a relative error of 1.2, while the forward was right. Here the backward goes round the ring once
more and, for each block that arrives, takes the attention weights of the block of the step before."""
import torch
import torch.distributed as dist
from kit import HEAD_DIM, Attention, Net, load, loss_of, mesh_of, single, sum_grads, total, training, valid

RANKS = 3
BUG = {"id": "F7", "link": "https://github.com/NVIDIA/Megatron-LM/issues/1464", "diagnosis": "other",
       "line": "p = weights[", "also": ["grad_v = grad_v + p.mT @ grad", "ds = p * (grad @ v.mT - delta)"]}


def rotate(block, cp):
    """To the next rank; what the one before had arrives."""
    n, rank = cp.size(), cp.rank()
    arrived = torch.empty_like(block)
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, block.contiguous(), (rank + 1) % n),
                                        dist.P2POp(dist.irecv, arrived, (rank - 1) % n)]):
        work.wait()
    return arrived


class RingAttention(torch.autograd.Function):
    """Blocks of keys and values pass by; the weights of each block are kept for the backward, in the order of the steps."""

    @staticmethod
    def forward(ctx, q, k, v, cp, fixed):
        n, rank, length = cp.size(), cp.rank(), q.shape[2]
        scores, values, kv = [], [], torch.stack((k, v))
        place = torch.arange(length)
        for step in range(n):
            sender = (rank - step) % n
            causal = rank * length + place.unsqueeze(-1) >= sender * length + place
            scores.append((q @ kv[0].mT * HEAD_DIM ** -0.5).masked_fill(~causal, -torch.inf))
            values.append(kv[1])
            kv = rotate(kv, cp)
        weights = torch.cat(scores, -1).softmax(-1).chunk(n, -1)
        out = sum(w @ x for w, x in zip(weights, values))
        ctx.save_for_backward(q, k, v, out, *weights)
        ctx.cp, ctx.fixed = cp, fixed
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, *weights = ctx.saved_tensors
        n, delta = ctx.cp.size(), (grad * out).sum(-1, keepdim=True)
        grad_q, block = torch.zeros_like(q), torch.stack((k, v, torch.zeros_like(k), torch.zeros_like(v)))
        for step in range(n):
            k, v, grad_k, grad_v = block
            p = weights[step if ctx.fixed else step - 1]
            ds = p * (grad @ v.mT - delta) * HEAD_DIM ** -0.5
            grad_q = grad_q + ds @ k
            grad_k = grad_k + ds.mT @ q
            grad_v = grad_v + p.mT @ grad
            block = rotate(torch.stack((k, v, grad_k, grad_v)), ctx.cp)
        return grad_q, block[2], block[3], None, None


class ContextAttention(Attention):
    def __init__(self, cp, fixed):
        super().__init__()
        self.cp, self.fixed = cp, fixed

    def attend(self, q, k, v):
        return RingAttention.apply(q, k, v, self.cp, self.fixed)


def reference():
    return single(lambda: Net(attention=Attention))


def parallel(ref, fixed=False):
    mesh = mesh_of(cp=3)
    cp = mesh.get_group()
    model = load(Net(attention=lambda: ContextAttention(cp, fixed)), ref.weights)
    tokens, labels = (t.chunk(RANKS, 1)[cp.rank()].contiguous() for t in (ref.batch["tokens"], ref.batch["labels"]))

    def backward():
        loss = loss_of(model(tokens), labels, "sum") / total(valid(labels))
        loss.backward()
        sum_grads(model.parameters(), None)
        return total(loss)

    return training(model, backward)
