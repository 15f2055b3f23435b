"""Each weak-spec warning on a program that deserves it, and none on one that does not."""
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

import trainverify as tv
from trainverify.engine.facts import _upper
from trainverify.engine.weak import _degrees, _rings, _tokens
from trainverify.ir.trace import Collective, OpCall, Program, Trace

IGNORE, VOCAB = -100, 12


class Model(torch.nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(VOCAB, 4), torch.nn.Linear(4, VOCAB, bias=False)
        self.inner = torch.nn.Linear(4, width, bias=False)
        self.outer = torch.nn.Linear(width, 4, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(x + self.outer(self.inner(x).relu()))


def make_batch(rows=6, length=5, ignored=lambda row: row % 4):
    labels = torch.arange(rows * length).reshape(rows, length) % VOCAB
    tokens = labels.roll(1, 1).contiguous()
    for row in range(rows):
        labels[row, : ignored(row)] = IGNORE
    return {"tokens": tokens, "labels": labels}


def training(model, parts, optimizer, clip):
    optimizer = optimizer(model.parameters())

    def step():
        for tokens, labels in parts:
            F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum").div(10).backward()
        norm = clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        return {"norm": norm}
    return tv.Training(model, step)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def whole(batch, rank, world):
    return [(batch["tokens"], batch["labels"])]


def warnings(*, batch=make_batch, optimizer=adamw, clip=0.1, width=6, share=whole, ranks=1, steps=2, prepare=lambda model: None):
    def reference():
        torch.manual_seed(0)
        model, b = Model(width), batch()
        prepare(model)
        made = training(model, whole(b, 0, 1), optimizer, clip)
        return tv.Training(made.model, made.step, batch=b)

    def parallel(ref):
        if ranks > 1:
            dist.init_process_group("gloo")
        model = Model(width)
        prepare(model)
        model.load_state_dict(ref.weights)
        return training(model, share(ref.batch, dist.get_rank() if ranks > 1 else 0, ranks), optimizer, clip)

    report = tv.verify(reference, parallel, ranks=ranks, steps=steps, timeout=60.0)
    assert report.outputs, report
    return {d.code: d.message for d in report.warnings}


def test_none_on_a_strong_spec():
    assert warnings() == {}


def test_equal_counts_of_valid_tokens():
    def split(b, rank, world):
        return list(zip(b["tokens"].chunk(2), b["labels"].chunk(2)))
    found = warnings(batch=lambda: make_batch(ignored=lambda row: 1), share=split)
    assert found.keys() == {"WEAK001"} and "12 valid tokens" in found["WEAK001"]


def test_one_microbatch_has_no_equal_counts():
    assert _tokens([(7,)]) == [] and _tokens([(7, 6), (7, 7)]) == [] and _tokens([(7, 7), (7, 7)])[0].code == "WEAK001"


def test_a_batch_of_one():
    assert warnings(batch=lambda: make_batch(1, 7)).keys() == {"WEAK002"}


@pytest.mark.slow
def test_microbatches_of_one():
    def one_by_one(b, rank, world):
        return list(zip(b["tokens"].split(1), b["labels"].split(1)))
    assert "rank 0 reads one sample at a time" in warnings(share=one_by_one)["WEAK002"]


def test_clipping_that_does_not_bind():
    assert warnings(clip=1e3).keys() == {"WEAK003"}


@pytest.mark.parametrize(("name", "args", "kwargs", "bound"), [
    ("aten.clamp", ("x",), {"max": 1.0}, 1.0), ("aten.clamp", ("x", None, 1.0), {}, 1.0), ("aten.clamp_max", ("x", 1.0), {}, 1.0),
    ("aten.clamp", ("x", 1), {}, None), ("aten.clamp", ("x",), {"min": 1}, None)])
def test_a_count_of_at_least_1_is_no_clipping(name, args, kwargs, bound):
    assert _upper(name, OpCall(0, f"{name}.default", args, kwargs, None)) == bound


def test_learning_rate_0():
    found = warnings(optimizer=lambda p: torch.optim.AdamW(p, lr=0.0, weight_decay=0.1))
    assert found.keys() == {"WEAK004"} and "lr is 0" in found["WEAK004"]


def test_one_step_from_zero_state():
    assert warnings(steps=1).keys() == {"WEAK005"}
    assert warnings(steps=1, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1)) == {}


def test_parameter_without_gradient():
    found = warnings(prepare=lambda model: model.outer.register_parameter("spare", torch.nn.Parameter(torch.ones(3))))
    assert found.keys() == {"WEAK006"} and "no gradient reaches outer.spare" in found["WEAK006"]


def test_square_weights_and_square_batch():
    assert "outer.weight are square" in warnings(width=4)["WEAK009"]
    assert "batch and sequence have the same size 6" in warnings(batch=lambda: make_batch(6, 6))["WEAK009"]


def test_equal_sizes_in_attention():
    def training(model, x):
        optimizer = adamw(model.parameters())

        def step():
            q = model(x).unflatten(-1, (2, 4)).transpose(1, 2)
            F.scaled_dot_product_attention(q, q, q).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return tv.Training(model, step, batch=x)

    def reference():
        torch.manual_seed(0)
        return training(torch.nn.Linear(3, 8), torch.randn(2, 5, 3))

    def parallel(ref):
        model = torch.nn.Linear(3, 8)
        model.load_state_dict(ref.weights)
        return training(model, ref.batch)

    (d,) = tv.verify(reference, parallel, ranks=1, timeout=60.0).warnings
    assert d.code == "WEAK009" and "[2, 2, 5, 4]" in d.message


def test_no_weight_decay():
    assert warnings(optimizer=lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0)).keys() == {"WEAK011"}
    assert warnings(optimizer=lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0, fused=True)).keys() == {"WEAK011"}


