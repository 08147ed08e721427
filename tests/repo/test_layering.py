"""The order of the folders: who may import whom (the layout in CONTRIBUTING.md)."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from repo import folder_graph
from repo.folder_graph import imports, packages_of, read_modules, room

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[2]

# One rank per folder, and per public module of `llmos_tf/`. A file imports only from its own rank
# or a lower one. A new folder has no rank until it gets one here.
RANKS = {
    "llmos_tf.config": 0,  # no TensorFlow
    "llmos_tf.mesh": 0,  # numpy only
    "llmos_tf.process": 0,  # no TensorFlow
    "llmos_tf.data": 0,  # no TensorFlow
    "llmos_tf.files": 0,  # no TensorFlow
    "llmos_tf._internal": 0,  # every private import of TensorFlow and Keras
    "llmos_tf.planning": 1,  # no TensorFlow
    "llmos_tf.devices": 1,
    "llmos_tf.coordination": 1,
    "llmos_tf.spmd": 1,
    "llmos_tf.options": 2,  # no TensorFlow
    "llmos_tf.graph": 2,
    "llmos_tf.partition.graph": 2,
    "llmos_tf.collectives": 3,
    "llmos_tf.partition.rules": 3,
    "llmos_tf.rematerialisation": 3,
    "llmos_tf.partition": 4,
    "llmos_tf.sharding": 4,
    "llmos_tf.memory": 4,
    "llmos_tf.layers": 5,
    "llmos_tf.strategies.engine": 5,
    "llmos_tf.strategies.gradients": 5,
    "llmos_tf.strategies.layer_stack": 5,
    "llmos_tf.strategies.keras_layers": 5,
    "llmos_tf.strategies.optimizer": 6,
    "llmos_tf.strategies.pipeline": 6,
    "llmos_tf.models": 6,
    "llmos_tf.strategies.keras_patches": 7,
    "llmos_tf.strategies": 8,
    "llmos_tf.training": 9,
    "llmos_tf.checkpoint": 9,
    "llmos_tf.inference": 9,
    "llmos_tf.testing": 9,
    "llmos_tf.scripts.peers": 9,
    "llmos_tf.scripts": 10,
    "llmos_tf.scripts.programs": 10,
    "llmos_tf": 11,  # the public API
}

# Modules that need no TensorFlow: programs answer --help and plan a run without waiting for it.
WITHOUT_TENSORFLOW = (
    "llmos_tf.checkpoint.choosing",
    "llmos_tf.checkpoint.errors",
    "llmos_tf.checkpoint.folders",
    "llmos_tf.checkpoint.manifest",
    "llmos_tf.checkpoint.records",
    "llmos_tf.config",
    "llmos_tf.data",
    "llmos_tf.files",
    "llmos_tf.mesh",
    "llmos_tf.options",
    "llmos_tf.planning",
    "llmos_tf.process",
)

# Python files that may lie loose in a folder of which most code belongs in sub-folders.
LOOSE = {"llmos_tf": 8, "llmos_tf.strategies": 12}

# The only folder that may import these.
PRIVATE = ("tensorflow.python", "keras.src")
INTERNAL = "llmos_tf._internal"


# Who alone imports PyTorch, which is not installed with the package: the modules of llmos-benchmark
# that run it, each in a process of its own. JAX is imported by Keras only.
TORCH_USERS = "llmos_tf.scripts.peers.torch_"


def violations(modules: dict[str, str]) -> list[str]:
    """Returns one line for each import of `modules` that the order of the folders forbids."""
    problems = []
    graph = {}
    packages = packages_of(modules)
    for name, source in modules.items():
        tree = ast.parse(source)
        own = RANKS.get(room(name, packages))
        if own is None:
            problems.append(f"{name} has no rank: give {room(name, packages)} one in RANKS")
        graph[name] = imports(tree, modules) & set(modules)
        for target in sorted(graph[name]):
            other = RANKS.get(room(target, packages))
            if own is not None and other is not None and other > own:
                problems.append(f"{name} (rank {own}) imports {target} (rank {other})")
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                problems.append(f"{name}:{node.lineno} imports relatively")
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                problems += [
                    f"{name}:{inner.lineno} imports inside {node.name}"
                    for inner in ast.walk(node)
                    if isinstance(inner, ast.Import | ast.ImportFrom)
                ]
    return problems + circles(modules, graph)


def circles(modules: dict[str, str], graph: dict[str, set[str]]) -> list[str]:
    """Returns a line for a cycle of files, or else one for each cycle of folders."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return ["import circle: " + " -> ".join(error.args[1])]
    return [
        f"folders in a circle: {', '.join(sorted(group))}"
        for group in folder_graph.cycles(folder_graph.folder_graph(modules))
    ]


