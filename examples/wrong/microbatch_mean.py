"""Each microbatch takes the mean over its own tokens, and the means are averaged.

Mirrors https://github.com/huggingface/transformers/pull/34191: gradient accumulation with microbatches of different lengths.
"""
import sys
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ddp_accumulation
from ddp_accumulation import MICROBATCHES, RANKS, reference
from models.llama import token_loss

EXPECT = {"verdict": "REFUTED", "file": "wrong/microbatch_mean.py",
          "line": "return token_loss(logits, labels) / (MICROBATCHES * dist.get_world_size())",
          "also": [("models/llama.py", "return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), "
                                       "ignore_index=IGNORE, reduction=reduction)")]}


def microbatch_loss(logits, labels, total_tokens):
    return token_loss(logits, labels) / (MICROBATCHES * dist.get_world_size())


def parallel(ref):
    return ddp_accumulation.parallel(ref, microbatch_loss=microbatch_loss)
