"""Final answers by the convention of GSM8K."""

from decimal import Decimal

import pytest

from hf_nexus.evaluation.answers import final_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#### 42", 42),
        ("so 6 * 7\n#### 42.0", 42),
        ("#### $1,234.50.", Decimal("1234.5")),
        ("#### -7\nQuestion: what else?", -7),
        ("#### 1\nno:\n#### 2", 2),
        ("#### 1e3", 1000),
        ("#### 12345678901234567891", 12345678901234567891),
        ("#### blue whale..", "blue whale"),
        ("#### 50%", "50%"),
        ("#### nan", "nan"),
        ("#### Infinity", "Infinity"),
        ("#### ", None),
        ("####42", None),
        ("42", None),
        ("", None),
    ],
)
def test_the_final_answer_is_the_line_after_the_last_mark(text, expected):
    assert final_answer(text) == expected
