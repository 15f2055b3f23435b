"""Traps of recording, one by one: what a trace says must be what was computed."""
import ctypes

import numpy as np
import pytest
import torch

from capture.check import replayed
from trainverify.capture.recorder import Recorder
from trainverify.capture.scalars import ScalarMode
from trainverify.diagnostics import Fault
from trainverify.ir.trace import Name, Program, ScalarRef, Sequence, TensorRef, inputs
from trainverify.ops.access import reads


def record(function, *args):
    """The program of one rank that runs function(*args), after it replayed bit for bit."""
    recorder = Recorder("reference", 0, 1, None)
    with recorder.recording(), ScalarMode(recorder):
        function(*args)
    program = Program([recorder.trace()], [recorder.blobs])
    replayed(program)
    return program.traces[0], recorder.blobs


def names(trace):
    return [c.name.split(".")[1] for c in trace.ops]


def test_views_are_not_recorded_and_refer_to_one_storage():
    x = torch.arange(12.0).reshape(3, 4)
    trace, blobs = record(lambda: x.t()[1:3].unsqueeze(0).expand(2, 2, 3).add(1))
    (call,) = trace.ops
    assert call.args[0] == TensorRef(0, 1, (2, 2, 3), (0, 1, 4), "float32") and trace.storages[0].initial
    assert (blobs["init.0"].view(np.float32) == np.arange(12)).all()


def test_in_place_and_out_arguments():
    x, y = torch.ones(3), torch.zeros(3)

    def run():
        x.add_(2)
        torch.mul(x, x, out=y)
        torch.mul(y, x, out=y)

    trace, _ = record(run)
    add, first, second = trace.ops
    assert add.writes == (add.outs,) == (add.args[0],) and reads(add) == (add.args[0],)
    assert first.writes == (first.kwargs["out"],) and reads(first) == (first.args[0], first.args[1])
    assert y.tolist() == [27.0] * 3 and len(reads(second)) == 2


def test_of_a_large_buffer_only_what_is_used_is_in_the_trace():
    def run():
        bucket = torch.empty(1 << 24, 3)       # 200 MB
        bucket.view(-1)[5:10].copy_(torch.ones(5))
        bucket[2].mul_(2)
        torch.empty(1 << 26).numel()           # not used at all
        return bucket.view(torch.int32)[3, 1].add(0)

    trace, _ = record(run)
    first, second = (c for c in trace.ops if c.name == "aten.empty.memory_format")
    assert first.args == (Sequence((4, 3)),) and first.outs.size == (4, 3) and first.outs.stride == (3, 1)
    assert second.outs.size == (1,)
    assert [trace.storages[c.outs.storage].nbytes for c in (first, second)] == [4 * 3 * 4, 4]


def test_a_large_buffer_that_is_resized_or_small_stays():
    def run():
        torch.empty(9).add_(1)
        torch.empty(1 << 19).untyped_storage().resize_(0)

    trace, _ = record(run)
    assert [c.outs.size for c in trace.ops if c.name == "aten.empty.memory_format"] == [(9,), (1 << 19,)]


def test_what_is_written_unseen_into_a_large_buffer_is_found():
    def run():
        bucket = torch.empty(1 << 25)
        raw = np.frombuffer((ctypes.c_float * bucket.numel()).from_address(bucket.data_ptr()), dtype=np.float32)
        raw[1000] = 7
        bucket[:10].add(1)                     # nobody wrote there
        bucket[1000:1001].add(1)

    trace, blobs = record(run)
    blank, found = (c.args[0].storage for c in trace.ops if c.name == "aten.add.Tensor")
    assert not trace.storages[blank].initial and trace.storages[found].initial
    assert blobs[f"init.{found}"].view(np.float32)[1000] == 7


def test_digests_cover_what_is_read():
    def run():
        x = torch.empty(3)
        x.copy_(torch.ones(3))
        torch.empty_like(x)

    trace, _ = record(run)
    empty, ones, copy, like = trace.ops
    assert empty.digest_out == like.digest_out == 0 == like.digest_in and copy.digest_in == ones.digest_out == copy.digest_out != 0


def test_data_assignment_and_set():
    def run():
        p, q = torch.nn.Parameter(torch.ones(2)), torch.zeros(4)
        p.data = q[1:3]
        p.data.add_(1)
        q.set_(torch.ones(2).untyped_storage(), 0, (2,), (1,))
        q.mul_(3)

    trace, _ = record(run)
    add, mul = (c for c in trace.ops if c.name in ("aten.add_.Tensor", "aten.mul_.Tensor"))
    assert add.args[0].offset == 1 and mul.args[0].storage != add.args[0].storage


def test_storages_are_numbered_for_life():
    def run():
        for _ in range(50):
            torch.ones(1000).mul(2)

    trace, _ = record(run)
    assert len(trace.storages) == 100


