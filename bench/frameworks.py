"""Runs the framework examples, compares their verdicts with the expected ones, and writes the tables of docs/frameworks.md.

    python bench/frameworks.py [NAME ...]

A NAME is the beginning of a case's name in tests/frameworks/table.py ("megatron"): only those run, and the rest of the document stays as measured before
(bench/frameworks.json keeps the figures). Exits 1 where a verdict is not the expected one.
"""
from __future__ import annotations

import json
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import run as bench

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "frameworks"))

from table import CASES, Case  # noqa: E402

KEPT = ROOT / "bench" / "frameworks.json"
DOCUMENT = ROOT / "docs" / "frameworks.md"
MARK = "<!-- from here on written by `make bench-frameworks` -->\n"
SHOWN, NAMED = 12, 6                           # reasons of one case, outputs of one reason that are named
PLACES = (f"{sysconfig.get_path('purelib')}/", f"{ROOT}/")      # of this machine, which are no part of a figure


def measure(case: Case) -> dict:
    """One run: what its report says and what it cost."""
    row, report = bench.measure([*case.command, "--no-repair"])
    phases = Counter()
    for p in report["phases"]:
        phases["capture" if p["name"].startswith("capture") else "verify"] += p["seconds"]
    failed = [_placeless(f"{d['code']} {d['message']}") for d in report["diagnostics"] if d["severity"] in ("error", "internal")]
    reasons: dict[tuple[str, str], list[dict]] = {}
    for o in report["outputs"]:
        if o["verdict"] != "PROVED":
            reasons.setdefault((o["verdict"], _placeless(o["reason"] + _finding(report, o))), []).append(o)
    return {"name": case.name, "verdict": row["verdict"], "ranks": report["ranks"], "ops": row["ops"], "outputs": len(report["outputs"]),
            **{v: sum(o["verdict"] == v for o in report["outputs"]) for v in ("PROVED", "REFUTED", "UNKNOWN")},
            "capture": round(phases["capture"], 1), "verify": round(row["wall"] - phases["capture"], 1), "wall": round(row["wall"], 1),
            "cpu": round(row["cpu"], 1), "memory": row["peak_memory"], "failed": failed if report["verdict"] == "ERROR" else [],
            "reasons": [[*why, len(outputs), _names(outputs)] for why, outputs in sorted(reasons.items())],
            "assumed": [_placeless(a["text"] + (f" ({', '.join(a['places'])})" if a["places"] else "")) for a in report["assumptions"] if int(a["code"][1:]) > 5]}


def _finding(report: dict, output: dict) -> str:
    """What explains a difference, and where."""
    if output["finding"] < 0:
        return ""
    told = report["findings"][output["finding"]]["diagnostic"]
    return f"; {told['code']} {told['message']}" + (f" at {told['span']['file']}:{told['span']['line']}" if told["span"] else "")


def _names(outputs: list[dict]) -> str:
    """Which outputs these are: each, or of many how many of a kind."""
    if len(outputs) <= NAMED:
        return ", ".join(f"{o['kind']} {o['name']} of step {o['step']}" for o in outputs)
    kinds = Counter((o["kind"], o["step"]) for o in outputs)
    return ", ".join(f"{n} of kind {kind} of step {step}" for (kind, step), n in kinds.items())


def table(rows: list[dict]) -> list[str]:
    """One line per case, in Markdown."""
    lines = ["| case | ranks | ops | outputs | PROVED | REFUTED | UNKNOWN | capture s | verify s | CPU s | GB |", "|---|---|---|---|---|---|---|---|---|---|---|"]
    for r in rows:
        lines.append(f"| `{r['name']}` | {r['ranks']} | {r['ops']:,} | {r['outputs']} | {r['PROVED']} | {r['REFUTED']} | {r['UNKNOWN']} "
                     f"| {r['capture']:.0f} | {r['verify']:.0f} | {r['cpu']:.0f} | {r['memory'] / 1e9:.1f} |")
    return lines