def loose_files(modules: dict[str, str]) -> list[str]:
    """Returns one line for each folder with more loose files than it may have."""
    packages = packages_of(modules)
    counts = dict.fromkeys(LOOSE, 0)
    for name in modules:
        parent = name if name in LOOSE else name.rpartition(".")[0]
        if parent in LOOSE and (name == parent or name not in packages):
            counts[parent] += 1
    return [
        f"{folder} has {count} loose files, at most {LOOSE[folder]} are public: "
        "put the others into the folder of their concern"
        for folder, count in counts.items()
        if count > LOOSE[folder]
    ]


def private_imports(modules: dict[str, str]) -> list[str]:
    """Returns one line for each private import outside of `_internal`."""
    return [
        f"{name} imports {target}"
        for name, source in modules.items()
        if not f"{name}.".startswith(f"{INTERNAL}.")
        for target in sorted(imports(ast.parse(source), modules))
        if any(f"{target}.".startswith(f"{private}.") for private in PRIVATE)
    ]


def tensorflow_imports(modules: dict[str, str]) -> list[str]:
    """Returns one line for each import of TensorFlow or Keras where none is needed."""
    return [
        f"{name} imports {target}"
        for name, source in modules.items()
        if any(f"{name}.".startswith(f"{free}.") for free in WITHOUT_TENSORFLOW)
        for target in sorted(imports(ast.parse(source), modules))
        if target.split(".")[0] in ("tensorflow", "keras")
    ]


def test_files_import_only_downwards():
    # Fails when a file imports a higher rank, closes a circle of files or folders, hides an import
    # in a function, imports relatively, or is in a new folder that has no rank.
    assert violations(read_modules(ROOT)) == []


def test_every_rank_is_of_a_folder():
    # Fails when a folder goes and its rank stays, or a rank is given to a single file of a folder.
    graph = folder_graph.folder_graph(read_modules(ROOT))
    assert set(RANKS) == set(graph)


def test_folders_hold_their_public_files_only():
    # Fails when another file is put into `llmos_tf/` or `strategies/` instead of a sub-folder.
    assert loose_files(read_modules(ROOT)) == []


def test_private_names_of_tensorflow_and_keras_are_in_one_folder():
    # Fails when an upgrade of TensorFlow could break a file outside of `_internal/`.
    assert private_imports(read_modules(ROOT)) == []


def test_plans_need_no_tensorflow():
    # Fails when a flag error or a plan would wait for TensorFlow to be imported.
    assert tensorflow_imports(read_modules(ROOT)) == []
    assert tensorflow_imports({"llmos_tf.mesh": "import keras"}) == ["llmos_tf.mesh imports keras"]


def test_other_frameworks_are_needed_by_nobody_else():
    # Fails when the package, or a program without their runs, needs PyTorch or JAX; or when a
    # module that needs PyTorch is imported by one that does not.
    modules = read_modules(ROOT)
    users = {name for name in modules if name.startswith(TORCH_USERS)}
    assert users
    for name, source in modules.items():
        found = imports(ast.parse(source), modules)
        packages = {target.split(".")[0] for target in found}
        assert "jax" not in packages, name
        if name not in users:
            assert "torch" not in packages, name
            assert not found & users, name


def test_all_files_are_looked_at():
    # Fails when a folder moves and the tests above look at nothing.
    names = set(read_modules(ROOT))
    assert {"llmos_tf", "llmos_tf.config", "llmos_tf.models.presets", "llmos_tf.scripts"} <= names


