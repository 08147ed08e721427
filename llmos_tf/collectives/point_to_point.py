"""A tensor from one rank to another.

TensorFlow's collective ops have no send and receive of their own, but a broadcast in a group of two
is one, and in it sender and receiver have different ops. The sender does not wait: its op ends when
the receiver has taken the tensor, and nothing but what is told to depends on that.
"""

import numpy as np
import tensorflow as tf

from llmos_tf.collectives.annotations import Sent
from llmos_tf.mesh import AXES
from llmos_tf.spmd.program import ReplicaProgram

# What the ops can carry. The bits of other types travel as one of these, small integers as larger.
_CARRIED = (tf.bool, tf.float32, tf.float16, tf.float64, tf.int32, tf.int64)
_SAME_BITS = {
    tf.bfloat16: tf.float16,
    tf.uint32: tf.int32,
    tf.uint64: tf.int64,
    tf.complex64: tf.int64,
}


class Edge:
    """The way from each rank to the one `shift` places further around its group, and back from it.

    Args:
        program: the program of this rank.
        axes: canonical axis names of the group.
        shift: places, not a multiple of the group's size.
        kind: "send", or "permute" where all ranks of a group send.
    """

    def __init__(
        self, program: ReplicaProgram, axes: tuple[str, ...], shift: int, kind: str = "send"
    ):
        self._program, self._kind = program, kind
        self._first = program.keys.edge_keys(axes, shift % program.mesh.axis_size(axes))
        self._name = ("sender", *axes, shift)
        self._axes, self._shift = axes, shift
        split = [axis for axis in axes if program.mesh.axis_size(axis) > 1]
        # TensorFlow's errors name the op.
        self._op_name = f"{kind}_along_{'_'.join(split)}"

    def send(self, x: tf.Tensor, instance_key: int | tf.Tensor) -> tf.Tensor:
        """Sends `x`.

        Args:
            x: any dense tensor.
            instance_key: tells it from the others on this edge.

        Returns:
            A tensor that is there when `x` has been taken. Without a use, nothing is sent.
        """
        self._program.communicates = True
        carried = _as_carried(x)
        group_key = self._first + self._program.axis_index(AXES)
        sends = Sent.along(self._program, self._axes, self._kind, carried.dtype, carried.shape)
        with sends.noted():
            return tf.raw_ops.CollectiveBcastSendV2(
                input=carried,
                group_size=2,
                group_key=group_key,
                instance_key=instance_key,
                communication_hint=self._program.communication,
                name=self._op_name,
            )

    def receive(
        self, dtype: tf.DType, shape: tf.Tensor | tuple, instance_key: int | tf.Tensor
    ) -> tf.Tensor:
        """Receives what the rank at the other end has sent.

        Args:
            dtype: of the tensor.
            shape: of the tensor.
            instance_key: as in `send`.

        Returns:
            The tensor.
        """
        self._program.communicates = True
        x = tf.raw_ops.CollectiveBcastRecvV2(
            T=_carrier(dtype),
            group_size=2,
            group_key=self._first + self._program.once(self._name, self._sender),
            instance_key=instance_key,
            shape=shape,
            communication_hint=self._program.communication,
            name=self._op_name,
        )
        if x.dtype == dtype:
            return x
        return tf.bitcast(x, dtype) if dtype in _SAME_BITS else tf.cast(x, dtype)

    def _sender(self) -> tf.Tensor:
        """The rank from which this one receives."""
        mesh = self._program.mesh
        size = mesh.axis_size(self._axes)
        senders = [
            mesh.group(rank, self._axes)[(mesh.index_along(rank, self._axes) - self._shift) % size]
            for rank in range(mesh.size)
        ]
        return tf.gather(tf.constant(np.array(senders, np.int32)), self._program.axis_index(AXES))


def _carrier(dtype: tf.DType) -> tf.DType:
    return dtype if dtype in _CARRIED else _SAME_BITS.get(dtype, tf.int32)


def _as_carried(x: tf.Tensor) -> tf.Tensor:
    if x.dtype in _CARRIED:
        return x
    carrier = _carrier(x.dtype)
    return tf.bitcast(x, carrier) if x.dtype in _SAME_BITS else tf.cast(x, carrier)
