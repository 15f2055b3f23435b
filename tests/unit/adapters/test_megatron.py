"""What the adapter for megatron-core replaces means the same as what Megatron does where its kernels are installed (needs no megatron-core)."""
from types import ModuleType, SimpleNamespace

import pytest
import torch

from trainverify.adapters import megatron


def adapted(name, **contents):
    """A module as Megatron's of that name, after the adapter saw its import, and the reasons that it gave."""
    module, reasons = ModuleType(f"megatron.core.{name}"), {}
    vars(module).update(contents)

    def patch(owner, attribute, new, reason):
        setattr(owner, attribute, new)
        reasons[attribute] = reason
    megatron.after_import(module.__name__, module, patch)
    return module, reasons


def test_the_norm_of_several_tensors_is_that_of_all_their_elements():
    module, reasons = adapted("utils")
    tensors = [torch.randn(3, 4), torch.randn(5)]
    norm, per_tensor = module.local_multi_tensor_l2_norm(65536, None, [tensors], False)
    assert norm.shape == (1,) and per_tensor is None and "float()" in reasons["local_multi_tensor_l2_norm"]
    torch.testing.assert_close(norm[0], torch.cat([t.flatten() for t in tensors]).norm())


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norms_carry_the_mark_that_the_configuration_says(sequence_parallel):
    class WrappedTorchNorm:
        def __new__(cls, config, hidden_size, eps=1e-5):
            assert not config.sequence_parallel
            return torch.nn.RMSNorm(hidden_size, eps)

    module, reasons = adapted("transformer.torch_norm", WrappedTorchNorm=WrappedTorchNorm)
    config = SimpleNamespace(sequence_parallel=sequence_parallel)
    norm = module.WrappedTorchNorm(config, 4, eps=1e-3)
    assert norm.eps == 1e-3 and config.sequence_parallel == sequence_parallel and "sequence_parallel" in reasons["__new__"]
    assert getattr(norm.weight, "sequence_parallel", False) == sequence_parallel


def test_a_name_that_megatron_defines_is_left_alone():
    assert adapted("transformer.moe.moe_utils")[0].te_general_gemm is None
    module, reasons = adapted("transformer.moe.moe_utils", te_general_gemm=torch.mm)
    assert module.te_general_gemm is torch.mm and reasons.keys() == {"maybe_move_tensor_to_cpu"}


def test_tensors_become_numpy_where_they_are_asked_to():
    move = adapted("transformer.moe.moe_utils")[0].maybe_move_tensor_to_cpu
    x = torch.arange(3)
    assert move(x) is x and move(x, as_numpy=True).tolist() == [0, 1, 2] and move(None) is None


def test_other_modules_are_left_alone():
    assert adapted("parallel_state")[1] == {}
