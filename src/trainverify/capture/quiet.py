"""Our own tensor work inside a captured process: no dispatch or function mode sees it, autograd neither (trusted)."""
from __future__ import annotations

import torch


class _Unseen:
    """A class and not a generator, and no torch.no_grad(): it is entered a few times for each recorded call."""

    __slots__ = ("_function", "_dispatch", "_below", "_grad")

    def __enter__(self) -> None:
        self._function, self._dispatch, self._below = torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch(), torch._C._AutoDispatchBelowAutograd()
        self._function.__enter__()             # first and last: the functions below are such that modes see
        self._dispatch.__enter__()
        self._below.__enter__()
        self._grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)

    def __exit__(self, *error: object) -> None:
        torch._C._set_grad_enabled(self._grad)
        self._below.__exit__(*error)
        self._dispatch.__exit__(*error)
        self._function.__exit__(*error)


def unseen() -> _Unseen:
    """Nothing in `with unseen():` is recorded or differentiated."""
    return _Unseen()
