"""torch.distributed's groups over the fake backend."""
import gc

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from trainverify.capture.groups import process_groups
from trainverify.capture.session import _groups
from trainverify.diagnostics import Fault


@pytest.fixture
def notes():
    found = []
    with process_groups(1, 4, lambda code, text: found.append((code, text))):
        yield found
    assert not dist.is_initialized()


def test_the_default_group_is_there(notes):
    assert dist.is_initialized() and (dist.get_rank(), dist.get_world_size()) == (1, 4)
    assert notes == []


@pytest.mark.parametrize("backend", ["nccl", "gloo", "cpu:gloo,cuda:nccl", None])
def test_a_program_may_initialise(notes, backend):
    dist.init_process_group(backend, init_method="env://", world_size=4, rank=1)
    assert dist.get_backend() == {"nccl": "nccl", "gloo": "gloo", None: "fake"}.get(backend, "nccl")
    assert len(notes) == (backend is not None)
    with pytest.raises(ValueError, match="twice"):
        dist.init_process_group("nccl")


def test_initialising_again_after_destroying(notes):
    dist.init_process_group("nccl")
    dist.destroy_process_group()
    assert not dist.is_initialized()
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 4


@pytest.mark.parametrize("wrong", [dict(world_size=8), dict(world_size=4, rank=0)])
def test_a_program_that_asks_for_another_world(notes, wrong):
    with pytest.raises(Fault) as caught:
        dist.init_process_group("nccl", **wrong)
    assert caught.value.diagnostics[0].code == "RUN016"


def test_groups_keep_their_members(notes):
    dist.init_process_group("nccl")
    mine = dist.new_group([1, 3], backend="gloo")
    other = dist.new_group([0, 2])
    assert dist.get_process_group_ranks(mine) == [1, 3] and dist.get_backend(mine) == "gloo"
    assert other is dist.GroupMember.NON_GROUP_MEMBER
    halves = dist.split_group(split_ranks=[[0, 2], [1, 3]])
    assert dist.get_process_group_ranks(halves) == [1, 3]
    subgroup, _ = dist.new_subgroups(2)
    assert dist.get_process_group_ranks(subgroup) == [0, 1]


def test_meshes_are_on_the_cpu(notes):
    mesh = init_device_mesh("cuda", (2, 2), mesh_dim_names=("dp", "tp"))
    assert mesh.device_type == "cpu"
    assert dist.get_process_group_ranks(mesh.get_group("tp")) == [0, 1]
    assert dist.get_process_group_ranks(mesh["dp"].get_group()) == [1, 3]


def test_barriers(notes):
    dist.barrier(device_ids=[0])
    dist.monitored_barrier()


def test_a_mesh_that_the_program_lets_go_of_still_names_its_groups():
    with process_groups(0, 12, lambda *_: None) as meshes:
        mesh = init_device_mesh("cpu", (2, 3, 2), mesh_dim_names=("pp", "dp", "tp"))
        mesh["pp", "dp"]._flatten("replicas")
        del mesh
        gc.collect()
        named = {g.axis: g.ranks for g in _groups(meshes)}
    assert named.items() >= {"pp": (0, 6), "dp": (0, 2, 4), "tp": (0, 1), "replicas": (0, 2, 4, 6, 8, 10)}.items()


def test_meshes_of_another_capture_name_nothing():
    with process_groups(0, 4, lambda *_: None):
        init_device_mesh("cpu", (4,), mesh_dim_names=("other",))
    with process_groups(0, 4, lambda *_: None) as meshes:
        assert meshes == [] and {g.axis for g in _groups(meshes)} == {""}
