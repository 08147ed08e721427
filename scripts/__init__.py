"""Command-line programs: ``python -m llmos_tf.scripts.train``, installed as ``llmos-train``."""

import os

if __name__ != "llmos_tf.scripts":
    raise ImportError(
        "The folder scripts/ is the package llmos_tf.scripts: run "
        "`python -m llmos_tf.scripts.train` or `llmos-train`. "
        f"Received an import as {__name__!r}."
    )

# Before a program imports TensorFlow: its start-up notes would bury the program's own words.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
