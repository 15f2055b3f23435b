"""A compiled model under DDP, with tied embeddings and a running statistic: it runs eagerly, and the report says so."""
from common import programs

programs.use()

import variants  # noqa: E402
from variants import RANKS, reference  # noqa: E402, F401


def parallel(ref):
    return variants.parallel(ref, "compiled")
