"""What every function of a stand-in does besides computing: say where it was called, and refuse what it does not cover (trusted)."""
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch

from trainverify.adapters.standins import CALLS
from trainverify.diagnostics import Diagnostic, Fault

F = TypeVar("F", bound=Callable[..., Any])


def stands_for(name: str, meaning: str) -> Callable[[F], F]:
    """The function takes the place of `name`; each line that calls it assumes that `name` computes `meaning`."""
    text = f"stand-in: {name} computes {meaning}"

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            if CALLS.note is not None:
                CALLS.note("ASSUME", text)
            return function(*args, **kwargs)
        called.stands_for = (name, meaning)
        return called
    return decorate


def refuse(what: str) -> NoReturn:
    """An argument that the stand-in does not cover."""
    raise Fault(Diagnostic("STAND002", f"{what} is not covered by the stand-in", fix="Leave the argument at its default, or write the call in plain PyTorch."))


def only(name: str, **given: tuple[Any, Any]) -> None:
    """Each argument, as (given, the one value that is covered)."""
    for argument, (value, covered) in given.items():
        if value is not covered and not (isinstance(value, (bool, int, float, str)) and value == covered):
            refuse(f"{name}({argument}={value!r})")


def wide(x: torch.Tensor | None) -> torch.Tensor | None:
    """Kernels compute in float32 at least."""
    return x.float() if x is not None and x.dtype in (torch.float16, torch.bfloat16) else x
