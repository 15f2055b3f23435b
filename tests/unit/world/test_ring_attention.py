"""context_parallel runs on CPU tensors; the ring itself, over several ranks, is examples/ring_attention.py's subject."""
import pytest
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from trainverify.capture.groups import process_groups
from trainverify.capture.ring_attention import CODE, ring_attention
from trainverify.capture.world import run_world


def attend(q, k, v):
    q, k, v = (t.clone().requires_grad_() for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    (out * torch.arange(out.numel()).reshape(out.shape)).sum().backward()
    return out.detach(), q.grad, k.grad, v.grad


def test_one_rank_computes_plain_attention():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 4, 8, generator=generator) for _ in range(3))
    expected = attend(q, k, v)
    notes = []
    with process_groups(0, 1, lambda *note: None), ring_attention(lambda *note: notes.append(note)):
        mesh = init_device_mesh("cpu", (1,))
        buffers = [q.clone(), k.clone(), v.clone()]
        with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2, 2, 2]):
            got = attend(*buffers)
    assert notes[0][0] == CODE
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_without_it_torch_refuses():
    q = torch.randn(1, 2, 4, 8)
    with process_groups(0, 1, lambda *note: None):
        mesh = init_device_mesh("cpu", (1,))
        with context_parallel(mesh, buffers=[q], buffer_seq_dims=[2]), pytest.raises(Exception):
            attend(q, q, q)


def masked(rank):
    q = torch.randn(1, 2, 4, 8)
    with process_groups(rank.rank, rank.world_size, lambda *note: None), ring_attention(lambda *note: None):
        mesh = init_device_mesh("cpu", (rank.world_size,))
        with context_parallel(mesh, buffers=[q], buffer_seq_dims=[2]):
            F.scaled_dot_product_attention(q, q, q, attn_mask=torch.zeros(1, 1, 2, 4))


def test_a_mask_is_refused_at_its_line():
    (fault,) = run_world(2, masked, timeout=60).faults
    assert (fault.code, fault.severity, fault.ranks, fault.span.function) == ("DIST003", "error", (0, 1), "masked")
    assert fault.span.line == masked.__code__.co_firstlineno + 5
    assert "attn_mask of shape [1, 1, 2, 4]" in fault.message and "is_causal=True" in fault.fix
