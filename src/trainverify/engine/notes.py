"""What capture noted about a run, as parts of the report: assumptions, what was not run, and warnings (not trusted).

Every note reaches the report: a code that is not listed here becomes a warning.
"""
from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import msgspec

from trainverify.diagnostics import Diagnostic, Span
from trainverify.ir.trace import Patched, Program

NOT_RUN = {
    "NOTRUN": "",
    "CUDA001": "cuda devices (they were the cpu)",
    "CUDA002": "no GPU was asked, though the program was told that there is one",
    "CUDA003": "facts about the GPU were made up",
    "CUDA004": "the cuda random generator (it was the cpu's)",
    "CUDA005": "torch.compile (ran eagerly)",
    "CUDA006": "autocast for cuda (ran as autocast for the cpu)",
    "CUDA007": "arguments that name a GPU (dropped)",
    "DIST001": "",                            # the text says it
}
ASSUMED = {
    "DIST002": "the GPU's flash attention kernel computes what the CPU's does, which ran in the ring",
    "CAP007": "numbers that returned from Python and equal a tracked value in two captures are that value",
}
TOLD = {"CAP006"}                             # replay says this itself, where the value is used
SHOWN = 4


@dataclass(slots=True)
class Noted:
    """One code's texts and places, and the ranks that met it."""

    texts: dict[str, None] = field(default_factory=dict)
    places: dict[str, None] = field(default_factory=dict)
    ranks: set[int] = field(default_factory=set)
    span: Span | None = None


@dataclass(slots=True)
class Notes:
    """assumptions: (text, places), without their codes, which the report numbers."""

    assumptions: list[tuple[str, tuple[str, ...]]]
    not_run: list[str]
    warnings: list[Diagnostic]
    details: dict[tuple[str, str], list[str]]          # (code, place) -> texts, for diagnostics that replay makes


def notes_of(*programs: Program) -> Notes:
    """All notes of both sides; ranks that noted the same are told once."""
    found: dict[tuple[str, str], Noted] = defaultdict(Noted)
    details: dict[tuple[str, str], list[str]] = defaultdict(list)
    for trace in (t for p in programs for t in p.traces):
        for note in trace.notes:
            span = trace.spans[note.span] if 0 <= note.span < len(trace.spans) else None
            span = span if span is not None and span.file else None       # noted where no line of the program runs
            place = str(span) if span else ""
            if note.code in TOLD:
                if note.text not in details[(note.code, place)]:
                    details[(note.code, place)].append(note.text)
                continue
            merged = bool(NOT_RUN.get(note.code)) or note.code in ASSUMED
            one = found[(note.code, "" if merged else note.text)]
            one.texts[note.text] = None
            one.ranks.add(trace.rank)
            one.span = one.span or span
            if place:
                one.places[place] = None
    out = Notes(_patches(programs), [], [], details)
    for (code, text), one in sorted(found.items()):
        if code in NOT_RUN:
            out.not_run.append(_not_run(code, text, one))
        elif code in ASSUMED:
            out.assumptions.append((f"{ASSUMED[code]} ({_some(one.texts)})", tuple(one.places)))
        elif code.startswith("ASSUME"):
            out.assumptions.append((text, tuple(one.places)))
        else:
            out.warnings.append(Diagnostic(code, text, "warning", one.span, tuple(sorted(one.ranks))))
    return out


def _patches(programs: tuple[Program, ...]) -> list[tuple[str, tuple[str, ...]]]:
    """What adapters replaced in frameworks, those of one reason together."""
    decode = msgspec.json.Decoder(list[Patched]).decode
    found: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for kept in dict.fromkeys(t.meta.get("patches", "[]") for p in programs for t in p.traces):
        for p in decode(kept):
            found[p.framework, p.reason][p.target] = None
    return [(f"{framework}: {reason}", tuple(targets)) for (framework, reason), targets in sorted(found.items())]


def _not_run(code: str, text: str, one: Noted) -> str:
    what = f"{NOT_RUN[code]}: {_some(one.texts)}" if NOT_RUN[code] else text
    return what + (f" at {_some(one.places)}" if one.places else "") + ("" if code == "NOTRUN" else f" [{code}]")


def _some(texts: dict[str, None]) -> str:
    shown = list(texts)[:SHOWN]
    return ", ".join(shown) + (f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else "")


def detailed(diagnostics: list[Diagnostic], notes: Notes) -> list[Diagnostic]:
    """Diagnostics of replay with what capture noted at their places."""
    return [Diagnostic(d.code, d.message, d.severity, d.span, d.ranks, (*d.notes, *notes.details.get((d.code, str(d.span)), ())), d.fix) for d in diagnostics]
