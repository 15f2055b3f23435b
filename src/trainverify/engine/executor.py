"""Who proves theorems: this process, a pool of processes, or a cluster. What is proved is the same (not trusted to say what a result means)."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from trainverify.contracts.docket import Executor, Here, work
from trainverify.engine.pool import Pool


@contextmanager
def executor(jobs: int, ray: str = "") -> Iterator[Executor]:
    """jobs: processes that analyse; one replays in numbers and one proves, so that from the third on they are workers. ray: address of a cluster. Nothing
    runs any more when the context ends."""
    if ray:
        from trainverify.engine.ray import OnRay
    made = OnRay(work, ray) if ray else Pool(work, jobs - 2) if jobs > 2 else Here()
    try:
        yield made
    finally:
        made.close()
