"""The JSON report: the report model as plain objects, with the exit code and the counts beside it (no torch, not trusted). Spans are objects here though traces store them as
arrays, and floats that JSON lacks are the strings "NaN", "Infinity" and "-Infinity"; `schema.py` describes exactly this form."""
from __future__ import annotations

import math
from typing import Any

import msgspec

from trainverify.diagnostics import Span
from trainverify.report.model import VERDICTS, Report, Suite

_SPAN_FIELDS = Span.__struct_fields__
_COMPUTED = ("exit_code", "counts")


def encode(report: Report) -> bytes:
    """The report as indented JSON, ending in a newline."""
    return _indented(_object(report))


def encode_suite(suite: Suite) -> bytes:
    """Several runs: the worst verdict first, then every run's report."""
    data = {"schema_version": suite.schema_version, "verdict": suite.verdict, "exit_code": suite.exit_code, "counts": {v: suite.count(v) for v in VERDICTS},
            "seconds": suite.seconds, "rerun": suite.rerun, "versions": suite.versions, "reports": [_object(r) for r in suite.reports]}
    return _indented(data)


def decode(data: bytes) -> Report:
    """Reads what `encode` wrote; raises msgspec.ValidationError for anything else."""
    plain = msgspec.json.decode(data, type=dict)
    return msgspec.convert(_revive({k: v for k, v in plain.items() if k not in _COMPUTED}), Report)


def _object(report: Report) -> dict[str, Any]:
    body = _plain(report)
    first = {k: body.pop(k) for k in ("schema_version", "verdict")}
    return {**first, "exit_code": report.exit_code, "counts": {v: report.count(v) for v in VERDICTS}, **body}


def _indented(data: Any) -> bytes:
    return msgspec.json.format(msgspec.json.encode(data), indent=2) + b"\n"


def _plain(x: Any) -> Any:
    if isinstance(x, msgspec.Struct):
        return {name: _plain(getattr(x, name)) for name in x.__struct_fields__}
    if isinstance(x, dict):
        return {k: _plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(v) for v in x]
    if isinstance(x, float) and not math.isfinite(x):
        return "NaN" if math.isnan(x) else "Infinity" if x > 0 else "-Infinity"
    return x


def _revive(x: Any) -> Any:
    if isinstance(x, dict):
        if tuple(x) == _SPAN_FIELDS:
            return [_revive(v) for v in x.values()]
        if {"reference", "parallel"} <= x.keys():
            return {**x, "reference": float(x["reference"]), "parallel": [(rank, float(v)) for rank, v in x["parallel"]]}
        return {k: _revive(v) for k, v in x.items()}
    return [_revive(v) for v in x] if isinstance(x, list) else x
