"""The experts are selected by the scores alone; the reference adds the selection bias first."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import moe_expert_parallel
from moe_expert_parallel import RANKS, ExpertParallelMoE, reference

EXPECT = {"verdict": ("REFUTED", "UNKNOWN"), "file": "wrong/routing_scores.py",
          "line": "chosen = scores.topk(self.top_k).indices",
          "also": [("wrong/routing_scores.py", "weights = scores.gather(-1, chosen)")]}


class Wrong(ExpertParallelMoE):
    def route(self, tokens):
        scores = self.router(tokens).softmax(-1)
        chosen = scores.topk(self.top_k).indices
        weights = scores.gather(-1, chosen)
        return weights / weights.sum(-1, keepdim=True), chosen


def parallel(ref):
    return moe_expert_parallel.parallel(ref, moe=Wrong)
