"""Optimizer state and weights in the host's memory: where they lie, and one device's weights."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from llmos_tf import Mesh, checkpoint, collectives
from llmos_tf.memory.device_programs import device_programs, trace_step
from llmos_tf.strategies import MeshStrategy
from llmos_tf.strategies.optimizer import fused_update

HOST = "/job:localhost/replica:0/task:0/device:CPU:0"
DEVICES = [f"/job:localhost/replica:0/task:0/device:CPU:{i}" for i in range(1, 5)]
STEPS, BATCH = 5, 8
LAYOUTS = {
    ".*/hidden/kernel": (None, "tensor"),
    ".*/hidden/bias": ("tensor",),
    ".*/out/kernel": ("tensor", None),
    ".*/table/.*": (None, None),
    ".*/(out/bias|gamma|beta|moving_.*)": (None,),
}
MESHES = {
    "data": ({"data": 2}, {}),
    "zero1": ({"data": 2}, {"zero_stage": 1}),
    "zero2": ({"data": 2}, {"zero_stage": 2}),
    "fsdp": ({"fsdp": 2}, {}),
    "tensor": ({"tensor": 2}, {"layout_map": LAYOUTS}),
    "data-fsdp": ({"data": 2, "fsdp": 2}, {}),
}
OPTIMIZERS = {
    "adamw": lambda: keras.optimizers.AdamW(0.02, weight_decay=0.1),
    "averaged": lambda: keras.optimizers.AdamW(0.02, use_ema=True),
    # A norm is a collective, in the midst of what the host does.
    "clipped": lambda: keras.optimizers.AdamW(0.02, weight_decay=0.1, global_clipnorm=0.1),
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    # What an optimizer keeps beside moments, and one verdict and one norm of all gradients.
    "everything": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.AdamW(
            0.02,
            global_clipnorm=0.1,
            use_ema=True,
            ema_overwrite_frequency=3,
            gradient_accumulation_steps=2,
        )
    ),
    # Not element by element: Keras's own loop, on whole variables.
    "lamb": lambda: keras.optimizers.Lamb(0.02),
}


def make_strategy(mesh, offload="all", **options):
    axes, more = MESHES[mesh]
    mesh = Mesh(**axes, devices=DEVICES[: int(np.prod(list(axes.values())))])
    return MeshStrategy(mesh, offload=offload, host_device="CPU:0", **more, **options)


def make_model(optimizer="adamw", strategy=None):
    keras.utils.set_random_seed(0)
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = keras.Sequential(
            [
                keras.Input([4], dtype="int32"),
                # Rows that are looked up have sparse gradients.
                keras.layers.Embedding(11, 3, name="table"),
                keras.layers.Flatten(),
                keras.layers.Dense(6, activation="tanh", name="hidden"),
                keras.layers.BatchNormalization(synchronized=True),
                keras.layers.Dense(3, name="out"),
            ]
        )
        model.compile(OPTIMIZERS[optimizer](), "mse")
        model.optimizer.build(model.trainable_variables)
    return model


def data():
    draws = np.random.default_rng(0)
    x = draws.integers(0, 11, size=[STEPS * BATCH, 4])
    return x, draws.normal(size=[STEPS * BATCH, 3])


def fit(model):
    model.fit(*data(), batch_size=BATCH, shuffle=False, verbose=0)
    return model


def devices_of(variables):
    return [tuple(part.device for part in variable.value.values) for variable in variables]


# Each mesh, each way to offload and each optimizer, once or twice.
IN_CI = {
    ("zero1", "everything", "all"),
    ("zero2", "adamw", "parameters"),
    ("tensor", "adamw", "all"),
    ("data-fsdp", "momentum", "parameters"),
    ("data-fsdp", "lamb", "optimizer"),
}
ALL = [
    (m, o, f)
    for m in MESHES
    for o in OPTIMIZERS
    for f in ("optimizer", "parameters", "all")
    if o not in ("clipped", "averaged")
]


@pytest.mark.parametrize(
    ("mesh", "optimizer", "offload"),
    [case if case in IN_CI else pytest.param(*case, marks=pytest.mark.nightly) for case in ALL],
)
def test_weights_are_those_of_one_device(float64, mesh, optimizer, offload):
    """Fails if a part is updated with another's state, before its gradient or not at all, if it
    lies elsewhere than said, or if a device has a trace of its own."""
    strategy = make_strategy(mesh, offload)
    model = make_model(optimizer, strategy)
    on_devices = tuple(strategy.mesh.devices)
    on_host = (HOST,) * len(on_devices)
    state = on_devices if offload == "parameters" else on_host
    weights = on_devices if offload == "optimizer" else on_host
    assert set(devices_of(model.optimizer.variables)) == {state}
    assert set(devices_of(model.trainable_variables)) == {weights}
    assert set(devices_of(model.non_trainable_variables)) == {on_devices}
    fit(model)
    assert strategy.num_traces == 1
    for one, other in zip(
        fit(make_model(optimizer)).get_weights(), model.get_weights(), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-9)


def program_of(model):
    """The graph of a device's program of a step."""
    specs = tf.TensorSpec([BATCH, 4], tf.int32), tf.TensorSpec([BATCH, 3])
    return device_programs(trace_step(model, None, specs), [])[0].graph


