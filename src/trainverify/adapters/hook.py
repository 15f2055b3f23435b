"""The import hook that calls adapters, and what they patched (no torch; trusted to record every patch).

The hook finds nothing by itself: it asks the finders behind it and runs the adapter around the module's execution. Frameworks that the program
never imports cost nothing.
"""
from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from trainverify.ir.trace import Patched

_MISSING = object()


class Hook:
    """A finder of sys.meta_path. `applied`: what adapters have patched so far, in order."""

    def __init__(self, adapters: Callable[[], Iterable[ModuleType]]):
        self._find_adapters = adapters
        self._adapters: tuple[ModuleType, ...] = ()
        self._begun: set[str] = set()
        self._undo: list[tuple[Any, str, Any]] = []
        self.applied: list[Patched] = []

    # ---- life

    def install(self) -> None:
        """Watch imports from here on. What was imported before is patched now, which is late only for what its import computed."""
        if self in sys.meta_path:
            return
        self._adapters = tuple(self._find_adapters())
        sys.meta_path.insert(0, self)
        for name, module in list(sys.modules.items()):
            adapter = self._adapter_of(name)
            if adapter is not None and isinstance(module, ModuleType):
                self._begin(adapter)
                self._after(adapter, name, module)

    def remove(self) -> None:
        """Undo every patch, last first, and watch no more."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        while self._undo:
            owner, attribute, old = self._undo.pop()
            if old is _MISSING:
                delattr(owner, attribute)
            else:
                setattr(owner, attribute, old)
        self.applied.clear()
        self._begun.clear()

    # ---- the protocol of sys.meta_path

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        adapter = self._adapter_of(name)
        if adapter is None:
            return None
        spec = self._found_behind(name, path, target)
        if spec is None or not hasattr(spec.loader, "exec_module"):
            return spec                        # a namespace has no code
        loader, execute = spec.loader, spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module             # the loader is as it was: tools that read sources ask it
            self._begin(adapter)
            execute(module)
            self._after(adapter, name, module)

        loader.exec_module = exec_module
        return spec

    def _found_behind(self, name: str, path: Any, target: ModuleType | None) -> ModuleSpec | None:
        behind = sys.meta_path[sys.meta_path.index(self) + 1:]
        return next((spec for finder in behind if (spec := finder.find_spec(name, path, target)) is not None), None)

    # ---- adapters

    def _adapter_of(self, name: str) -> ModuleType | None:
        return next((a for a in self._adapters if name == a.FRAMEWORK or name.startswith(a.FRAMEWORK + ".")), None)

    def _begin(self, adapter: ModuleType) -> None:
        if adapter.FRAMEWORK in self._begun:
            return
        self._begun.add(adapter.FRAMEWORK)
        before = getattr(adapter, "before_import", None)
        if before is not None:
            before(self._patcher(adapter))

    def _after(self, adapter: ModuleType, name: str, module: ModuleType) -> None:
        after = getattr(adapter, "after_import", None)
        if after is not None:
            after(name, module, self._patcher(adapter))

    def _patcher(self, adapter: ModuleType) -> Callable[[Any, str, Any, str], None]:
        def patch(owner: Any, attribute: str, new: Any, reason: str) -> None:
            """owner.attribute = new, for the reason given."""
            if not reason:
                raise ValueError(f"{adapter.__name__} patches {attribute} without a reason")
            self._undo.append((owner, attribute, vars(owner).get(attribute, _MISSING)))
            setattr(owner, attribute, new)
            made = Patched(adapter.FRAMEWORK, f"{_name(owner)}.{attribute}", reason)
            if made not in self.applied:
                self.applied.append(made)
        return patch


def _name(owner: Any) -> str:
    """The dotted name of a module, a class, or an object's class."""
    if isinstance(owner, ModuleType):
        return owner.__name__
    kind = owner if isinstance(owner, type) else type(owner)
    return f"{kind.__module__}.{kind.__qualname__}"


@contextmanager
def installed(hook: Hook):
    """Within a block only, for tests: undone at its end."""
    hook.install()
    try:
        yield hook
    finally:
        hook.remove()
