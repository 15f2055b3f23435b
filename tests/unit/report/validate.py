"""A JSON schema validator for the keywords that the schemas in use here have; it refuses schemas with others."""
import re

KEYWORDS = {"$ref", "$schema", "$id", "id", "$defs", "definitions", "title", "description", "default", "type", "properties", "required", "additionalProperties", "items",
            "prefixItems", "minItems", "maxItems", "uniqueItems", "anyOf", "enum", "const", "minimum", "pattern", "format"}
KINDS = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None)}
FORMATS = {"uri": re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:[!-~]+"), "uri-reference": re.compile(r"(?:[!#-;=?-Z_a-z~\[\]]|%[0-9A-Fa-f]{2})*")}


def problems(value, rule, defs, path="$"):
    """What of `value` breaks the rule."""
    assert rule.keys() <= KEYWORDS, rule.keys() - KEYWORDS
    found = problems(value, defs[rule["$ref"].split("/")[-1]], defs, path) if "$ref" in rule else []
    if "anyOf" in rule:
        tried = [problems(value, r, defs, path) for r in rule["anyOf"]]
        found += [] if any(not t for t in tried) else tried[0]
    if "enum" in rule or "const" in rule:
        found += [] if value in rule.get("enum", [rule.get("const")]) else [f"{path}: {value!r}"]
    kinds = tuple(KINDS[t] for t in ([rule["type"]] if isinstance(rule.get("type"), str) else rule.get("type", ())))
    if kinds and (not any(isinstance(value, k) for k in kinds) or (isinstance(value, bool) and bool not in kinds)):
        return [*found, f"{path}: {value!r} is no {rule['type']}"]
    if isinstance(value, (int, float)) and value < rule.get("minimum", value):
        found += [f"{path}: {value} is too small"]
    if isinstance(value, str):
        found += [f"{path}: {value!r} fits no {p}" for p in (rule.get("pattern"),) if p and not re.search(p, value)]
        found += [f"{path}: {value!r} is no {f}" for f in (rule.get("format"),) if f and not FORMATS[f].fullmatch(value)]
    return found + (_of_object(value, rule, defs, path) if isinstance(value, dict) else _of_array(value, rule, defs, path) if isinstance(value, list) else [])


def _of_object(value, rule, defs, path):
    known = rule.get("properties", {})
    found = [f"{path}: no {k}" for k in rule.get("required", ()) if k not in value]
    for k, v in value.items():
        inner = known.get(k, rule.get("additionalProperties", True))
        found += [f"{path}: surplus {k}"] if inner is False else [] if inner is True else problems(v, inner, defs, f"{path}.{k}")
    return found


def _of_array(value, rule, defs, path):
    found = [f"{path}: too few"] if len(value) < rule.get("minItems", 0) else []
    if rule.get("uniqueItems") and any(v in value[:i] for i, v in enumerate(value)):
        found += [f"{path}: not unique"]
    fixed = rule.get("prefixItems", [])
    for i, v in enumerate(value):
        inner = fixed[i] if i < len(fixed) else rule.get("items", True)
        found += [f"{path}[{i}]: surplus"] if inner is False else [] if inner is True else problems(v, inner, defs, f"{path}[{i}]")
    return found
