"""Runs programs that are written for CUDA on the CPU, unmodified (not trusted beyond this: a replaced call must mean the same).

Device arguments are rewritten by a torch function mode, torch.cuda answers like one GPU per rank, the few torch classes that insist
on a GPU are told of the CPU. Every replaced branch is noted once per line, for the report. Everything is restored on exit.
`tensor.cuda()` is the tensor itself, since it is already where it computes.
"""
from __future__ import annotations

import contextlib
import inspect
import re
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch

from trainverify.capture import cuda_stubs
from trainverify.capture.patches import Patches
from trainverify.capture.quiet import unseen
from trainverify.capture.reentry import ReentrantMode
from trainverify.capture.userframes import calling_file, is_user_file

NOTES: Mapping[str, str] = MappingProxyType({
    "CUDA001": "cuda devices are the cpu",
    "CUDA002": "torch.cuda.is_available() answered True",
    "CUDA003": "facts about the GPU were made up",
    "CUDA004": "the cuda random generator is the cpu's",
    "CUDA005": "torch.compile was not run",
    "CUDA006": "autocast for cuda ran as autocast for cpu",
    "CUDA007": "arguments that name a GPU were dropped",
})

_CUDA = re.compile(r"cuda(:\d+)?$")
_CPU = torch.device("cpu")


class NoteSink(Protocol):
    def note(self, code: str, text: str) -> None: ...


@contextlib.contextmanager
def cuda_shim(sink: NoteSink, *, available: bool | None = None, local_rank: int = 0, count: int = 1) -> Iterator[None]:
    """Run the block as if each rank had a GPU.

    available: what torch.cuda.is_available() answers to the program; None: True to its own files, and the truth to installed
    libraries, which know how to run on a CPU.
    """
    patches = Patches()
    shim = _Shim(sink, patches, available, local_rank, count)
    try:
        shim.install()
        with DeviceMode(shim.note), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        patches.restore()


def cpu_device(device: Any) -> Any:
    """The CPU for a device of cuda, in any spelling but an index; anything else as it is."""
    if isinstance(device, torch.device):
        return _CPU if device.type == "cuda" else device
    if isinstance(device, str) and _CUDA.match(device):
        return "cpu"
    return device


class DeviceMode(ReentrantMode):
    """Rewrites the device arguments of torch functions."""

    def __init__(self, note):
        super().__init__()
        self.note = note
        tensor = torch.Tensor
        self._returns_self = {tensor.cuda: "Tensor.cuda()", tensor.pin_memory: "Tensor.pin_memory()"}
        self._handlers = {torch.device: self.call, tensor.cuda: self._self, tensor.pin_memory: self._self, tensor.to: self._to, tensor.type: self._type}

    def handle(self, func, args: tuple, kwargs: dict):
        handler = self._handlers.get(func)     # of torch.device: the object may say cuda; it is rewritten where it is used
        return self._rewritten_call(func, args, kwargs) if handler is None else handler(func, args, kwargs)

    def _self(self, func, args: tuple, kwargs: dict):
        self.note("CUDA001", self._returns_self[func])
        return args[0]

    def _to(self, func, args: tuple, kwargs: dict):
        if len(args) > 1 and type(args[1]) is int:
            args = (args[0], f"cuda:{args[1]}", *args[2:])
        return self._rewritten_call(func, args, kwargs)

    def _type(self, func, args: tuple, kwargs: dict):
        if len(args) > 1 and isinstance(args[1], str):
            args = (args[0], args[1].replace("torch.cuda.", "torch."), *args[2:])
        if len(args) == 1 and not kwargs and is_user_file(calling_file(sys._getframe(1))):
            self.note("CUDA003", "Tensor.type()")
            return self.call(func, args, kwargs).replace("torch.", "torch.cuda.", 1)
        return self._rewritten_call(func, args, kwargs)

    def _rewritten_call(self, func, args: tuple, kwargs: dict):
        for a in args:
            if isinstance(a, (str, torch.device)):
                args = tuple([self._rewritten(func, a) for a in args])
                break
        if kwargs:
            kwargs = self._keywords(func, kwargs)
        return self.call(func, args, kwargs)

    def _keywords(self, func, kwargs: dict) -> dict:
        device = kwargs.get("device")
        if device is not None:
            index = isinstance(device, int) and not isinstance(device, bool)
            kwargs = {**kwargs, "device": self._rewritten(func, f"cuda:{device}" if index else device)}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return kwargs

    def _rewritten(self, func, device):
        new = cpu_device(device)
        if new is not device:
            self.note("CUDA001", f"{getattr(func, '__name__', func)}({str(device)!r})")
        return new


