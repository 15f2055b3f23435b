"""The JSON schema of the JSON report, generated from the report model and committed beside it (no torch, not trusted). A test regenerates it and compares;
`python -m trainverify.report.schema` writes it anew."""
from __future__ import annotations

from pathlib import Path

import msgspec

from trainverify.diagnostics import Span
from trainverify.report.model import SCHEMA_VERSION, VERDICTS, Report

FILE = Path(__file__).with_name("report.schema.json")
_FLOAT = {"anyOf": [{"type": "number"}, {"enum": ["NaN", "Infinity", "-Infinity"]}]}


def schema() -> dict:
    """JSON schema (2020-12) of what `json_.encode` writes."""
    _, parts = msgspec.json.schema_components([Report], ref_template="#/$defs/{name}")
    span_object = msgspec.defstruct("Span", [(f.name, f.type) for f in msgspec.structs.fields(Span)])
    _, span = msgspec.json.schema_components([span_object])
    parts["Span"] = {**span["Span"], "description": (Span.__doc__ or "")}
    for part in parts.values():
        part["required"] = list(part["properties"])   # every field is always written
        part["additionalProperties"] = False
        for field in part["properties"].values():
            field.pop("default", None)
    for name in ("Report", "OutputResult"):
        parts[name]["properties"]["verdict"] = {"enum": list(VERDICTS)}
    witness = parts["Witness"]["properties"]
    witness["reference"] = _FLOAT
    witness["parallel"]["items"]["prefixItems"][1] = _FLOAT
    root = parts.pop("Report")
    counts = {"type": "object", "properties": {v: {"type": "integer"} for v in VERDICTS}, "required": list(VERDICTS), "additionalProperties": False}
    root["properties"] |= {"schema_version": {"const": SCHEMA_VERSION}, "exit_code": {"enum": [0, 1, 3, 4]}, "counts": counts}
    root["required"] = list(root["properties"])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root, "title": "TrainVerify report", "$defs": dict(sorted(parts.items()))}


def text() -> str:
    return msgspec.json.format(msgspec.json.encode(schema()), indent=2).decode() + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
