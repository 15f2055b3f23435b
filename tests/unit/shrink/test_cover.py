"""Few tokens such that each group of rows has a kept one."""
from collections import defaultdict

import numpy as np
import pytest

from trainverify.shrink.cover import cover
from trainverify.shrink.spaces import PICK, Spaces

RANKS, LOCAL, TOP, EXPERTS = 4, 33, 2, 16


def grouped(first: int) -> tuple[Spaces, int, list[int]]:
    """Each rank's slots by expert, of tokens that all ranks keep alike; token t of rank r takes experts 2 * (t + r * first) and the next one."""
    spaces = Spaces()
    token, groups = spaces.new(LOCAL), []
    for rank in range(RANKS):
        slots = spaces.new(LOCAL * TOP)
        spaces.product(slots, (token, spaces.new(TOP)))
        expert = (np.arange(LOCAL * TOP) + rank * first * TOP) % EXPERTS
        for e in range(EXPERTS):
            at = np.flatnonzero(expert == e)
            groups.append(spaces.new(len(at)))
            spaces.pick(groups[-1], slots, at)
    return spaces, token, groups


@pytest.mark.parametrize("first", [0, 1])
def test_every_group_has_a_kept_row_and_few_tokens_are_kept(first):
    spaces, token, groups = grouped(first)
    required = defaultdict(set)
    cover(spaces, required)
    for g in groups:
        form = spaces.form(g)
        assert form.kind == PICK
        slots = form.picked
        tokens, top = spaces.form(form.parts[0]).parts
        assert any(t in required[tokens] and k in required[top] for t, k in zip(slots // TOP, slots % TOP))
    assert len(required[token]) == EXPERTS // TOP          # each token takes two experts of a rank's


def test_what_is_kept_already_is_enough():
    spaces, token, groups = grouped(0)
    required = defaultdict(set, {a: set(range(spaces.size(a))) for a in {a for g in groups for a in spaces.atoms(g)}})
    before = {a: set(v) for a, v in required.items()}
    cover(spaces, required)
    assert required == before
