"""transformers: flash_attention_2 without a GPU, where flash_attn is stood in for (every patch is listed in the report as an assumption)."""
from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from trainverify.adapters.standins import FINDER

FRAMEWORK = "transformers"
REASON = "asks for a GPU beside flash_attn; with the stand-in for flash_attn there is none"


def after_import(module_name: str, module: ModuleType, patch: Callable[[Any, str, Any, str], None]) -> None:
    if not FINDER.provides("flash_attn"):
        return
    if module_name == "transformers.utils.import_utils":
        asks = module.is_flash_attn_2_available

        @functools.wraps(asks)
        def is_flash_attn_2_available(*args: Any, **kwargs: Any) -> bool:
            return True

        patch(module, "is_flash_attn_2_available", is_flash_attn_2_available, REASON)
    if module_name == "transformers.modeling_flash_attention_utils":
        known = module.FLASH_ATTENTION_COMPATIBILITY_MATRIX
        here = {**known[2], "supported_devices": (*known[2]["supported_devices"], (lambda: True, "cpu"))}
        patch(module, "FLASH_ATTENTION_COMPATIBILITY_MATRIX", {**known, 2: here}, REASON)
