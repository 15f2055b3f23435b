"""Stand-ins for torch.cuda on a machine without a GPU (not trusted: nothing that they answer reaches a proof but as recorded Python).

One device per rank; streams and events are in order at once, memory is unlimited and empty, the device's random generator is the
CPU's. `namespace` gives the replacements by name.
"""
from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

CAPABILITY = (8, 0)                           # of an A100: bfloat16 yes, fp8 no
MEMORY = 80 << 30


class Event:
    """An event that has always happened."""

    def __init__(self, *args, **kwargs):
        self.event_id = 0

    def record(self, stream=None) -> None: ...
    def wait(self, stream=None) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other) -> float:
        return 0.0


class Stream:
    """A stream on which work is done at once, so that every order that a program asks for holds."""

    def __init__(self, device=None, priority=0, **kwargs):
        self.device, self.priority, self.cuda_stream, self.stream_id = torch.device("cuda", 0), priority, 0, 0

    def wait_stream(self, stream) -> None: ...
    def wait_event(self, event) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, event=None) -> Event:
        return event or Event()

    def query(self) -> bool:
        return True

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None: ...


class DeviceScope:
    """`with torch.cuda.device(i):`"""

    def __init__(self, *args):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None: ...


def nothing(*args, **kwargs) -> None:
    """For calls that only steer the device."""


def _always(value: Any) -> Callable:
    return lambda *args, **kwargs: value


def _device_facts(local_rank: int, count: int) -> dict[str, Any]:
    properties = SimpleNamespace(
        name="GPU stand-in", major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=MEMORY, multi_processor_count=108, warp_size=32,
        max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, shared_memory_per_block=49152,
        shared_memory_per_block_optin=166912, L2_cache_size=40 << 20, is_integrated=False, is_multi_gpu_board=False,
        gcnArchName="", uuid="0")
    return {
        "device_count": _always(count), "current_device": _always(local_rank), "is_initialized": _always(True),
        "get_device_capability": _always(CAPABILITY), "get_device_properties": _always(properties),
        "get_device_name": _always(properties.name), "is_bf16_supported": _always(True), "is_tf32_supported": _always(True),
        "get_arch_list": _always(["sm_80"]), "get_gencode_flags": _always(""), "can_device_access_peer": _always(True),
        "is_current_stream_capturing": _always(False), "mem_get_info": _always((MEMORY, MEMORY)),
        "memory_stats": lambda *a, **k: defaultdict(int), "memory_stats_as_nested_dict": lambda *a, **k: {},
        "memory_snapshot": lambda *a, **k: [], "memory_summary": _always(""), "list_gpu_processes": _always(""),
        "get_sync_debug_mode": _always(0), "get_allocator_backend": _always("native"),
        **{name: _always(0) for name in (
            "memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved", "memory_cached",
            "max_memory_cached", "memory_usage", "utilization", "temperature", "power_draw", "clock_rate", "device_memory_used")}}


def _commands() -> dict[str, Any]:
    return {name: nothing for name in (
        "init", "_lazy_init", "set_device", "synchronize", "empty_cache", "ipc_collect", "set_per_process_memory_fraction",
        "reset_peak_memory_stats", "reset_max_memory_allocated", "reset_max_memory_cached", "reset_accumulated_memory_stats",
        "set_sync_debug_mode", "caching_allocator_enable", "check_error", "set_stream")}


def _streams() -> dict[str, Any]:
    current = Stream()
    return {
        "Stream": Stream, "ExternalStream": Stream, "Event": Event, "current_stream": _always(current),
        "default_stream": _always(current), "stream": lambda stream: contextlib.nullcontext(stream),
        "StreamContext": lambda stream: contextlib.nullcontext(stream), "device": DeviceScope, "device_of": DeviceScope}


def _random() -> dict[str, Any]:
    generator = torch.default_generator
    return {
        "manual_seed": generator.manual_seed, "manual_seed_all": generator.manual_seed, "seed": generator.seed,
        "seed_all": generator.seed, "initial_seed": generator.initial_seed,
        "get_rng_state": lambda *a, **k: generator.get_state(), "get_rng_state_all": lambda: [generator.get_state()],
        "set_rng_state": lambda state, *a, **k: _set_state(generator, state),
        "set_rng_state_all": lambda states: _set_state(generator, *states)}


def _set_state(generator: torch.Generator, state: torch.Tensor) -> None:
    generator.set_state(state)


def namespace(local_rank: int, count: int) -> dict[str, Any]:
    """Replacements for the names of torch.cuda (is_available is the shim's)."""
    types = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
    return {**_device_facts(local_rank, count), **_commands(), **_streams(), **_random(),
            **{f"{t}Tensor": getattr(torch, f"{t}Tensor") for t in types},
            "default_generators": (torch.default_generator,) * count}


NVTX = {"range_push": nothing, "range_pop": nothing, "mark": nothing, "range_start": nothing, "range_end": nothing,
        "range": lambda *args, **kwargs: contextlib.nullcontext()}
