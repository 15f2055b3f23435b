"""TrainVerify: formally verifies that a distributed PyTorch training step equals its single-device model.

The public names are loaded when first used: importing this package does not import torch.
"""
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainverify.api import Training, fixed, local
    from trainverify.engine.verify import assert_equivalent, verify

__version__ = "0.1.0"
__all__ = ["Training", "assert_equivalent", "fixed", "local", "verify"]

_HOMES = {
    "Training": "trainverify.api", "local": "trainverify.api", "fixed": "trainverify.api",
    "verify": "trainverify.engine.verify", "assert_equivalent": "trainverify.engine.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trainverify' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
