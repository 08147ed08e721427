"""Bugs of different kinds, as changes to the sources, and tests of the normal run that find each.

A bug is added for each kind that has ever got past the normal run. `tests` name the places where it
is to be found, few enough to run in half a minute; the rest of the run finds it as well, or not.
"""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Bug:
    """A change to one place of the sources.

    Attributes:
        name: says what is wrong.
        path: of the file, from the root of the checkout.
        before: text that is there exactly once.
        after: the text with the bug.
        tests: arguments of pytest: files, folders or node ids.
    """

    name: str
    path: str
    before: str
    after: str
    tests: tuple[str, ...]

    def planted_in(self, source: str) -> str:
        """Returns the file's text with the bug.

        Args:
            source: the file's text.

        Raises:
            ValueError: the place is not there, or more than once.
        """
        count = source.count(self.before)
        if count != 1:
            raise ValueError(
                f"{self.name!r}: the text to change must stand once in {self.path}. Found {count} "
                f"times: {self.before!r}. Change the bug's `before` along with the source."
            )
        return source.replace(self.before, self.after)

    def plant(self, root: Path) -> None:
        """Changes the file below a copy of the checkout.

        Args:
            root: of the copy.
        """
        file = root / self.path
        file.write_text(self.planted_in(file.read_text(encoding="utf-8")), encoding="utf-8")


