"""torch.optim's foreach, fused and sharded forms against its plain loops: AdamW, SGD with momentum and eight others, with schedules."""
from common import programs

programs.use()

import optimizers  # noqa: E402
from optimizers import RANKS, reference  # noqa: E402, F401

CASES = [{"how": "foreach"}, {"how": "fused"}, {"how": "sharded"}]


def parallel(ref, how):
    return optimizers.parallel(ref, how)
