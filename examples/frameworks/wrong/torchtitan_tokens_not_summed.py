"""torchtitan's Trainer whose valid tokens are not summed over the data-parallel ranks: each rank's loss is divided by its own count."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torchtitan.trainer import Trainer

import torchtitan_llama3
from common.planted import edited
from torchtitan_llama3 import reference

RANKS = 2


def parallel(ref):
    Trainer.train_step = edited(Trainer.train_step, "if parallel_dims.dp_enabled:", "if False:")
    return torchtitan_llama3.parallel(ref, dp=2)