def test_resize():
    def run():
        x = torch.ones(4)
        x.untyped_storage().resize_(0)
        x.untyped_storage().resize_(16)
        x.copy_(torch.full((4,), 2.0))
        x.add_(1)

    trace, _ = record(run)
    assert [c.args for c in trace.ops if c.name == "tv.resize"] == [(Name("storage", "0"), 0), (Name("storage", "0"), 16)]


def test_what_memory_gains_is_no_contents():
    x = torch.tensor([1, 2, 3], dtype=torch.uint8)             # the recorder has not seen it

    def run():
        x.resize_(400)                         # as torch pads objects that it gathers
        return x + 1

    trace, blobs = record(run)
    grown = next(c for c in trace.ops if c.name == "tv.resize")
    add = next(c for c in trace.ops if c.name == "aten.add.Tensor")
    assert grown.args == (Name("storage", str(add.args[0].storage)), 400)
    assert bytes(blobs[f"init.{add.args[0].storage}"]) == b"\1\2\3"


def test_memory_that_numpy_fills_is_data():
    def run():
        x, n = torch.empty(3), torch.zeros(3, dtype=torch.int64)
        x.numpy()[:] = 5
        n.numpy()[:] = 7
        return (x + 1) * n

    trace, blobs = record(run)
    add, mul = (c for c in trace.ops if c.name in ("aten.add.Tensor", "aten.mul.Tensor"))
    for ref, value in ((add.args[0], np.float32(5)), (mul.args[1], np.int64(7))):
        assert (blobs[f"init.{ref.storage}"].view(value.dtype) == value).all()


def test_a_hidden_write_shows_in_the_digests():
    def run():
        x = torch.ones(3).mul(2)
        x.numpy()[:] = 5
        x.add(1)

    with pytest.raises(AssertionError, match="add.Tensor"):
        record(run)


def test_random_results_are_kept():
    trace, blobs = record(lambda: (torch.rand(3), torch.nn.functional.dropout(torch.ones(4), 0.5), torch.randperm(5), torch.zeros(2).uniform_()))
    random = [c for c in trace.ops if c.rng]
    assert len(random) == 4 and all(f"rng.{c.index}.0" in blobs for c in random)
    torch.manual_seed(0)
    q = torch.rand(1, 2, 4, 4)
    trace, _ = record(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert not any(c.rng for c in trace.ops)


def test_lazy_conjugates_and_negatives_become_real():
    z = torch.randn(3, dtype=torch.complex64)
    trace, _ = record(lambda: (z.conj() * z.conj().clone(), z.conj().imag + 1, torch.stack([z.conj(), z]), z.reshape(1, 3).mH @ z.reshape(1, 3)))
    assert names(trace).count("conj_physical") == 4 and "neg" in names(trace)
    with pytest.raises(Fault, match="CAP001"):
        record(lambda: z.conj().add_(1))


def test_batch_norm_writes_its_statistics():
    norm, x = torch.nn.BatchNorm1d(2), torch.rand(4, 2)
    trace, _ = record(lambda: norm(x))
    (call,) = [c for c in trace.ops if "batch_norm" in c.name]
    assert len(call.writes) == 2 and {w.size for w in call.writes} == {(2,)}
    with torch.inference_mode():
        trace, _ = record(lambda: torch.native_batch_norm(x, None, None, norm.running_mean, norm.running_var, True, 0.1, 1e-5))
        assert len(trace.ops[0].writes) == 2
        trace, _ = record(lambda: torch.native_batch_norm(x, None, None, norm.running_mean, norm.running_var, False, 0.1, 1e-5))
        assert trace.ops[0].writes == ()


def test_composite_ops_are_taken_apart_in_inference_mode():
    with torch.inference_mode():
        trace, _ = record(lambda: torch.dropout(torch.nn.functional.linear(torch.ones(2, 3, 4), torch.ones(5, 4)), 0.0, True))
    assert "linear" not in names(trace) and {"mm"} & set(names(trace))


def test_zero_tensors_get_memory():
    from torch.autograd import forward_ad
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.ones(2), torch.ones(2))
        trace, _ = record(lambda: forward_ad.unpack_dual(x * torch.ones(2)))
    assert "_efficientzerotensor" not in names(trace)


def test_meta_tensors_leave_no_trace():
    def run():
        with torch.device("meta"):
            layer = torch.nn.Linear(2, 2)
        layer.to_empty(device="cpu")
        layer.weight.data.fill_(1)
        layer.bias.data.zero_()
        layer(torch.ones(1, 2))

    trace, _ = record(run)
    assert not any("meta" in str(c.kwargs) for c in trace.ops) and names(trace)[-1] == "addmm"


