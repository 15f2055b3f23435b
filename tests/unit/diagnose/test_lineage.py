"""Lineages in the field's words: of a tensor- and sequence-parallel program with known ones, and of single relations."""
import json
from pathlib import Path

import numpy as np
import pytest

from trainverify.cli import main
from trainverify.diagnose.lineage import placed
from trainverify.engine.options import Options
from trainverify.report.lineage import render, selected
from trainverify.verify import lineage_table

SPEC = Path(__file__).parent / "specs" / "sequence_parallel.py"


@pytest.fixture(scope="module")
def table():
    return lineage_table(SPEC, Options(steps=1))


def found(table, op, phase="forward", rank=0, number=0):
    return [x for x in table.lineages if x.rank == rank and x.phase == phase and x.op.split(".")[-2 if "." in x.op else 0] == op][number]


@pytest.mark.parametrize("rank", [0, 1])
def test_known_lineages(table, rank):
    gathered = found(table, "all_gather", rank=rank)
    assert (gathered.kind, gathered.shape) == ("permuted", (4, 3, 6)) and "order [1, 0, 2]" in gathered.text and "batch['x']" in gathered.text
    hidden = found(table, "tanh", rank=rank)
    assert hidden.kind == "shard" and hidden.dims == (2,) and f"{4 * rank}:{4 * rank + 4}] of [3, 4, 8]" in hidden.part and "tanh" in hidden.text
    part = found(table, "mm", rank=rank, number=1)
    assert part.kind == "partial" and part.group == (0, 1) and part.reference_op == "aten.mm.default" and part.text.startswith("partial over ranks [0, 1]")
    out = found(table, "reduce_scatter", rank=rank)
    assert out.kind == "shard" and out.dims == (1,)
    share = found(table, "mul", rank=rank)
    assert (share.kind, share.group, share.factor) == ("partial", (0, 1), "3") and share.text.startswith("partial over ranks [0, 1]: the sum is 3 x replicate of aten.sum")
    scaled = found(table, "all_reduce", rank=rank)
    assert (scaled.kind, scaled.group, scaled.factor) == ("scaled", (), "3") and scaled.text.startswith("3 x replicate of aten.sum")
    loss = found(table, "div", rank=rank)
    assert (loss.kind, loss.reference_op) == ("replicate", "aten.div.Tensor") and "sequence_parallel.py" in loss.reference_place


def test_every_float_result_of_every_rank_is_there(table):
    assert {x.rank for x in table.lineages} == {0, 1}
    assert all(x.kind != "unknown" and x.text for x in table.lineages)
    updated = [x for x in table.lineages if x.phase == "optimizer" and x.op.startswith("aten.add_")]
    assert len(updated) == 4 and {(x.kind, x.dims) for x in updated} == {("shard", (0,)), ("shard", (1,))}


def test_the_text_fits_and_tells_ranks_together(table):
    text = render(selected(table, [], "tanh"))
    assert max(map(len, text.splitlines())) <= 80
    assert "\n0-1    tanh [4, 3, 4]" in text and "shard of dim 2" in text and "mm" not in text.replace("comm", "")
    assert "results of all ranks: " in text
    assert {x.rank for x in selected(table, [1], "").lineages} == {1}
    assert {x.op for x in selected(table, [], "aten.t?nh*").lineages} == {"aten.tanh.default", "aten.tanh_backward.default"}


def test_the_command_writes_json(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["lineage", str(SPEC), "--op", "all_gather", "--rank", "1", "--format", "json", "-q"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ranks"] == 2 and told["steps"] == 1 and {x["op"] for x in told["lineages"]} == {"all_gather"}
    assert {x["rank"] for x in told["lineages"]} == {1} and all(x["reference_op"] for x in told["lineages"])


def test_options_that_do_not_fit_are_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "traces").mkdir()
    assert main(["lineage", "traces", "--steps", "2"]) == 2 and "--steps is for a capture" in capsys.readouterr().err
    assert main(["lineage", str(SPEC), "--rank", "2", "-q"]) == 2 and "no rank 2" in capsys.readouterr().err


# ---- single relations, on numbers that stand for fingerprints
def relation(held: np.ndarray, ours: np.ndarray):
    flat = held.reshape(-1)
    first = {int(p): i for i, p in reversed(list(enumerate(flat)))}
    return placed(ours.reshape(-1), ours.shape, flat, held.shape, np.array([first[int(p)] for p in ours.reshape(-1)]))


HELD = np.arange(1, 25).reshape(4, 6)


@pytest.mark.parametrize(("ours", "kind", "dims", "part"), [
    (HELD, "replicate", (), ""),
    (HELD.reshape(2, 12), "replicate", (), ""),
    (HELD[2:4], "shard", (0,), "[2:4, :] of [4, 6]"),
    (HELD[:, 1:3], "shard", (1,), "[:, 1:3] of [4, 6]"),
    (HELD[0:2, 3:6], "shard", (0, 1), "[0:2, 3:6] of [4, 6]"),
    (HELD.T, "permuted", (), ""),
    (HELD.T[3:6], "shard", (1,), "[:, 3:6] of [4, 6]"),
    (HELD.reshape(-1)[5:10], "shard", (), "elements 5:10 of 24"),
    (HELD[::-1], "permuted", (), "reversed along dimension 0"),
    (np.roll(HELD, 1, 1), "permuted", (), "shifted by -1 along dimension 1"),
    (HELD[[0, 2]][:, [1, 5]], "permuted", (), "4 of its 24 elements"),
    (np.broadcast_to(HELD, (3, 4, 6)), "replicate", (), "expanded"),
], ids=lambda x: x if isinstance(x, str) else None)
def test_relations(ours, kind, dims, part):
    words = relation(HELD, ours)
    assert (words.kind, words.dims, words.part) == (kind, dims, part)


def test_elements_that_occur_twice_are_still_a_shard():
    held = np.concatenate((HELD[:2], HELD[:2]))
    assert relation(held, held[2:4]).kind == "shard"
    assert relation(np.stack((HELD, HELD)), np.stack((HELD, HELD))[1:2]).dims == (0,)