class _Shim:
    """The patches."""

    def __init__(self, sink: NoteSink, patches: Patches, available: bool | None, local_rank: int, count: int):
        self.sink, self.patches, self.available = sink, patches, available
        self.current, self.count = local_rank, count
        self.seen: set[tuple[str, str, str]] = set()

    def note(self, code: str, text: str) -> None:
        """Tell the sink once per code, text and user line."""
        place = _user_line()
        if (code, text, place) not in self.seen:
            self.seen.add((code, text, place))
            self.sink.note(code, text)

    def install(self) -> None:
        self._cuda_namespace()
        self._accelerator()
        self._devices()
        self._amp()
        self._wrappers()
        self._loading()

    # -- torch.cuda

    def _cuda_namespace(self) -> None:
        cuda = torch.cuda
        stubs = cuda_stubs.namespace(self.current, self.count)
        stubs.update(current_device=lambda: self.current, set_device=self._set_device, is_available=self._is_available)
        for name in ("get_device_capability", "get_device_properties", "is_bf16_supported", "get_arch_list", "mem_get_info"):
            stubs[name] = self._noted("CUDA003", f"torch.cuda.{name}()", stubs[name])
        for name in ("manual_seed", "manual_seed_all", "seed", "seed_all", "get_rng_state", "set_rng_state"):
            stubs[name] = self._noted("CUDA004", f"torch.cuda.{name}()", stubs[name])
        functions = {}
        for name, stub in stubs.items():
            original = getattr(cuda, name, None)
            if callable(original) and name not in ("device", "stream"):
                functions[original] = stub     # also where torch.cuda's submodules and the program hold it by name
            self.patches.set(cuda, name, stub)
        self.patches.everywhere(functions)
        for name, stub in cuda_stubs.NVTX.items():
            self.patches.set(cuda.nvtx, name, stub)

    def _noted(self, code: str, text: str, function):
        def wrapper(*args, **kwargs):
            if is_user_file(sys._getframe(1).f_code.co_filename):
                self.note(code, text)
            return function(*args, **kwargs)
        return wrapper

    def _set_device(self, device) -> None:
        index = torch.device(device).index if not isinstance(device, int) else device
        self.current = self.current if index is None else index

    def _is_available(self) -> bool:
        file = sys._getframe(1).f_code.co_filename
        if not is_user_file(file):
            return False
        answer = not _installed(file) if self.available is None else self.available
        if answer:
            self.note("CUDA002", "torch.cuda.is_available()")
        return answer

    def _accelerator(self) -> None:
        accelerator = torch.accelerator
        cuda_device = torch.device("cuda")
        stubs = {
            "is_available": lambda: _user_called() and self._is_available_here(),
            "current_accelerator": lambda check_available=False: cuda_device if _user_called() and self._is_available_here() else None,
            "device_count": lambda: self.count if _user_called() else 0,
            "current_device_index": lambda: self.current, "current_device_idx": lambda: self.current,
            "set_device_index": self._set_device, "set_device_idx": self._set_device,
            "current_stream": torch.cuda.current_stream}
        stubs.update({n: cuda_stubs.nothing for n in ("synchronize", "empty_cache", "set_stream", "reset_peak_memory_stats")})
        stubs.update({n: lambda *args: 0 for n in (
            "memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")})
        for name, stub in stubs.items():
            self.patches.set(accelerator, name, stub)

    def _is_available_here(self) -> bool:
        if self.available is not False:
            self.note("CUDA002", "torch.accelerator")
        return self.available is not False

    # -- devices that do not pass through torch functions

    def _devices(self) -> None:
        from torch.utils import _device

        original = _device.DeviceContext.__init__
        self.patches.set(_device.DeviceContext, "__init__", lambda context, device: original(context, cpu_device(device)))
        self.patches.set(torch, "Generator", _generator_class())
        self.patches.set(torch.Tensor, "record_stream", cuda_stubs.nothing)
        for owner in (torch.UntypedStorage, torch.TypedStorage):
            self.patches.set(owner, "cuda", lambda storage, *args, **kwargs: storage)
        from torch.optim import optimizer

        supported = optimizer._get_capturable_supported_devices
        self.patches.everywhere({supported: lambda *args, **kwargs: [*supported(*args, **kwargs), "cpu"]})

    # -- mixed precision

    def _amp(self) -> None:
        autocast_init, scaler_init = torch.autocast.__init__, torch.amp.GradScaler.__init__
        shim = self

        def autocast(self_, device_type, dtype=None, *args, **kwargs):
            if device_type == "cuda":
                shim.note("CUDA006", "torch.autocast('cuda')")
                device_type, dtype = "cpu", dtype or torch.float16
            autocast_init(self_, device_type, dtype, *args, **kwargs)

        def scaler(self_, device="cuda", *args, **kwargs):
            scaler_init(self_, "cpu" if device == "cuda" else device, *args, **kwargs)

        self.patches.set(torch.autocast, "__init__", autocast)
        self.patches.set(torch.amp.GradScaler, "__init__", scaler)
        for name in ("is_autocast_enabled", "get_autocast_dtype", "set_autocast_enabled", "set_autocast_dtype"):
            self.patches.set(torch, name, _cpu_first(getattr(torch, name)))
        self.patches.set(torch, "get_autocast_gpu_dtype", lambda: torch.get_autocast_dtype("cpu"))

    # -- classes with device arguments, torch.compile

    def _wrappers(self) -> None:
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.nn.parallel import DistributedDataParallel

        self._without_gpu_names(DistributedDataParallel, FullyShardedDataParallel)
        compile_, attention, move = torch.compile, torch.nn.attention.sdpa_kernel, torch.nn.Module.to

        def compiled(model=None, **kwargs):
            self.note("CUDA005", "torch.compile")
            if isinstance(model, torch.nn.Module):
                model.__dict__["_orig_mod"] = model    # where programs look for the module itself; not a submodule
            return compiled if model is None else model

        def sdpa_kernel(backends, *args, **kwargs):
            given = list(backends) if isinstance(backends, (list, tuple)) else [backends]
            return attention([*given, torch.nn.attention.SDPBackend.MATH], *args, **kwargs)

        def module_to(module, *args, **kwargs):
            args = tuple("cpu" if type(a) is int else cpu_device(a) for a in args)
            kwargs = {k: "cpu" if type(v) is int else cpu_device(v) for k, v in kwargs.items()}
            return move(module, *args, **kwargs)

        self.patches.set(torch.nn.Module, "to", module_to)
        self.patches.everywhere({compile_: compiled, attention: sdpa_kernel})
        self.patches.set(torch.nn.Module, "compile", lambda module, *args, **kwargs: compiled(module) and None)

    def _without_gpu_names(self, ddp: type, fsdp: type) -> None:
        ddp_init, fsdp_init, note = ddp.__init__, fsdp.__init__, self.note

        def init_ddp(self_, module, device_ids=None, output_device=None, *args, **kwargs):
            if device_ids is not None or output_device is not None:
                note("CUDA007", "DistributedDataParallel(device_ids=..., output_device=...)")
            ddp_init(self_, module, None, None, *args, **kwargs)

        def init_fsdp(self_, module, *args, **kwargs):
            if kwargs.get("device_id") is not None:
                note("CUDA007", "FullyShardedDataParallel(device_id=...)")
            fsdp_init(self_, module, *args, **{**kwargs, "device_id": _CPU})

        check_hook = ddp._check_comm_hook

        def check_any_hook(self_, hook):
            """Under another name: by its name torch asks for NCCL where a hook compresses to bfloat16."""
            def renamed(*args):
                return hook(*args)
            renamed.__signature__ = inspect.signature(hook)
            check_hook(self_, renamed)

        self.patches.set(ddp, "__init__", init_ddp)
        self.patches.set(ddp, "_check_comm_hook", check_any_hook)
        self.patches.set(fsdp, "__init__", init_fsdp)

    # -- files

    def _loading(self) -> None:
        load = torch.load

        def load_on_cpu(f, map_location=None, *args, **kwargs):
            return load(f, map_location if callable(map_location) else "cpu", *args, **kwargs)

        replacements = {load: load_on_cpu}
        safetensors = sys.modules.get("safetensors.torch")
        if safetensors is not None:
            replacements[safetensors.load_file] = _unseen(_reads_on_cpu(safetensors.load_file, 1))
            replacements[safetensors.safe_open] = _reads_on_cpu(safetensors.safe_open, 2)
            for owner, name in ((safetensors, "load_file"), (safetensors, "safe_open"), (sys.modules["safetensors"], "safe_open")):
                self.patches.set(owner, name, replacements[getattr(owner, name)])
        self.patches.everywhere(replacements)


