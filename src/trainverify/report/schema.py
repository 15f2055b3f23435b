"""The JSON schemas of the JSON report and of a suite of them, generated from the report model and committed beside it (no torch, not trusted). A test
regenerates and compares them; `python -m trainverify.report.schema` writes them anew."""
from __future__ import annotations

from pathlib import Path

import msgspec

from trainverify.diagnostics import Span
from trainverify.report.model import SCHEMA_VERSION, VERDICTS, Report, Suite

FILE = Path(__file__).with_name("report.schema.json")
SUITE_FILE = Path(__file__).with_name("suite.schema.json")
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
    root["properties"] |= _head()
    root["required"] = list(root["properties"])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root, "title": "TrainVerify report", "$defs": dict(sorted(parts.items()))}


def suite_schema() -> dict:
    """JSON schema of what `json_.encode_suite` writes: several reports."""
    report = schema()
    parts, dialect = report.pop("$defs"), report.pop("$schema")
    report.pop("title")
    properties = {**_head(), "seconds": {"type": "number"}, "rerun": {"type": "string"}, "versions": report["properties"]["versions"],
                  "reports": {"type": "array", "items": {"$ref": "#/$defs/Report"}}}
    return {"$schema": dialect, "type": "object", "description": Suite.__doc__ or "", "properties": properties, "required": list(properties),
            "additionalProperties": False, "title": "TrainVerify suite", "$defs": dict(sorted({**parts, "Report": report}.items()))}


def _head() -> dict:
    """What stands first in both."""
    counts = {"type": "object", "properties": {v: {"type": "integer"} for v in VERDICTS}, "required": list(VERDICTS), "additionalProperties": False}
    return {"schema_version": {"const": SCHEMA_VERSION}, "verdict": {"enum": list(VERDICTS)}, "exit_code": {"enum": [0, 1, 3, 4]}, "counts": counts}


def text(which: dict) -> str:
    return msgspec.json.format(msgspec.json.encode(which), indent=2).decode() + "\n"


if __name__ == "__main__":
    FILE.write_text(text(schema()))
    SUITE_FILE.write_text(text(suite_schema()))
