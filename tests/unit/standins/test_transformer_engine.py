"""TransformerEngine's stand-ins against formulas in float64, and over two ranks against one."""
import pytest
import torch
import torch.distributed as dist
import trainverify as tv
from trainverify.adapters.standins import te_attention, te_linear
from trainverify.adapters.standins import transformer_engine as te
from trainverify.diagnostics import Fault
from trainverify.verify import verify

D = {"params_dtype": torch.float64}


def made(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape))).requires_grad_()


def filled(module, seed=1):
    """Parameters that are neither zeros nor ones."""
    for i, p in enumerate(module.parameters()):
        p.data = made(*p.shape, seed=seed + i).detach()
    return module


def agree(got, expected, *inputs):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    weight = torch.cos(torch.arange(got.numel(), dtype=torch.float64)).reshape(got.shape)
    for a, b in zip(torch.autograd.grad((got * weight).sum(), inputs, retain_graph=True),
                    torch.autograd.grad((expected * weight).sum(), inputs, retain_graph=True)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def normed(kind, x, weight, bias, eps):
    x = x if kind == "RMSNorm" else x - x.mean(-1, keepdim=True)
    out = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return out if bias is None else out + bias


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("centered", [False, True])
def test_norms(kind, centered):
    x, norm = made(3, 5), getattr(te_linear, kind)(5, eps=1e-3, zero_centered_gamma=centered, sequence_parallel=True, **D)
    assert norm.weight.eq(0.0 if centered else 1.0).all() and all(p.sequence_parallel for p in norm.parameters())
    filled(norm)
    agree(norm(x), normed(kind, x, norm.weight + (1 if centered else 0), norm.bias, 1e-3), x, *norm.parameters())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("returned", [False, True])
def test_linear(bias, returned):
    x, layer = made(3, 2, 5), filled(te.Linear(5, 4, bias=bias, return_bias=returned, **D))
    out = layer(x, is_first_microbatch=True)
    expected = torch.einsum("abi,oi->abo", x, layer.weight)
    if returned:
        out, given = out
        assert given is layer.bias and given.numel() == (4 if bias else 0)
    agree(out, expected + layer.bias if bias and not returned else expected, x, layer.weight)
    assert list(layer.state_dict()) == ["weight", *(["bias"] if bias else []), "_extra_state"]


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_norm_and_linear(kind):
    x, layer = made(3, 5), filled(te.LayerNormLinear(5, 4, normalization=kind, eps=1e-3, **D))
    norm = normed(kind, x, layer.layer_norm_weight, layer.layer_norm_bias, 1e-3)
    agree(layer(x), norm @ layer.weight.t() + layer.bias, x, *layer.parameters())


def test_grouped_linear():
    x, layer = made(6, 5), filled(te.GroupedLinear(3, 5, 4, **D))
    rows = x.split([2, 0, 4])
    expected = torch.cat([rows[i] @ getattr(layer, f"weight{i}").t() + getattr(layer, f"bias{i}") for i in range(3)])
    agree(layer(x, [2, 0, 4]), expected, x, *layer.parameters())


@pytest.mark.parametrize("marked", [False, True])
def test_gradients_go_where_megatron_looks(marked):
    x, layer = made(3, 5), filled(te.Linear(5, 4, bias=False, fuse_wgrad_accumulation=True, **D))
    layer.weight.main_grad = torch.ones_like(layer.weight)
    if marked:
        layer.weight.grad_added_to_main_grad = False
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.main_grad, 1 + 2 * (x @ layer.weight.t()).t() @ x)
    assert layer.weight.grad_added_to_main_grad if marked else layer.weight.grad is None


def attention(q, k, v, seen, scale):
    """(batch, length, heads, channels) from exponentials and sums."""
    share = q.shape[2] // k.shape[2]
    weights = torch.exp(torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(share, 2)) * scale) * seen
    return torch.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdim=True), v.repeat_interleave(share, 2)).flatten(2)


MASKS = {"no_mask": lambda i, j: torch.ones(3, 5), "causal": lambda i, j: j <= i, "causal_bottom_right": lambda i, j: j <= i + 2,
         "arbitrary": lambda i, j: (i + j) % 2 == 0, "padding": lambda i, j: j < 4 + 0 * i}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", ["sbhd", "bshd"])
def test_attention(mask, layout):
    q, k, v = made(2, 3, 4, 6), made(2, 5, 2, 6), made(2, 5, 2, 6, seed=3)
    i, j = torch.arange(3)[:, None], torch.arange(5)[None, :]
    given = ~MASKS[mask](i, j).bool()[None, None] if mask in ("arbitrary", "padding") else None
    layer = te.DotProductAttention(4, 6, num_gqa_groups=2, qkv_format=layout, attn_mask_type=mask, softmax_scale=0.3)
    inputs = [x.transpose(0, 1) if layout == "sbhd" else x for x in (q, k, v)]
    out = layer(*inputs, given)
    agree(out.transpose(0, 1) if layout == "sbhd" else out, attention(q, k, v, MASKS[mask](i, j).double(), 0.3), q, k, v)