def reasons(rows: list[dict]) -> list[str]:
    """Why outputs are not proved, case by case."""
    why = {c.name: c.why for c in CASES}
    lines = []
    for r in rows:
        if not r["reasons"] and not r["failed"]:
            continue
        lines += [f"**`{r['name']}`** " + why[r["name"]], ""]
        lines += [f"- {text}" for text in r["failed"]]
        lines += [f"- {n} x {verdict}: {_one_line(reason)}" + (f" ({_one_line(names)})" if names else "") for verdict, reason, n, names in r["reasons"][:SHOWN]]
        if len(r["reasons"]) > SHOWN:
            lines.append(f"- and {len(r['reasons']) - SHOWN} other reasons")
        lines.append("")
    return lines


def assumed(rows: list[dict]) -> list[str]:
    """What adapters and stand-ins replaced, each told once for the framework."""
    found: dict[str, dict[str, None]] = {}
    for r in rows:
        for text in r["assumed"]:
            found.setdefault(_one_line(text), {})[r["name"].split("[")[0].split("/")[-1]] = None
    return [f"- {text}: in {', '.join(f'`{n}`' for n in names)}" for text, names in found.items()]


def _placeless(text: str) -> str:
    """Without the places of this checkout and of its packages."""
    for place in PLACES:
        text = text.replace(place, "")
    return text


def _one_line(text: str) -> str:
    """Without what breaks a list in Markdown."""
    return " ".join(_placeless(text).replace("|", "/").replace("<", "(").replace(">", ")").split()).encode("ascii", "replace").decode()


def document(rows: list[dict]) -> str:
    right, wrong = ([r for r in rows if r["name"].startswith("wrong/") is flag] for flag in (False, True))
    total = Counter()
    for r in right:
        total.update({k: r[k] for k in ("outputs", "PROVED", "REFUTED", "UNKNOWN")})
    parts = [f"{len(right)} cases, {total['outputs']} outputs: {total['PROVED']} PROVED, {total['REFUTED']} REFUTED, {total['UNKNOWN']} UNKNOWN.", "",
             *table(right), "", *_unmeasured(rows), "## Planted bugs", "", "One function of each framework, edited when it is imported; the report names its line (where the framework is torch itself: the line that calls it).", "",
             *table(wrong), "", "## What is not proved, and why", "", *reasons(right), "## What adapters and stand-ins assume", "", *assumed(rows)]
    return "\n".join(parts).rstrip() + "\n"


def _unmeasured(rows: list[dict]) -> list[str]:
    """Cases of the table without figures: none is left out silently."""
    missing = [c.name for c in CASES if c.name not in {r["name"] for r in rows}]
    return [f"Without figures yet: {', '.join(f'`{n}`' for n in missing)}.", ""] if missing else []


def main(wanted: list[str]) -> int:
    kept = {r["name"]: r for r in json.loads(KEPT.read_text())} if KEPT.exists() else {}
    unexpected = []
    for case in CASES:
        if wanted and not any(case.name.startswith(w) for w in wanted):
            continue
        try:
            row = kept[case.name] = measure(case)
        except SystemExit as gone:            # no report: the other cases are measured all the same
            unexpected.append(f"{case.name}: {gone}")
            continue
        print(f"{case.name:<60} {row['verdict']:<8} {row['wall']:6.1f} s", flush=True)
        if row["verdict"] != case.expected:
            unexpected.append(f"{case.name}: {row['verdict']}, expected {case.expected}")
        rows = [kept[c.name] for c in CASES if c.name in kept]
        KEPT.write_text(json.dumps(rows, indent=1) + "\n")
        DOCUMENT.write_text(DOCUMENT.read_text().partition(MARK)[0] + MARK + "\n" + document(rows))
    print("\n".join(unexpected), file=sys.stderr)
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
