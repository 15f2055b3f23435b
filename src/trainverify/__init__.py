"""TrainVerify: formally verifies that a distributed PyTorch training step equals its single-device model.

Importing this package does not import torch: the names that need it are loaded when first used.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

# At once and not on first use: loading the submodule `verify` later would put the module in the place of the function.
from trainverify.testing import assert_equivalent
from trainverify.verify import verify

if TYPE_CHECKING:
    from trainverify.api import Training, fixed, local, op, routing

__version__ = "0.1.0"
__all__ = ["Training", "assert_equivalent", "fixed", "local", "op", "routing", "verify"]

_LAZY = ("Training", "fixed", "local", "op", "routing")


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'trainverify' has no attribute {name!r}")
    from trainverify import api
    value = getattr(api, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
