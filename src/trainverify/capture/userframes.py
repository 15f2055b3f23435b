"""Which stack frames are the user's: neither torch's, nor ours, nor the standard library's (no torch; used for messages only)."""
from __future__ import annotations

import functools
import importlib.util
import re
import sysconfig
import traceback
from pathlib import Path

Frame = tuple[str, int, str, str]             # file, line, function, source text

_DUMPED = re.compile(r'^  File "(.+)", line (\d+) in (.+)$', re.MULTILINE)
# Installed code that stands between the program and torch: what it does is done for the caller.
_PLUMBING = frozenset({"typing_extensions.py", "decorator.py", "wrapt", "numpy", "sympy", "jaxtyping", "beartype", "typeguard"})
_OURS = str(Path(__file__).resolve().parents[1]) + "/"


@functools.cache
def is_user_file(file: str) -> bool:
    """Whether a source file belongs to the program under verification; its libraries do, but for torch and mere plumbing."""
    if file.startswith("<") or file.startswith(_OURS) or file.startswith(_torch_directory()):
        return False
    if file.endswith(".pyx") and not file.startswith("/"):     # a compiled library, which names its source as it was built
        return False
    libraries, standard = _python_directories()
    for library in libraries:
        if file.startswith(library):
            return file[len(library) + 1:].split("/")[0] not in _PLUMBING
    return not file.startswith(standard)


@functools.cache
def _python_directories() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Where installed packages and the standard library are (slow to ask for)."""
    paths = sysconfig.get_paths()
    return (paths["purelib"], paths["platlib"]), (paths["stdlib"], paths["platstdlib"])


@functools.cache
def _torch_directory() -> str:
    spec = importlib.util.find_spec("torch")
    return str(Path(spec.origin).parent) + "/" if spec and spec.origin else "<no torch>"


def call_through(func, args, kwargs):
    """Call for the user what the user called: an exception that passes only through here is not ours."""
    return func(*args, **kwargs)


def calling_file(frame) -> str:
    """The file of the first frame, from this one outwards, that is not ours: of whoever called the function that one of our modes handles."""
    while frame.f_code.co_filename.startswith(_OURS) and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_filename


def calling_frame(frame):
    """The first frame, from this one outwards, that is neither ours nor of torch's plumbing between a call and its function modes; None at the bottom."""
    while frame is not None and (frame.f_code.co_filename.startswith(_OURS) or frame.f_code.co_filename in _torch_plumbing()):
        frame = frame.f_back
    return frame


def is_torch_file(file: str) -> bool:
    """Whether a source file is torch's own."""
    return file.startswith(_torch_directory())


@functools.cache
def _torch_plumbing() -> frozenset[str]:
    return frozenset(_torch_directory() + name for name in ("_tensor.py", "overrides.py", "utils/_contextlib.py"))


def frames_of_exception(error: BaseException) -> tuple[Frame, ...]:
    """The user's frames of a traceback, outermost first; a chained cause's where the exception itself has none."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) and error.filename:
        frames.append(traceback.FrameSummary(error.filename, error.lineno or 0, "<module>"))
    found = tuple((f.filename, f.lineno or 0, f.name, f.line or "") for f in frames if is_user_file(f.filename))
    cause = error.__cause__ or error.__context__
    return found or (frames_of_exception(cause) if cause is not None else ())


def frame_text(frame: Frame) -> str:
    """A frame as a note."""
    file, line, function, source = frame
    return f"{file}:{line} in {function}" + (f": {source}" if source else "")


def is_internal(error: BaseException) -> bool:
    """Whether an exception is our own bug: it has no user frame, or is of a kind that a kernel, called by us for the user, never raises."""
    frames = traceback.extract_tb(error.__traceback__)
    if not any(is_user_file(f.filename) for f in frames):
        return not isinstance(error, (SyntaxError, SystemExit, KeyboardInterrupt, MemoryError))
    ours = frames[-1].filename.startswith(_OURS) and frames[-1].name != call_through.__name__
    return ours and isinstance(error, (AssertionError, AttributeError, KeyError, NameError, TypeError))


def frames_of_stack_dump(text: str) -> list[tuple[str, int, str]]:
    """The user frames of a faulthandler dump, innermost first; below ours stands whoever started us."""
    frames = [(file, int(line), name) for file, line, name in _DUMPED.findall(text)]
    bottom = next((i for i, (file, _, name) in enumerate(frames) if file.startswith(_OURS) and name == "_run_child"), len(frames))
    return [frame for frame in frames[:bottom] if is_user_file(frame[0])]
