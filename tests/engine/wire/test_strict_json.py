"""The parser for what strangers send."""

from __future__ import annotations

import contextlib
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loquent.engine.wire.strict_json import MAX_DEPTH, parse_object

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**60), 10**60)
    | st.text(max_size=8)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=12,
)


@settings(max_examples=50)
@given(st.dictionaries(st.text(max_size=8), VALUES, max_size=5))
def test_objects_come_through(fields: dict[str, object]) -> None:
    assert parse_object(json.dumps(fields), max_depth=50) == fields


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Expecting value"),
        ("[]", "list, expected an object"),
        ("3", "int, expected an object"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ('{"a": 1e999}', "too large"),
        ('{"a": ' + "9" * 65 + "}", "65 characters"),
        ('{"a": 0.' + "9" * 10_000 + "}", "10002 characters"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' twice"),
        ('{"a": {"b": 1, "b": 2}}', "'b' twice"),
        ('{"a": ' + "[" * 100_000, "nested deeper"),
        ('{"a": ' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}", "nested deeper"),
        ('{"a": 1} x', "Extra data"),
        ('{"a": ["\\ud83d"]}', "half of a surrogate pair"),
        ('{"\\ude00": 1}', "half of a surrogate pair"),
    ],
)
def test_mistakes_are_told(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_object(text)


def test_a_whole_pair_is_a_character() -> None:
    assert parse_object('{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}


def test_many_names_of_which_one_comes_twice() -> None:
    """Looking for it must not take time by the square of their number."""
    names = [f'"{number}": 0' for number in range(80_000)]
    began = time.process_time()
    with pytest.raises(ValueError, match="'79999' twice"):
        parse_object("{" + ", ".join([*names, names[-1]]) + "}")
    assert time.process_time() - began < 5


def test_the_deepest_that_is_allowed() -> None:
    depth = MAX_DEPTH - 1
    assert parse_object('{"a": ' + "[" * depth + "]" * depth + "}")


@settings(max_examples=50)
@given(st.text(max_size=60))
def test_any_text_gives_an_object_or_a_reason(text: str) -> None:
    for candidate in (text, '{"a": ' + text, '{"' + text + '": 1}'):
        with contextlib.suppress(ValueError):
            assert isinstance(parse_object(candidate), dict)
