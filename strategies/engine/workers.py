"""What the engine does where other processes hold some of the ranks of a mesh."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.coordination import Agreement
from llmos_tf.graph.fingerprint import op_counts


def require_same_programs(agreement: Agreement, programs: Mapping[int, Any]) -> None:
    """Checks that processes have traced the same program of each stage.

    Unlike programs wait for each other's collectives for ever, or train copies that part.

    Args:
        agreement: of the processes, which all trace at this point.
        programs: by stage, the concrete function of those that this process runs.

    Raises:
        ValueError: they differ.
    """  # noqa: DOC502
    counts = {str(stage): op_counts(concrete) for stage, concrete in programs.items()}
    texts = {stage: json.dumps(one) for stage, one in counts.items()}
    digests = {s: hashlib.sha256(text.encode()).hexdigest() for s, text in texts.items()}
    what = "trace the same program"
    found = [
        json.loads(one) for one in agreement.from_all(json.dumps(digests), what, agreement.limit)
    ]
    stages = sorted({stage for one in found for stage in one})
    unlike = [s for s in stages if len({one[s] for one in found if s in one}) > 1]
    if unlike:
        mine = texts.get(unlike[0], "null")
        entries = [json.loads(one) for one in agreement.from_all(mine, what, agreement.limit)]
        agreement.refuse("traced program, which has these ops", entries)


class StepCounter:
    """How many calls of programs have begun and ended on this process's devices."""

    def __init__(self):
        with tf.init_scope(), tf.device("CPU:0"):
            self._begun, self._ended = (
                _internal.ResourceVariable(0, trainable=False, dtype=tf.int64, name=name)
                for name in ("steps_begun", "steps_ended")
            )

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Counts the calls that are placed meanwhile in a graph as one step."""
        graph = tf.compat.v1.get_default_graph()
        before = len(graph.get_operations())
        with tf.device("CPU:0"):
            self._begun.assign_add(1, read_value=False)
        yield
        calls = [op for op in graph.get_operations()[before:] if "Call" in op.type]
        with tf.device("CPU:0"), tf.control_dependencies(calls):
            self._ended.assign_add(1, read_value=False)

    def read(self) -> tuple[int, int]:
        """Returns how many have begun and how many have ended."""
        return int(self._begun.numpy()), int(self._ended.numpy())
