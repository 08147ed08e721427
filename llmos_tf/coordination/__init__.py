"""What the processes of a cluster agree on outside of programs."""

from llmos_tf.coordination.agreement import Agreement

__all__ = ["Agreement"]
