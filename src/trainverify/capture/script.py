"""Scripts in place of a spec: two command lines, what their placeholders stand for, and how one is run as torchrun would (not trusted).

`Scripts` offers what a `Spec` does, so that capture and all that follows need not know which of both they work for. What runs in a rank is
capture/scripted.py.
"""
from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import os
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainverify import adapters
from trainverify.api import Local
from trainverify.diagnostics import Diagnostic, Fault

PLACEHOLDERS = {
    "checkpoint": "a folder with the reference's weights: model.safetensors (of a Hugging Face model with its config.json) and model.pt",
    "dcp": "a folder with the reference's weights as a torch.distributed.checkpoint",
    "save": "a folder that the reference script itself writes, and the parallel one reads",
}
NUMBER = "routing"                            # which of the runs of --routings it is: 0 to N - 1
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
_RANKS = re.compile(r"ranks=([1-9][0-9]*)\Z")
_PYTHON = re.compile(r"python[0-9.]*\Z")


@dataclass(frozen=True)
class Command:
    """A script and its arguments. module: run by its module name, as with -m."""

    target: str
    arguments: tuple[str, ...] = ()
    module: bool = False

    def __str__(self) -> str:
        return shlex.join((*(("-m",) if self.module else ()), self.target, *self.arguments))

    def names(self, placeholder: str) -> bool:
        """Whether an argument holds the placeholder."""
        return any("{" + placeholder + "}" in a for a in self.arguments)

    def filled(self, paths: dict[str, Path]) -> Command:
        """With the placeholders' paths in their place."""
        return replace(self, arguments=tuple(_PLACEHOLDER.sub(lambda m: str(paths[m[1]].absolute()) if m[1] in paths else m[0], a) for a in self.arguments))

    def routed(self, routing: int) -> Command:
        """With the number of the routing in its place."""
        return replace(self, arguments=tuple(a.replace("{" + NUMBER + "}", str(routing)) for a in self.arguments))

    def without(self, *placeholders: str) -> tuple[Command, tuple[str, ...]]:
        """The command without the options that hold one of the placeholders, and what was left out."""
        kept: list[str] = []
        left: list[str] = []
        for a in self.arguments:
            if not any("{" + p + "}" in a for p in placeholders):
                kept.append(a)
            elif a.startswith("-"):
                left.append(a)
            elif kept and kept[-1].startswith("-") and "=" not in kept[-1]:
                left.append(f"{kept.pop()} {a}")
            else:
                raise Fault(Diagnostic("SCRIPT002", f"the reference's argument {a!r} follows no option, so the reference cannot run without it",
                                       fix="The checkpoint is made from the reference's own initial weights. Name an existing file in its place."))
        return replace(self, arguments=tuple(kept)), tuple(left)

    def run(self) -> None:
        """Run the script as `__main__`, with its sys.argv and its folder (of a module: the working directory) first on sys.path."""
        if self.module:
            sys.path[0:0] = [os.getcwd()]
            sys.argv = [_module_file(self.target), *self.arguments]
            runpy.run_module(self.target, run_name="__main__", alter_sys=True)
        else:
            file = Path(self.target).resolve()
            sys.path[0:0] = [str(file.parent)]
            sys.argv = [self.target, *self.arguments]
            runpy.run_path(str(file), run_name="__main__")


@dataclass(frozen=True)
class Scripts:
    """A reference script and a parallel one. local: how ranks' shares of a float that is read combine ("mean", "sum"); skip: floats that are not
    compared, by the expression that is read."""

    reference: Command
    parallel: Command
    ranks: int | None = None
    local: dict[str, str] = field(default_factory=dict)
    skip: tuple[str, ...] = ()
    path: str = ""
    ops: tuple[Any, ...] = ()
    accept: tuple[str, ...] = ()

    def __str__(self) -> str:
        return str(self.parallel)

    def options(self, ranks: int | None) -> list[str]:
        """Our own arguments that name them, but for the parallel script, which comes last."""
        return ["--ranks", str(self.ranks or ranks), "--reference", str(self.reference),
                *[w for name, how in self.local.items() for w in ("--local", f"{name}={how}")], *[w for name in self.skip for w in ("--skip", name)]]

    def routed(self, routing: int) -> Scripts:
        """The scripts for one of the routings."""
        return replace(self, reference=self.reference.routed(routing), parallel=self.parallel.routed(routing))

    # ---- what a Spec offers
    def op_rows(self) -> tuple:
        return ()

    def case(self, given: dict[str, Any]) -> dict[str, Any]:
        return dict(given)

    def world_size(self, ranks: int | None, case: dict[str, Any]) -> int:
        n = self.ranks or ranks
        if n is None:
            raise Fault(Diagnostic("SPEC005", f"nothing says how many ranks {self.parallel} runs on", fix="Pass --ranks N."))
        return n

    @property
    def children(self) -> tuple[Callable, Callable]:
        """What runs in the reference's process and in each rank."""
        scripted = importlib.import_module("trainverify.capture.scripted")
        return scripted.reference_child, scripted.parallel_child

    def before_parallel(self, handed: Any, options: Any, folder: Path) -> tuple[Diagnostic, ...]:
        """Let the reference script write its own checkpoint, where one is asked for."""
        if not self.parallel.names("save"):
            return ()
        return importlib.import_module("trainverify.capture.scripted").save(self, handed, options, folder)

    def settle(self, reference: Any, parallel: Any, folder: Path) -> tuple[Diagnostic, ...]:
        """Leave out the floats that only one side reads."""
        return importlib.import_module("trainverify.capture.read_floats").settle(self, reference, parallel, folder)

    # ---- what runs in a rank asks
    @property
    def loads(self) -> bool:
        """Whether the parallel script reads the reference's weights from a file."""
        return any(self.parallel.names(p) for p in PLACEHOLDERS)

    def reported(self, side: str, name: str, value: Any) -> Any:
        """A float that was read, declared as a share where the user said so."""
        how = self.local.get(name)
        return Local(value, how) if how and side == "parallel" else value


