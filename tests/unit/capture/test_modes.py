"""What our modes cost nothing and hide nothing: attributes go straight to torch, our own work is unseen, and both leave everything as it was."""
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from trainverify.capture.quiet import unseen
from trainverify.capture.reentry import ReentrantMode
from trainverify.capture.userframes import is_internal


class Handled(ReentrantMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def handle(self, func, args, kwargs):
        self.seen.append(getattr(func, "__name__", ""))
        return func(*args, **kwargs)


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_attributes_are_not_handled_and_calls_are():
    x = torch.randn(2, 3, requires_grad=True)
    with Handled() as mode:
        assert (x.shape, x.dtype, x.requires_grad, x.grad, x.dim(), x.size(1), x.numel(), x.stride()) == ((2, 3), torch.float32, True, None, 2, 3, 6, (3, 1))
        assert mode.seen == []
        x.sum().item(), x.tolist(), x.to("cpu"), x.untyped_storage(), x.data_ptr()
    assert mode.seen == ["sum", "item", "tolist", "to", "untyped_storage", "data_ptr"]


def test_attributes_that_compute_are_dispatched():
    x = torch.randn(2, 3)
    with Handled(), Dispatched() as dispatched:
        assert x.T.shape == (3, 2) and x.data.shape == (2, 3)
    assert dispatched.seen[0].overloadpacket in (torch.ops.aten.t, torch.ops.aten.permute, torch.ops.aten.numpy_T)


def test_a_wrong_question_is_the_users_error():
    with Handled(), pytest.raises(TypeError) as caught:
        torch.randn(2).size(1, 2, 3, "x")
    assert not is_internal(caught.value)


@pytest.mark.parametrize("grad", [True, False])
def test_unseen_leaves_everything_as_it_was(grad):
    x = torch.ones(3, requires_grad=True)
    with torch.set_grad_enabled(grad), Functions() as functions, Dispatched() as dispatched:
        with unseen():
            x.mul_(2)                          # a leaf that requires grad: autograd would refuse
            with unseen():
                x.add_(1)
            x.add_(1)
            assert not torch.is_grad_enabled()
        assert functions.seen == [] and dispatched.seen == []
        assert torch.is_grad_enabled() is grad
        with pytest.raises(ZeroDivisionError), unseen():
            1 / 0
        assert torch.is_grad_enabled() is grad
        assert (x + 1).requires_grad is grad
        assert len(functions.seen) > 0 and len(dispatched.seen) == 1


class Layer(ReentrantMode):
    """Writes down what it handles, in a list that it shares with others."""

    def __init__(self, name, seen):
        super().__init__()
        self.name, self.seen = name, seen

    def handle(self, func, args, kwargs):
        self.seen.append((self.name, getattr(func, "__name__", "")))
        return self.call(func, args, kwargs)


def test_modes_above_each_other_are_layers_of_one():
    x, seen, depth = torch.ones(2, requires_grad=True), [], torch.overrides._len_torch_function_stack
    with Layer("low", seen):
        with Layer("high", seen):
            assert depth() == 1
            torch.exp(x.detach())
            assert seen == [("high", "detach"), ("low", "detach"), ("high", "exp"), ("low", "exp")]
            y = x * 2
            y.register_hook(lambda g: torch.sin(g))
            seen.clear()
            y.sum().backward()
            assert ("high", "backward") in seen and seen[-2:] == [("high", "sin"), ("low", "sin")]
        seen.clear()
        torch.exp(x)
        assert seen == [("low", "exp")]
    assert depth() == 0


def test_a_mode_of_the_program_stays_between_ours():
    x, seen = torch.ones(2), []
    with Layer("low", seen), Functions() as functions, Layer("high", seen):
        torch.exp(x)
    assert seen == [("high", "exp"), ("low", "exp")] and functions.seen == [torch.exp]


def test_what_a_layer_does_by_itself_is_not_handled_below():
    class Own(Layer):
        def handle(self, func, args, kwargs):
            torch.zeros(1)
            return super().handle(func, args, kwargs)

    seen = []
    with Layer("low", seen), Own("high", seen):
        torch.exp(torch.ones(2))
    assert seen == [("high", "ones"), ("low", "ones"), ("high", "exp"), ("low", "exp")]
