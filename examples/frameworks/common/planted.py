"""Plants a bug in a framework at run time: one function of it with a few words of its source changed, in the framework's own file and lines."""
import inspect


def edited(function, old, new):
    """The function with `old`, which occurs once in its source, replaced by `new`; tracebacks and reports name the lines of the original."""
    source, first = inspect.getsourcelines(function)
    text = "".join(source)
    if text.count(old) != 1 or old.count("\n") != new.count("\n"):
        raise ValueError(f"{function.__qualname__} has {text.count(old)} times {old!r}; one is to be replaced, on its own lines")
    code = "\n" * (first - 2) + "if True:\n" + "".join(f" {line}" for line in text.replace(old, new).splitlines(True))
    names = {}
    exec(compile(code, inspect.getsourcefile(function), "exec"), function.__globals__, names)
    return names[function.__name__]
