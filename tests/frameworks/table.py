"""The framework examples, each under its cases, with the verdict that is expected (`make bench-frameworks` runs all, `make test-frameworks` the quick ones).

A wrong twin names the line at which it must be caught: the end of the file's name, and what stands in the line.
"""
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "frameworks"


@dataclass(frozen=True)
class Case:
    """file: relative to examples/frameworks; ranks: what the spec's RANKS says for the case; why: for what is not PROVED; place: (file, text);
    stand_in: as --stand-in."""

    file: str
    case: dict = field(default_factory=dict)
    ranks: int = 2
    expected: str = "PROVED"
    quick: bool = False
    why: str = ""
    place: tuple[str, str] | None = None
    stand_in: str = ""

    @property
    def name(self) -> str:
        return self.file.removesuffix(".py") + (f"[{self.arguments}]" if self.case else "")

    @property
    def arguments(self) -> str:
        return ",".join(f"{k}={v}" for k, v in self.case.items())

    @property
    def command(self) -> list[str]:
        """Of `trainverify verify`."""
        return [str(FOLDER / self.file), *(["--case", self.arguments] if self.case else []), *(["--stand-in", self.stand_in] if self.stand_in else [])]


MEGATRON = [
]

TORCHTITAN = [
]

DEEPSPEED = [
]

TRANSFORMERS = [
]

TORCH = [
]

CASES = [*DEEPSPEED, *MEGATRON, *TORCH, *TORCHTITAN, *TRANSFORMERS]
