"""Generated text in a terminal."""

import doctest

import pytest

from llmos_tf.scripts import printable as module
from llmos_tf.scripts.printable import printable

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def f():\n\treturn 'é ✓'\n", "def f():\n\treturn 'é ✓'\n"),
        ("a\x1b]0;title\x07b", "a\\x1b]0;title\\x07b"),
        ("a\r\nb\rc", "a\nb\\rc"),
        ("\x00\x7f\x9b2J", "\\x00\\x7f\\x9b2J"),
        ("a\u202eb\u2028", "a\\u202eb\\u2028"),
    ],
)
def test_what_a_terminal_would_obey(text, expected):
    """Fails if generated text can move the cursor or change the terminal, or text is lost."""
    assert printable(text) == expected


def test_examples():
    """Fails if the example in the docstring gives something else."""
    assert doctest.testmod(module).failed == 0