def _reads_on_cpu(function, position: int):
    """A reader of files whose argument `device`, at this position, is the CPU where it says cuda."""
    def reader(*args, **kwargs):
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        elif len(args) > position:
            args = (*args[:position], _on_cpu(args[position]), *args[position + 1:])
        return function(*args, **kwargs)
    return reader


def _unseen(function):
    """A reader of files looks at bytes of them, which decide nothing; what it returns is known by its values."""
    def reader(*args, **kwargs):
        with unseen():
            return function(*args, **kwargs)
    return reader


def _on_cpu(device: Any) -> Any:
    return "cpu" if isinstance(device, int) else str(cpu_device(device))


def _cpu_first(function):
    """torch.is_autocast_enabled and its like: the device type comes first, none means cuda."""
    def wrapper(*args):
        if args and isinstance(args[0], str):
            return function("cpu" if args[0] == "cuda" else args[0], *args[1:])
        return function("cpu", *args)
    return wrapper


def _generator_class() -> type:
    base = torch._C.Generator

    class Meta(type(base)):
        def __instancecheck__(cls, x) -> bool:
            return isinstance(x, base)

    class Generator(base, metaclass=Meta):
        """A generator of the CPU for any device that is asked for."""

        def __new__(cls, device=None):
            return base.__new__(cls, "cpu" if device is None or isinstance(device, int) else cpu_device(device))

    return Generator


def _installed(file: str) -> bool:
    paths = sysconfig.get_paths()
    return file.startswith((paths["purelib"], paths["platlib"]))


def _user_called() -> bool:
    """Whether the program itself (no library, nor torch) called the stub that asks; seen from a lambda in it."""
    file = sys._getframe(2).f_code.co_filename
    return is_user_file(file) and not _installed(file)


def _user_line() -> str:
    frame = sys._getframe(2)
    while frame is not None and not is_user_file(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else ""
