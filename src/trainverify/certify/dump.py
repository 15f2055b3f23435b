"""Obligations that are UNKNOWN, written to a folder for reading and for other solvers (not trusted)."""
from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trainverify.certify.formula import formula
from trainverify.certify.smtlib import in_theory, parts, script
from trainverify.diagnostics import Diagnostic, Fault
from trainverify.kernel.terms import Obligation, digest, text


@dataclass(frozen=True, slots=True)
class Item:
    """An obligation, the place in the source that it comes from, and why it is not decided."""

    obligation: Obligation
    place: str
    reason: str


def dump_unknown(directory: str | os.PathLike, items: Iterable[Item]) -> list[Path]:
    """Write DIGEST.txt and DIGEST.smt2 for each distinct obligation; the paths that were written. Raises Fault with FILE006 if that fails."""
    found: dict[str, list[Item]] = {}
    for item in items:
        found.setdefault(digest(item.obligation), []).append(item)
    folder, written = Path(directory), []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, group in found.items():
            for suffix, content in ((".txt", _readable(name, group)), (".smt2", _script(name, group))):
                path = folder / (name + suffix)
                path.write_text(content, encoding="utf-8", newline="\n")
                written.append(path)
    except OSError as e:
        raise Fault(Diagnostic("FILE006", f"{folder} cannot be written: {e.strerror or e}", fix="Name a folder that can be written.")) from e
    return written


def _places(group: list[Item]) -> list[str]:
    return [f"{item.place}: {item.reason}" for item in dict.fromkeys(group)]


def _readable(name: str, group: list[Item]) -> str:
    obligation = group[0].obligation
    theory = ", ".join(sorted(parts(obligation))) or "polynomials only"
    kinds = "exact" if in_theory(obligation) else "in part: a solver's unsat proves the claim, its sat means nothing"
    return "\n".join([f"obligation {name}", f"theory     {theory}", f"SMT-LIB    {kinds}", *(f"at         {place}" for place in _places(group)), "",
                      "For all reals x<k> for which the left side is defined and what is given holds, the right side is defined and equal:", "",
                      formula(obligation), "The same, node by node (the address is of this form):", "", text(obligation)])


def _script(name: str, group: list[Item]) -> str:
    comments = [f"obligation {name}: unsat proves it", *_places(group)]
    if not in_theory(group[0].obligation):
        comments.append("some functions are abstracted: sat means nothing")
    return script(group[0].obligation, comments)
