"""Programs that are hard-coded for CUDA run on the CPU, unmodified; what was replaced is noted, and restored."""
import math

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Work, _create_work_from_future
from torch.utils._python_dispatch import TorchDispatchMode
from trainverify.capture.groups import process_groups
from trainverify.capture.recorder import Recorder
from trainverify.capture.scalars import ScalarMode
from trainverify.capture.shim import NOTES, cuda_shim
from trainverify.capture.world import preload, run_world
from trainverify.ir.trace import ScalarRef

import cuda_program


class Notes:
    def __init__(self):
        self.all = []

    def note(self, code, text):
        self.all.append((code, text))


class Completed(TorchDispatchMode):
    """What a recorder does for DDP: works that carry their result (values are not exchanged here)."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        if fake is None and any(t not in (torch.Tensor, torch.nn.Parameter) for t in types):
            return NotImplemented
        if func._opname == "allreduce_":
            future = torch.futures.Future()
            future.set_result(args[0])
            return args[0], Work.boxed(_create_work_from_future(future))
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module", autouse=True)
def modules():
    preload()


@pytest.fixture
def notes():
    return Notes()


def test_a_script_for_gpus(tmp_path, monkeypatch):
    # torch's operator samples, which other tests import, forbid what the script does: setting torch.backends.cudnn's flags
    monkeypatch.setitem(torch.backends.flags_frozen.__globals__, "__allow_nonbracketed_mutation_flag", True)

    def child(rank):
        notes = Notes()
        with (process_groups(rank.rank, 2, notes.note), cuda_shim(notes, local_rank=rank.rank, count=2), Completed()):
            loss = cuda_program.main(str(tmp_path))
        assert math.isfinite(loss)
        return "\n".join(sorted({f"{code} {text}" for code, text in notes.all})).encode()
    world = run_world(2, child, timeout=120)
    assert not world.faults
    lines = world.results[1].decode().splitlines()
    assert {line.split()[0] for line in lines} == {"DIST001", *NOTES}
    assert "CUDA005 torch.compile" in lines and "CUDA001 randint('cuda:1')" in lines


def test_everything_is_restored(notes):
    import torch.distributed.device_mesh as device_mesh
    owners = [torch, torch.cuda, torch.cuda.nvtx, torch.accelerator, torch.autocast, torch.amp.GradScaler, torch.nn.Module, torch.Tensor,
              torch.UntypedStorage, dist, dist.distributed_c10d, device_mesh, device_mesh.DeviceMesh, torch.utils._device.DeviceContext]
    with process_groups(0, 2, notes.note):
        pass                                   # torch keeps some names of its own from the first group
    before = [dict(vars(owner)) for owner in owners]
    with process_groups(0, 2, notes.note), cuda_shim(notes):
        assert torch.cuda.is_available()
    for owner, names in zip(owners, before):
        changed = {n for n, v in vars(owner).items() if names.get(n) is not v} | (names.keys() - vars(owner).keys())
        assert not changed, owner
    assert not dist.is_initialized() and not torch.cuda.is_available()


def test_who_is_told_that_cuda_is_available(notes):
    with cuda_shim(notes):
        assert torch.cuda.is_available()       # this file is the program's
        library = {"torch": torch}
        exec(compile("def ask(): return torch.cuda.is_available()", torch.__file__, "exec"), library)
        assert not library["ask"]()            # torch's own code takes no path that needs a GPU
    with cuda_shim(notes, available=False):
        assert not torch.cuda.is_available()
    assert [code for code, _ in notes.all] == ["CUDA002"]


def test_a_branch_is_noted_once_per_line(notes):
    with cuda_shim(notes):
        for _ in range(3):
            torch.zeros(2, device="cuda")
        torch.zeros(2, device="cuda")
    assert notes.all == [("CUDA001", "zeros('cuda')")] * 2


def test_cpu_programs_are_left_alone(notes):
    with cuda_shim(notes):
        torch.zeros(2, device="cpu").to("cpu").to(torch.float64)
        torch.nn.Linear(2, 2).to(torch.bfloat16)
    assert notes.all == []


def test_device_objects_keep_saying_cuda(notes):
    with cuda_shim(notes):
        device = torch.device("cuda", 1)
        assert (device.type, device.index) == ("cuda", 1)
        assert torch.ones(1, device=device).device.type == "cpu"


def test_tensors_name_their_type_as_on_a_gpu(notes):
    x = torch.ones(2)
    with cuda_shim(notes):
        assert x.type() == "torch.cuda.FloatTensor"            # what programs assert before they call a kernel
        assert x.type(torch.float64).type() == "torch.cuda.DoubleTensor"
        assert torch.ones(1).type(x.type()).dtype == torch.float32
        library = {"x": x}
        exec(compile("kind = x.type()", torch.__file__, "exec"), library)
        assert library["kind"] == "torch.FloatTensor"
    assert x.type() == "torch.FloatTensor" and ("CUDA003", "Tensor.type()") in notes.all


def test_compiled_functions_run_eagerly(notes):
    calls = []

    def double(x):
        calls.append(1)                        # a traced function would not run this every time
        return 2 * x
    with cuda_shim(notes):
        fast = torch.compile(double, fullgraph=True)
        decorated = torch.compile(mode="reduce-overhead")(double)
        module = torch.nn.Linear(2, 2)
        module.compile()
        assert fast(torch.ones(1)).item() == decorated(torch.ones(1)).item() == 2
        fast(torch.ones(1))
    assert len(calls) == 3 and ("CUDA005", "torch.compile") in notes.all


def test_capturable_optimizers(notes):
    with cuda_shim(notes):
        p = torch.ones(2, requires_grad=True)
        optimizer = torch.optim.AdamW([p], capturable=True, foreach=False)
        p.grad = torch.ones(2)
        optimizer.step()
    assert p.detach().ne(1).all()


def test_files_are_read_on_the_cpu(notes, tmp_path):
    import safetensors
    import safetensors.torch
    tensors = {"w": torch.arange(3.0)}
    safetensors.torch.save_file(tensors, tmp_path / "w.safetensors")
    torch.save(tensors, tmp_path / "w.pt")
    before = (safetensors.safe_open, safetensors.torch.load_file)
    with cuda_shim(notes):
        assert safetensors.torch.load_file(tmp_path / "w.safetensors", "cuda:0")["w"].tolist() == [0, 1, 2]
        for device in ("cuda", 0, torch.device("cuda", 0), "cpu"):
            with safetensors.safe_open(tmp_path / "w.safetensors", framework="pt", device=device) as file:
                assert file.get_tensor("w").tolist() == [0, 1, 2]
        with safetensors.safe_open(tmp_path / "w.safetensors", "pt", "cuda") as file:
            assert list(file.keys()) == ["w"]
        for place in ("cuda:0", {"cuda:0": "cuda:1"}, None, lambda storage, location: storage.cuda(0)):
            assert torch.load(tmp_path / "w.pt", map_location=place)["w"].tolist() == [0, 1, 2]
    assert (safetensors.safe_open, safetensors.torch.load_file) == before


def test_a_number_that_left_a_tensor_comes_back_to_a_gpu():
    """torch.tensor() of it is rebuilt from recorded parts, on a device that is there."""
    import torch._dynamo  # noqa: F401  as capture does, before the shim changes what it looks at

    recorder = Recorder("reference", 0, 1, None)
    with cuda_shim(recorder), recorder.recording(), ScalarMode(recorder):
        loss = torch.arange(3.0).sum().item()
        back = torch.tensor([loss, 2.0], device="cuda")
        assert back.device.type == "cpu" and back.tolist() == [3.0, 2.0]
    filled = [call for call in recorder.ops if call.name == "aten.full.default"]
    assert [type(call.args[1]) for call in filled] == [ScalarRef, float]
