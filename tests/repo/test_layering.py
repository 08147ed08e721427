"""The order of the files: who may import whom (the layout in CONTRIBUTING.md)."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Package -> folder it lies in. The order matters: the longer name is looked up first.
FOLDERS = {
    "llmos_tf.strategies": "strategies",
    "llmos_tf.models": "models",
    "llmos_tf.scripts": "scripts",
    "llmos_tf": "llmos_tf",
}

# A file imports only from its own rank or a lower one. The longest matching name counts, and a
# package's rank holds for all of it; `llmos_tf` itself is only its __init__.py, so a new module
# has no rank until it gets one here.
RANKS = {
    "llmos_tf.config": 0,  # no TensorFlow
    "llmos_tf._internal": 0,  # every private import of TensorFlow and Keras
    "llmos_tf.resident": 0,  # no TensorFlow
    "llmos_tf.agreement": 1,
    "llmos_tf.devices": 1,
    "llmos_tf.mesh": 1,  # numpy only
    "llmos_tf.data": 1,
    "llmos_tf.planning": 1,  # no TensorFlow
    "llmos_tf.strategies.schedules": 1,  # plain data, read by the executor and by planning
    "llmos_tf.strategies.schedule_orders": 1,
    "llmos_tf.collective_keys": 2,
    "llmos_tf.program": 2,
    "llmos_tf.blocks": 2,
    "llmos_tf.graph_cuts": 2,
    "llmos_tf.op_costs": 2,
    "llmos_tf.fusion": 2,
    "llmos_tf.kept_results": 2,
    "llmos_tf.wire": 2,
    "llmos_tf.loop_turns": 2,
    "llmos_tf.function_calls": 2,
    "llmos_tf.traffic": 2,
    "llmos_tf.point_to_point": 2,
    "llmos_tf.collective_ops": 2,
    "llmos_tf.collectives": 2,
    "llmos_tf.batch": 2,
    "llmos_tf.sharding": 2,
    "llmos_tf.memory": 3,
    "llmos_tf.strategies": 3,
    "llmos_tf.layers": 4,
    "llmos_tf.models": 5,
    "llmos_tf.training": 6,
    "llmos_tf.checkpoint": 6,
    "llmos_tf.inference": 6,
    "llmos_tf.testing": 6,
    "llmos_tf.scripts": 7,
    "llmos_tf": 8,  # the public API
}

# The only file that may import these.
PRIVATE = ("tensorflow.python", "keras.src")
INTERNAL = "llmos_tf._internal"


# Who alone imports PyTorch, which is not installed with the package: the modules of llmos-benchmark
# that run it, each in a process of its own. JAX is imported by Keras only.
TORCH_USERS = "llmos_tf.scripts.peers.torch_"


def sources() -> dict[str, str]:
    """Returns module name -> source of every file of the project."""
    modules = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            below = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *(part for part in below if part != "__init__")))
            modules[name] = path.read_text(encoding="utf-8")
    return modules


def rank(module: str) -> int | None:
    if module == "llmos_tf":
        return RANKS[module]
    names = [name for name in RANKS if f"{module}.".startswith(f"{name}.") and name != "llmos_tf"]
    return RANKS[max(names, key=len)] if names else None


def imports(tree: ast.AST, modules: dict[str, str]) -> set[str]:
    """Returns what a tree imports; `from a import b` is a.b where that is a module."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                inside = node.module.split(".")[0] == "llmos_tf"
                found.add(full if full in modules or not inside else node.module)
    return found


def violations(modules: dict[str, str]) -> list[str]:
    """Returns one line for each import of `modules` that the order of the files forbids."""
    problems = []
    graph = {}
    for name, source in modules.items():
        tree = ast.parse(source)
        own = rank(name)
        if own is None:
            problems.append(f"{name} has no rank: give it one in RANKS")
        graph[name] = imports(tree, modules) & set(modules)
        for target in sorted(graph[name]):
            other = rank(target)
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
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        problems.append("import circle: " + " -> ".join(error.args[1]))
    return problems


def private_imports(modules: dict[str, str]) -> list[str]:
    """Returns one line for each private import outside of `_internal`."""
    return [
        f"{name} imports {target}"
        for name, source in modules.items()
        if name != INTERNAL
        for target in sorted(imports(ast.parse(source), modules))
        if any(f"{target}.".startswith(f"{private}.") for private in PRIVATE)
    ]


def test_files_import_only_downwards():
    # Fails when a file imports a higher rank, closes a circle, hides an import in a function,
    # imports relatively, or is new and has no rank.
    assert violations(sources()) == []


def test_private_names_of_tensorflow_and_keras_are_in_one_file():
    # Fails when an upgrade of TensorFlow could break a file other than _internal.py.
    assert private_imports(sources()) == []


def test_other_frameworks_are_needed_by_nobody_else():
    # Fails when the package, or a program without their runs, needs PyTorch or JAX; or when a
    # module that needs PyTorch is imported by one that does not.
    modules = sources()
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
    names = set(sources())
    assert {"llmos_tf", "llmos_tf.config", "llmos_tf.models.presets", "llmos_tf.scripts"} <= names


EMPTY = dict.fromkeys(("llmos_tf.config", "llmos_tf.mesh", "llmos_tf.layers.dense"), "")


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("llmos_tf.config", "from llmos_tf.mesh import Mesh", "imports llmos_tf.mesh (rank 1)"),
        ("llmos_tf.config", "from llmos_tf import mesh", "imports llmos_tf.mesh (rank 1)"),
        ("llmos_tf.config", "import llmos_tf.mesh as m", "imports llmos_tf.mesh (rank 1)"),
        ("llmos_tf.mesh", "from llmos_tf import Mesh", "imports llmos_tf (rank 8)"),
        ("llmos_tf.collectives", "import llmos_tf.layers.dense", "llmos_tf.layers.dense (rank 4)"),
        ("llmos_tf.strategies.schedules", "import llmos_tf.strategies.base", "(rank 3)"),
        ("llmos_tf.mesh", "def f():\n    import json", "mesh:2 imports inside f"),
        ("llmos_tf.mesh", "class A:\n  async def f(s):\n    from json import x", "inside f"),
        ("llmos_tf.mesh", "from . import config", "mesh:1 imports relatively"),
        ("llmos_tf.mesh", "from llmos_tf import devices", "import circle"),
        ("llmos_tf.novelty", "", "llmos_tf.novelty has no rank"),
    ],
)
def test_the_check_sees(name, source, expected):
    # Fails when the check above is blind to this kind of import.
    modules = {
        "llmos_tf": "",
        "llmos_tf.devices": "import llmos_tf.mesh",
        "llmos_tf.strategies.base": "",
        **EMPTY,
        name: source,
    }
    problems = violations(modules)
    assert len(problems) == 1
    assert expected in problems[0]


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
    assert private_imports({INTERNAL: source}) == []


def test_the_check_allows():
    # Fails when the check forbids what the order allows.
    modules = {
        **EMPTY,
        "llmos_tf.collectives": "import json\nfrom llmos_tf.mesh import Mesh",
        "llmos_tf.sharding.rules": "from llmos_tf import collectives",
        "llmos_tf.strategies.base": "from llmos_tf.sharding import rules",
    }
    assert violations(modules) == []
    assert private_imports({"llmos_tf.mesh": "import tensorflow as tf, keras.srcs"}) == []
