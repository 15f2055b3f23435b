"""torch.distributed without a network: the fake backend under whatever backend the program asks for (trusted: groups keep their members).

A rank's communication is done by the recorder, not by a backend; groups, ranks and meshes are torch's own. The program may call
`init_process_group` or find it done, may ask for nccl or gloo, and reads back from `get_backend` what it asked for.
"""
from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist
import torch.distributed.device_mesh as device_mesh
import torch.distributed.distributed_c10d as c10d

from trainverify.capture.patches import Note, Patches, caller_is_user
from trainverify.diagnostics import Diagnostic, Fault


def init_fake(rank: int, world_size: int, init=c10d.init_process_group) -> None:
    """Initialise the default process group with the fake backend."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    init("fake", store=FakeStore(), rank=rank, world_size=world_size)


@contextlib.contextmanager
def process_groups(rank: int, world_size: int, note: Note) -> Iterator[list[device_mesh.DeviceMesh]]:
    """Initialise the default group and keep torch.distributed's group functions on the fake backend until exit. Gives all meshes that are
    made meanwhile: their axes name groups, also when the program has let go of the mesh."""
    init_fake(rank, world_size)
    patches = Patches()
    groups = _Groups(rank, world_size, note, patches)
    groups.install()
    try:
        yield groups.meshes
    finally:
        patches.restore()
        if dist.is_initialized():
            dist.destroy_process_group()


class _Groups:
    """The replacements. They keep the arguments of the functions that they replace."""

    def __init__(self, rank: int, world_size: int, note: Note, patches: Patches):
        self.rank, self.world_size, self.note, self.patches = rank, world_size, note, patches
        self.asked: dict[str, str] = {}        # backend asked for, by group name
        self.meshes: list[device_mesh.DeviceMesh] = []
        self.init_calls = 0
        self.original_init = c10d.init_process_group
        self.original_helper = c10d._new_process_group_helper
        self.original_get_backend = c10d.get_backend
        self.original_mesh_init = device_mesh.DeviceMesh.__init__
        self.original_init_mesh = device_mesh.init_device_mesh

    def install(self) -> None:
        self.patches.everywhere({
            c10d.init_process_group: self.init_process_group, c10d._new_process_group_helper: self.new_helper,
            c10d.get_backend: self.get_backend, c10d.split_group: self.split_group,
            c10d.monitored_barrier: self.monitored_barrier, device_mesh.init_device_mesh: self.init_device_mesh})
        groups = self

        def mesh_init(mesh, device_type, *args, **kwargs):
            groups.original_mesh_init(mesh, groups.mesh_device(device_type), *args, **kwargs)
            groups.meshes.append(mesh)         # slices and flattened meshes get the names of their groups after this

        self.patches.set(device_mesh.DeviceMesh, "__init__", mesh_init)

    def init_process_group(self, backend=None, init_method=None, timeout=None, world_size=-1, rank=-1, store=None,
                           group_name="", pg_options=None, device_id=None, _ranks=None):
        for what, asked, given in (("world_size", world_size, self.world_size), ("rank", rank, self.rank)):
            if asked not in (-1, given):
                raise Fault(Diagnostic(
                    "RUN016", f"init_process_group({what}={asked}) on rank {self.rank} of a world of {self.world_size}",
                    ranks=(self.rank,), fix=f"Leave {what} to the environment (RANK, WORLD_SIZE), or verify with that world size."))
        if dist.is_initialized():
            if self.init_calls:
                raise ValueError("trying to initialize the default process group twice!")
        else:
            init_fake(self.rank, self.world_size, self.original_init)
        self.init_calls += 1
        if backend:
            self.asked[dist.group.WORLD.group_name] = str(backend).lower()
            self.note("DIST001", f"init_process_group({str(backend)!r}): communication is done by the verifier, not by a backend")

    def new_helper(self, group_size, group_rank, global_ranks_in_group, backend, store, group_name, *args, **kwargs):
        options = {"timeout", "pg_tag", "group_desc"}
        names = ("backend_options", "timeout", "pg_tag", "device_id", "group_desc")
        kwargs.update(zip(names, args))
        kept = {k: v for k, v in kwargs.items() if k in options}
        if str(backend) not in ("fake", "None", "undefined"):
            self.asked[group_name] = str(backend).lower()
        return self.original_helper(group_size, group_rank, global_ranks_in_group, c10d.Backend("fake"), store, group_name, **kept)

    def get_backend(self, group=None):
        backend = self.original_get_backend(group)
        if not caller_is_user():               # torch's own code must not take the paths of a backend that is not there
            return backend
        name = (group or dist.group.WORLD).group_name
        asked = self.asked.get(name) or self.asked.get(dist.group.WORLD.group_name) or str(backend)
        return _first_backend(asked)

    def split_group(self, parent_pg=None, split_ranks=None, timeout=None, pg_options=None, group_desc=None, **_):
        parent = parent_pg or dist.group.WORLD
        members = dist.get_process_group_ranks(parent)
        mine = None
        for ranks in split_ranks or []:
            group = dist.new_group([members[r] for r in ranks], group_desc=group_desc)
            mine = group if self.rank in [members[r] for r in ranks] else mine
        return mine

    @staticmethod
    def monitored_barrier(group=None, timeout=None, wait_all_ranks=False):
        dist.barrier(group)

    @staticmethod
    def mesh_device(device_type):
        return "cpu" if device_type == "cuda" else device_type

    def init_device_mesh(self, device_type, *args, **kwargs):
        return self.original_init_mesh(self.mesh_device(device_type), *args, **kwargs)


def _first_backend(asked: str) -> str:
    """Of "cpu:gloo,cuda:nccl" what a program on GPUs is told: the last one."""
    return asked.split(",")[-1].split(":")[-1]
