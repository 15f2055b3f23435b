"""Replacing and restoring what belongs to torch (the one way in which capture patches anything)."""
from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from trainverify.capture.userframes import is_user_file

_MISSING = object()


class Patches:
    """Remembers what it replaces; `restore` undoes all, last first."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """owner.name = value; own attributes of modules and classes only."""
        self._undo.append((owner, name, vars(owner).get(name, _MISSING)))
        setattr(owner, name, value)

    def everywhere(self, replacements: Mapping[Any, Any]) -> None:
        """Rebind functions and classes in every module of torch and of the user that holds them by name."""
        by_id = {id(old): (old, new) for old, new in replacements.items()}
        for module_name, module in list(sys.modules.items()):
            names = getattr(module, "__dict__", None)
            if not isinstance(names, dict) or not _ours_to_patch(module_name, module):
                continue
            if not any(map(by_id.__contains__, map(id, names.values()))):
                continue                       # most modules, without a step in Python for each name
            for name, value in list(names.items()):
                old, new = by_id.get(id(value), (None, None))
                if old is value and new is not None:
                    self.set(module, name, new)

    def restore(self) -> None:
        while self._undo:
            owner, name, value = self._undo.pop()
            if value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def _ours_to_patch(name: str, module: Any) -> bool:
    if name == "torch" or name.startswith("torch."):
        return True
    file = getattr(module, "__file__", None)
    return isinstance(file, str) and is_user_file(file)


def caller_is_user(depth: int = 2) -> bool:
    """Whether the code that called our caller is the user's."""
    return is_user_file(sys._getframe(depth).f_code.co_filename)


Note = Callable[[str, str], None]
