"""A repair to try, in words and as an edit (data; not trusted)."""
from __future__ import annotations

from dataclasses import dataclass

from trainverify.diagnose.dataflow import Node
from trainverify.diagnose.edit import Edit
from trainverify.diagnose.relation import Relation


@dataclass(frozen=True, slots=True)
class Candidate:
    """What would be changed. means: what is wrong with the outputs if just this mends them, where that says more than a comparison of
    values can; at: the call that it is about."""

    text: str
    edit: Edit
    means: Relation | None = None
    at: Node | None = None
