"""The page of each diagnostic code, as Markdown files beside the package: what it means, why it matters, an example, the way out (no torch, not trusted)."""
from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).with_name("pages")


def codes() -> dict[str, str]:
    """Every code with a page, and its title."""
    titles = {}
    for path in sorted(FOLDER.glob("*.md"), key=_order):
        first = path.read_text(encoding="utf-8").split("\n", 1)[0]
        titles[path.stem] = first.removeprefix("# ").removeprefix(path.stem).removeprefix(": ").strip()
    return titles


def page(code: str) -> str | None:
    """The page as Markdown, or None where there is none."""
    path = FOLDER / f"{code.upper()}.md"
    return path.read_text(encoding="utf-8") if code.isalnum() and path.is_file() else None


def _order(path: Path) -> tuple[str, int]:
    letters = path.stem.rstrip("0123456789")
    return letters, int(path.stem[len(letters):] or 0)