def test_shape_propagation_of_dtensor_is_not_recorded():
    from torch._subclasses.fake_tensor import FakeTensorMode

    def run():
        with FakeTensorMode():
            torch.ones(3) + 1
        torch.ones(2) + 1

    trace, _ = record(run)
    assert all(t.size != (3,) for c in trace.ops for t in inputs(c))


def test_a_view_that_copies_is_recorded_where_torch_does_not_decompose_it():
    """Below autograd (in a subclass's own dispatch) contiguous, reshape and to come undecomposed; their schemas say that they are views."""
    x = torch.arange(6.0).reshape(2, 3)

    def run():
        with torch._C._AutoDispatchBelowAutograd():
            y = x.t()
            y.contiguous().contiguous(), y.reshape(-1), y.to(torch.float64), y.flatten(), y.reshape(3, 1, 2), y.reshape(3, 2).narrow(0, 1, 1)

    trace, _ = record(run)
    assert names(trace) == ["clone", "clone", "_to_copy", "clone"]


def test_arguments():
    x = torch.ones(2, 2)
    trace, _ = record(lambda: (x.sum(0, dtype=torch.float64), x.clamp(min=0.5), torch.full((2,), 1 + 2j), x.to(torch.bfloat16), x[x > 0],
                               torch.ones_like(x, memory_format=torch.contiguous_format)))
    kinds = {a.kind for c in trace.ops for a in (*c.args, *c.kwargs.values()) if isinstance(a, Name)}
    assert {"dtype", "complex", "memory_format"} <= kinds and "opaque" not in kinds
    (index,) = [c for c in trace.ops if c.name == "aten.index.Tensor"]
    assert isinstance(index.args[1], Sequence) and index.args[1].items[0].dtype == "bool"


def test_tracked_scalars_come_back_as_references():
    x = torch.tensor([3.0, 4.0])

    def run():
        norm = x.norm().item()
        c = min(1.0, 0.5 / (norm + 1e-6))
        torch.mul(x, c)
        torch._foreach_mul([x, x], c)
        torch._foreach_addcdiv([x], [x], [x], [norm])
        x.add(x, alpha=2.0)

    trace, _ = record(run)
    ops = {c.name: c for c in trace.ops}
    assert isinstance(ops["aten._local_scalar_dense.default"].outs, ScalarRef)
    assert ops["tv.scalar.add"].args == (ScalarRef(0), 1e-6) and ops["tv.decision"].outs is True
    assert ops["aten.mul.Tensor"].args[1] == ops["aten._foreach_mul.Scalar"].args[1] == ops["tv.scalar.truediv"].outs
    assert ops["aten._foreach_addcdiv.ScalarList"].args[3] == Sequence((ScalarRef(0),)) and ops["aten.add.Tensor"].kwargs == {"alpha": 2.0}


def test_booleans_and_integers_leave_as_they_are():
    x = torch.arange(3)
    trace, _ = record(lambda: (x.sum().item(), bool((x > 1).any()), torch.equal(x, x)))
    assert [c.outs for c in trace.ops if c.name in ("aten._local_scalar_dense.default", "aten.equal.default")] == [3, True, True]


def test_autograd_function_and_hooks_have_their_own_lines():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return g * 3

    x = torch.ones(2, requires_grad=True)

    def run():
        y = Double.apply(x)
        z = y.exp()
        z.register_hook(lambda g: g + 1)
        z.sum().backward()

    trace, _ = record(run)
    spans = {c.name: trace.spans[c.span] for c in trace.ops if trace.spans[c.span].phase == "backward"}
    assert spans["aten.add.Tensor"].function == "<lambda>" and spans["aten.mul.Tensor"].function == "backward"
    (backward,) = [s for s in trace.spans if s.function == "backward"]
    (forward,) = [s for s in trace.spans if s.function == "forward"]
    assert backward.phase == "backward" and backward.line == forward.line + 4 and forward.stack[0][2] == "run"


def test_recomputed_forward_has_its_own_lines():
    layer = torch.nn.Linear(2, 2)

    def run():
        torch.utils.checkpoint.checkpoint(lambda x: layer(x).relu(), torch.ones(1, 2), use_reentrant=False).sum().backward()

    trace, _ = record(run)
    relu = [trace.spans[c.span] for c in trace.ops if c.name == "aten.relu.default"]
    assert [s.phase for s in relu] == ["setup", "backward"] and {s.function for s in relu} == {"<lambda>"}


def test_nothing_is_left_behind():
    resize, item = torch.UntypedStorage.resize_, torch.ones(1).item()
    record(lambda: torch.ones(1).item())
    assert torch.UntypedStorage.resize_ is resize and type(torch.ones(1).item()) is type(item) is float
    assert not torch.nn.modules.module._global_forward_pre_hooks
