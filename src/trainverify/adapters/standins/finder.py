"""The import machinery of stand-ins: modules made of functions of ours under the names of a package (no torch; not trusted)."""
from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

Modules = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Package:
    """distribution: its name for pip; tops: its top-level modules; version: what it says of itself."""

    distribution: str
    tops: tuple[str, ...]
    version: str


class Finder:
    """A finder of sys.meta_path that comes first, for the packages that it was told to provide."""

    def __init__(self, modules: Callable[[str], Modules]):
        self._modules = modules
        self._packages: dict[str, Package] = {}
        self._made: dict[str, Modules] = {}

    def provides(self, name: str) -> bool:
        return name in self._packages

    def provide(self, name: str, package: Package) -> None:
        if name in self._packages:
            return
        self._packages[name] = package
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        for module in [m for m in sys.modules if m.split(".")[0] in package.tops]:
            del sys.modules[module]            # who imports it from here on gets the stand-in

    def withdraw(self) -> None:
        """Provide nothing any more; for tests."""
        for package in self._packages.values():
            for module in [m for m in sys.modules if m.split(".")[0] in package.tops]:
                del sys.modules[module]
        self._packages.clear()
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    # ---- the protocol of sys.meta_path

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        found = self._of(name.split(".")[0])
        if found is None:
            return None
        if found not in self._made:
            self._made[found] = self._modules(found)
        modules = self._made[found]
        if name not in modules:
            return None
        return ModuleSpec(name, self, origin=f"stand-in for {name}", is_package=any(m.startswith(name + ".") for m in modules))

    def find_distributions(self, context: metadata.DistributionFinder.Context = metadata.DistributionFinder.Context()) -> Iterator[metadata.Distribution]:
        for package in self._packages.values():
            if context.name is None or _plain(context.name) == _plain(package.distribution):
                yield _Distribution(package)

    # ---- the protocol of loaders

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        name = self._of(module.__name__.split(".")[0])
        vars(module).update(self._made[name][module.__name__])
        if "." not in module.__name__:
            module.__version__ = self._packages[name].version
        for child in self._made[name]:
            if child.rpartition(".")[0] == module.__name__:
                importlib.import_module(child)         # many are used as attributes of their parents

    def _of(self, top: str) -> str | None:
        return next((n for n, p in self._packages.items() if top in p.tops), None)


class _Distribution(metadata.Distribution):
    """What importlib.metadata is told of a package that is stood in for."""

    def __init__(self, package: Package):
        self._package = package

    def read_text(self, filename: str) -> str | None:
        if filename == "METADATA":
            return f"Metadata-Version: 2.1\nName: {self._package.distribution}\nVersion: {self._package.version}\n"
        return "\n".join(self._package.tops) + "\n" if filename == "top_level.txt" else None

    def locate_file(self, path: Any) -> Path:
        return Path(path)


def _plain(name: str) -> str:
    return name.replace("_", "-").lower()
