"""The versions that a report names, read from the installed packages' metadata: nothing is imported for it (no torch, not trusted)."""
from __future__ import annotations

import platform
from importlib import metadata


def versions() -> dict[str, str]:
    """Version of each part that a verdict may depend on."""
    found = {}
    for package in ("trainverify", "torch", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    return {**found, "python": platform.python_version()}
