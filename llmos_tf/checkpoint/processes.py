"""Work on a checkpoint that all processes of a cluster do together, or none."""

import json
from collections.abc import Callable
from typing import TypeVar

import keras

from llmos_tf.checkpoint.errors import DamagedCheckpointError
from llmos_tf.coordination import Agreement

_Result = TypeVar("_Result")

# Classes of errors that a script may catch: it has to do so in every process.
_ERRORS = {error.__name__: error for error in (DamagedCheckpointError, ValueError, OSError)}


def agreement_of(model: keras.Model) -> Agreement | None:
    """Returns the `Agreement` between the processes that train a model.

    Args:
        model: any Keras model.

    Returns:
        That of a `MultiWorkerMeshStrategy`; None where there is one process.
    """
    return getattr(model.distribute_strategy, "agreement", None)


def together(agreement: Agreement | None, work: Callable[[], _Result]) -> _Result:
    """Runs a function in every process, and raises in all of them if it fails in one.

    Otherwise the others would continue, and wait for ever for the process that has ended.

    Args:
        agreement: as `agreement_of` returns it.
        work: the function; every process calls `together` with the same one.

    Returns:
        What it returned in this process.

    Raises:
        DamagedCheckpointError: what another process raised, and likewise with the other classes.
        ValueError: as above.
        OSError: as above.
        RuntimeError: another process raised an error of any other class.
    """  # noqa: DOC503
    if agreement is None:
        return work()
    try:
        result = work()
    except Exception as error:
        kind = next((name for name, kind in _ERRORS.items() if isinstance(error, kind)), "")
        agreement.from_all(json.dumps([kind, f"{type(error).__name__}: {error}"]))
        raise
    for task, answer in enumerate(agreement.from_all("")):
        if answer:
            kind, message = json.loads(answer)
            raise _ERRORS.get(kind, RuntimeError)(f"Worker {task} failed: {message}")
    return result
