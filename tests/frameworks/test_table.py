"""The table names every framework example, and only such (needs no framework)."""
from table import CASES, FOLDER


def test_every_example_is_in_the_table():
    specs = {str(f.relative_to(FOLDER)) for f in FOLDER.rglob("*.py") if "def parallel(" in f.read_text()}
    assert {c.file for c in CASES} == specs


def test_cases_are_told_apart_and_explained():
    names = [c.name for c in CASES]
    assert len(set(names)) == len(names)
    assert [c.name for c in CASES if c.expected == "UNKNOWN" and not c.why] == []
    assert [c.name for c in CASES if c.expected == "REFUTED" and c.place is None and not c.why] == []
