"""Layout rules: from paths to layouts, and everything that is wrong with a rule is said."""

import re

import keras
import pytest
import tensorflow as tf

from llmos_tf.mesh import Mesh
from llmos_tf.sharding import Layout, LayoutRules, announce_layouts, mesh_axis_size
from llmos_tf.strategies import MeshStrategy, TensorParallelStrategy

pytestmark = pytest.mark.fast

MESH = Mesh(data=2, tensor=2)
KERNEL = "model/hidden/kernel"


def keras_map(rules, device_mesh=None):
    layout_map = keras.distribution.LayoutMap(device_mesh)
    for pattern, axes in rules.items():
        layout_map[pattern] = axes
    return layout_map


def device_mesh():
    """As a Keras script for a distribution of its own would make it."""
    return keras.distribution.DeviceMesh((2, 2), ["data", "tensor"], [f"cpu:{i}" for i in range(4)])


def make_model():
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(6, name="hidden"),
            keras.layers.Dense(2, name="output"),
        ],
        name="model",
    )


@pytest.mark.parametrize(
    "make",
    [
        dict,
        keras_map,
        lambda rules: keras_map(rules, device_mesh()),
        lambda rules: keras_map(
            {p: keras.distribution.TensorLayout(axes) for p, axes in rules.items()}
        ),
        lambda rules: {p: list(axes) for p, axes in rules.items()},
        lambda rules: {p: Layout(axes) for p, axes in rules.items()},
    ],
    ids=["dict", "LayoutMap", "LayoutMap with devices", "TensorLayout", "lists", "Layout"],
)
def test_rules_of_every_kind(make):
    """Catches a kind of rules that is taken for none, which would leave every variable whole."""
    rules = LayoutRules(
        MESH, make({".*/kernel": (None, "tensor"), "model/hidden/bias": ("tensor",)})
    )
    assert rules.find(KERNEL, (4, 6), True) == Layout((None, "tensor"))
    assert rules.find("model/hidden/bias", (6,), True) == Layout(("tensor",))
    assert rules.find("model/output/bias", (2,), True) == Layout((None,))
    rules.check_all_used()


def test_a_layout_map_cuts_the_variables_of_a_model():
    """Catches a LayoutMap that a strategy takes but does not follow, as Keras's TensorFlow does."""
    layout_map = keras_map({".*/hidden/kernel": (None, "tensor")}, device_mesh())
    with MeshStrategy(MESH, layout_map=layout_map).scope():
        model = make_model()
    shapes = [[c.shape.as_list() for c in v._value.values] for v in model.weights]
    assert shapes == [[[4, 3]] * 4, [[6]] * 4, [[6, 2]] * 4, [[2]] * 4]


def test_names_of_a_keras_device_mesh():
    """Catches a LayoutMap as Keras's guide and KerasHub write it that is refused, or that cuts a
    variable along the rows of the batch."""
    for batch, model in [("batch", "model"), ("data", "tensor"), ("fsdp", "model")]:
        devices = keras.distribution.list_devices("cpu")[:4]
        mesh = keras.distribution.DeviceMesh((2, 2), (batch, model), devices)
        rules = LayoutRules(
            MESH, keras_map({KERNEL: (batch, model), ".*/output/kernel": (batch, None)}, mesh)
        )
        assert rules.find(KERNEL, (4, 6), True) == Layout((None, "tensor"))
        assert rules.find("model/output/kernel", (6, 2), True).is_whole
        rules.check_all_used()


def test_other_names_of_a_keras_device_mesh():
    """Catches an axis of the user's own naming that is silently left out."""
    mesh = keras.distribution.DeviceMesh((1, 2), ("dp", "tp"), ["cpu:0", "cpu:1"])
    with pytest.raises(ValueError, match="names the axis 'tp'") as error:
        LayoutRules(MESH, keras_map({KERNEL: (None, "tp")}, mesh))
    assert "'model' is taken as 'tensor'" in str(error.value)