def parse_command(words: str | Sequence[str]) -> Command:
    """ "train.py --tp 2" or "-m package.train --tp 2", with or without `python` before it; raises Fault."""
    try:
        parts = shlex.split(words) if isinstance(words, str) else list(words)
    except ValueError as e:
        raise Fault(Diagnostic("SCRIPT001", f"{words!r} cannot be split into words: {e}", fix='Write "train.py --tp 1".')) from e
    if parts and _PYTHON.match(Path(parts[0]).name):
        parts = parts[1:]
    module = parts[:1] == ["-m"]
    parts = parts[1:] if module else parts
    if not parts:
        raise Fault(Diagnostic("SCRIPT001", "a command line names no script", fix='Write "train.py --tp 1", or "-m package.train --tp 1".'))
    command = Command(parts[0], tuple(parts[1:]), module)
    if module and not _module_file(command.target):
        raise Fault(Diagnostic("SCRIPT001", f"there is no module {command.target}", fix="Run from the folder in which `python -m` finds it."))
    if not module and not Path(command.target).is_file():
        raise Fault(Diagnostic("SCRIPT001", f"{command.target}: no such file",
                               fix='A command line begins with the script, as behind torchrun\'s own options: "train.py --tp 1".'))
    for a in command.arguments:
        for name in _PLACEHOLDER.findall(a):
            if name not in (*PLACEHOLDERS, NUMBER):
                raise Fault(Diagnostic("SCRIPT002", f"{{{name}}} in {str(command)!r} stands for nothing",
                                       notes=(*(f"{{{k}}}: {v}" for k, v in PLACEHOLDERS.items()), f"{{{NUMBER}}}: 0, then 1 and so on with --routings: for a seed of the data"),
                                       fix="Use one of these."))
    return command


def parse_scripts(reference: str, parallel: str | Sequence[str], ranks: int | None = None, local: Sequence[str] = (), skip: Sequence[str] = ()) -> Scripts:
    """Both command lines; the parallel one may begin with ranks=N."""
    words = shlex.split(parallel) if isinstance(parallel, str) else list(parallel)
    if words and (own := _RANKS.match(words[0])):
        ranks, words = int(own[1]), words[1:]
    return Scripts(parse_command(reference), parse_command(words), ranks, dict(_share(text) for text in local), tuple(skip))


def _share(text: str) -> tuple[str, str]:
    name, _, how = text.rpartition("=")
    if not name or how not in ("mean", "sum"):
        raise Fault(Diagnostic("SCRIPT002", f"--local {text!r} is not NAME=mean or NAME=sum", fix="Name a float as the report does: --local loss=mean."))
    return name, how


def load_scripts(scripts: Scripts) -> Scripts:
    """Before the ranks are forked: adapters watch imports, and installed packages that the scripts import are imported once for all."""
    adapters.install()
    names = ["safetensors.torch"]              # its readers are known to the verifier only if they are there when it starts
    for command in dict.fromkeys((scripts.reference, scripts.parallel)):
        names += _imported(Path(_module_file(command.target) if command.module else command.target))
    for name in names:
        if _is_installed(name.split(".")[0]):
            with contextlib.suppress(ImportError):     # the script will say so itself
                importlib.import_module(name)
    return scripts


def _imported(file: Path) -> list[str]:
    """The modules that a file imports at its top; [] where it cannot be read as Python: running it will say why."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return []
    names = [a.name for node in tree.body if isinstance(node, ast.Import) for a in node.names]
    names += [node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    return list(dict.fromkeys(names))


def _is_installed(name: str) -> bool:
    """Whether a top-level name is an installed package, and neither the standard library's nor the user's own."""
    if name in sys.stdlib_module_names or name == "torch":
        return False
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None and "site-packages" in spec.origin


def _module_file(name: str) -> str:
    """The file that `python -m name` runs in the working directory; "" if there is none."""
    here = os.getcwd()
    before = list(sys.path)
    sys.path[0:0] = [here]
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except (ImportError, ValueError):
        return ""
    finally:
        sys.path[:] = before
    return spec.origin or "" if spec is not None else ""
