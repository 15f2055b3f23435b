"""`trainverify ops`: one entry per row of the op table, each with its meaning, source and tests."""
import json

from trainverify import cli
from trainverify.ops.standard import standard_table


def test_every_row_is_listed_with_meaning_source_and_tests(capsys):
    assert cli.main(["ops", "--format", "json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [r["name"] for r in records] and {r["name"] for r in records} == set(standard_table().rows)
    assert [r["name"] for r in records if not (r["meaning"] and r["source"] and r["kind"] and r["tests"])] == []


def test_text_form(capsys):
    assert cli.main(["ops"]) == 0
    text = capsys.readouterr().out
    assert text.isascii() and text.endswith(f"{len(standard_table().rows)} ops\n")
    at = text.index("  aten.exp\n")
    assert "source: torch.exp\n" in text[at:at + 200]