MATRIX = "tests/equivalence/test_matrix.py"
BUGS = (
    Bug(
        "gradients are not summed over the batch",
        "strategies/gradients/sync.py",
        "unpacked(collectives.all_reduce(packed(tensors), axes), tensors)",
        "unpacked(packed(tensors), tensors)",
        ("tests/integration/test_parity.py",),
    ),
    Bug(
        "ranks weigh alike, however many rows they have",
        "llmos_tf/collectives/batch.py",
        "return tf.where(total > 0, tf.math.divide_no_nan(mine, total), equal)",
        "return equal",
        (MATRIX,),
    ),
    Bug(
        "a row that a rank is lent counts",
        "llmos_tf/collectives/batch.py",
        "return x if rows is None else tf.where(rows > 0, x, tf.zeros_like(x))",
        "return x",
        (MATRIX,),
    ),
    Bug(
        "the last rows of an uneven batch are lost",
        "strategies/engine/rows.py",
        "return _range(x, index * rows // ways, (index + 1) * rows // ways)",
        "return _range(x, index * (rows // ways), (index + 1) * (rows // ways))",
        (MATRIX, "tests/unit/strategies/engine/test_input.py"),
    ),
    Bug(
        "a schedule takes a pair of backward passes in the wrong order",
        "llmos_tf/planning/schedule_orders.py",
        'turns += [("B", 0), ("W", 0), ("F", 1), ("B", 1), ("W", 1)]',
        'turns += [("W", 0), ("B", 0), ("F", 1), ("B", 1), ("W", 1)]',
        ("tests/unit/planning/test_schedules.py",),
    ),
    Bug(
        "interleaved chunks go backward in the order of their forward passes",
        "llmos_tf/planning/schedule_orders.py",
        '("B", num_chunks - 1 - chunk) for chunk in chunks]',
        '("B", chunk) for chunk in chunks]',
        ("tests/unit/planning/test_schedules.py",),
    ),
    Bug(
        "a flat shard begins one element late",
        "llmos_tf/sharding/layout.py",
        "part = part[where[axis] * length : (where[axis] + 1) * length]",
        "part = tf.roll(part, -1, 0)[where[axis] * length : (where[axis] + 1) * length]",
        ("tests/unit/sharding/test_layout.py", "tests/integration/test_parity.py"),
    ),
    Bug(
        "a gathered variable keeps its padding in the place of its last elements",
        "llmos_tf/sharding/layout.py",
        "part = collectives.all_gather(part, self.flat[level])[: lengths[level]]",
        "part = collectives.all_gather(part, self.flat[level])[-lengths[level] :]",
        ("tests/unit/sharding/test_layout.py", "tests/integration/test_parity.py"),
    ),
    Bug(
        "a gradient is clipped by the norm of a rank's shard",
        "strategies/gradients/clipping.py",
        "summed = collectives.all_reduce(tf.stack([local[i] for i in members]), axes)",
        "summed = tf.stack([local[i] for i in members])",
        (MATRIX,),
    ),
    Bug(
        "ranks that hold other heads drop by the same mask",
        "llmos_tf/layers/dropout.py",
        "seed += tf.stack([0, collectives.axis_index(axes) * 1_000_003])",
        "seed += tf.stack([0, 0 * collectives.axis_index(axes)])",
        ("tests/unit/layers/test_dropout.py",),
    ),
    Bug(
        "ranks with other rows drop by the same mask",
        "llmos_tf/sharding/state_variables.py",
        "return value + self._shift(rank)",
        "return tf.identity(value)",
        ("tests/unit/sharding/test_variables.py", "tests/unit/layers/test_dropout.py"),
    ),
    Bug(
        "tensors of a bucket are split at each other's boundaries",
        "strategies/gradients/packing.py",
        "lengths = [tensor.shape.num_elements() for tensor in tensors]",
        "lengths = sorted(tensor.shape.num_elements() for tensor in tensors)",
        ("tests/unit/strategies/gradients", "tests/integration/test_parity.py"),
    ),
    Bug(
        "a bucket may be larger than its limit",
        "llmos_tf/planning/buckets.py",
        "if members and total + sizes[i] > limits[key]:",
        "if members and total > limits[key]:",
        ("tests/unit/planning", "tests/unit/strategies/gradients"),
    ),
    Bug(
        "a checkpoint loses the state of the data",
        "llmos_tf/checkpoint/saving.py",
        "                extra=extra,\n                model_variables",
        "                extra={},\n                model_variables",
        ("tests/unit/checkpoint",),
    ),
    Bug(
        "damage of a checkpoint's step and options is not seen",
        "llmos_tf/checkpoint/manifest.py",
        "    if has_checksum and written != checksum(content):",
        "    if has_checksum and written is None:",
        ("tests/unit/checkpoint",),
    ),
    Bug(
        "a checkpoint loses the optimizer's state",
        "llmos_tf/checkpoint/restoring.py",
        "            files.append((path / OPTIMIZER_FILE, records, contents.optimizer_variables))",
        "            pass",
        ("tests/unit/checkpoint",),
    ),
    Bug(
        "a resumed epoch is shuffled anew",
        "llmos_tf/data/iterator.py",
        "key = np.array([self._seed, self._epoch], np.uint64)",
        "key = np.array([self._seed, self._epoch + self._position], np.uint64)",
        ("tests/unit/data/test_iterator.py",),
    ),
    Bug(
        "ring attention takes keys of the far half for those of the near half",
        "llmos_tf/layers/ring_attention.py",
        "is_earlier = self._index >= step",
        "is_earlier = self._index > step",
        ("tests/unit/layers/test_ring_attention.py", "tests/integration/test_context.py"),
    ),
    Bug(
        "a weight of two stages is trained by the gradient of one",
        "strategies/pipeline/shared_weights.py",
        "total = tf.add_n([terms[stage] for stage in sorted(terms)])",
        "total = terms[me]",
        ("tests/integration/test_pipeline.py",),
    ),
    Bug(
        "a rank judges a loss scale by the shards that it has",
        "strategies/keras_patches/while_tracing.py",
        'return tf.equal(collectives.all_reduce(mine, split, op="min"), 1)',
        "return tf.equal(mine, 1)",
        (MATRIX,),
    ),
    Bug(
        "an accumulated gradient is divided by one step too many",
        "strategies/optimizer/apply.py",
        "means = [(g + s) / steps for g, s in zip(gradients, sums, strict=True)]",
        "means = [(g + s) / (steps + 1) for g, s in zip(gradients, sums, strict=True)]",
        (MATRIX,),
    ),
    Bug(
        "a metric counts a rank's rows only",
        "llmos_tf/sharding/state_variables.py",
        "        total = collectives.all_reduce(mine, BATCH_AXES)\n"
        "        if self._aggregation == tf.VariableAggregation.MEAN:\n"
        "            total /= tf.cast(collectives.axis_size",
        "        total = collectives.broadcast(mine, BATCH_AXES)\n"
        "        if self._aggregation == tf.VariableAggregation.MEAN:\n"
        "            total /= tf.cast(collectives.axis_size",
        (MATRIX,),
    ),
    Bug(
        "an expert takes one token less than it has room for",
        "llmos_tf/layers/capacity.py",
        "kept = tf.where(earlier < tf.cast(capacity, tf.int32), choices, num_experts)",
        "kept = tf.where(earlier + 1 < tf.cast(capacity, tf.int32), choices, num_experts)",
        ("tests/unit/layers/test_capacity.py",),
    ),
    Bug(
        "a generated token is written one position late",
        "llmos_tf/inference/generation.py",
        "position = length + step - 1",
        "position = length + step",
        ("tests/unit/inference/test_generation.py",),
    ),
    Bug(
        "an all-reduce is said to send half of what it sends",
        "llmos_tf/planning/traffic.py",
        '"all_reduce": 2 * share,',
        '"all_reduce": share,',
        ("tests/unit/planning/test_traffic.py",),
    ),
    Bug(
        "rows of an embedding that other ranks looked up are lost",
        "strategies/gradients/sync.py",
        "        values = collectives.all_gather(values, axes)\n"
        "        indices = collectives.all_gather(indices, axes)",
        "        pass",
        (MATRIX,),
    ),
    Bug(
        "the weights of the wrong block are gathered early",
        "strategies/layer_stack/fsdp_prefetch.py",
        "following = order[order.index(call.layer) + 1 :][:1]",
        "following = order[order.index(call.layer) :][:1]",
        ("tests/unit/strategies/layer_stack/test_fsdp_prefetch.py",),
    ),
    Bug(
        "an uneven microbatch weighs as all of them",
        "strategies/pipeline/microbatches.py",
        "return values, self._counted(end - begin)",
        "return values, self._counted(length)",
        ("tests/integration/test_pipeline_keras.py", MATRIX),
    ),
    Bug(
        "the model is built by a batch that is taken from the data",
        "strategies/keras_patches/symbolic_build.py",
        "specs = _specs_of_batch(data_batch) if iterator is None else _specs_of_data(iterator)",
        "specs = _specs_of_batch(data_batch) if iterator is None else _specs_of_data(iterator)\n"
        "        if iterator is not None:\n"
        "            next(next(iter(iterator))[2])",
        (MATRIX,),
    ),
    Bug(
        "a loss inside a metric is that of all ranks",
        "strategies/keras_patches/while_tracing.py",
        "function = original if current_program().in_metric else replacement",
        "function = replacement",
        (MATRIX,),
    ),
    Bug(
        "the values that ranks have for a float8 scale are added",
        "strategies/gradients/sync.py",
        'flat = collectives.all_reduce(flat, axes, op="max")',
        "flat = collectives.all_reduce(flat, axes)",
        (MATRIX,),
    ),
    Bug(
        "a slice of rows that begins late is taken for all rows",
        "llmos_tf/partition/rules/movement.py",
        """is_all = masks["begin"] >> i & 1 and masks["end"] >> i & 1 and strides[i] == 1""",
        """is_all = masks["end"] >> i & 1 and strides[i] == 1""",
        ("tests/unit/partition/rules",),
    ),
    Bug(
        "a mean of rows is divided by a rank's number of rows",
        "llmos_tf/partition/rules/reductions.py",
        "shape = emission.global_shape(node.inputs[0], dim, x)",
        "shape = tf.shape(x)",
        ("tests/unit/partition/rules",),
    ),
    Bug(
        "what follows from many rows is taken to follow from few",
        "llmos_tf/partition/graph/dims.py",
        "NOMINAL_ROWS = ((3, 480), (12, 480), (60, 480), (240, 480))",
        "NOMINAL_ROWS = ((240, 480),)",
        ("tests/unit/partition/test_flat_graph.py",),
    ),
)
