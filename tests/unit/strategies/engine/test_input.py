"""Data: every row once, in every way in which `tf.distribute` loops over it."""

import pytest
import tensorflow as tf
from small_strategies import MESHES, local, strategy_of

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("mesh", MESHES)
def test_a_distributed_dataset_has_every_row_once(mesh):
    """Catches rows that are lost, doubled or moved, most of all in a batch that is uneven."""
    strategy = strategy_of(mesh)
    numbers = tf.range(13)
    elements = {"x": numbers, "y": (10 * numbers, tf.strings.as_string(numbers))}
    rows = tf.data.Dataset.from_tensor_slices(elements)
    # 12 rows in batches of a length that is static, and 13 in others.
    for batch, count in [(3, 12), (1, 13), (3, 13), (4, 13), (8, 13)]:
        batches = rows.take(count).batch(batch, drop_remainder=count == 12)
        dataset = strategy.experimental_distribute_dataset(batches)
        assert isinstance(dataset, tf.distribute.DistributedDataset)
        assert len(dataset) == int(dataset.cardinality) == -(-count // batch)
        # Twice, as in two epochs.
        for _ in range(2):
            seen = []
            for element in dataset:
                parts = local(strategy, element["x"])
                lengths = [len(part) for part in parts]
                assert len(parts) == strategy.num_replicas_in_sync
                assert max(lengths) - min(lengths) <= 1
                assert local(strategy, element["y"][0]) == [[10 * i for i in p] for p in parts]
                texts = [[str(i).encode() for i in p] for p in parts]
                assert local(strategy, element["y"][1]) == texts
                seen.append([i for part in parts for i in part])
            assert [i for row in seen for i in row] == list(range(count))
            assert {len(row) for row in seen[:-1]} == {batch}


def sum_by_loops(strategy, dataset):
    """The sum of all rows, by every way to loop over a distributed dataset."""

    def one(element):
        rows = strategy.run(tf.reduce_sum, args=(element,))
        return strategy.reduce("SUM", rows, axis=None)

    @tf.function
    def over_dataset():
        total = tf.constant(0, tf.int64)
        for element in dataset:
            total += one(element)
        return total

    @tf.function
    def over_iterator(iterator):
        total = tf.constant(0, tf.int64)
        for element in iterator:
            total += one(element)
        return total

    steps = len(dataset)

    @tf.function
    def counted(iterator):
        total = tf.constant(0, tf.int64)
        for _ in tf.range(steps):
            total += one(next(iterator))
        return total

    @tf.function(input_signature=[dataset.element_spec])
    def step(element):
        return one(element)

    def optionals():
        iterator, total = iter(dataset), 0
        while (element := iterator.get_next_as_optional()).has_value():
            total += one(element.get_value())
        return total

    sums = {
        "over_dataset": over_dataset(),
        "over_iterator": over_iterator(iter(dataset)),
        "counted": counted(iter(dataset)),
        "step": sum(step(element) for element in dataset),
        "optionals": optionals(),
        "reduce": dataset.reduce(tf.constant(0, tf.int64), lambda s, element: s + one(element)),
    }
    assert step.experimental_get_tracing_count() == 1
    return {name: int(value) for name, value in sums.items()}


@pytest.mark.parametrize("mesh", ["one", "data4", "tensor2"])
def test_ways_to_loop_over_a_distributed_dataset(mesh):
    """Catches a loop that ends early, never, or leaves out the rows of a last, smaller batch."""
    strategy = strategy_of(mesh)
    batches = tf.data.Dataset.range(1, 15).batch(4)
    for dataset in (
        strategy.experimental_distribute_dataset(batches),
        strategy.distribute_datasets_from_function(lambda _: tf.data.Dataset.range(1, 15).batch(1)),
    ):
        assert isinstance(iter(dataset), tf.distribute.DistributedIterator)
        assert set(sum_by_loops(strategy, dataset).values()) == {sum(range(1, 15))}


def test_an_iterator_made_in_a_tf_function_is_refused():
    """Catches a Python loop while it is traced, which would never end."""
    strategy = strategy_of("data2")
    dataset = strategy.experimental_distribute_dataset(tf.data.Dataset.range(4).batch(2))

    @tf.function(autograph=False)
    def loop():
        return list(dataset)

    with pytest.raises(RuntimeError, match="make the iterator outside"):
        loop()


@pytest.mark.parametrize("mesh", MESHES)
def test_a_dataset_from_a_function_deals_batches_to_replicas(mesh):
    """Catches batches that go to ranks in place of replicas, or last ones that are lost."""
    strategy = strategy_of(mesh)
    n = strategy.num_replicas_in_sync
    contexts = []

    def dataset_fn(context):
        contexts.append(context)
        size = context.get_per_replica_batch_size(2 * n)
        rows = tf.data.Dataset.range(11).shard(context.num_input_pipelines, 0)
        return rows.map(lambda i: (i, {"y": [i, -i]})).batch(size)

    dataset = strategy.distribute_datasets_from_function(dataset_fn)
    assert [(c.num_input_pipelines, c.input_pipeline_id) for c in contexts] == [(1, 0)]
    assert contexts[0].num_replicas_in_sync == n
    batches = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10]]
    batches += [[]] * (-len(batches) % n)
    seen = [(local(strategy, x), local(strategy, y["y"])) for x, y in dataset]
    assert {len(parts) for step in seen for parts in step} == {n}
    assert [part for x, _ in seen for part in x] == batches
    assert [part for _, y in seen for part in y] == [[[i, -i] for i in b] for b in batches]


