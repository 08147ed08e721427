"""The folder graph: rooms, levels, cycles, and its picture."""

import pytest
from repo import folder_graph

pytestmark = pytest.mark.fast

MODULES = {
    "llmos_tf": "",
    "llmos_tf.mesh": "",
    "llmos_tf.layers": "",
    "llmos_tf.layers.dense": "from llmos_tf.sharding.layout import Layout\nimport json",
    "llmos_tf.sharding": "",
    "llmos_tf.sharding.layout": "from llmos_tf import mesh\nimport llmos_tf.graph",
    "llmos_tf.graph": "",
    "llmos_tf.graph.subgraph": "import llmos_tf.sharding.layout",
}


def test_rooms_are_folders_and_public_modules():
    # Fails if a file is a room of its own, an import is lost, or a room imports itself.
    assert folder_graph.folder_graph(MODULES) == {
        "llmos_tf": set(),
        "llmos_tf.mesh": set(),
        "llmos_tf.layers": {"llmos_tf.sharding"},
        "llmos_tf.sharding": {"llmos_tf.mesh", "llmos_tf.graph"},
        "llmos_tf.graph": {"llmos_tf.sharding"},
    }


def test_levels_and_cycles():
    # Fails if a cycle is not seen, or rooms of one stand on different levels.
    graph = folder_graph.folder_graph(MODULES)
    assert folder_graph.cycles(graph) == [{"llmos_tf.sharding", "llmos_tf.graph"}]
    assert folder_graph.levels(graph) == [
        ["llmos_tf", "llmos_tf.mesh"],
        ["llmos_tf.graph", "llmos_tf.sharding"],
        ["llmos_tf.layers"],
    ]
    report = folder_graph.describe(MODULES).splitlines()
    assert report[0].split()[:5] == ["2", "layers", "2", "files", "1"]
    assert report[-2:] == ["5 rooms on 3 levels, 1 cycles", "cycle: graph, sharding"]


def test_the_picture(tmp_path):
    # Fails if no picture can be drawn of a graph with a cycle.
    folder_graph.draw(MODULES, tmp_path / "graph.png")
    assert (tmp_path / "graph.png").read_bytes().startswith(b"\x89PNG")
