"""Megatron-LM commit cac8d1a3f0: under sequence parallelism each tensor-parallel rank adds the z-loss of the router, a mean over its own tokens.
The gradients are summed over these ranks, and the coefficient of that loss was not divided by their number."""
from kit import EXPERTS, FFN, Gather, Moe, Net, ReduceScatter, SequenceNet, clip_sharded, finalize, load, loss_of, mark, mesh_of, rows_of, sharded, single
from kit import total, training, valid

RANKS = 6
BUG = {"id": "B10", "link": "https://github.com/NVIDIA/Megatron-LM/commit/cac8d1a3f0", "diagnosis": "additive term",
       "line": "moe.logits.logsumexp(-1)", "also": ["logits = self.router(x)", "loss = main + ", "dist.all_reduce(p.grad, group=group)",
                                                    "sum_grads(model.parameters(), dp)"],
       "missed": ["diagnosis"]}
SHARDS, COEFFICIENT = {"w1": 2, "w2": 1}, 0.5


class ZMoe(Moe):
    def route(self, x):
        self.logits = logits = self.router(x)
        scores = logits.softmax(-1)
        return scores, scores.new_zeros(scores.shape).scatter(-1, scores.topk(2).indices, 1.0)


class TpMoe(ZMoe):
    """The router sees this rank's part of the sequence; the experts, whose hidden dimension is split, see all of it."""

    def __init__(self, tp):
        super().__init__(EXPERTS, FFN // tp.size())
        self.tp = tp

    def run(self, x, weights):
        x, weights = (Gather.apply(t, self.tp, 1, True) for t in (x, weights))
        return ReduceScatter.apply(super().run(x, weights), self.tp, 1)


def z_loss(model, coefficient):
    moe = model.layers[0].mlp
    return coefficient * moe.logits.logsumexp(-1).square().mean()


def reference():
    return single(lambda: Net(mlp=ZMoe), lambda model, batch: loss_of(model(batch["tokens"]), batch["labels"]) + z_loss(model, COEFFICIENT))


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=2, tp=3)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    model = load(SequenceNet(tp, mlp=lambda: TpMoe(tp)), ref.weights, tp, SHARDS)
    mark(model.embed.weight, model.layers[0].mlp.router.weight, *model.norm.parameters(), *model.layers[0].norm2.parameters())
    tokens, labels = rows_of(ref.batch, dp)
    share = 1 / tp.size() if fixed else 1

    def backward():
        main = loss_of(model(tokens), labels, "sum") / total(valid(labels), dp)
        z = z_loss(model, COEFFICIENT / dp.size())
        loss = main + z * share
        loss.backward()
        finalize(model, tp, dp)
        return total(main, dp) + total(z) / tp.size()

    return training(model, backward, clip=lambda ps: clip_sharded(ps, sharded(model, SHARDS), tp))
