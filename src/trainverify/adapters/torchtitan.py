"""torchtitan 0.3 on torch 2.13: microbatches that its trainer has split already are handed to torch's pipeline schedules (listed in the report).

torchtitan calls `schedule.step(arg_mbs=..., kwarg_mbs=..., target_mbs=...)`, which torch has from 2.14 on. torch 2.13 splits a whole batch itself and
then does the same; the patch leaves out the splitting and nothing else. Its training loop changes timeouts by a function of torch 2.14. A GPU it does not
need: its device type is cuda, which the CUDA shim redirects.
"""
from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

FRAMEWORK = "torchtitan"

Patch = Callable[[Any, str, Any, str], None]


def after_import(module_name: str, module: ModuleType, patch: Patch) -> None:
    if module_name == "torchtitan.distributed.pipeline_parallel":
        for schedule in (module.PipelineScheduleSingle, module.PipelineScheduleMulti):
            if "arg_mbs" not in inspect.signature(schedule.step).parameters:
                patch(schedule, "step", _taking_microbatches(schedule.step),
                      "torchtitan hands over microbatches, for which torch 2.13 has no argument (2.14 has): they take the place of those that torch splits")
    if module_name == "torchtitan.distributed.utils":
        import torch.distributed as dist       # the framework has imported it

        if not hasattr(dist, "set_timeout"):
            patch(dist, "set_timeout", _leaving_timeouts, "torch 2.13 cannot change the timeouts of process groups (2.14 can): they stay as they are")


def _leaving_timeouts(timeout: Any, group: Any = None) -> None:
    """In place of torch's function, with which nothing is computed."""


def _taking_microbatches(step: Callable) -> Callable:
    """A schedule's step that also takes microbatches."""
    @functools.wraps(step)
    def wrapper(schedule, *args, arg_mbs=None, kwarg_mbs=None, target_mbs=None, losses=None, return_outputs=True, loss_kwargs=None, **kwargs):
        if arg_mbs is None and kwarg_mbs is None:
            return step(schedule, *args, losses=losses, return_outputs=return_outputs, loss_kwargs=loss_kwargs, **kwargs)
        stages = schedule._stages if hasattr(schedule, "_stages") else [schedule._stage]
        for stage in stages:
            stage.has_backward = schedule._has_backward
            stage.clear_runtime_states()
        schedule._step_microbatches(arg_mbs, kwarg_mbs, target_mbs, losses, return_outputs, loss_kwargs=loss_kwargs)
        last = next((stage for stage in stages if stage.is_last and return_outputs), None)
        return None if last is None else schedule._merge_outputs(last.output_chunks)

    return wrapper