def components_by_handle(graph, variables):
    """Of a program's inputs those that are handles of variables, as their names in it."""
    outside = {id(v.value.values[0].handle): v for v in variables}
    return {inner.name: outside[id(x)] for x, inner in graph.captures if id(x) in outside}


def writes(graph, handles):
    """The ops that write into variables, with what they write into."""
    return [
        (handles[op.inputs[0].name], op)
        for op in graph.get_operations()
        if op.type.startswith(("Assign", "ResourceApply")) and op.inputs[0].name in handles
    ]


def users_of(graph, variables):
    """The ops that use values of variables."""
    handles = components_by_handle(graph, variables)
    values = [
        op.outputs[0]
        for op in graph.get_operations()
        if op.type == "ReadVariableOp" and op.inputs[0].name in handles
    ]
    users = [user for value in values for user in value.consumers()]
    # TensorFlow's own copy of what is read where it lies.
    again = [u.outputs[0] for u in users if u.type == "Identity" and u.device == HOST]
    return [u for u in users if u.device != HOST or u.type != "Identity"] + [
        user for value in again for user in value.consumers()
    ]


@pytest.mark.parametrize("offload", ["optimizer", "parameters", "all"])
def test_updates_are_computed_where_the_state_is(offload):
    """Fails if state travels to the device to be updated there, or weights to the host."""
    model = make_model("clipped", make_strategy("fsdp", offload))
    graph = program_of(model)
    state, weights = (
        writes(graph, components_by_handle(graph, variables))
        for variables in (model.optimizer.variables, model.trainable_variables)
    )
    # Two moments of each weight, and the count of steps; a decay, and an update.
    assert len(state) == 2 * len(model.trainable_variables) + 1
    assert len(weights) == 2 * len(model.trainable_variables)
    assert {op.device for _, op in state} == {"" if offload == "parameters" else HOST}
    assert {op.device for _, op in weights} == {"" if offload == "optimizer" else HOST}
    # Adam divides by a root; batch normalization's is of another type.
    roots = [op for op in graph.get_operations() if op.type == "Sqrt"]
    assert {op.device for op in roots} == {"" if offload == "parameters" else HOST}
    used = {user.device for user in users_of(graph, model.optimizer.variables[2:])}
    assert used == {"" if offload == "parameters" else HOST}
    users = users_of(graph, model.trainable_variables)
    if offload == "optimizer":
        # A change comes back, so weights need not come.
        assert users and {user.device for user in users} == {""}
    else:
        # Whatever a layer computes with is a copy.
        assert {user.type for user in users if user.device == ""} == {"Identity"}
    # Collectives are the devices' own.
    sent = [op for op in graph.get_operations() if op.type.startswith("Collective")]
    assert sent and {op.device for op in sent} == {""}


