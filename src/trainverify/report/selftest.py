"""A self-test as text: how many planted bugs the spec shows, which it does not, and which outputs none of them reached (no torch, not trusted)."""
from __future__ import annotations

from trainverify.report.model import PlantedBug, SelfTest
from trainverify.report.words import count_of, fold_names, ranks_text, short_path, wrap

_MOST = 12                                    # hidden bugs that are listed; the JSON report has all


def self_test_lines(found: SelfTest | None, width: int) -> list[str]:
    if found is None:
        return []
    if found.note:
        return wrap("  self-test: ", found.note, width, indent=4)
    share = f" ({100 * found.revealed // found.planted}%)" if found.planted else ""
    lines = wrap("  self-test: ", f"{found.revealed} of {count_of(found.planted, 'planted bug')} would show{share}, "
                 f"{found.witnessed} of them with a counterexample", width, indent=4)
    partly = [f"{kind} {shown} of {planted}" for kind, planted, shown in found.kinds if shown < planted]
    lines += wrap("    not all of  ", ", ".join(partly), width) if partly else []
    if found.hidden:
        lines.append("    not shown: no bug in this program, or this spec cannot show it")
    for bug in found.hidden[:_MOST]:
        lines += _hidden(bug, width)
    lines += [f"      and {len(found.hidden) - _MOST} more"] if len(found.hidden) > _MOST else []
    by_kind: dict[str, list[str]] = {}
    for output in found.unreached:
        kind, _, name = output.partition(" ")
        by_kind.setdefault(kind, []).append(name)
    if by_kind:
        told = f"{len(found.unreached)} of {count_of(found.outputs, 'output')} cannot show a bug here: no planted one changed them"
        lines += wrap("    ", told, width, indent=6)
    for kind, names in by_kind.items():
        lines += wrap(f"      {kind}: ", ", ".join(fold_names(names)), width, indent=8)
    return lines


def _hidden(bug: PlantedBug, width: int) -> list[str]:
    place = short_path(bug.place) if bug.place else "no line of a file"
    return wrap("      ", f"{place}: {bug.text} ({ranks_text(bug.ranks)}): {bug.why}", width, indent=8)
