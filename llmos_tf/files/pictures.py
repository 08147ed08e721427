"""Pictures that appear on disk as a whole."""

import io
import os

import matplotlib.figure

from llmos_tf.files.writing import write_bytes


def write_png(path: str | os.PathLike[str], figure: matplotlib.figure.Figure, dpi: int) -> None:
    """Writes or replaces a PNG in one step, as `write_bytes` does.

    Args:
        path: the file.
        figure: what it shows.
        dpi: pixels per inch.

    Raises:
        OSError: it cannot be written; the error names the path.
    """  # noqa: DOC502
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi)
    write_bytes(path, picture.getvalue())
