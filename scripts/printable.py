"""Generated text as a terminal may print it."""

import re

# C0 and C1 control characters except tab and newline, and the characters that reverse the direction
# of what follows: a terminal moves its cursor, changes its title or hides text by them.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Returns text with control characters escaped as in Python.

    Args:
        text: any text.

    Returns:
        The text: tabs and newlines as they are, and CR LF as newlines.

    Example:
        >>> printable("a\\x1b[2Jb")
        'a\\\\x1b[2Jb'
    """
    text = text.replace("\r\n", "\n")
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
