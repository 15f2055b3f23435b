"""Stand-ins for packages whose kernels need a GPU: their functions written in plain PyTorch (trusted: each is an assumption of the report).

A stand-in takes the package's place in `import`, where the user asks for it (`--stand-in flash_attn`) or where the program fails because the package is not
there. What it computes is recorded op by op, as if the program had written it so; every line that calls it is named with the
meaning that it was given. What a stand-in does not cover is a diagnostic (STAND002), never a guess.
"""
from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from trainverify.adapters.standins.finder import Finder, Package
from trainverify.diagnostics import Diagnostic, Fault

_VERSIONS = {                                 # what a program that asks is told; newer ones have more than is stood in for
    "apex": Package("apex", ("apex", "amp_C"), "0.1"),
    "flash_attn": Package("flash-attn", ("flash_attn",), "2.8.3"),
    "grouped_gemm": Package("grouped-gemm", ("grouped_gemm",), "1.1.4"),
    "transformer_engine": Package("transformer-engine", ("transformer_engine",), "2.2.0"),
}
STANDINS: Mapping[str, Package] = MappingProxyType(_VERSIONS)


@dataclass(slots=True)
class Calls:
    """Where calls of stand-ins are told; note(code, text) is a recorder's while it records."""

    note: Callable[[str, str], None] | None = None


def _modules(name: str) -> Mapping[str, Mapping[str, Any]]:
    """The modules of a stand-in: dotted name -> attributes."""
    return importlib.import_module(f"{__name__}.{name}").modules()


FINDER = Finder(_modules)                     # of this process and the ranks that are forked from it
CALLS = Calls()


def provide(names: Iterable[str]) -> None:
    """Let these stand-ins be imported from here on, also where the package itself is installed."""
    for name in names:
        if name not in STANDINS:
            raise Fault(Diagnostic("STAND001", f"there is no stand-in for {name!r}", fix=f"Stand-ins: {', '.join(STANDINS)}."))
        FINDER.provide(name, STANDINS[name])


def provide_missing(module: str) -> bool:
    """Provide the stand-in for a module that could not be imported; False if there is none, or it was provided before."""
    for name, package in STANDINS.items():
        if module.split(".")[0] in package.tops and not FINDER.provides(name):
            provide([name])
            return True
    return False


@contextmanager
def noting(note: Callable[[str, str], None]) -> Iterator[None]:
    """Tell `note` of every line that calls a stand-in."""
    before, CALLS.note = CALLS.note, note
    try:
        yield
    finally:
        CALLS.note = before
