"""Programs of the test suite (tests/programs), which are examples of torch's own parallelism too."""
import sys
from pathlib import Path

FOLDER = str(Path(__file__).resolve().parents[3] / "tests" / "programs")


def use():
    """Make them importable."""
    if FOLDER not in sys.path:
        sys.path.insert(0, FOLDER)
