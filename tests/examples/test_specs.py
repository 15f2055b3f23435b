"""The examples are as the table says, and every twin names source lines that exist."""
import json
import subprocess
import sys
from collections import defaultdict

import pytest

from cases import EXAMPLES, FOLDER, TWINS

LOAD = """
import importlib, json, sys
sys.path[:0] = sys.argv[1:3]
modules = [importlib.import_module(name) for name in sys.argv[3:]]
print(json.dumps({m.__name__: [m.RANKS, getattr(m, "CASES", [None])] for m in modules}))
"""


def load(folder, names):
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder), str(FOLDER), *names],
                          capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout)


def test_table_is_what_the_files_say():
    table = defaultdict(list)
    for e in EXAMPLES:
        table[e.path.stem].append((e.ranks, e.case))
    found = load(FOLDER, [p.stem for p in sorted(FOLDER.glob("*.py"))])
    assert {name: [(ranks, case) for case in cases] for name, (ranks, cases) in found.items()} == table


def test_twins_load():
    assert len(load(FOLDER / "wrong", [t.path.stem for t in TWINS])) == len(TWINS) == 15


@pytest.mark.parametrize("twin", TWINS, ids=lambda t: t.path.stem)
def test_expected_lines_exist(twin):
    assert len(twin.place.numbers()) == 1
    for place in twin.also:
        assert place.numbers(), place


def test_readme_names_every_file():
    text = (FOLDER / "README.md").read_text()
    for path in FOLDER.rglob("*.py"):
        assert f"({path.relative_to(FOLDER)})" in text
