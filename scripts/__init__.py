"""Command-line programs: ``python -m llmos_tf.scripts.train``, installed as ``llmos-train``."""

if __name__ != "llmos_tf.scripts":
    raise ImportError(
        "The folder scripts/ is the package llmos_tf.scripts: run "
        "`python -m llmos_tf.scripts.train` or `llmos-train`. "
        f"Received an import as {__name__!r}."
    )