# ---- degrees and rings

def test_equal_degrees():
    named = {(0, 1): "tp", (2, 3): "tp", (0, 2): "dp", (1, 3): "dp", (0, 1, 2, 3): ""}
    (d,) = _degrees(named, 4, [])
    assert d.code == "WEAK007" and "tp, dp have the same degree 2" in d.message
    assert _degrees({(0, 1): "tp", (0, 2, 4): "dp", tuple(range(6)): ""}, 6, []) == []
    (d,) = _degrees({(0, 1): "", (0, 2): ""}, 4, [])
    assert "group 0, 1, group 0, 2" in d.message


def test_as_many_microbatches_as_ranks():
    (d,) = _degrees({}, 2, [(5, 6), (7, 8)])
    assert d.code == "WEAK007" and "2 microbatches on 2" in d.message
    assert _degrees({}, 2, [(5, 6, 4), (7, 8, 3)]) == [] and _degrees({}, 1, [(5,)]) == []


def calls(*collectives):
    return [OpCall(i, "c10d.x", (), {}, None, collective=c) for i, c in enumerate(collectives)]


def message(kind, peer, n):
    return Collective(kind, tuple(range(n)), "0", 0, peer=peer)


def ring(n):
    return Program([Trace("parallel", r, n, calls(message("send", (r + 1) % n, n), message("recv", (r - 1) % n, n))) for r in range(n)], [{}] * n)


def test_a_ring_of_2():
    (d,) = _rings(ring(2))
    assert d.code == "WEAK008" and "ranks 0 and 1" in d.message
    assert _rings(ring(3)) == []


def test_a_ring_of_2_by_all_to_all():
    def rotated(splits):
        return Program([Trace("parallel", r, 2, calls(Collective("all_to_all", (0, 1), "cp", 0, in_splits=splits[r]))) for r in range(2)], [{}] * 2)
    assert [d.code for d in _rings(rotated([(0, 3), (3, 0)]))] == ["WEAK008"]
    assert _rings(rotated([(1, 2), (2, 1)])) == []


def test_a_pipeline_of_three_is_no_ring():
    def stage(r):
        peers = [p for p in (r - 1, r + 1) if 0 <= p < 3]
        return Trace("parallel", r, 3, calls(*[message(kind, p, 3) for p in peers for kind in ("send", "recv")]))
    assert _rings(Program([stage(r) for r in range(3)], [{}] * 3)) == []


# ---- the vocabulary

def sharded(tokens_of):
    """A vocabulary-parallel embedding on two ranks; the head stays whole."""
    class Sharded(torch.nn.Module):
        def __init__(self, weights, rank):
            super().__init__()
            self.first, n = rank * VOCAB // 2, VOCAB // 2
            self.part = torch.nn.Parameter(weights["embed.weight"][self.first: self.first + n].clone())
            self.head = torch.nn.Parameter(weights["head.weight"].clone())

        def forward(self, tokens):
            mine = (tokens >= self.first) & (tokens < self.first + len(self.part))
            x = F.embedding(torch.where(mine, tokens - self.first, 0), self.part) * mine.unsqueeze(-1)
            dist.all_reduce(x)
            return x @ self.head.t()

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(VOCAB, 4), torch.nn.Linear(4, VOCAB, bias=False)

        def forward(self, tokens):
            return self.head(self.embed(tokens))

    def step_of(model, tokens):
        optimizer = adamw(model.parameters())

        def step():
            with torch.no_grad():
                loss = model(tokens).square().mean()
            optimizer.step()
            return {"loss": loss}
        return step

    def reference():
        torch.manual_seed(0)
        model, tokens = Whole(), tokens_of()
        return tv.Training(model, step_of(model, tokens), batch=tokens)

    def parallel(ref):
        dist.init_process_group("gloo")
        model = Sharded(ref.weights, dist.get_rank())
        return tv.Training(model, step_of(model, ref.batch))

    return {d.code: d.message for d in tv.verify(reference, parallel, ranks=2, steps=1, timeout=60.0).warnings}


@pytest.mark.parametrize(("present", "absent"), [((5, 6), None), ((5, 7), "6"), ((1, 2), "5, 6")])
def test_ids_at_the_edges_of_the_vocabulary_shards(present, absent):
    found = sharded(lambda: torch.tensor([[0, present[0], 3], [present[1], 9, 11]]))
    assert ("WEAK010" in found) == (absent is not None)
    if absent:
        assert f"token ids {absent} at the edges" in found["WEAK010"]


@pytest.mark.slow
def test_an_embedding_that_is_not_sharded_has_no_edges():
    assert "WEAK010" not in warnings(batch=lambda: make_batch(2, 5), ranks=2)


