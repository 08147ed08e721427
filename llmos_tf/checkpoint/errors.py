"""The error of a checkpoint that is not whole."""


class DamagedCheckpointError(ValueError):
    """Files of a checkpoint are missing, or are not those that were written.

    An older checkpoint of the same run may be whole: `restore_latest` looks for it.
    """
