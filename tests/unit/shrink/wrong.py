"""Programs that are wrong at the sizes at which they are recorded, and right where every dimension has two elements (one where it divides by two)."""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

import trainverify as tv

Values = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Pair:
    """Two functions of a model with parameter w and a batch x, both of these sizes."""

    right: Callable
    wrong: Callable
    w: tuple[int, ...]
    x: tuple[int, ...]
    ranks: int = 1


class Model(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.w = nn.Parameter(torch.randn(size))


def spec(pair: Pair, wrong: bool = True) -> tuple[Callable, Callable]:
    """reference and parallel, which report one number."""
    def training(model, batch, f):
        def step():
            return {"value": f(model.w, batch["x"])}
        return tv.Training(model, step, batch)

    def reference():
        torch.manual_seed(0)
        return training(Model(pair.w), {"x": torch.randn(pair.x) + 2}, pair.right)

    def parallel(ref):
        model = Model(pair.w)
        model.load_state_dict(ref.weights)
        return training(model, ref.batch, pair.wrong if wrong else pair.right)

    return reference, parallel


def dot(w, y):
    """Every element of y counts."""
    return (w.reshape(-1) * y.reshape(-1)).sum()


def gathered(part):
    """All ranks' parts, one after the other."""
    out = torch.empty(dist.get_world_size() * part.shape[0], *part.shape[1:])
    dist.all_gather_into_tensor(out, part.contiguous())
    return out


def summed(y):
    y = y.clone()
    dist.all_reduce(y)
    return y


PAIRS: dict[str, Pair] = {}


def pair(name, right, wrong, w=(1,), x=(12,), ranks=1):
    PAIRS[name] = Pair(right, wrong, w, x, ranks)


# ---- identities of short sums
pair("power_sums_3", lambda w, x: x.sum() ** 3 + 2 * (x ** 3).sum(), lambda w, x: 3 * x.sum() * (x ** 2).sum())
pair("power_sums_of_a_function", lambda w, x: x.sigmoid().sum() ** 3 + 2 * (x.sigmoid() ** 3).sum(), lambda w, x: 3 * x.sigmoid().sum() * (x.sigmoid() ** 2).sum())
pair("power_sums_4", lambda w, x: x.sum() ** 4 + 3 * (x ** 2).sum() ** 2 + 8 * x.sum() * (x ** 3).sum(),
     lambda w, x: 6 * x.sum() ** 2 * (x ** 2).sum() + 6 * (x ** 4).sum())
pair("power_sums_5", lambda w, x: x.sum() ** 5 + 20 * x.sum() ** 2 * (x ** 3).sum() + 15 * x.sum() * (x ** 2).sum() ** 2 + 24 * (x ** 5).sum(),
     lambda w, x: 10 * x.sum() ** 3 * (x ** 2).sum() + 20 * (x ** 2).sum() * (x ** 3).sum() + 30 * x.sum() * (x ** 4).sum())
pair("pairs_are_the_ends", lambda w, x: x.sum() ** 2 - (x ** 2).sum(), lambda w, x: 2 * x[0] * x[-1])
pair("variance_is_a_difference", lambda w, x: ((x - x.mean()) ** 2).mean(), lambda w, x: (x[0] - x[-1]) ** 2 / 4)


def bracket(a, b):
    return a @ b - b @ a


pair("squares_of_commutators_commute", lambda w, x: dot(w, bracket(x[0], x[1]) @ bracket(x[0], x[1]) @ x[2]),
     lambda w, x: dot(w, x[2] @ bracket(x[0], x[1]) @ bracket(x[0], x[1])), w=(8, 8), x=(3, 8, 8))

# ---- first and last instead of all
pair("product_of_the_ends", lambda w, x: x.prod(), lambda w, x: x[0] * x[-1])
pair("norm_of_the_ends", lambda w, x: x.norm(), lambda w, x: (x[0] ** 2 + x[-1] ** 2).sqrt())
pair("logsumexp_of_the_ends", lambda w, x: x.logsumexp(0), lambda w, x: (x[0].exp() + x[-1].exp()).log())
pair("largest_of_the_ends", lambda w, x: x.amax(), lambda w, x: torch.maximum(x[0], x[-1]))
pair("softmax_over_the_ends", lambda w, x: dot(w, x.softmax(0)), lambda w, x: dot(w, x.exp() / (x[0].exp() + x[-1].exp())), w=(12,))
pair("first_two", lambda w, x: x.sum(), lambda w, x: x[:2].sum())
pair("neighbours_for_a_prefix", lambda w, x: dot(w, x.cumsum(0)), lambda w, x: dot(w, x + torch.cat([x[:1] * 0, x[:-1]])), w=(12,))

# ---- literals
pair("mean_over_the_other_size", lambda w, x: dot(w, x.mean(1)), lambda w, x: dot(w, x.sum(1) / x.shape[0]), w=(6,), x=(6, 10))
pair("mean_by_two", lambda w, x: x.mean(), lambda w, x: x.sum() / 2)
pair("ones_counted", lambda w, x: x.sum() / torch.ones_like(x).sum(), lambda w, x: x.sum() / 2)
pair("ones_counted_at_the_reduced_size", lambda w, x: x.sum() / torch.ones_like(x).sum(), lambda w, x: x.sum() / 4)
pair("ones_hidden_in_a_sum", lambda w, x: (x + 1).sum(), lambda w, x: x.sum() + 4)
pair("ones_of_another_size", lambda w, x: x.sum() / torch.ones(12).sum(), lambda w, x: x.sum() / torch.ones(14).sum())
pair("valid_counted_in_floats", lambda w, x: x.sum() / (torch.arange(12) > 3).float().sum(), lambda w, x: x.sum() / 4)
pair("valid_added_up_as_floats", lambda w, x: x.sum() / (torch.arange(12) < 12).sum(dtype=torch.float32), lambda w, x: x.sum() / 4)
pair("unbiased", lambda w, x: ((x - x.mean()) ** 2).sum(), lambda w, x: ((x - x.mean()) ** 2).sum() / (x.shape[0] - 1))
pair("scale_of_the_other_size", lambda w, x: dot(w, x @ x.t() / math.sqrt(x.shape[1])), lambda w, x: dot(w, x @ x.t() / math.sqrt(x.shape[0])), w=(6, 6), x=(6, 10))
pair("means_of_uneven_parts", lambda w, x: x.mean(), lambda w, x: (x[:7].mean() + x[7:].mean()) / 2)

# ---- order
pair("heads_and_their_size_swapped", lambda w, x: (x.view(4, 8, 9) ** 2).sum(2).sin().sum(), lambda w, x: (x.view(4, 9, 8) ** 2).sum(2).sin().sum(), x=(4, 72))
pair("heads_transposed", lambda w, x: dot(w, x.view(4, 8, 9).transpose(1, 2).reshape(4, 72)), lambda w, x: dot(w, x), w=(4, 72), x=(4, 72))
pair("halves_or_neighbours", lambda w, x: dot(w, torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1)),
     lambda w, x: dot(w, torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)), w=(3, 32), x=(3, 32))
