"""Ranks 1 and 2 hold each other's first stage, so activations reach the wrong one of the two."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pipeline_1f1b
from pipeline_1f1b import RANKS, reference

CASES = [dict(schedule="Interleaved1F1B", stages_per_rank=2)]
EXPECT = {"verdict": "REFUTED", "file": "models/llama.py",
          "line": "return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight",
          "also": [("wrong/pipeline_peers.py", "return pipeline_1f1b.stage_layers({1: 2, 2: 1}.get(stage, stage), "
                                               "stages)")]}


def stage_layers(stage, stages):
    return pipeline_1f1b.stage_layers({1: 2, 2: 1}.get(stage, stage), stages)


def parallel(ref, **case):
    return pipeline_1f1b.parallel(ref, **case, stage_layers=stage_layers)
