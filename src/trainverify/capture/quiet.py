"""Our own tensor work inside a captured process: no dispatch or function mode sees it, autograd neither (trusted)."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def unseen() -> Iterator[None]:
    """Nothing in here is recorded, differentiated, or bumps a version counter."""
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction(), torch._C._AutoDispatchBelowAutograd(), torch.no_grad():
        yield