pair("groups_of_heads", lambda w, x: dot(w, x.repeat_interleave(6, 0)), lambda w, x: dot(w, x.repeat(6, 1)), w=(48, 9), x=(8, 9))
pair("groups_of_heads_expanded", lambda w, x: dot(w, x[:, None].expand(8, 6, 9).reshape(48, 9)), lambda w, x: dot(w, x[None].expand(6, 8, 9).reshape(48, 9)), w=(48, 9), x=(8, 9))
pair("halves_swapped_or_reversed", lambda w, x: dot(w, torch.cat([x[8:], x[:8]])), lambda w, x: dot(w, torch.cat([x[8:].flip(0), x[:8].flip(0)])), w=(16,), x=(16,))
pair("even_ones_or_the_first_half", lambda w, x: dot(w, x[::2]), lambda w, x: dot(w, x[:8]), w=(8,), x=(16,))
pair("microbatches_interleaved", lambda w, x: dot(w, x.view(2, 8)), lambda w, x: dot(w, x.view(8, 2).t()), w=(2, 8), x=(16,))

# ---- masks

def masked(condition):
    def f(w, x):
        i = torch.arange(x.shape[0])
        return dot(w, (x @ x.t()).masked_fill(condition(i[:, None], i[None]), 0.0))
    return f


pair("causal_or_the_first", masked(lambda i, j: i < j), masked(lambda i, j: ~((i == j) | (j == 0))), w=(9, 9), x=(9, 5))
pair("window_of_two", masked(lambda i, j: i < j), masked(lambda i, j: (i < j) | (i - j > 1)), w=(9, 9), x=(9, 5))
pair("full_window", masked(lambda i, j: i < -1), masked(lambda i, j: (i - j).abs() > 1), w=(9, 9), x=(9, 5))
pair("documents_of_two", lambda w, x: x.sum(), lambda w, x: (x * (torch.arange(x.shape[0]) < 2)).sum())

# ---- ranks
pair("strided_shards", lambda w, x: dot(w, x), lambda w, x: dot(w, gathered(x[dist.get_rank()::2])), w=(16,), x=(16,), ranks=2)
pair("ring_the_other_way", lambda w, x: dot(w, torch.cat([x[24:], x[:24]])), lambda w, x: dot(w, gathered(x[(dist.get_rank() + 1) % 4 * 8:][:8])), w=(32,), x=(32,), ranks=4)
pair("offset_of_all_but_the_first", lambda w, x: dot(w, x), lambda w, x: dot(w, gathered(x[(dist.get_rank() > 0) * 8:][:8])), w=(24,), x=(24,), ranks=3)
pair("ranks_average_uneven_means", lambda w, x: x.mean(), lambda w, x: summed((x[:7] if dist.get_rank() == 0 else x[7:]).mean()) / 2, ranks=2)
pair("ranks_see_the_first_two", lambda w, x: x.sum(), lambda w, x: summed(x[dist.get_rank() * 6:][:2].sum()), ranks=2)


