"""Which reference elements a parallel parameter holds, and which samples a rank trains on, is found from the values."""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import trainverify as tv
from judge import assert_equal, assert_not_equal, assert_refuted, codes, is_equal, line_of, output, summary
from pairs import WIDTH, Weight, batch_of, compare, sgd


class Attention(nn.Module):
    """Queries, keys and values of equal shape, each a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.q = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.k = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.v = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x):
        return attend(x @ self.q, x @ self.k, x @ self.v)


class Fused(nn.Module):
    """The three in one matrix [3 * WIDTH, WIDTH]."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(3 * WIDTH, WIDTH))

    def forward(self, x):
        return attend(*F.linear(x, self.qkv).chunk(3, dim=-1))


def attend(q, k, v):
    return (q @ k.t() / WIDTH ** 0.5).softmax(-1) @ v


def step_of(model, batch):
    optimizer = sgd(model.parameters())

    def step():
        loss = F.cross_entropy(model(batch["x"]), batch["targets"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss}
    return step


def verify(load, parallel_model=Attention, reference_model=Attention):
    """load(model, weights) fills the parallel model."""
    def reference():
        torch.manual_seed(0)
        model, batch = reference_model(), batch_of()
        return tv.Training(model, step_of(model, batch), batch=batch)

    def parallel(ref):
        model = parallel_model()
        with torch.no_grad():
            load(model, ref.weights)
        return tv.Training(model, step_of(model, ref.batch))

    return tv.verify(reference, parallel, ranks=1, steps=1)


def test_loaded_by_name():
    assert_equal(verify(lambda model, w: model.load_state_dict(w)))


def test_queries_and_keys_swapped_in_loading():
    def load(model, w):
        model.q.copy_(w["k"])
        model.k.copy_(w["q"])
        model.v.copy_(w["v"])
    report = verify(load)
    assert_refuted(report, line_of(attend, "softmax"))
    assert output(report, "loss").verdict == "REFUTED", summary(report)


def test_fused_matrix():
    def load(model, w):
        model.qkv.copy_(torch.cat([w["q"].t(), w["k"].t(), w["v"].t()]))
    report = verify(load, Fused)
    assert_equal(report)
    assert output(report, "k", "gradient").ranks == (0,), summary(report)


def test_fused_matrix_in_another_order():
    def load(model, w):
        model.qkv.copy_(torch.cat([w["k"].t(), w["q"].t(), w["v"].t()]))
    assert_refuted(verify(load, Fused), line_of(attend, "softmax"))


def test_square_matrix_transposed_in_loading():
    def load(model, w):
        model.load_state_dict(w)
        model.v.copy_(w["v"].t())
    report = verify(load)
    assert_refuted(report)
    assert output(report, "loss").verdict == "REFUTED", summary(report)


def test_transposed_on_both_ways_is_right():
    class Transposed(Attention):
        def forward(self, x):
            return attend(x @ self.q, x @ self.k, F.linear(x, self.v))

    def load(model, w):
        model.load_state_dict(w)
        model.v.copy_(w["v"].t())

    assert_equal(verify(load, Transposed))


def test_parameter_of_its_own_initialisation():
    def load(model, w):
        model.q.copy_(w["q"])
        model.k.copy_(w["k"])
    report = verify(load)
    assert report.verdict != "PROVED" and "BIND001" in codes(report), summary(report)
    assert any("v" in d.message for d in report.diagnostics if d.code == "BIND001"), summary(report)
    assert not is_equal(output(report, "loss")), summary(report)
    assert not is_equal(output(report, "v", "parameter")), summary(report)


def test_parameter_that_is_a_changed_copy():
    def load(model, w):
        model.load_state_dict(w)
        model.v.mul_(1.5)
    report = verify(load)
    assert_not_equal(report, "loss")


# -- sixteen bits

def narrow(model, w):
    for p in model.parameters():
        p.data = p.data.bfloat16()
    model.load_state_dict({k: v.bfloat16() for k, v in w.items()})


class Widened(Attention):
    """Keeps its weights in bf16 and computes with them in fp32."""

    def forward(self, x):
        return attend(x @ self.q.float(), x @ self.k.float(), x @ self.v.float())


def test_bfloat16_copies_are_recognised():
    assert_equal(verify(narrow, Widened))


def test_bfloat16_copies_in_the_wrong_place():
    def load(model, w):
        narrow(model, dict(w, q=w["k"], k=w["q"]))
    assert_refuted(verify(load, Widened), line_of(attend, "softmax"))


# -- tied weights

class Tied(nn.Module):
    """One matrix, used twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.tie()

    def tie(self):
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.embed(x)))


def test_tied_weights():
    def load(model, w):
        assert w["embed.weight"].data_ptr() == w["head.weight"].data_ptr()
        model.load_state_dict(w)
    assert_equal(verify(load, Tied, Tied))


def test_weights_that_are_no_longer_tied():
    class Untied(Tied):
        def tie(self):
            """Two matrices with the same values: each gets its own gradient."""
    report = verify(lambda model, w: model.load_state_dict(w), Untied, Tied)
    assert_refuted(report)
    assert output(report, "embed.weight", "gradient").verdict == "REFUTED", summary(report)


# -- samples

class Embedded(nn.Module):
    """Logits of token ids."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, WIDTH)
        self.head = nn.Linear(WIDTH, 8, bias=False)

    def forward(self, tokens):
        return self.head(torch.tanh(self.embed(tokens)))


def tokens():
    return {"x": torch.tensor([[0, 7, 3], [1, 2, 6], [5, 5, 4], [7, 0, 2]]),
            "targets": torch.tensor([[7, 3, 1], [2, 6, 0], [5, 4, 4], [0, 2, 3]])}


def whole(model, batch):
    return data_parallel(lambda x: x)(model, batch)


def data_parallel(rows):
    """Mean gradients over ranks, each of which trains on rows(x)."""
    def build(model, batch):
        optimizer = sgd(model.parameters())
        x, targets = rows(batch["x"]), rows(batch["targets"])

        def step():
            loss = F.cross_entropy(model(x).flatten(0, 1), targets.flatten())
            loss.backward()
            if dist.is_initialized():
                for p in model.parameters():
                    dist.all_reduce(p.grad)
                    p.grad /= dist.get_world_size()
            optimizer.step()
            optimizer.zero_grad()
            return {"loss": tv.local(loss)}
        return step
    return build


def verify_rows(rows):
    return compare(whole, data_parallel(rows), model=Embedded, batch=tokens, ranks=2)


def test_each_rank_trains_on_its_samples():
    assert_equal(verify_rows(lambda t: t.chunk(2)[dist.get_rank()]))


def test_samples_in_another_order():
    assert_equal(verify_rows(lambda t: t[dist.get_rank()::2]))
    assert_equal(verify_rows(lambda t: t.flip(0).chunk(2)[dist.get_rank()]))


def test_rank_that_trains_on_another_ranks_samples():
    assert_refuted(verify_rows(lambda t: t.chunk(2)[0]))


def test_rank_that_reads_one_sample_twice():
    assert_refuted(verify_rows(lambda t: t[[0, 1]] if dist.get_rank() == 0 else t[[1, 3]]))


def test_targets_of_another_rank():
    def build(model, batch):
        other = dict(batch, targets=batch["targets"].flip(0))
        return data_parallel(lambda t: t.chunk(2)[dist.get_rank()])(model, other)
    assert_refuted(compare(whole, build, model=Embedded, batch=tokens, ranks=2))


# -- float inputs: symbols, data, masks

def weighted(count):
    """A mean over rows that a float tensor weighs; count(weights) is what is divided by."""
    def build(model, batch):
        optimizer = sgd(model.parameters())

        def step():
            losses = F.cross_entropy(model(batch["x"]), batch["targets"], reduction="none")
            loss = (losses * batch["weights"]).sum() / count(batch["weights"])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return {"loss": loss}
        return step
    return build


def verify_weights(weights, number, **options):
    return compare(weighted(lambda w: w.sum()), weighted(lambda w: number), model=Weight,
                   batch=lambda: {**batch_of(), "weights": weights()}, **options)


def test_mask_of_zeros_and_ones_is_data():
    assert_equal(verify_weights(lambda: torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0]), 3.0))


def test_float_input_is_a_symbol():
    assert_not_equal(verify_weights(lambda: torch.tensor([1.0, 0.5, 1.0, 2.0, 0.5]), 5.0), "loss")


def test_float_input_that_is_declared_fixed():
    assert_equal(verify_weights(lambda: tv.fixed(torch.tensor([1.0, 0.5, 1.0, 2.0, 0.5])), 5.0))
