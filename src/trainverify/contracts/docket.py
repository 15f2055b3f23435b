"""Tasks that were handed to an executor, and what came of them (trusted: nothing that was assumed goes without its proof).

A replay may go on under the *claim* that a theorem holds while somebody proves it. Whatever was assumed is asked for before the replay's result counts
(`close`); if a claim does not hold, the replay is made again (`Again`), and knows what came of all tasks so far. Since a task's result
depends on the task alone, the last replay is the one that a single process makes, however many there were before it.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Protocol

from trainverify.contracts.task import Result, Task, address, packed, prove, unpacked
from trainverify.kernel.terms import Obligation

EFFORT = 8_000                                # operations evaluated for all theorems: a program that needs more does not repeat itself
MOST_AGAIN = 2                                # replays under claims; then each task is waited for


class TooMuch(Exception):
    """Theorems cost more than they spare."""


class Again(Exception):
    """Something that was assumed does not hold."""


class Lost(str):
    """Why a task has no result though it was tried twice."""


class Executor(Protocol):
    """Runs `work` (below) on tasks, in any order and anywhere."""

    waits: bool                               # submit returns when the work is done
    def submit(self, task: bytes, urgent: bool) -> int: ...
    def done(self) -> Iterator[tuple[int, Result | Lost]]: ...     # what has come since; waits for nothing
    def wait(self) -> None: ...               # for something to come, of what was submitted
    def close(self) -> None: ...


def work(data: bytes) -> Result:
    """What an executor does with a task."""
    return prove(unpacked(data))


class Here:
    """An executor that does the work itself, at once."""

    waits = True

    def __init__(self, work: Callable[[bytes], Result] = work):
        self._work, self._done, self._next = work, [], 0

    def submit(self, task: bytes, urgent: bool) -> int:
        self._done.append((self._next, self._work(task)))
        self._next += 1
        return self._next - 1

    def done(self) -> Iterator[tuple[int, Result]]:
        while self._done:
            yield self._done.pop(0)

    def wait(self) -> None:
        return None

    def close(self) -> None:
        return None


class Docket:
    def __init__(self, executor: Executor):
        self._executor = executor
        self._results: dict[bytes, Result | Lost] = {}
        self._tickets: dict[int, bytes] = {}
        self._under_way: set[bytes] = set()
        self._used: dict[bytes, None] = {}        # by this replay
        self._assumed: set[bytes] = set()         # by this replay, and not yet known to hold
        self.replays, self.evaluated = 0, 0

    def begin(self) -> None:
        """A replay from the start."""
        self._used, self._assumed, self.evaluated = {}, set(), 0
        self.replays += 1

    # ---- while a replay goes on
    def ask(self, task: Task, assume: bool = False) -> Result | Lost | None:
        """What comes of a task. assume: None is for that its claim may be taken for true, for now. Raises TooMuch, Again."""
        data = packed(task)
        key = address(data)
        if key not in self._used:
            self._used[key] = None
            self.evaluated += len(task.steps) + len(task.mine)
            if self.evaluated > EFFORT:
                self._await_assumed()
                raise TooMuch
        assume = assume and not self._executor.waits and self.replays <= MOST_AGAIN
        if key not in self._results and key not in self._under_way:
            self._under_way.add(key)
            self._tickets[self._executor.submit(data, not assume)] = key
        self._collect()
        if assume and key not in self._results:
            self._assumed.add(key)
            return None
        while key not in self._results:
            self._executor.wait()
            self._collect()
        return self._results[key]

    def _collect(self) -> None:
        for ticket, result in self._executor.done():
            key = self._tickets.pop(ticket)
            self._under_way.discard(key)
            self._results[key] = result
            if key in self._assumed:
                if isinstance(result, Lost) or not result.holds:
                    raise Again
                self._assumed.discard(key)

    # ---- when it is done, or has failed
    def close(self) -> None:
        """Wait until all that was assumed is known to hold. Raises Again."""
        self._await_assumed()
        if any(key not in self._results for key in self._used):
            raise AssertionError("a task of which something was made has no result")

    def _await_assumed(self) -> None:
        while self._assumed:
            self._executor.wait()
            self._collect()

    def totals(self) -> tuple[Counter[str], list[Obligation]]:
        """Counts of what this replay used, and the obligations that were proved."""
        counts, tried, proved = Counter(), {}, {}
        for key in self._used:
            result = self._results[key]
            if not isinstance(result, Lost):
                counts.update(result.counts)
                tried.update(dict.fromkeys(result.tried))
                proved.update(result.proved)
        counts["obligations"] = len(tried)
        return counts, list(proved.values())

    @property
    def lost(self) -> list[Lost]:
        """Why tasks have no result, each once."""
        return list(dict.fromkeys(r for r in self._results.values() if isinstance(r, Lost)))
