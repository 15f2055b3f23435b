"""torch's attention kernels for GPUs on CPU tensors: against formulas in float64 with gradients, and in whole runs."""
import math

import pytest
import torch
import torch.nn.attention.flex_attention as flex
import torch.nn.attention.varlen as varlen
import torch.nn.functional as F
import trainverify as tv
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from trainverify.capture.kernels import attention_kernels
from trainverify.diagnostics import Fault
from trainverify.verify import verify

COMPILED = torch.compile(flex_attention)


@pytest.fixture
def told():
    notes = []
    with attention_kernels(lambda code, text: notes.append((code, text))):
        yield notes


def made(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape))).requires_grad_()


def agree(got, expected, *inputs):
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)
    weight = torch.cos(torch.arange(got.numel(), dtype=torch.float64)).reshape(got.shape)
    for a, b in zip(torch.autograd.grad((got * weight).sum(), inputs, retain_graph=True), torch.autograd.grad((expected * weight).sum(), inputs)):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def by_formula(q, k, v, scale, score=lambda s, b, h, i, j: s, seen=lambda b, h, i, j: True):
    """Score by score; also the logarithms of the sums."""
    share, out, sums = q.shape[1] // k.shape[1], [], []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                keys = [j for j in range(k.shape[2]) if seen(b, h, i, j)]
                weights = [torch.exp(score((q[b, h, i] * k[b, h // share, j]).sum() * scale, b, h, i, j)) for j in keys]
                sums.append(torch.log(sum(weights)) if keys else torch.tensor(-math.inf, dtype=q.dtype))
                out.append(sum(w * v[b, h // share, j] for w, j in zip(weights, keys)) / sum(weights) if keys else torch.zeros_like(v[0, 0, 0]))
    return torch.stack(out).reshape(*q.shape[:3], -1), torch.stack(sums).reshape(q.shape[:3])


def test_plain_and_grouped(told):
    q, k, v = made(2, 4, 3, 2), made(2, 2, 5, 2), made(2, 2, 5, 2, seed=1)
    agree(flex_attention(q, k, v, enable_gqa=True), by_formula(q, k, v, 1 / math.sqrt(2))[0], q, k, v)
    assert told and told[0][0] == "ASSUME" and "flex_attention" in told[0][1]


def test_a_score_with_parameters(told):
    q, k, v, bias = made(1, 2, 3, 2), made(1, 2, 3, 2, seed=1), made(1, 2, 3, 2, seed=2), made(2, 5)
    got = flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: torch.tanh(s) + bias[h, i - j + 2], scale=0.5)
    agree(got, by_formula(q, k, v, 0.5, lambda s, b, h, i, j: torch.tanh(s) + bias[h, i - j + 2])[0], q, k, v, bias)


def test_masks_with_rows_that_see_nothing_and_sums(told):
    q, k, v = made(1, 2, 4, 2), made(1, 2, 4, 2, seed=1), made(1, 2, 4, 2, seed=2)
    mask = create_block_mask(lambda b, h, i, j: (i > j) | ((h == 1) & (i == j)), 1, 2, 4, 4, device="cpu")
    expected, sums = by_formula(q, k, v, 1.0, seen=lambda b, h, i, j: i > j or (h == 1 and i == j))
    agree(flex_attention(q, k, v, block_mask=mask, scale=1.0), expected, q, k, v)
    out, told_sums = flex_attention(q, k, v, block_mask=mask, scale=1.0, return_lse=True)
    torch.testing.assert_close(told_sums, sums)
    torch.testing.assert_close(out, expected)


def test_blocks_that_are_not_listed_are_not_seen(told):
    """Two by two blocks of two: the first row of blocks sees the first, the second both; the last block is full, whatever mask_mod says."""
    q, k, v = made(1, 1, 4, 2), made(1, 1, 4, 2, seed=1), made(1, 1, 4, 2, seed=2)
    mask = BlockMask.from_kv_blocks(
        torch.tensor([[[1, 1]]], dtype=torch.int32), torch.tensor([[[[0, 1], [0, 1]]]], dtype=torch.int32), torch.tensor([[[0, 1]]], dtype=torch.int32),
        torch.tensor([[[[0, 1], [1, 0]]]], dtype=torch.int32), BLOCK_SIZE=2, mask_mod=lambda b, h, i, j: i >= j, seq_lengths=(4, 4))
    seen = {(i, j) for i in range(4) for j in range(4) if (j < 2 and i >= j) or (i >= 2 and j >= 2)}
    agree(flex_attention(q, k, v, block_mask=mask, scale=1.0), by_formula(q, k, v, 1.0, seen=lambda b, h, i, j: (i, j) in seen)[0], q, k, v)


def test_sequences_of_several_lengths(told):
    q, k, v, ends = made(5, 4, 3), made(5, 2, 3), made(5, 2, 3, seed=1), torch.tensor([0, 2, 5], dtype=torch.int32)
    from torch.nn.attention.varlen import varlen_attn
    got, sums = varlen_attn(q, k, v, ends, ends, 3, 3, window_size=(1, 0), enable_gqa=True, return_aux=varlen.AuxRequest(lse=True))
    parts = [by_formula(*(x[None, a:b].transpose(1, 2) for x in (q, k, v)), 1 / math.sqrt(3), seen=lambda b, h, i, j: i - 1 <= j <= i) for a, b in ((0, 2), (2, 5))]
    agree(got, torch.cat([p[0].transpose(1, 2)[0] for p in parts]), q, k, v)
    torch.testing.assert_close(sums, torch.cat([p[1][0] for p in parts], 1))
    with pytest.raises(Fault, match="STAND002"):
        varlen_attn(q, k, v, ends, ends, 3, 3, enable_gqa=True, seqused_k=torch.tensor([2, 3]))


def test_torch_is_as_before():
    inner, check, attention = flex.flex_attention_hop, flex._validate_device, varlen.varlen_attn
    with attention_kernels(lambda code, text: None):
        assert varlen.varlen_attn is not attention
    assert (flex.flex_attention_hop, flex._validate_device, varlen.varlen_attn) == (inner, check, attention)
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        flex_attention(made(1, 1, 2, 2), made(1, 1, 2, 2), made(1, 1, 2, 2))


class Model(torch.nn.Module):
    """Causal attention over documents; grouped products of experts."""

    def __init__(self, how):
        super().__init__()
        self.how, self.qkv, self.experts = how, torch.nn.Linear(6, 24), torch.nn.Parameter(torch.randn(2, 8, 16))

    def attend(self, q, k, v):
        n, documents = q.shape[2], torch.tensor([0, 0, 1, 1, 1])
        if self.how == "plain":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(n, n).tril().bool() & (documents[:, None] == documents[None, :]))
        if self.how == "flex":
            mask = create_block_mask(lambda b, h, i, j: (i >= j) & (documents[i] == documents[j]), None, None, n, n, device="cpu")
            return COMPILED(q, k, v, block_mask=mask)
        ends = torch.tensor([0, 2, 5, 7, 10], dtype=torch.int32)
        out = varlen.varlen_attn(*(x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)), ends, ends, 3, 3, window_size=(-1, 0))
        return out.unflatten(0, (q.shape[0], n)).transpose(1, 2)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        rows = self.attend(q, k, v).transpose(1, 2).flatten(0, 1).flatten(1)
        if self.how == "plain":
            return torch.cat([part @ w for part, w in zip(rows.split([4, 6]), self.experts)]).square().mean()
        return F.grouped_mm(rows, self.experts, offs=torch.tensor([4, 10], dtype=torch.int32)).square().mean()


def training(model, batch):
    def step():
        loss = model(batch["x"])
        loss.backward()
        return {"loss": loss}
    return tv.Training(model, step, batch=batch)


def reference():
    torch.manual_seed(0)
    return training(Model("plain"), {"x": torch.randn(2, 5, 6)})


def parallel(ref, how):
    model = Model(how)
    model.load_state_dict(ref.weights)
    return training(model, ref.batch)


@pytest.mark.parametrize("how", ["flex", "varlen"])
def test_kernels_in_a_run(how):
    report = verify(reference, parallel, ranks=1, case={"how": how}, steps=1)
    assert report.verdict == "PROVED", ([(o.kind, o.name, o.reason) for o in report.outputs if o.verdict != "PROVED"], report.diagnostics)
    (assumed,) = [a for a in report.assumptions if f"torch's {how}" in a.text]
    assert __file__ in assumed.places[0]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 2, batch_first=True), nn.Linear(2, 4)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


def by_hand(model, x):
    """The recurrence, written out."""
    p = dict(model.rnn.named_parameters())
    h = c = torch.zeros(x.shape[0], 2)
    out = []
    for t in range(x.shape[1]):
        gates = x[:, t] @ p["weight_ih_l0"].T + p["bias_ih_l0"] + h @ p["weight_hh_l0"].T + p["bias_hh_l0"]
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        out.append(h)
    return model.head(torch.stack(out, 1))


def recurrent_training(model, forward, batch):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        loss = forward(batch["x"]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss}
    return tv.Training(model, step, batch=batch)


@pytest.mark.slow
def test_an_lstm_is_its_recurrence():
    def reference():
        torch.manual_seed(0)
        model = Recurrent()
        return recurrent_training(model, model, {"x": torch.randn(2, 3, 3)})

    def parallel(ref):
        model = Recurrent()
        model.load_state_dict(ref.weights)
        return recurrent_training(model, lambda x: by_hand(model, x), ref.batch)

    before = torch._C._get_mkldnn_enabled()
    report = verify(reference, parallel, ranks=1)
    assert report.verdict == "PROVED", ([(o.kind, o.name, o.reason) for o in report.outputs if o.verdict != "PROVED"], report.diagnostics)
    assert torch._C._get_mkldnn_enabled() == before