def wrong_at_the_end_of_each_shard(w, x):
    part, at = x[dist.get_rank() * 12:][:12], torch.arange(12)
    return dot(w, gathered(part[torch.where(at == 11, 0, at)]))


pair("index_at_the_end_of_a_shard", lambda w, x: dot(w, x), wrong_at_the_end_of_each_shard, w=(24,), x=(24,), ranks=2)
pair("label_at_the_end", lambda w, x: x.gather(1, torch.arange(12)[:, None] % 5).sum(), lambda w, x: x.gather(1, (torch.arange(12)[:, None] % 5) * (torch.arange(12)[:, None] < 11)).sum(),
     x=(12, 5))
pair("top_two_experts_are_all", lambda w, x: dot(w, (x.softmax(-1))), lambda w, x: dot(w, torch.zeros_like(x).scatter(-1, x.topk(2, -1).indices, x.softmax(-1).topk(2, -1).values)),
     w=(3, 8), x=(3, 8))


# ---- experts: integers put tokens in an order, and say how many each expert gets
TOP = 2


def slots(tokens: int, experts: int):
    """Balanced routing: (slots of tokens by expert, how many rows each expert gets)."""
    chosen = torch.arange(tokens * TOP) % experts
    return chosen.argsort(stable=True), chosen.bincount(minlength=experts).tolist()


def experts(w, x, turn=0, row=lambda order, tokens: order // TOP, end=0):
    """Each token by its two experts. turn: expert e takes the weights of e + turn; end: so many rows of the last expert are dropped."""
    order, counts = slots(len(x), len(w))
    rows = x[row(order, len(x))]
    made = [part @ w[(e + turn) % len(w)] for e, part in enumerate(rows.split(counts))]
    if end:
        made[-1] = torch.cat([made[-1][:-end], made[-1][-end:] * 0.0])
    return torch.zeros_like(x).index_add(0, order // TOP, torch.cat(made)).square().sum()


def unsorted(w, x, back):
    """What the experts made, brought back by back(order) and added up by token."""
    order, counts = slots(len(x), len(w))
    made = torch.cat([part @ w[e] for e, part in enumerate(x[order // TOP].split(counts))])
    return made[back(order)].view(len(x), TOP, -1).sum(1).square().sum()


def exchanged(w, x, turn=0, cut=0):
    """Ranks with equal parts of the tokens and of the experts; what is sent is for the experts `turn` ranks further on; the last of two ranks gets 2 * cut
    rows of each too many."""
    n, rank = dist.get_world_size(), dist.get_rank()
    mine, here = x.chunk(n)[rank], w.chunk(n)[(rank + turn) % n]
    order, counts = slots(len(mine), len(w))
    sent = mine[order // TOP].contiguous()
    to_send = [len(sent) // n] * n if not cut else [len(sent) // 2 - cut, len(sent) // 2 + cut]
    got = sent.new_empty(n * to_send[rank], sent.shape[1])
    dist.all_to_all_single(got, sent, [to_send[rank]] * n, to_send)
    each = counts[0]
    made = torch.cat([part @ here[k % len(here)] for k, part in enumerate(got.split(each))])
    back = torch.empty_like(sent)
    dist.all_to_all_single(back, made, to_send, [to_send[rank]] * n)
    return summed(torch.zeros_like(mine).index_add(0, order // TOP, back).square().sum())


pair("experts_take_the_next_weights", experts, lambda w, x: experts(w, x, turn=1), w=(4, 6, 6), x=(12, 6))
pair("expert_drops_its_last_row", experts, lambda w, x: experts(w, x, end=1), w=(4, 6, 6), x=(12, 6))
pair("tokens_of_slots_by_remainder", experts, lambda w, x: experts(w, x, row=lambda order, tokens: order % tokens), w=(4, 6, 6), x=(12, 6))
pair("rows_brought_back_by_their_own_order", lambda w, x: unsorted(w, x, lambda order: order.argsort()), lambda w, x: unsorted(w, x, lambda order: order),
     w=(4, 6, 6), x=(12, 6))
pair("experts_of_the_other_rank", experts, lambda w, x: exchanged(w, x, turn=1), w=(4, 6, 6), x=(12, 6), ranks=2)
pair("rows_sent_in_wrong_splits", experts, lambda w, x: exchanged(w, x, cut=1), w=(4, 6, 6), x=(12, 6), ranks=2)


def chosen_by_scores(w, x, turn=0):
    """Each token by the two experts with the largest scores: floats decide how many rows an expert gets."""
    chosen = (x @ w[:, 0].t()).topk(TOP).indices.flatten()
    order, counts = chosen.argsort(stable=True), chosen.bincount(minlength=len(w)).tolist()
    made = [part @ w[(e + turn) % len(w)] for e, part in enumerate(x[order // TOP].split(counts))]
    return torch.zeros_like(x).index_add(0, order // TOP, torch.cat(made)).square().sum()


pair("experts_by_scores_take_the_next_weights", chosen_by_scores, lambda w, x: chosen_by_scores(w, x, turn=1), w=(4, 6, 6), x=(12, 6))
