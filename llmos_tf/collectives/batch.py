"""The rows of a batch, and the ranks that share them.

A batch of fewer rows than ways to split it, such as the last of an epoch, leaves ranks without a
row. TensorFlow's kernels are not made for that: a float32 convolution on the CPU gives a wrong
shape, and the gradient of a depthwise one is whatever was in memory. So the engine lends such a
rank a row of another one, and nothing that it computes on it counts: in no loss, gradient, metric,
statistic or result.

That holds for Keras's steps and for functions that are said to `weigh_rows`. Any other function
that `strategy.run` runs gets the rows of its replica and no others, as `tf.distribute` has it.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from llmos_tf import _internal, collectives
from llmos_tf.mesh import BATCH_AXES
from llmos_tf.spmd.program import ReplicaProgram, require_program


def weigh_rows(fn: Callable) -> Callable:
    """Says of a replica function that nothing of it counts on a rank without rows of its own.

    Args:
        fn: the function; it computes losses by Keras, or uses the functions below.

    Returns:
        `fn`.
    """
    fn.weighs_rows = True
    return fn


def weighs_rows(fn: Any) -> bool:
    """Returns whether ranks without a row may be lent one.

    Args:
        fn: a replica function, as `strategy.run` hands it on.

    Returns:
        True for Keras's steps and for what was said to `weigh_rows`.
    """
    if _internal.is_keras_step(fn):
        return True
    while hasattr(fn, "__wrapped__"):
        fn = fn.__wrapped__
    return getattr(fn, "weighs_rows", False)


def counted(x: tf.Tensor) -> tf.Tensor:
    """Returns `x`, or zeros on a rank that has no rows of its own.

    Args:
        x: any tensor.

    Returns:
        Tensor like `x`.
    """
    rows = require_program("batch.counted").rows
    return x if rows is None else tf.where(rows > 0, x, tf.zeros_like(x))


def own_rows(x: tf.Tensor) -> tf.Tensor:
    """Returns `x`, or nothing of it on a rank that has no rows of its own.

    Args:
        x: a result of a program. Its first dimension counts rows where its length is not static.

    Returns:
        The rows that are this rank's own.
    """
    rows = require_program("batch.own_rows").rows
    if rows is None or not x.shape.rank or x.shape[0] is not None:
        return x
    return x[: tf.where(rows > 0, tf.shape(x)[0], 0)]


def of_last_stage(x: tf.Tensor) -> tf.Tensor:
    """Returns what the pipeline stage with the results has, to processes without that stage.

    Args:
        x: a result on that stage; of the same shape and dtype on others.

    Returns:
        Tensor like `x`.
    """
    program = require_program("batch.of_last_stage")
    extended = program.strategy.extended
    if extended.in_one_process(["pipe"]):
        # There results are taken from that stage.
        return x
    has = program.stage == extended.result_stage
    return collectives.all_reduce(x if has else tf.zeros_like(x), "pipe")


def share(dtype: tf.DType) -> tf.Tensor:
    """Returns which part of the batch's rows are this rank's.

    Args:
        dtype: floating-point type of the result.

    Returns:
        Scalar; the sum over the parts of the batch, and over the microbatches, is 1.
    """
    program = require_program("batch.share")
    if program.rows is None:
        return tf.constant(1 / num_parts(), dtype)

    def compute():
        mine, total = tf.cast(program.rows, tf.float64), _num_rows(program)
        # Of a batch without rows what all ranks compute alike still counts once.
        equal = tf.constant(1 / num_parts(), tf.float64)
        return tf.where(total > 0, tf.math.divide_no_nan(mine, total), equal)

    return tf.cast(program.once("share", compute), dtype)


def if_any_rows(x: tf.Tensor, otherwise: tf.Tensor) -> tf.Tensor:
    """Returns `x`, or another value where the whole batch has no rows.

    Args:
        x: computed of rows, which may all be lent.
        otherwise: a tensor like `x`.

    Returns:
        One of the two, on all ranks the same one.
    """
    program = require_program("batch.if_any_rows")
    return x if program.rows is None else tf.where(_num_rows(program) > 0, x, otherwise)


def _num_rows(program: ReplicaProgram) -> tf.Tensor:
    """Number of rows of the whole batch, a float64 scalar."""
    return program.once("num_rows", lambda: everywhere(tf.cast(program.rows, tf.float64)))


def num_parts() -> int:
    """Returns into how many parts the batch is cut: over ranks, and in a pipeline over time."""
    program = require_program("batch.num_parts")
    microbatches = 1 if program.trace is None else program.trace.num_microbatches
    return program.mesh.batch_ways * microbatches


def everywhere(count: tf.Tensor) -> tf.Tensor:
    """Sums a number that is not differentiated over all parts of the batch.

    Args:
        count: this rank's, or this microbatch's.

    Returns:
        The sum, on every rank.
    """
    program = require_program("batch.everywhere")
    if program.trace is not None:
        return program.trace.total(counted(count))
    return collectives.all_reduce(counted(count), BATCH_AXES)


def total(x: tf.Tensor) -> tf.Tensor:
    """Sums over the parts of the batch; the gradient is that of this rank's part alone.

    So a loss has the value of one device on every rank, whatever is done with it, and the sum of
    the ranks' gradients is the gradient of one device. In a pipeline, where the other microbatches
    are not there yet, it is this microbatch's part of the sum.

    Args:
        x: this rank's part of the sum.

    Returns:
        The sum, on every rank.
    """
    if require_program("batch.total").trace is not None:
        return counted(x)
    return collectives.reduce_from_axis(counted(x), BATCH_AXES)


def mean(x: tf.Tensor) -> tf.Tensor:
    """Averages what each rank has averaged over its rows; the gradient is as in `total`.

    Args:
        x: a mean over this rank's rows, or what is the same on every rank.

    Returns:
        The mean over all rows, on every rank.
    """
    return total(x * share(x.dtype))


def same(x: tf.Tensor) -> tf.Tensor:
    """Returns what every rank has computed alike; of the gradient each rank takes its share.

    Args:
        x: the same on every rank, such as a regularizer of the weights.

    Returns:
        `x`.
    """
    part = share(x.dtype)

    @tf.custom_gradient
    def shared(x):
        return tf.identity(x), lambda dy: dy * part

    return shared(x)