def test_averages_of_weights_are_kept_on_the_host():
    """Fails if an average is copied to the device to be moved there."""
    model = make_model("averaged", make_strategy("data", "optimizer"))
    graph = program_of(model)
    averages = [v for v in model.optimizer.variables if v.path.endswith("_average")]
    assert len(averages) == len(model.trainable_variables)
    assert {user.device for user in users_of(graph, averages)} == {HOST}


def before(op):
    """The names of all ops that one waits for."""
    found, unfinished = set(), [op]
    while unfinished:
        op = unfinished.pop()
        for other in (*(x.op for x in op.inputs), *op.control_inputs):
            if other.name not in found:
                found.add(other.name)
                unfinished.append(other)
    return found


@pytest.mark.parametrize(
    ("optimizer", "offload"), [("adamw", "optimizer"), ("adamw", "all"), ("momentum", "all")]
)
def test_the_first_update_does_not_wait_for_the_last_gradient(monkeypatch, optimizer, offload):
    """Fails if what is copied to the host, or updated there, waits for all gradients: groups in the
    order of the variables, or one copy for all."""
    monkeypatch.setattr(fused_update, "GROUP_BYTES", 1)
    model = make_model(optimizer, make_strategy("data", offload, bucket_bytes=1))
    graph = program_of(model)
    slots = [v for v in model.optimizer.variables if "out_kernel" in v.path]
    updates = writes(graph, components_by_handle(graph, slots))
    assert updates
    # The slope of the hidden layer: all that is further back comes after it.
    (slope,) = [op for op in graph.get_operations() if op.type == "TanhGrad"]
    for _, op in updates:
        assert slope.name not in before(op)
    # And its change of weights goes back alone.
    changes = writes(graph, components_by_handle(graph, [model.get_layer("out").kernel]))
    for _, op in changes:
        assert slope.name not in before(op)


def test_a_checkpoint_goes_from_one_to_the_other(float64, tmp_path):
    """Fails if what lies on the host is not saved, is restored to the device, or is left as it
    was."""
    model = fit(make_model("adamw", make_strategy("fsdp")))
    checkpoint.save_checkpoint(tmp_path, model, step=STEPS)
    model.save_weights(tmp_path / "it.weights.h5")
    saved = tf.train.Checkpoint(model=model).save(tmp_path / "tf")
    model.export(tmp_path / "exported", verbose=False)
    x = data()[0][:BATCH]
    expected = model.predict(x, verbose=0)
    exported = tf.saved_model.load(tmp_path / "exported")
    served = exported.serve(tf.constant(x, tf.int32))
    np.testing.assert_allclose(served, expected, rtol=0, atol=1e-12)
    weights = fit(model).get_weights()
    for other in (None, make_strategy("data", "parameters"), make_strategy("zero1", "optimizer")):
        again = make_model("adamw", other)
        again.load_weights(tmp_path / "it.weights.h5")
        np.testing.assert_allclose(again.predict(x, verbose=0), expected, rtol=0, atol=1e-12)
        checkpoint.restore_checkpoint(checkpoint.latest_checkpoint(tmp_path), again)
        for one, two in zip(weights, fit(again).get_weights(), strict=True):
            np.testing.assert_allclose(one, two, rtol=0, atol=1e-9)
    fresh = make_model("adamw", make_strategy("fsdp"))
    tf.train.Checkpoint(model=fresh).restore(saved).expect_partial()
    np.testing.assert_allclose(fresh.predict(x, verbose=0), expected, rtol=0, atol=1e-12)
    assert set(devices_of(fresh.trainable_variables)) == {(HOST, HOST)}


def test_copies_to_the_host_are_no_traffic():
    """Fails if a collective runs on the host, once more, or for what is copied."""
    sent = []
    for offload in (None, "all"):
        axes, options = MESHES["data-fsdp"]
        strategy = MeshStrategy(Mesh(**axes, devices=DEVICES), offload=offload, **options)
        model = make_model("adamw", strategy)
        x, y = data()
        model.train_on_batch(x[:BATCH], y[:BATCH])
        sent.append(collectives.traffic(strategy, model))
    assert sent[0] == sent[1] != []