def test_attention_over_packed_sequences_and_windows():
    q, k, v = made(5, 2, 4), made(5, 2, 4, seed=5), made(5, 2, 4, seed=6)
    ends = torch.tensor([0, 2, 5], dtype=torch.int32)
    layer = te.DotProductAttention(2, 4, qkv_format="thd")
    got = layer(q, k, v, cu_seqlens_q=ends, cu_seqlens_kv=ends, attn_mask_type="padding_causal", window_size=(1, 0))
    expected = []
    for a, b in ((0, 2), (2, 5)):
        i, j = torch.arange(b - a)[:, None], torch.arange(b - a)[None, :]
        expected.append(attention(*(x[None, a:b] for x in (q, k, v)), ((j <= i) & (j >= i - 1)).double(), 0.5)[0])
    agree(got, torch.cat(expected), q, k, v)


def test_a_bias_on_the_scores():
    q, k, v, bias = made(1, 3, 2, 4), made(1, 3, 2, 4, seed=1), made(1, 3, 2, 4, seed=2), made(1, 2, 3, 3)
    got = te.DotProductAttention(2, 4, qkv_format="bshd", attn_mask_type="causal")(q, k, v, core_attention_bias_type="post_scale_bias", core_attention_bias=bias)
    agree(got, attention(q, k, v, torch.exp(bias) * torch.ones(3, 3).tril(), 0.5), q, k, v, bias)


@pytest.mark.parametrize("call", [
    lambda: te.fp8_autocast(enabled=True), lambda: te.Linear(4, 4, delay_wgrad_compute=True), lambda: te.DotProductAttention(2, 4, attention_dropout=0.1),
    lambda: te.modules()["transformer_engine.common.recipe"]["DelayedScaling"](), lambda: te.Linear(4, 4).set_extra_state(torch.ones(1)),
    lambda: te.FusedAdam([made(2)], store_param_remainders=True),
    lambda: te.DotProductAttention(1, 4, window_size=(1, 0))(made(2, 1, 1, 4), made(3, 1, 1, 4), made(3, 1, 1, 4))])
def test_what_is_not_covered_is_refused(call):
    with pytest.raises(Fault, match="STAND002"):
        call()


def test_places_of_a_context_parallel_rank():
    assert torch.cat([te_attention.positions(r, 2, 4) for r in range(2)]).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]


# ---- over two ranks

class Block(torch.nn.Module):
    """Norm, column, attention over heads, row; (length, batch, width)."""

    def __init__(self, group=None, sequence=False, heads=2, width=6, **context):
        super().__init__()
        share = {"tp_group": group, "sequence_parallel": sequence, "params_dtype": torch.float32}
        self.qkv = te.LayerNormLinear(width, 3 * heads * 2, parallel_mode="column", **share)
        self.core = te.DotProductAttention(heads, 2, **context)
        self.out = te.Linear(heads * 2, width, parallel_mode="row", **share)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (-1, 3, 2)).unbind(-2)
        return x + self.out(self.core(q, k, v))


def training(model, batch, loss_of):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        loss = loss_of(batch["x"])
        loss.backward()
        return {"loss": optimizer.step() or loss}
    return tv.Training(model, step, batch=batch)


def reference():
    torch.manual_seed(0)
    model = Block()
    return training(model, {"x": torch.randn(8, 2, 6)}, lambda x: model(x).square().mean())


def tensor_parallel(ref, sequence=False):
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), dist.group.WORLD
    model = Block(group, sequence)
    parts = {"qkv.weight": 0, "qkv.bias": 0, "out.weight": 1}
    model.load_state_dict({n: w.chunk(2, parts[n])[rank] if n in parts else w for n, w in ref.weights.items()} | {
        n: torch.empty(0, dtype=torch.uint8) for n in model.state_dict() if n.endswith("_extra_state")}, strict=False)
    replicated = [p for n, p in model.named_parameters() if n not in parts]
    assert [n for n, p in model.named_parameters() if getattr(p, "sequence_parallel", False)] == (
        ["qkv.layer_norm_weight", "qkv.layer_norm_bias", "out.bias"] if sequence else ["out.bias"])
    for p in replicated if sequence else ():
        p.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad))

    def loss(x):
        if not sequence:
            return model(x).square().mean()
        part = model(x.chunk(2)[rank]).square().sum() / x.numel()
        return te_linear.summed_out(part, group)
    return training(model, ref.batch, loss)


def context_parallel(ref):
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), dist.group.WORLD
    model = Block(cp_group=group)
    model.load_state_dict(ref.weights, strict=False)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad))

    def loss(x):
        part = model(x[te_attention.positions(rank, 2, 4)]).square().sum() / x.numel()
        return te_linear.summed_out(part, group)
    return training(model, ref.batch, loss)


@pytest.mark.parametrize(("parallel", "case"), [(tensor_parallel, {}), (tensor_parallel, {"sequence": True}), (context_parallel, {})], ids=["tp", "sp", "cp"])
def test_two_ranks_are_one(parallel, case):
    report = verify(reference, parallel, ranks=2, case=case, steps=1)
    assert report.verdict == "PROVED", ([(o.kind, o.name, o.verdict, o.reason) for o in report.outputs if o.verdict != "PROVED"], report.diagnostics)
    assumed = [a for a in report.assumptions if a.text.startswith("stand-in: transformer_engine.pytorch.")]
    assert len(assumed) == 3 and all(a.places and __file__ in a.places[0] for a in assumed)
