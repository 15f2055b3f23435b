"""The world together with the recorder: what programs do with torch.distributed works, and its faults name their lines."""
import inspect

import pytest
import torch
import torch.distributed as dist
from trainverify.capture.groups import process_groups
from trainverify.capture.recorder import Recorder
from trainverify.capture.ring_attention import ring_attention
from trainverify.capture.scalars import ScalarMode
from trainverify.capture.shim import cuda_shim
from trainverify.capture.world import run_world


def run(n, program):
    """Run program(rank) as capture does; its repr per rank."""
    def child(rank):
        recorder = Recorder("parallel", rank.rank, n, rank.channel)
        with (process_groups(rank.rank, n, recorder.note), cuda_shim(recorder, local_rank=rank.rank, count=n),
              ring_attention(recorder.note), recorder, ScalarMode(recorder)):
            return repr(program(rank.rank)).encode()
    return run_world(n, child, timeout=120)


def results(n, program):
    world = run(n, program)
    assert not world.faults
    return [eval(r) for r in world.results]


def line_of(function, text):
    lines, first = inspect.getsourcelines(function)
    return first + next(i for i, source in enumerate(lines) if text in source)


def test_object_collectives():
    def program(rank):
        everyone, root, scattered = [None] * 3, [rank * 10], [None]
        dist.all_gather_object(everyone, {"rank": rank})
        dist.broadcast_object_list(root, src=1)
        dist.scatter_object_list(scattered, ["a", "b", "c"] if rank == 0 else None, src=0)
        gathered = [None] * 3 if rank == 0 else None
        dist.gather_object(rank, gathered, dst=0)
        dist.monitored_barrier()
        dist.barrier()
        return everyone, root, scattered, gathered
    assert results(3, program) == [
        ([{"rank": 0}, {"rank": 1}, {"rank": 2}], [10], ["abc"[r]], [0, 1, 2] if r == 0 else None) for r in range(3)]


def test_receives_may_be_posted_before_sends():
    def program(rank):
        mine, theirs = torch.full((2,), float(rank), device="cuda"), torch.empty(2, device="cuda")
        ops = [dist.P2POp(dist.irecv, theirs, 1 - rank), dist.P2POp(dist.isend, mine, 1 - rank)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        return theirs.tolist()
    assert results(2, program) == [[1.0, 1.0], [0.0, 0.0]]


def test_ring_attention_over_three_ranks():
    import torch.nn.functional as F
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import context_parallel_unshard

    def program(rank):
        mesh = init_device_mesh("cuda", (3,))
        q, k, v = torch.randn(3, 1, 2, 12, 4)
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        buffers = [q.clone(), k.clone(), v.clone()]
        with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2, 2, 2]):
            local = F.scaled_dot_product_attention(*buffers, is_causal=True)
            (whole,) = context_parallel_unshard(mesh, [local], [2])
        return bool((whole - expected).abs().max() < 1e-5)
    assert results(3, program) == [True] * 3


def skipped(rank):
    x = torch.ones(3, device="cuda")
    if rank != 2:
        dist.all_reduce(x)                     # left out on rank 2
    dist.all_gather_into_tensor(torch.empty(9), x)


def not_created_everywhere(rank):
    if rank < 2:
        dist.new_group([0, 1])
    group = dist.new_group([0, 2])
    if rank != 1:
        dist.all_reduce(torch.ones(2), group=group)


def uneven(rank):
    dist.all_reduce(torch.ones(4 if rank == 1 else 3))


def average_on_one(rank):
    dist.all_reduce(torch.ones(4), op=dist.ReduceOp.AVG if rank == 1 else dist.ReduceOp.SUM)


def half_on_one(rank):
    dist.all_reduce(torch.ones(4, dtype=torch.bfloat16 if rank == 1 else torch.float32))


def shorter_loop(rank):
    for _ in range(2 if rank == 1 else 3):
        dist.all_reduce(torch.ones(1))


def wrong_shape(rank):
    if rank == 1:
        torch.nn.Linear(2, 2)(torch.ones(3))
    dist.all_reduce(torch.ones(1))


@pytest.mark.parametrize(("program", "code", "ranks", "text"), [
    (skipped, "RUN002", (2,), "all_gather_into_tensor"), (not_created_everywhere, "RUN007", (0, 2), "dist.all_reduce"),
    (uneven, "RUN005", (1,), "dist.all_reduce"), (average_on_one, "RUN003", (1,), "dist.all_reduce"),
    (half_on_one, "RUN004", (1,), "dist.all_reduce"), (shorter_loop, "RUN008", (1,), "dist.all_reduce"),
    (wrong_shape, "RUN009", (1,), "torch.nn.Linear")])
def test_a_faulty_program_is_told_its_line(program, code, ranks, text):
    fault = run(3, program).faults[0]
    assert (fault.code, fault.ranks) == (code, ranks)
    assert (fault.span.file, fault.span.line) == (__file__, line_of(program, text))
