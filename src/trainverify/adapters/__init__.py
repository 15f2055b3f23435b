"""Small changes to frameworks that ask for a GPU, applied when the program imports them (each is an assumption of the report).

An adapter is a module of this package with `FRAMEWORK`, the module whose import it belongs to ("megatron.core"), and one or both of

    before_import(patch)                      called once, before the framework's first module is executed
    after_import(module_name, module, patch)  called after each of its modules was executed

`patch(owner, attribute, new, reason)` sets an attribute and keeps a `Patched`, which the traces and the report name. An adapter exists only where the
framework itself demands what a machine without a GPU lacks, and never mends what is to be checked. Trusted as far as the report lists it.
"""
from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from types import ModuleType

from trainverify.adapters.hook import Hook
from trainverify.ir.trace import Patched

__all__ = ["HOOK", "Hook", "Patched", "adapters", "install"]


def adapters() -> Iterator[ModuleType]:
    """The adapters of this package, by name."""
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda i: i.name):
        if info.ispkg or info.name == "hook":
            continue
        yield importlib.import_module(f"{__name__}.{info.name}")


HOOK = Hook(adapters)                         # of this process: what it patched stays patched as long as the frameworks are imported


def install(stand_ins: Iterable[str] = ()) -> Hook:
    """Watch the imports of this process, and of the ranks that are forked from it, and provide these stand-ins; a second call changes nothing."""
    from trainverify.adapters import standins

    standins.provide(stand_ins)
    HOOK.install()
    return HOOK
