"""torch's `context_parallel`: ring attention over 3 ranks, keys and values gathered or handed on."""
from common import programs

programs.use()

import sequences  # noqa: E402
from smallgpt import reference  # noqa: E402, F401

CASES = [{"rotate": "allgather"}, {"rotate": "alltoall"}]
RANKS = 3


def parallel(ref, rotate):
    return sequences.parallel(ref, f"ring_{rotate}")
