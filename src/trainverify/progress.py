"""Progress on stderr: one live line on a terminal, one plain line per phase otherwise, nothing when quiet (no torch, not trusted).

The engine forks one process per rank while this is showing, so nothing here starts a thread or redirects a stream.
"""
from __future__ import annotations

from typing import Protocol, TextIO


class Progress(Protocol):
    def __call__(self, phase: str, detail: str = "", fraction: float | None = None) -> None: ...

    def close(self) -> None: ...


class Quiet:
    def __call__(self, phase: str, detail: str = "", fraction: float | None = None) -> None:
        pass

    def close(self) -> None:
        pass


class Plain:
    """A line when a phase begins; details would flood a log."""

    def __init__(self, stream: TextIO):
        self.stream, self.phase = stream, ""

    def __call__(self, phase: str, detail: str = "", fraction: float | None = None) -> None:
        if phase != self.phase:
            self.phase = phase
            self.stream.write(f"{phase}{': ' if detail else ''}{detail}\n")
            self.stream.flush()

    def close(self) -> None:
        pass


class Live:
    """A bar that is redrawn by the calls themselves, so it needs no thread."""

    def __init__(self, stream: TextIO):
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar
        self.bar = Bar(TextColumn("{task.description}"), BarColumn(24), TimeElapsedColumn(), TextColumn("{task.fields[detail]}"),
                       console=Console(file=stream, highlight=False), auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False)
        self.phase, self.task = "", None

    def __call__(self, phase: str, detail: str = "", fraction: float | None = None) -> None:
        if self.task is None:
            self.bar.start()
        if phase != self.phase:
            if self.task is not None:
                self.bar.remove_task(self.task)
            self.phase, self.task = phase, self.bar.add_task(phase, total=None, detail="")
        self.bar.update(self.task, total=None if fraction is None else 1.0, completed=fraction or 0.0, detail=detail)
        self.bar.refresh()

    def close(self) -> None:
        if self.task is not None:
            self.bar.stop()


def progress_to(stream: TextIO, quiet: bool) -> Progress:
    """The progress display that fits the stream."""
    if quiet:
        return Quiet()
    return Live(stream) if stream.isatty() else Plain(stream)
