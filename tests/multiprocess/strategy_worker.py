"""One of two processes under `MultiWorkerMeshStrategy`; `test_two_processes.py` starts it.

    TF_CONFIG=... python strategy_worker.py FOLDER [CHECK ...]

Both run the same stock Keras scripts, the functions named check_*, and compare what each of them
sees with one device, which is what Keras trains on without a strategy.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import errno
import faulthandler
import hashlib
import json
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from llmos_tf import Mesh, _internal, devices
from llmos_tf.checkpoint import (
    DamagedCheckpointError,
    restore_checkpoint,
    restore_latest,
    restoring,
    save_checkpoint,
    saving,
)
from llmos_tf.layers import TokenCrossEntropy
from llmos_tf.models import GPT, GPTConfig
from llmos_tf.strategies import MultiWorkerMeshStrategy

FOLDER = Path(sys.argv[1])
TASK = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
# float64: sums in another order differ by 1e-16; Adam's root of tiny moments magnifies that.
TOLERANCE = 1e-9
ROWS = 11
ONE_DEVICE = tf.distribute.get_strategy


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


def same(expected, actual):
    for one, other in zip(expected, actual, strict=True):
        close(other, one)


def build_mlp(optimizer):
    model = keras.Sequential(
        [
            keras.Input([6]),
            keras.layers.Dense(8, "relu", name="hidden"),
            keras.layers.Dense(3),
        ]
    )
    model.compile(optimizer, "mse", metrics=["mae"], weighted_metrics=["mse"])
    return model


def build_gpt(optimizer):
    config = GPTConfig(vocab_size=10, max_positions=4, hidden_size=8, num_heads=2, num_layers=2)
    model = GPT(config)
    model.compile(optimizer, TokenCrossEntropy())
    return model


def features():
    rng = np.random.default_rng(0)
    return rng.random((ROWS, 6)), rng.random((ROWS, 3)), rng.random(ROWS)


def tokens():
    rng = np.random.default_rng(0)
    return (*rng.integers(0, 10, (2, ROWS, 4)).astype("int32"), rng.random((ROWS, 4)))


def script(strategy, build, optimizer, data):
    """An unmodified Keras script: batches of 4, 4 and 3 rows, shuffled, with validation."""
    keras.utils.set_random_seed(0)
    x, y, weights = data
    with strategy.scope():
        model = build(optimizer())
    history = model.fit(
        x, y, 4, 2, sample_weight=weights, validation_data=(x[:5], y[:5]), verbose=0
    )
    loss = model.evaluate(x, y, batch_size=4, verbose=0, return_dict=True)
    outputs = [model.predict(x[:n], batch_size=4, verbose=0) for n in (ROWS, 3)]
    assert [len(rows) for rows in outputs] == [ROWS, 3]
    return model.get_weights(), history.history, loss, outputs


def compare(mesh, build, optimizer, data, **options):
    # Joins the cluster, which has to come before anything else that TensorFlow does.
    strategy = MultiWorkerMeshStrategy(mesh, **options)
    expected = script(ONE_DEVICE(), build, optimizer, data)
    assert strategy.num_replicas_in_sync == strategy.mesh.batch_ways
    assert strategy.num_workers == 2
    weights, history, loss, outputs = script(strategy, build, optimizer, data)
    same(expected[0], weights)
    for one, other in zip(expected[1:3], (history, loss), strict=True):
        assert list(one) == list(other)
        same(one.values(), other.values())
    same(expected[3], outputs)


def sgd():
    return keras.optimizers.SGD(0.1, momentum=0.9)


def adamw():
    return keras.optimizers.AdamW(0.01)


def check_an_unseeded_run():
    """Catches processes that start from, or shuffle by, random numbers of their own."""
    strategy = MultiWorkerMeshStrategy()
    assert dict(strategy.mesh.sizes)["data"] == 4
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input([6]), keras.layers.Dense(8), keras.layers.Dropout(0.5)]
        )
        model.compile("sgd", "mse")
    x = np.random.random((ROWS, 6))
    drawn = [
        str(value)
        for value in (x, model.get_weights(), tf.random.shuffle(range(50)), random.random())
    ]
    strategy.agreement.require_same("random numbers", hashlib.md5(str(drawn).encode()).hexdigest())
    model.fit(x, np.random.random((ROWS, 8)), 4, 2, verbose=0)
    found = b"".join(np.ascontiguousarray(value).tobytes() for value in model.get_weights())
    strategy.agreement.require_same("weights", hashlib.md5(found).hexdigest())


def check_fit_data():
    """Catches rows that two processes take, results of the own rows only, or a mean of means."""
    compare(Mesh(data=4), build_mlp, sgd, features())


def check_fit_data_zero_1():
    """Catches optimizer state that is gathered within a process only."""
    compare(Mesh(data=4), build_mlp, adamw, features(), zero_stage=1)


def check_fit_data_fsdp():
    """Catches the axis that crosses processes taken for the one inside."""
    compare(Mesh(data=2, fsdp=2), build_mlp, adamw, features())


def check_fit_fsdp():
    """Catches weights that are read from the parts of one process."""
    compare(Mesh(fsdp=4), build_mlp, sgd, features())


def check_fit_data_tensor():
    """Catches rows that are counted once for each rank of a tensor group."""
    compare(Mesh(data=2, tensor=2), build_gpt, adamw, tokens())


def check_fit_tensor_across():
    """Catches a tensor axis over processes that is neither refused nor right."""
    layouts = {".*hidden/kernel": (None, "tensor")}
    compare(Mesh(tensor=4), build_mlp, sgd, features(), layout_map=layouts)


def check_fit_pipe_across():
    """Catches stages in two processes that do not meet, or weights read where they are not."""
    compare(Mesh(pipe=2, data=2), build_mlp, adamw, features(), num_microbatches=2)


def check_fit_pipe_tensor():
    """Catches what several stages hold, or a tensor axis beside them, taken for one process's."""
    compare(Mesh(pipe=2, tensor=2), build_gpt, adamw, tokens(), num_microbatches=2)


