"""torch.distributed.tensor.parallel: `parallelize_module` plans, sequence parallelism, `loss_parallel`; norms over sharded and plain gradients."""
from common import programs

programs.use()

import tensor_parallel  # noqa: E402
from tensor_parallel import RANKS, reference  # noqa: E402, F401

CASES = [{"how": "by_dtensor"}, {"how": "no_sequence"}, {"how": "parallel_loss"}]


def parallel(ref, how):
    return tensor_parallel.parallel(ref, how)
