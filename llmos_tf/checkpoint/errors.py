"""Errors about checkpoints."""

import textwrap


class DamagedCheckpointError(ValueError):
    """Files of a checkpoint are missing, or are not those that were written.

    An older checkpoint of the same run may be whole: `restore_latest` looks for it.
    """


def quoted(text: str | Exception) -> str:
    """Returns a text for a message, shortened: values in a damaged file may take megabytes.

    Args:
        text: the text, or an error with a message.

    Returns:
        At most 1,000 characters.
    """
    return textwrap.shorten(str(text), 1000, placeholder="...")