def check_fit_pipe_inside():
    """Catches stages of one process whose rows are taken for all, or all four in a row."""
    ranks = MultiWorkerMeshStrategy(Mesh(data=4)).mesh.devices
    devices_of = [ranks[i] for i in (0, 2, 1, 3)]
    mesh = Mesh(pipe=2, data=2, devices=devices_of)
    compare(mesh, build_mlp, sgd, features(), schedule="gpipe", num_microbatches=2)


def batches():
    """Global batches of a static 5 rows, which no number of ranks divides."""
    x, y, _ = features()
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(5, drop_remainder=True)


def on_batches(strategy):
    keras.utils.set_random_seed(0)
    x, y, _ = features()
    with strategy.scope():
        model = build_mlp(sgd())
    model.fit(batches(), epochs=2, shuffle=False, verbose=0)
    losses = [model.train_on_batch(x[:n], y[:n], return_dict=True)["loss"] for n in (5, 8, 1)]
    losses.append(model.test_on_batch(x[:5], y[:5], return_dict=True)["loss"])
    return [*model.get_weights(), losses, model.predict_on_batch(x[:5])]


def check_batches_that_do_not_divide():
    """Catches processes that trace unlike programs, by the unlike shapes of their rows."""
    same(on_batches(ONE_DEVICE()), on_batches(MultiWorkerMeshStrategy(Mesh(data=4))))