def test_elements_of_a_dataset_from_a_function_need_not_be_batches():
    """Catches elements without rows that are refused or cut, and a last step that has too few."""
    strategy = strategy_of("data2")

    def steps(count):
        words = tf.RaggedTensor.from_row_lengths(tf.range(count), [1] * count)
        elements = tf.data.Dataset.from_tensor_slices((tf.range(count), words))
        return strategy.distribute_datasets_from_function(lambda _: elements)

    seen = [(local(strategy, x), local(strategy, y)) for x, y in steps(4)]
    assert seen == [([0, 1], [[0], [1]]), ([2, 3], [[2], [3]])]
    uneven = iter(steps(3))
    next(uneven)
    with pytest.raises(tf.errors.InvalidArgumentError, match="give it a multiple of 2 elements"):
        next(uneven)


def test_ragged_and_sparse_batches_from_a_function_are_dealt():
    """Catches the last step's replicas without a batch, which get one of no rows."""
    strategy = strategy_of("data2")
    words = tf.ragged.constant([[1], [2, 3], [4]])
    rows = tf.sparse.from_dense([[0, 1], [2, 0], [0, 3]])
    data = tf.data.Dataset.from_tensor_slices((words, rows)).batch(1)
    steps = list(strategy.distribute_datasets_from_function(lambda _: data))
    last_words, last_rows = (strategy.experimental_local_results(x) for x in steps[-1])
    assert [x.to_list() for x in last_words] == [[[4]], []]
    assert [tf.sparse.to_dense(x).numpy().tolist() for x in last_rows] == [[[0, 3]], []]


@pytest.mark.parametrize("count", [None, 8])
def test_tensors_of_unequal_rows_are_refused(count):
    """Catches what is no rows of the batch and would be cut as if it were."""
    strategy = strategy_of("data2")
    rows = tf.data.Dataset.range(8).batch(8, drop_remainder=count is not None)
    data = rows.map(lambda x: (x, tf.ones([3])[: tf.cast(x[0], tf.int32) + 3]))
    if count:
        data = rows.map(lambda x: (x, tf.ones([3])))
    error = ValueError if count else tf.errors.InvalidArgumentError
    with pytest.raises(error, match="all its tensors need the same number of rows"):
        next(iter(strategy.experimental_distribute_dataset(data)))
