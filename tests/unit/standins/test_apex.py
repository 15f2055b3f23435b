"""Apex's stand-ins against formulas in float64 and torch's optimizers, with gradients."""
import pytest
import torch
import trainverify as tv
from trainverify.adapters.standins import apex
from trainverify.diagnostics import Fault
from trainverify.verify import verify


def made(*shape, seed=3):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape))).requires_grad_()


def agree(got, expected, *inputs):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    weight = torch.cos(torch.arange(got.numel(), dtype=torch.float64)).reshape(got.shape)
    for a, b in zip(torch.autograd.grad((got * weight).sum(), inputs, retain_graph=True), torch.autograd.grad((expected * weight).sum(), inputs, retain_graph=True)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def layer_norm(x, weight, bias, eps, dims):
    center = x - x.mean(dims, keepdim=True)
    return center / ((center * center).mean(dims, keepdim=True) + eps).sqrt() * weight + bias


def rms_norm(x, weight, eps, dims):
    return x / ((x * x).mean(dims, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("shape", [(4,), (3, 4)], ids=str)
def test_norms(shape):
    x, weight, bias = made(2, 3, 4), made(*shape), made(*shape, seed=5)
    dims = tuple(range(-len(shape), 0))
    norm, rms = apex.FusedLayerNorm(shape, eps=1e-3).double(), apex.FusedRMSNorm(shape, eps=1e-3).double()
    assert norm.weight.eq(1).all() and norm.bias.eq(0).all() and rms.weight.eq(1).all()
    norm.weight, norm.bias, rms.weight = (torch.nn.Parameter(t.detach().clone()) for t in (weight, bias, weight))
    agree(norm(x), layer_norm(x, norm.weight, norm.bias, 1e-3, dims), x, norm.weight, norm.bias)
    agree(rms(x), rms_norm(x, rms.weight, 1e-3, dims), x, rms.weight)
    agree(apex.FusedLayerNormAffineFunction.apply(x, weight, bias, shape, 1e-3, True), layer_norm(x, weight, bias, 1e-3, dims), x, weight, bias)
    agree(apex.fused_rms_norm_affine(x, weight, shape, 1e-3), rms_norm(x, weight, 1e-3, dims), x, weight)
    agree(apex.fused_layer_norm(x, shape, 1e-3), layer_norm(x, 1.0, 0.0, 1e-3, dims), x)
    agree(apex.fused_rms_norm(x, shape, 1e-3), rms_norm(x, 1.0, 1e-3, dims), x)


def stepped(make, steps=3):
    """Parameters and states after some steps with known gradients."""
    parameters = [made(3, 2).detach().clone().requires_grad_(), made(4).detach().clone().requires_grad_()]
    optimizer = make(parameters)
    for n in range(steps):
        for i, p in enumerate(parameters):
            p.grad = made(*p.shape, seed=10 * n + i).detach()
        optimizer.step()
        optimizer.zero_grad()
        assert all(p.grad is None or p.grad.eq(0).all() for p in parameters)
    return [p.detach() for p in parameters], [optimizer.state[p] for p in parameters]


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam(decoupled, decay):
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    common = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": decay}
    got, states = stepped(lambda p: apex.FusedAdam(p, adam_w_mode=decoupled, **common))
    expected, theirs = stepped(lambda p: kind(p, **common))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)            # the states are float32
    for a, b in zip(states, theirs):
        assert set(a) == {"exp_avg", "exp_avg_sq"} and a["exp_avg"].dtype == torch.float32
        torch.testing.assert_close(a["exp_avg"].double(), b["exp_avg"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a["exp_avg_sq"].double(), b["exp_avg_sq"], rtol=1e-5, atol=1e-6)


def test_adam_without_correction_and_as_an_op():
    g, p = made(5).detach(), made(5, seed=1).detach().clone()
    m, v = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    expected = p - 0.1 * (0.1 * g / ((0.01 * g * g).sqrt() + 1e-3) + 0.2 * p)
    apex.multi_tensor_adam(65536, None, [[g], [p], [m], [v]], 0.1, 0.9, 0.99, 1e-3, 1, 1, 0, 0.2)
    torch.testing.assert_close(p, expected)
    torch.testing.assert_close((m, v), (0.1 * g, 0.01 * g * g))


@pytest.mark.parametrize("how", [{}, {"momentum": 0.9}, {"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.9, "nesterov": True},
                                 {"momentum": 0.5, "dampening": 0.3}], ids=str)
def test_sgd(how):
    got, _ = stepped(lambda p: apex.FusedSGD(p, lr=0.1, **how))
    expected, _ = stepped(lambda p: torch.optim.SGD(p, lr=0.1, **how))
    torch.testing.assert_close(got, expected)


def test_multi_tensor_ops():
    flag, a, b = torch.zeros(1, dtype=torch.int32), [made(3).detach(), made(2, 2).detach()], [made(3, seed=8).detach(), made(2, 2, seed=9).detach()]
    out = [torch.zeros_like(t) for t in a]
    applier = apex.modules()["apex.multi_tensor_apply"]["multi_tensor_applier"]
    applier(apex.multi_tensor_scale, flag, [a, out], 0.5)
    torch.testing.assert_close(out, [t * 0.5 for t in a], rtol=1e-6, atol=1e-6)
    applier(apex.multi_tensor_axpby, flag, [a, b, out], 2.0, -3.0, 0)
    torch.testing.assert_close(out, [2 * x - 3 * y for x, y in zip(a, b)], rtol=1e-6, atol=1e-6)
    norm, each = applier(apex.multi_tensor_l2norm, flag, [a], True)
    assert norm.shape == (1,)
    torch.testing.assert_close(norm[0], torch.cat([t.flatten() for t in a]).norm())
    torch.testing.assert_close(each, torch.stack([t.norm() for t in a]))
    assert applier(apex.multi_tensor_l2norm, flag, [a], False)[1].numel() == 0 and flag.item() == 0


def test_what_is_not_covered_is_refused():
    with pytest.raises(Fault, match="master_weights"):
        apex.FusedAdam([made(2)], master_weights=True)


# ---- a step with Apex against one without

class Model(torch.nn.Module):
    def __init__(self, norm, layer_norm):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 6), torch.nn.Linear(6, 3)
        self.norm, self.layer_norm = norm(6, eps=1e-5), layer_norm(3)

    def forward(self, x):
        return self.layer_norm(self.second(self.norm(self.first(x)).tanh()))


def training(model, optimizer, clip, batch):
    def step():
        optimizer.zero_grad()
        loss = (model(batch["x"]) - batch["y"]).square().mean()
        loss.backward()
        norm = clip([p.grad for p in model.parameters()])
        optimizer.step()
        return {"loss": loss, "norm": norm}
    return tv.Training(model, step, batch=batch)


ADAM = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}


def reference():
    torch.manual_seed(0)
    model = Model(torch.nn.RMSNorm, torch.nn.LayerNorm)

    def clip(grads):
        norm = torch.stack([g.norm() for g in grads]).norm()
        for g in grads:
            g.mul_(0.1 / (norm + 1e-6))
        return norm
    return training(model, torch.optim.AdamW(model.parameters(), **ADAM), clip, {"x": torch.randn(5, 4), "y": torch.randn(5, 3)})


def fused(ref):
    model = Model(apex.FusedRMSNorm, apex.FusedLayerNorm)
    model.load_state_dict(ref.weights)
    flag, applier = torch.zeros(1, dtype=torch.int32), apex.MultiTensorApply(65536)

    def clip(grads):
        norm, _ = applier(apex.multi_tensor_l2norm, flag, [grads], False)
        applier(apex.multi_tensor_scale, flag, [grads, grads], 0.1 / (norm + 1e-6))
        return norm[0]
    return training(model, apex.FusedAdam(model.parameters(), **ADAM), clip, ref.batch)


def test_a_step_with_apex_is_one_without():
    report = verify(reference, fused, ranks=1)
    # Apex counts steps in the parameter groups, where torch's optimizer has a state of each parameter.
    assert {(o.verdict, o.reason) for o in report.outputs if o.name.endswith("::step")} == {("UNKNOWN", "no rank has it")}
    assert [(o.kind, o.name, o.verdict, o.reason) for o in report.outputs if o.verdict != "PROVED" and not o.name.endswith("::step")] == [], report.diagnostics
    assert {o.kind for o in report.outputs} >= {"scalar", "gradient", "parameter", "state"}
    named = {a.text.split(" computes")[0].removeprefix("stand-in: ") for a in report.assumptions if a.places and __file__ in a.places[0]}
    assert named == {"apex.normalization.FusedRMSNorm", "apex.normalization.FusedLayerNorm", "apex.optimizers.FusedAdam.step", "amp_C.multi_tensor_l2norm",
                     "amp_C.multi_tensor_scale"}
