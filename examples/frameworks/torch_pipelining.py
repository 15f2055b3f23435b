"""torch.distributed.pipelining: each of its schedules, with microbatches that count different numbers of tokens."""
from common import programs

programs.use()

import pipelines  # noqa: E402
import torch.distributed as dist  # noqa: E402
from pipelines import RANKS, reference  # noqa: E402, F401
from torch.distributed import pipelining  # noqa: E402

SCHEDULES = {
    "gpipe": (pipelining.ScheduleGPipe, lambda rank: [rank]),
    "1f1b": (pipelining.Schedule1F1B, lambda rank: [rank]),
    "interleaved_1f1b": (pipelining.ScheduleInterleaved1F1B, lambda rank: [rank, rank + 2]),
    "looped_bfs": (pipelining.ScheduleLoopedBFS, lambda rank: [rank, rank + 2]),
    "zero_bubble": (pipelining.ScheduleInterleavedZeroBubble, lambda rank: [rank, rank + 2]),
    "zbv": (pipelining.ScheduleZBVZeroBubble, lambda rank: [rank, 3 - rank]),
    "dual_pipe_v": (pipelining.schedules.ScheduleDualPipeV, lambda rank: [rank, 3 - rank]),
}
MICROBATCHES = {"dual_pipe_v": 6}
CASES = [{"schedule": name} for name in SCHEDULES]


def parallel(ref, schedule):
    dist.init_process_group("nccl")
    kind, stages_of = SCHEDULES[schedule]
    return pipelines.pipeline(ref, False, kind, stages_of(dist.get_rank()), parts=MICROBATCHES.get(schedule, 3))
