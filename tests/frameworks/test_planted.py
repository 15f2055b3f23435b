"""Bugs that are planted at run time are in the framework's own file and lines (needs no framework)."""
import json.decoder
import sys
import traceback

import pytest
from table import FOLDER

sys.path.insert(0, str(FOLDER))
from common.planted import edited


def test_an_edited_function_stands_where_the_original_does():
    original = json.decoder.JSONDecoder.raw_decode
    broken = edited(original, "return obj, end", "return obj / (end - end), end")
    assert broken.__code__.co_filename == original.__code__.co_filename and broken.__code__.co_firstlineno == original.__code__.co_firstlineno
    with pytest.raises(ZeroDivisionError) as error:
        broken(json.decoder.JSONDecoder(), "1")
    (line,) = [f.line for f in traceback.extract_tb(error.value.__traceback__) if f.name == "raw_decode"]
    assert line == "return obj, end"


def test_words_that_are_not_there_once_are_no_edit():
    with pytest.raises(ValueError, match="0 times"):
        edited(json.decoder.JSONDecoder.raw_decode, "return nothing", "return")
