"""A row from the spec that is not what the op computes."""
from custom_op import RANKS, parallel, reference                     # noqa: F401
from trainverify.ops.table import OpRow

OPS = [OpRow("specs.scaled", lambda m, x, factor: m.scale(x, factor + 1), "pointwise", "nowhere")]
