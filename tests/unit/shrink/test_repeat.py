"""What repeats is read once; what differs in one layer alone is not taken for the others."""
import pytest
import torch
from torch import nn

import trainverify as tv
from shrink.kit import captured, verified
from trainverify.ir.trace import Name, OpCall, ScalarRef, Storage, TensorRef, Trace
from trainverify.ops.standard import standard_table
from trainverify.shrink.reduce import Reducer, reduce_programs
from trainverify.shrink.repeat import WINDOW, Forms, Repeats, unnumbered


def ref(storage: int, *size: int, offset: int = 0) -> TensorRef:
    stride = [1]
    for n in reversed(size[1:]):
        stride.insert(0, stride[0] * n)
    return TensorRef(storage, offset, size, tuple(stride) if size else (), "float32")


def call(*args, outs=None, name="aten.add.Tensor", **kwargs) -> OpCall:
    return OpCall(0, name, args, kwargs, outs)


@pytest.mark.parametrize("a, b, alike", [
    (call(ref(0, 4), ref(1, 4), outs=ref(2, 4)), call(ref(7, 4), ref(5, 4), outs=ref(9, 4)), True),
    (call(ref(0, 4), ref(1, 4), outs=ref(2, 4)), call(ref(7, 4), ref(7, 4), outs=ref(9, 4)), False),
    (call(ref(0, 4), 1, outs=ref(2, 4)), call(ref(0, 4), 1.0, outs=ref(2, 4)), False),
    (call(ref(0, 4), 1, outs=ref(2, 4)), call(ref(0, 4), True, outs=ref(2, 4)), False),
    (call(ref(0, 4), 0.0, outs=ref(2, 4)), call(ref(0, 4), -0.0, outs=ref(2, 4)), False),
    (call(ref(0, 4), ScalarRef(3), outs=ref(2, 4)), call(ref(0, 4), ScalarRef(8), outs=ref(2, 4)), True),
    (call(ref(0, 4), outs=ref(2, 4)), call(ref(0, 4, offset=4), outs=ref(2, 4)), False),
    (call(ref(0, 4), outs=ref(2, 4), alpha=2), call(ref(0, 4), outs=ref(2, 4), alpha=3), False),
    (call(ref(0, 4), outs=ref(2, 4), dtype=Name("dtype", "float32")), call(ref(0, 4), outs=ref(2, 4), dtype=Name("dtype", "float64")), False),
])
def test_form(a, b, alike):
    forms = Forms()
    assert (forms.of(a, [])[0] == forms.of(b, [])[0]) is alike


@pytest.mark.parametrize("name, plain", [("layers.12.attention.wq.weight", "layers.#.attention.wq.weight"), ("fc1.weight", "fc1.weight"), ("0.w2", "#.w2"),
                                         ("layers.3.norm.weight::exp_avg", "layers.#.norm.weight::exp_avg")])
def test_numbers_of_layers(name, plain):
    assert unnumbered(name) == plain


def chain(layers: int, odd: int = -1) -> Trace:
    """x -> x * 2 + 1 and so on, a window and more in each layer; in layer `odd` one literal is another."""
    ops, at = [], 0
    for layer in range(layers):
        for k in range(WINDOW + 3):
            at += 1
            ops.append(OpCall(len(ops), "aten.mul.Scalar" if k % 3 else "aten.add.Scalar", (ref(at - 1, 6), 5 if layer == odd and k == 4 else k), {}, ref(at, 6)))
    return Trace("reference", 0, 1, ops, [Storage(24, s == 0) for s in range(at + 1)])


def test_depth_adds_nothing():
    found = [sum(1 for _ in Repeats(Forms(), chain(n)).distinct()) for n in (3, 30)]
    assert found[0] == found[1]


def test_one_layer_that_differs_is_told_apart():
    trace = chain(30, odd=17)
    repeats = Repeats(Forms(), trace)
    odd = 17 * (WINDOW + 3) + 4
    assert repeats.like[odd] == odd and repeats.like.count(odd) == 1
    assert all(trace.ops[i].args[1] == trace.ops[first].args[1] for i, first in enumerate(repeats.like))


# ---- programs

class Deep(nn.Module):
    def __init__(self, layers: int, wrong: int = -1):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(18, 30, bias=False), "down": nn.Linear(30, 18, bias=False)}) for _ in range(layers)])
        self.wrong = wrong

    def forward(self, x):
        for k, layer in enumerate(self.layers):
            inner = torch.sigmoid(layer["up"](x))
            x = x + layer["down"](inner * inner.mean(-1, keepdim=True) if k == self.wrong else inner * (inner.sum(-1, keepdim=True) / 30))
        return x


def spec(layers: int, wrong: int = -1):
    def training(model, batch):
        def step():
            loss = model(batch["x"]).square().mean()
            loss.backward()
            return {"loss": loss}
        return tv.Training(model, step, batch)

    def reference():
        torch.manual_seed(0)
        return training(Deep(layers), {"x": torch.randn(12, 18)})

    def parallel(handed):
        model = Deep(layers, wrong)
        model.load_state_dict(handed.weights)
        return training(model, handed.batch)

    return reference, parallel


def test_classes_do_not_grow_with_depth():
    counts = []
    for layers in (3, 7):
        reducer = Reducer(*captured(*spec(layers), 1), standard_table())
        counts.append(len(reducer.classes.spaces.roots()))
    assert counts[1] <= counts[0]


def test_templates_make_what_rewriting_makes(monkeypatch):
    """Every call rewritten for itself gives the same programs."""
    from trainverify.shrink.rewrite import Rewriter

    programs = captured(*spec(5), 1)
    fast = reduce_programs(*programs, standard_table())
    monkeypatch.setattr(Rewriter, "_is_template", lambda self, call: False)
    slow = reduce_programs(*programs, standard_table())
    for a, b in ((fast.reference, slow.reference), (fast.parallel, slow.parallel)):
        assert a.traces[0].ops == b.traces[0].ops and a.traces[0].storages == b.traces[0].storages


@pytest.mark.slow
@pytest.mark.parametrize("full_size", [False, True])
def test_another_way_to_the_mean_is_proved(full_size):
    report = verified(*spec(4, wrong=2), 1, full_size=full_size)
    assert report.verdict == "PROVED", report.diagnostics
    assert any(c.reduced < c.size for c in report.reduction.classes)


@pytest.mark.slow
@pytest.mark.parametrize("full_size", [False, True])
def test_a_bug_in_one_layer_is_found(monkeypatch, full_size):
    monkeypatch.setattr(Deep, "forward", _buggy)
    report = verified(*spec(5, wrong=3), 1, full_size=full_size)
    assert report.verdict == "REFUTED", report.diagnostics


def _buggy(self, x):
    for k, layer in enumerate(self.layers):
        inner = torch.sigmoid(layer["up"](x))
        x = x + layer["down"](inner * (inner.sum(-1, keepdim=True) / (29 if k == self.wrong else 30)))
    return x