class Interrupt(keras.callbacks.Callback):
    """Ends the job in the third epoch."""

    def on_epoch_end(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt


def with_callbacks(strategy, folder, *more):
    keras.utils.set_random_seed(0)
    x, y, _ = features()
    with strategy.scope():
        model = build_mlp(sgd())
    save, weights = keras.callbacks.ModelCheckpoint, {"save_weights_only": True}
    callbacks = [
        save(folder / "models" / "best.keras", monitor="loss", save_best_only=True),
        save(folder / "{epoch}.weights.h5", **weights),
        keras.callbacks.BackupAndRestore(folder / "backup", double_checkpoint=True),
        keras.callbacks.CSVLogger(folder / "log.csv", append=True),
        keras.callbacks.TensorBoard(folder / "board", histogram_freq=1),
        # The loss falls, so it stops three epochs after it has begun, and takes back the first.
        keras.callbacks.EarlyStopping("loss", patience=3, mode="max", restore_best_weights=True),
        *more,
    ]
    data = {"x": x, "y": y, "batch_size": 4, "validation_data": (x[:5], y[:5])}
    history = model.fit(**data, epochs=9, shuffle=False, verbose=0, callbacks=callbacks)
    return model, history.history["loss"]


def interrupted_job(strategy_of, folder):
    """A job that is interrupted and started again; what it has in the end, and its files."""
    folder.mkdir(exist_ok=True)
    try:
        with_callbacks(strategy_of(), folder, Interrupt())
    except KeyboardInterrupt:
        assert (folder / "backup" / "latest.weights.h5").exists()
    model, losses = with_callbacks(strategy_of(), folder)
    model.save(folder / "last.keras")
    model.save(folder / "last.h5", include_optimizer=False)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    # TensorBoard's files are named by time, host and process.
    names = sorted(name.split(".out.tfevents")[0] for name in names)
    log = np.loadtxt(folder / "log.csv", delimiter=",", skiprows=1)
    saved = [
        keras.models.load_model(folder / name).get_weights()
        for name in ("models/best.keras", "last.keras")
    ]
    model.load_weights(folder / "5.weights.h5")
    return names, [np.array(losses), log, *model.get_weights(), *saved[0], *saved[1]]


def check_callbacks():
    """Catches two writers of a file, a job that does not resume, or one that stops alone."""
    with tempfile.TemporaryDirectory() as own:
        names, expected = interrupted_job(ONE_DEVICE, Path(own))
    mesh = Mesh(data=2, fsdp=2)
    found, actual = interrupted_job(lambda: MultiWorkerMeshStrategy(mesh), FOLDER / "job")
    assert found == names
    same(expected, actual)


def check_a_save_that_fails():
    """Catches a process that waits for ever for a file that cannot be written."""
    with MultiWorkerMeshStrategy(Mesh(fsdp=4)).scope():
        model = build_mlp(sgd())
    try:
        model.save(FOLDER / "missing" / "model.keras")
        raise AssertionError("saved")
    except OSError as error:
        assert "there is no folder" in str(error)


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")


def damaged_in_worker_1(original, folder):
    def read_tensors(path, records):
        if TASK == 1 and path.parent == folder:
            raise DamagedCheckpointError("a bad sector")
        return original(path, records)

    return read_tensors


def check_checkpoints():
    """Catches two writers of a checkpoint, a shard stored for the whole, and a process that waits
    for ever for one that could not write or read."""
    folder, strategy = FOLDER / "steps", MultiWorkerMeshStrategy(Mesh(fsdp=4))
    with strategy.scope():
        model = build_mlp(adamw())
    model.fit(*features()[:2], 4, verbose=0)
    saved = [variable.numpy() for variable in [*model.variables, *model.optimizer.variables]]
    paths = [save_checkpoint(folder, model, step=step) for step in (1, 2)]
    # Of one process: no other one may go on.
    with _internal.patched({(saving, "write_tensors"): lambda f: f if TASK else full_disk}):
        try:
            save_checkpoint(folder, model, step=3)
            raise AssertionError("saved")
        except OSError as error:
            assert "No space left on device: 'a file'" in str(error), error
    strategy.agreement.from_all("")
    assert sorted(path.name for path in folder.iterdir()) == [path.name for path in paths]
    one_device = build_mlp(adamw())
    for restored in (one_device, model):
        restored.set_weights([np.zeros_like(value) for value in restored.get_weights()])
        restore_checkpoint(paths[1], restored)
        found = [*restored.variables, *restored.optimizer.variables]
        same(saved, [variable.numpy() for variable in found])
    damage = {(restoring, "read_tensors"): lambda f: damaged_in_worker_1(f, paths[1])}
    with _internal.patched(damage):
        state = restore_latest(folder, model)
    assert (state.step, len(state.skipped)) == (1, 1)
    assert "a bad sector" in state.skipped[0].reason
    try:
        restore_checkpoint(paths[TASK], model)
        raise AssertionError("restored")
    except ValueError as error:
        assert "the same checkpoint" in str(error), error


def check_unlike_meshes():
    """Catches workers with unlike meshes, which would wait for each other for ever."""
    try:
        MultiWorkerMeshStrategy(Mesh(data=4) if TASK == 0 else Mesh(fsdp=4))
        raise AssertionError("made")
    except ValueError as error:
        assert "worker 1 (localhost:" in str(error)
        assert "Mesh(fsdp=4" in str(error)


def check_a_mesh_of_another_size():
    """Catches a mesh that leaves devices out, or needs more, without a word."""
    for mesh, words in (
        (Mesh(data=2), "has 2 devices, and the 2 workers have 4 CPU devices"),
        (Mesh(data=2, devices=["CPU:0", "CPU:1"]), "a device of each of the 2 workers"),
    ):
        try:
            MultiWorkerMeshStrategy(mesh)
            raise AssertionError("made")
        except ValueError as error:
            assert words in str(error), error


def refused(act, *words):
    try:
        act()
    except ValueError as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError(f"not refused: {words}")


def check_unlike_scripts():
    """Catches workers that train apart, or wait for each other, as their scripts are not alike."""
    strategy = MultiWorkerMeshStrategy(Mesh(data=4))
    x, y, _ = features()
    mine = f"worker {TASK} (localhost:"

    def build(optimizer="sgd", activation="relu", loss="mse"):
        with strategy.scope():
            model = keras.Sequential(
                [keras.Input([6]), keras.layers.Dense(4, activation), keras.layers.Dense(3)]
            )
            model.compile(optimizer, loss)
        return model

    def fit(model, rows=ROWS, batch_size=4, **options):
        return model.fit(x[:rows], y[:rows], batch_size, verbose=0, **options)

    if TASK == 1:
        keras.layers.Dense(3).build([None, 3])
        np.random.random()
    model = build()
    found = b"".join(np.ascontiguousarray(value).tobytes() for value in model.get_weights())
    strategy.agreement.require_same("weights", hashlib.md5(found).hexdigest())
    other = TASK == 1
    refused(lambda: fit(model, rows=ROWS - 4 * other), mine, "x, rows: worker 0 (localhost:")
    refused(lambda: fit(model, batch_size=4 + other), "batch_size: worker 0", ": 5")
    refused(lambda: fit(model, steps_per_epoch=2 + other), "steps_per_epoch: worker 0", ": 3")
    refused(lambda: model.predict(x[: 4 + other], verbose=0), "x, rows", "arguments of predict")
    refused(lambda: fit(build(["sgd", "adam"][other])), "optimizer: worker 0", ": Adam")
    refused(lambda: fit(build(activation=["relu", "tanh"][other])), "activation: worker 0", "tanh")
    refused(lambda: fit(build(loss=["mse", "mae"][other])), "loss: worker 0", "mae")
    program = tf.function(lambda: strategy.run(lambda: [tf.exp, tf.math.log][TASK](1.0)))
    refused(program, "traced program", "Exp T=float", "Log T=float")
    # Nothing of it is left.
    fit(model)


def check_one_that_stops():
    """Catches a worker that stops alone, or one that stops at another step than the others."""
    strategy = MultiWorkerMeshStrategy(Mesh(data=4))
    x, y, _ = features()
    with strategy.scope():
        model = build_mlp(sgd())
    stops = []

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if "batch" in stops and int(model.optimizer.iterations) % 3 == 1:
                model.stop_training = True

        def on_epoch_end(self, epoch, logs=None):
            if "epoch" in stops and epoch == 1:
                model.stop_training = True
            if "sigterm" in stops and epoch == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    def fit(*more):
        return model.fit(x, y, 4, 9, shuffle=False, verbose=0, callbacks=[*more, Stop()])

    # In all at the same step: as on one device.
    stops[:] = ["batch"]
    fit()
    assert int(model.optimizer.iterations) == 1
    stops[:] = ["batch"] * (TASK == 1)
    fit()
    steps = int(model.optimizer.iterations)
    assert steps in (4, 5)
    strategy.agreement.require_same("steps", str(steps))
    stops[:] = ["epoch"] * (TASK == 1)
    assert len(fit().history["loss"]) == 2
    stops[:] = ["sigterm"] * (TASK == 0)
    try:
        fit(keras.callbacks.BackupAndRestore(FOLDER / "sigterm"))
        raise AssertionError("went on")
    except SystemExit as end:
        assert end.code == 128 + signal.SIGTERM
    assert (FOLDER / "sigterm" / "latest.weights.h5").exists()


def check_a_layout_map():
    """Catches options that are compared by the addresses of objects."""
    mesh = keras.distribution.DeviceMesh((1, 4), ("batch", "model"), ["cpu:0"] * 4)
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*hidden/kernel"] = (None, "model")
    MultiWorkerMeshStrategy(Mesh(tensor=4), layout_map=layouts)


def alone_a_worker_that_does_not_come():
    """Catches a worker that waits for ever for one that has less data."""
    strategy = MultiWorkerMeshStrategy(Mesh(data=4), collective_timeout=15)
    x, y, _ = features()
    with strategy.scope():
        model = build_mlp(sgd())
    # Nobody knows how many there are.
    rows = tf.data.Dataset.from_tensor_slices((x[:4], y[:4])).repeat(40 if TASK == 0 else 20)
    try:
        model.fit(rows.filter(lambda a, b: True).batch(4), verbose=0)
        raise AssertionError("trained")
    except (tf.errors.DeadlineExceededError, TimeoutError) as error:
        text = str(error)
    if TASK == 0:
        assert "worker 1 (localhost:" in text, text
        assert "all_reduce_along_data" in text, text


def alone_a_step_that_fails():
    """Catches a worker that does not say why another one has failed, or says it late."""
    strategy = MultiWorkerMeshStrategy(Mesh(data=4))
    x, y, _ = features()
    x[7] = 1e6  # The last row of the second batch, which worker 1 has.

    class Check(keras.layers.Layer):
        def call(self, x):
            check = tf.debugging.assert_less(x, tf.cast(100, x.dtype), "bad row")
            with tf.control_dependencies([check]):
                return tf.identity(x)

    with strategy.scope():
        model = keras.Sequential([Check(), keras.layers.Dense(3)])
        model.compile("sgd", "mse")
    try:
        model.fit(x, y, 4, shuffle=False, verbose=0)
        raise AssertionError("trained")
    except tf.errors.OpError as error:
        text = str(error)
    assert "bad row" in text, text
    assert TASK == 1 or "worker 1 (localhost:" in text, text


# Those that begin with "alone_" leave processes that TensorFlow runs no collective in again.
PREFIXES = ("check_", "alone_")
CHECKS = {name: value for name, value in globals().items() if name.startswith(PREFIXES)}


def main(names):
    devices.configure_virtual_cpus(2)
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    for name in names or [name for name in CHECKS if name.startswith("check_")]:
        started = time.monotonic()
        CHECKS[name]()
        print(f"passed {name}\n{time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":
    # Shows where a process waits for another that does not come, before it is killed.
    faulthandler.dump_traceback_later(900, exit=True)
    main(sys.argv[2:])