def test_a_pattern_matches_the_whole_path():
    """Catches `re.match` or `re.search`, by which a rule would reach variables it does not name."""
    rules = LayoutRules(MESH, {"hidden/kernel": ("tensor", None), "model/hidden": ("tensor", None)})
    assert rules.find(KERNEL, (4, 6), True).is_whole
    for pattern, path in [
        (".*hidden/kernel", KERNEL),
        (r"model/(hidden|output)/kernel", "model/output/kernel"),
        (r"model/block_\d+/kernel", "model/block_12/kernel"),
    ]:
        rules = LayoutRules(MESH, {pattern: ("tensor", None)})
        assert rules.find(path, (4, 6), True) == Layout(("tensor", None))
        assert rules.find(f"{path}/momentum", (4, 6), True).is_whole
        assert rules.find(f"a/{path[1:]}", (4, 6), True).is_whole == (pattern[0] != ".")


def test_a_path_itself_goes_before_patterns():
    """Catches a path that is read as a pattern only, and so is ambiguous beside a general rule."""
    rules = LayoutRules(MESH, {".*/kernel": (None, "tensor"), KERNEL: ("tensor", None)})
    assert rules.find(KERNEL, (4, 6), True) == Layout(("tensor", None))
    assert rules.find("model/output/kernel", (6, 2), True) == Layout((None, "tensor"))


def test_two_rules_for_one_variable():
    """Catches a layout that depends on the order in which rules were written."""
    strategy = MeshStrategy(
        MESH, layout_map={".*/kernel": (None, "tensor"), ".*hid.*": ("tensor",)}
    )
    with pytest.raises(ValueError, match=r"matched by 2 layout") as error, strategy.scope():
        make_model()
    assert all(text in str(error.value) for text in (KERNEL, ".*/kernel", ".*hid.*"))


def test_a_rule_that_matches_nothing():
    """Catches a misspelt rule, by which a variable is silently whole on every rank, or that only
    the first step finds."""
    rules = {".*/hidden/kernel": (None, "tensor"), "model/ouput/kernel": ("tensor", None)}
    strategy = MeshStrategy(MESH, layout_map=rules)
    named = "'model/ouput/kernel' matches no variable"
    with pytest.raises(ValueError, match=named) as error, strategy.scope():
        with strategy.scope():
            model = make_model()
        # The inner scope has checked nothing.
        assert model.built
    assert "nearest paths are model/output/kernel" in str(error.value)
    assert "  model/output/kernel (6, 2)\n  model/output/bias (2,)" in str(error.value)
    # A model that its first batch builds.
    with strategy.scope():
        model = keras.Sequential([keras.layers.Dense(2)])
        model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=named):
        model.fit(keras.ops.ones((2, 4)), keras.ops.ones((2, 2)), verbose=0)


def test_a_scope_that_is_left_otherwise_checks_nothing():
    """Catches a check that hides the user's exception, or asks for weights where none were
    created."""
    strategy = MeshStrategy(MESH, layout_map={".*/hidden/kernel": (None, "tensor")})
    with pytest.raises(RuntimeError, match="the user's"), strategy.scope():
        keras.layers.Dense(2).build((None, 2))
        raise RuntimeError("the user's")
    with strategy.scope() as entered:
        assert entered is strategy
        keras.metrics.Mean()
    assert not tf.distribute.has_strategy()


def test_an_error_lists_all_weights():
    """Catches a list that leaves out weights, or has a line for each of a hundred blocks."""
    rules = LayoutRules(Mesh(tensor=2), {"typo": (None, "tensor")})
    for i in range(12):
        rules.find(f"gpt/block_{i}/dense/kernel", (4, 6), True)
    rules.find("gpt/block_0/dense/bias", (6,), True)
    with pytest.raises(ValueError, match="All paths and shapes of weights") as error:
        rules.check_all_used()
    *_, first, second = str(error.value).splitlines()
    assert first == r"  gpt/block_\d+/dense/kernel (4, 6), 12 times"
    assert second == "  gpt/block_0/dense/bias (6,)"


def test_rules_are_not_checked_before_there_are_variables():
    """Catches a strategy that cannot run a function before its model is made."""
    strategy = MeshStrategy(MESH, layout_map={".*/kernel": (None, "tensor")})
    results = strategy.run(lambda: keras.ops.ones(()))
    assert len(strategy.experimental_local_results(results)) == 2


