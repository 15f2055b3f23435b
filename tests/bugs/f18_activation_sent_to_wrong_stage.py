"""TrainVerify's collection, bug 6 (github.com/verify-llm/TrainVerify): a move of an activation between pipeline stages names the wrong
source and destination. Here two pipelines share the stages' ranks; the second one's activations travel from the first stage of
the one to the second stage of the other."""
import torch
import torch.distributed as dist
from kit import HIDDEN, Net, Stage, clip_stage, loss_of, mesh_of, rows_of, single, sum_grads, total, training, valid

RANKS = 6
BUG = {"id": "F18", "link": "https://github.com/verify-llm/TrainVerify", "diagnosis": "permutation",
       "missed": ["diagnosis"], "line": "dist.recv(x, source)", "also": ["dist.send(y.detach(), target)", "return F.cross_entropy("]}


def reference():
    return single(lambda: Net(layers=2))


def forward_move(rank, replicas, fixed):
    """Stage 0 is ranks 0 to replicas - 1, stage 1 the others: the rank at the other end of the forward move."""
    replica = rank % replicas
    if rank < replicas:
        return replicas + (replica if fixed else (replica + 1) % replicas)
    return replica if fixed else (replica - 1) % replicas


def parallel(ref, fixed=False):
    mesh = mesh_of(pp=2, dp=3)
    pp, dp = mesh.get_group("pp"), mesh.get_group("dp")
    rank = dist.get_rank()
    stage = Stage(pp.rank(), 2, 2).take(ref.weights)
    tokens, labels = rows_of(ref.batch, dp)
    backward_peer = forward_move(rank, 3, True)

    def run():
        if stage.first:
            target = forward_move(rank, 3, fixed)
            y = stage(tokens)
            dist.send(y.detach(), target)
            grad = torch.empty_like(y)
            dist.recv(grad, backward_peer)
            y.backward(grad)
            return {}
        source = forward_move(rank, 3, fixed)
        x = torch.empty(*tokens.shape, HIDDEN)
        dist.recv(x, source)
        x.requires_grad_()
        loss = loss_of(stage(x), labels, "sum") / total(valid(labels), dp)
        loss.backward()
        dist.send(x.grad, backward_peer)
        return {"loss": total(loss, dp)}

    def backward():
        reported = run()
        sum_grads(stage.parameters(), dp)
        return reported

    return training(stage, backward, clip=lambda ps: clip_stage(ps, ps, pp))