SMALL = dict.fromkeys(
    (
        "llmos_tf",
        "llmos_tf.config",
        "llmos_tf.mesh",
        "llmos_tf.layers",
        "llmos_tf.layers.dense",
        "llmos_tf.planning",
        "llmos_tf.strategies",
        "llmos_tf.strategies.extended",
        "llmos_tf.strategies.engine",
    ),
    "",
) | {
    "llmos_tf.devices": "import llmos_tf.mesh",
    "llmos_tf.strategies.engine.engine": "import llmos_tf.layers.dense",
}


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("llmos_tf.mesh", "from llmos_tf.devices import x", "imports llmos_tf.devices (rank 1)"),
        ("llmos_tf.config", "from llmos_tf import devices", "imports llmos_tf.devices (rank 1)"),
        ("llmos_tf.config", "import llmos_tf.devices as d", "imports llmos_tf.devices (rank 1)"),
        ("llmos_tf.mesh", "from llmos_tf import Mesh", "imports llmos_tf (rank 11)"),
        ("llmos_tf.config", "import llmos_tf.layers.dense", "llmos_tf.layers.dense (rank 5)"),
        ("llmos_tf.planning.plan", "import llmos_tf.strategies.extended", "(rank 8)"),
        ("llmos_tf.strategies.engine.x", "import llmos_tf.strategies.extended", "(rank 8)"),
        ("llmos_tf.mesh", "def f():\n    import json", "mesh:2 imports inside f"),
        ("llmos_tf.mesh", "class A:\n  async def f(s):\n    from json import x", "inside f"),
        ("llmos_tf.mesh", "from . import config", "mesh:1 imports relatively"),
        ("llmos_tf.novelty", "", "llmos_tf.novelty has no rank"),
    ],
)
def test_the_check_sees(name, source, expected):
    # Fails when the check above is blind to this kind of import.
    problems = violations({**SMALL, name: source})
    assert len([problem for problem in problems if "circle" not in problem]) == 1
    assert any(expected in problem for problem in problems)


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        # Equal ranks, so that only the circle is forbidden.
        (
            {
                "llmos_tf.mesh": "import llmos_tf.config",
                "llmos_tf.config": "import llmos_tf.mesh",
            },
            "import circle: ",
        ),
        # Two folders import each other, though no file is in a circle.
        (
            {"llmos_tf.layers.norm": "import llmos_tf.strategies.engine"},
            "folders in a circle: llmos_tf.layers, llmos_tf.strategies.engine",
        ),
    ],
)
def test_the_check_sees_circles(sources, expected):
    # Fails when folders or files of one rank may import each other in a circle.
    (problem,) = violations(SMALL | sources)
    assert problem.startswith(expected)


@pytest.mark.parametrize(("folder", "limit"), LOOSE.items())
def test_the_check_sees_loose_files(folder, limit):
    # Fails when the count is of other files, or off by one: `__init__.py` is one, packages are not.
    files = dict.fromkeys([folder, f"{folder}.package", f"{folder}.package.a"], "")
    files |= dict.fromkeys([f"{folder}.public_{i}" for i in range(limit - 1)], "")
    assert loose_files(files) == []
    assert loose_files(files | {f"{folder}.another": ""})[0].startswith(folder)


@pytest.mark.parametrize(
    "source",
    [
        "import tensorflow.python.eager.context",
        "from tensorflow.python.distribute import values",
        "from tensorflow import python",
        "from keras import src as anything",
        "if 1:\n    from keras.src.losses import loss",
    ],
)
def test_the_check_sees_private_imports(source):
    # Fails when a private import has a form that the check above does not know.
    assert len(private_imports({"llmos_tf.mesh": source})) == 1
    assert private_imports({INTERNAL: source, f"{INTERNAL}.keras": source}) == []


def test_the_check_allows():
    # Fails when the check forbids what the order allows.
    modules = SMALL | {
        "llmos_tf.devices": "import json\nfrom llmos_tf.mesh import Mesh",
        "llmos_tf.layers.dense": "from llmos_tf import devices",
        "llmos_tf.strategies.extended": "from llmos_tf.layers import dense",
    }
    assert violations(modules) == []
    assert private_imports({"llmos_tf.mesh": "import tensorflow as tf, keras.srcs"}) == []
