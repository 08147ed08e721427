"""What a function says of its own: which of what it computes is worth to be kept.

`rematerialise="selective"` keeps the results of products. Attention that goes by blocks of keys has
one for each block, while its gradient needs no more than their sum. So such a function says it, as
by `jax.ad_checkpoint.checkpoint_name`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import tensorflow as tf

from llmos_tf import _internal

_ATTRIBUTE = "_llmos_kept"
_YES, _NO = b"yes", b"no"


@contextmanager
def not_kept() -> Iterator[None]:
    """Says of all that is computed while this is entered that it is not to be kept."""
    with _internal.op_attribute(tf.compat.v1.get_default_graph(), _ATTRIBUTE, _NO):
        yield


def kept(x: tf.Tensor) -> tf.Tensor:
    """Says of a tensor that it is to be kept.

    Args:
        x: the tensor.

    Returns:
        The same value, from which everything else has to be computed.
    """
    with _internal.op_attribute(tf.compat.v1.get_default_graph(), _ATTRIBUTE, _YES):
        return tf.identity(x)


def said_to_be_kept(op: tf.Operation) -> bool | None:
    """Returns what was said of an op.

    Args:
        op: of a traced program.

    Returns:
        Whether its result is to be kept; None where nothing was said.
    """
    try:
        said = op.get_attr(_ATTRIBUTE)
    except ValueError:
        return None
    return said == _YES
