"""The source line under a diagnostic, and what of it is underlined."""
import pytest
from trainverify.report.source import Excerpt, excerpt

SOURCE = """\
def f(x, y, w):
    h = self.weight * (x @ y)
    z = dist.all_reduce(h) + torch.nn.functional.silu(x)
    s = "\u00e9\u00e9" + g(x * 2)
    t =\tx - y
    return fn(
        h)

"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "code.py"
    path.write_text(SOURCE, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(("line", "op", "underlined"), [
    (2, "aten.mul.Tensor", "self.weight * (x @ y)"),
    (2, "aten.mm.default", "x @ y"),
    (2, "aten.exp.default", "h = self.weight * (x @ y)"),
    (3, "c10d.allreduce_.default", "dist.all_reduce(h)"),
    (3, "aten.silu_backward.default", "torch.nn.functional.silu(x)"),
    (4, "aten.mul.Tensor", "x * 2"),
    (5, "aten.sub.Tensor", "x - y"),
    (6, "aten.fn.default", "fn("),
    (2, "", "h = self.weight * (x @ y)"),
])
def test_the_expression_that_ran_is_underlined(file, line, op, underlined):
    found = excerpt(file, line, op)
    assert found.text[found.start:found.end] == underlined
    assert found.carets == " " * found.start + "^" * len(underlined)
    assert found.text.isascii()


def test_two_candidates_underline_the_whole_line(tmp_path):
    (tmp_path / "a.py").write_text("y = a * b * c\n")
    found = excerpt(str(tmp_path / "a.py"), 1, "aten.mul.Tensor")
    assert found.text[found.start:found.end] == "y = a * b * c"


def test_no_excerpt_where_there_is_none(file, tmp_path):
    (tmp_path / "binary.so").write_bytes(b"\xff\xfe\x00")
    assert excerpt(file, 99) is None and excerpt(file, 0) is None and excerpt(file, 8) is None
    assert excerpt(str(tmp_path / "gone.py"), 1) is None
    assert excerpt(str(tmp_path / "binary.so"), 1) is None
    assert excerpt("<string>", 1) is None and excerpt("a\0b", 1) is None


def test_a_file_that_is_not_python_is_still_shown(tmp_path):
    (tmp_path / "x.py").write_text("def (:\n  broken here\n")
    assert excerpt(str(tmp_path / "x.py"), 2, "aten.mul.Tensor").text == "broken here"


@pytest.mark.parametrize(("start", "end", "text", "shown"), [
    (0, 5, "abcdefghijklmnopq...", "abcde"),
    (4, 17, "abcdefghijklmnopq...", "efghijklmnopq"),
    (0, 52, "abcdefghijklmnopq...", "abcdefghijklmnopq"),
    (30, 34, "...EFGHIJKLMNOPQR...", "EFGH"),
    (48, 52, "...JKLMNOPQRSTUVWXYZ", "WXYZ"),
    (20, 52, "...uvwxyzABCDEFGH...", "uvwxyzABCDEFGH"),
])
def test_a_long_line_is_cut_around_what_is_underlined(start, end, text, shown):
    line = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    cut = Excerpt(7, line, start, end).clipped(20)
    assert cut.text == text and text[cut.start:cut.end] == shown and len(cut.carets) <= 20
    assert Excerpt(7, line, start, end).clipped(52).text == line