def test_a_dimension_that_the_axis_does_not_divide():
    """Catches a variable that is cut unevenly, or left whole, without a word."""
    strategy = MeshStrategy(Mesh(tensor=4), layout_map={".*/hidden/kernel": (None, "tensor")})
    with pytest.raises(ValueError, match=r"does not divide") as error, strategy.scope():
        make_model()
    named = (KERNEL, "(4, 6)", "axis tensor of size 4", "dimension 1 of 6")
    assert all(text in str(error.value) for text in named)


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ({KERNEL: (None, "model")}, "'model/hidden/kernel' names the axis 'model'"),
        # Ranks of these have other rows of the batch, so none can do with a slice of its own.
        ({KERNEL: ("data", None)}, "'model/hidden/kernel' names the axis 'data'"),
        ({KERNEL: ("fsdp", "tensor")}, "an fsdp axis cuts every variable by itself"),
        ({KERNEL: "tensor"}, "one axis name or None for each dimension"),
        ({KERNEL: 1}, "one axis name or None for each dimension"),
        ({"*/kernel": (None, "tensor")}, "'*/kernel' is no regular expression"),
        ([(KERNEL, (None, "tensor"))], "LayoutMap or a mapping"),
    ],
)
def test_a_rule_that_means_nothing(rules, named):
    """Catches a rule that fails obscurely, or only when a variable is made, or trains wrongly."""
    for make in (
        lambda: LayoutRules(MESH, rules),
        lambda: MeshStrategy(MESH, layout_map=rules),
        lambda: TensorParallelStrategy(["CPU:0", "CPU:1"], layout_map=rules),
    ):
        with pytest.raises(ValueError, match=r"Received|expression") as error:
            make()
        assert named in str(error.value)


@pytest.mark.parametrize(
    ("axes", "named"),
    [(("tensor",), "names 1 dimensions"), (("tensor", "tensor"), "uses an axis twice")],
)
def test_a_rule_that_does_not_fit_its_variable(axes, named):
    """Catches a layout with too few axes, whose other dimensions would be guessed."""
    rules = LayoutRules(MESH, {".*/kernel": axes})
    with pytest.raises(ValueError, match=re.escape(KERNEL)) as error:
        rules.find(KERNEL, (4, 6), True)
    assert named in str(error.value)


@pytest.mark.parametrize("rules", [None, {}, {".*/kernel": (None, None)}])
def test_a_tensor_axis_that_nothing_uses(rules):
    """Catches ranks that all do the same work, and look like a tensor-parallel run."""
    strategy = MeshStrategy(MESH, layout_map=rules)
    named = "has a tensor axis, but no layout"
    with pytest.raises(ValueError, match=named) as error, strategy.scope():
        make_model()
    assert "data=2,tensor=2" in str(error.value)
    assert "  model/hidden/kernel (4, 6)\n  model/hidden/bias (6,)" in str(error.value)
    with pytest.raises(ValueError, match=named):
        strategy.run(lambda: keras.ops.ones(()))


def test_rules_for_axes_of_size_one_do_nothing():
    """Catches a table that must be taken away to try the same script without its axis."""
    strategy = MeshStrategy(Mesh(data=2), layout_map={".*/kernel": (None, "tensor")})
    with strategy.scope():
        model = make_model()
    assert all(v._value.layout.is_whole for v in model.weights)
    strategy.run(lambda: keras.ops.ones(()))


def test_a_users_rules_replace_the_models_table():
    """Catches a model's rule that still acts, or is missed as unused, beside the user's."""
    table = {".*/hidden/kernel": (None, "tensor"), ".*/other": ("tensor",)}
    own = LayoutRules(MESH)
    own.add_model_table(table)
    assert own.find(KERNEL, (4, 6), True) == Layout((None, "tensor"))
    users = LayoutRules(MESH, {".*/output/kernel": ("tensor", None)})
    users.add_model_table(table)
    assert users.find(KERNEL, (4, 6), True).is_whole
    assert users.find("model/output/kernel", (6, 2), True) == Layout(("tensor", None))
    users.check_all_used()
    with pytest.raises(ValueError, match=re.escape("'.*/other' matches no variable")):
        own.check_all_used()


def test_a_model_announces_its_table_to_the_strategy_in_scope():
    """Catches a table that reaches no strategy, or is an error without one."""
    announce_layouts({".*/hidden/kernel": (None, "tensor")})
    assert mesh_axis_size("tensor") == 1
    with MeshStrategy(MESH).scope():
        announce_layouts({".*/hidden/kernel": (None, "tensor")})
        assert mesh_axis_size("tensor") == 2
        model = make_model()
    assert model.weights[0]._value.layout == Layout((None, "tensor"))
