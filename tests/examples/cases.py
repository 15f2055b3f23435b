"""The examples and their wrong twins, for the end-to-end tests.

Read from the files without running them: `EXAMPLES` lists every example under each of its cases, `TWINS` every file
of examples/wrong with what it must be reported as.
"""
import ast
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "examples"


@dataclass(frozen=True)
class Example:
    path: Path
    ranks: int
    case: dict | None = None

    @property
    def name(self) -> str:
        return self.path.stem + (f"[{self.case['schedule']}]" if self.case else "")


@dataclass(frozen=True)
class Place:
    """A source line, by its text: `file` is relative to examples/."""

    file: str
    text: str

    def numbers(self) -> list[int]:
        """The line numbers where a statement with this text begins (it may go over several lines)."""
        wanted = ast.dump(ast.parse(f"def f():\n  {self.text}").body[0].body[0])
        nodes = ast.walk(ast.parse((FOLDER / self.file).read_text()))
        return [n.lineno for n in nodes if isinstance(n, ast.stmt) and ast.dump(n) == wanted]


@dataclass(frozen=True)
class Twin:
    path: Path
    verdicts: tuple[str, ...]
    place: Place
    also: tuple[Place, ...]


def twin(path: Path) -> Twin:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "EXPECT":
            expect = ast.literal_eval(node.value)
            verdict = expect["verdict"]
            return Twin(path, (verdict,) if isinstance(verdict, str) else verdict, Place(expect["file"], expect["line"]),
                        tuple(Place(*p) for p in expect.get("also", ())))
    raise ValueError(f"{path} has no EXPECT")


EXAMPLES = [
    Example(FOLDER / "ddp_accumulation.py", 2),
    Example(FOLDER / "fsdp2_tp.py", 6),
    Example(FOLDER / "hf_tp.py", 2),
    Example(FOLDER / "llama_405b.py", 8),
    Example(FOLDER / "megatron_style_tp.py", 2),
    Example(FOLDER / "moe_expert_parallel.py", 3),
    Example(FOLDER / "pipeline_1f1b.py", 3, dict(schedule="1F1B", stages_per_rank=1)),
    Example(FOLDER / "pipeline_1f1b.py", 3, dict(schedule="Interleaved1F1B", stages_per_rank=2)),
    Example(FOLDER / "ring_attention.py", 4),
]
TWINS = [twin(path) for path in sorted((FOLDER / "wrong").glob("*.py"))]
