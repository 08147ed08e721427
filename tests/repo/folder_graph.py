"""The folder graph of a checkout: which folder imports which, by level, with its cycles.

Usage, from the root of a checkout:

    python3 tests/repo/folder_graph.py [CHECKOUT] [--picture=PATH]

Prints each folder (a *room*; public modules that lie loose in `llmos_tf/` are rooms of their own)
with its files, lines and the folders that it imports, from the public API down to what imports
nothing, then the cycles between folders. Exit status 1 when there is a cycle.
"""

import argparse
import ast
import graphlib
import sys
from collections.abc import Mapping
from pathlib import Path

import matplotlib.figure
import matplotlib.patches

# Package -> folder of the repository. The longer name is looked up first.
FOLDERS = {
    "llmos_tf.strategies": "strategies",
    "llmos_tf.models": "models",
    "llmos_tf.scripts": "scripts",
    "llmos_tf": "llmos_tf",
}


def read_modules(root: Path) -> dict[str, str]:
    """Returns module name -> source, of every file below the packaged folders."""
    modules = {}
    for package, folder in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            below = path.relative_to(root / folder).with_suffix("").parts
            name = ".".join((package, *(part for part in below if part != "__init__")))
            modules[name] = path.read_text(encoding="utf-8")
    return modules


def imports(tree: ast.AST, modules: Mapping[str, str]) -> set[str]:
    """Returns the imported modules; `from a import b` is a.b where that is a module."""
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


def packages_of(modules: Mapping[str, str]) -> set[str]:
    """Returns the modules that are folders: those with a module below them."""
    return {name.rpartition(".")[0] for name in modules} & set(modules)


def room(module: str, packages: set[str]) -> str:
    """Returns the folder of a module; a loose module of `llmos_tf` is a room of its own."""
    parent = module if module in packages else module.rpartition(".")[0]
    return module if parent == "llmos_tf" else parent


def folder_graph(modules: Mapping[str, str]) -> dict[str, set[str]]:
    """Returns room -> rooms that its files import, itself left out."""
    packages = packages_of(modules)
    graph = {room(name, packages): set() for name in modules}
    for name, source in modules.items():
        own = room(name, packages)
        targets = imports(ast.parse(source), modules) & set(modules)
        graph[own] |= {room(target, packages) for target in targets} - {own}
    return graph


def cycles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """Returns the groups of rooms that import each other, directly or not."""
    reached = {name: _reached_from(name, graph) for name in graph}
    groups = []
    for name in graph:
        group = {other for other in reached[name] if name in reached[other]}
        if group and group not in groups:
            groups.append(group)
    return groups


def levels(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Returns the rooms by level: level 0 imports nothing, and each imports lower levels only.

    Rooms of a cycle share a level.
    """
    together = {name: frozenset(group) for group in cycles(graph) for name in group}
    nodes = {name: together.get(name, frozenset({name})) for name in graph}
    edges = {node: set() for node in nodes.values()}
    for name, targets in graph.items():
        edges[nodes[name]] |= {nodes[target] for target in targets} - {nodes[name]}
    height = {}
    for node in graphlib.TopologicalSorter(edges).static_order():
        height[node] = 1 + max((height[target] for target in edges[node]), default=-1)
    rows = [[] for _ in range(1 + max(height.values()))]
    for name in sorted(graph):
        rows[height[nodes[name]]].append(name)
    return rows


def describe(modules: Mapping[str, str]) -> str:
    """Returns the report that the program prints."""
    graph = folder_graph(modules)
    packages = packages_of(modules)
    files, lines = dict.fromkeys(graph, 0), dict.fromkeys(graph, 0)
    for name, source in modules.items():
        files[room(name, packages)] += 1
        lines[room(name, packages)] += source.count("\n")
    rows = levels(graph)
    report = []
    for level in reversed(range(len(rows))):
        for name in rows[level]:
            targets = ", ".join(_short(target) for target in sorted(graph[name])) or "-"
            size = f"{files[name]:3} files {lines[name]:6,} lines"
            report.append(f"{level:2}  {_short(name):28} {size}  -> {targets}")
    found = cycles(graph)
    report.append(f"{len(graph)} rooms on {len(rows)} levels, {len(found)} cycles")
    report += ["cycle: " + ", ".join(map(_short, sorted(group))) for group in found]
    return "\n".join(report)


def draw(modules: Mapping[str, str], path: Path) -> None:
    """Writes a picture: rooms by level, what imports nothing at the bottom; cycles in red.

    An arrow that a longer way implies is left out.
    """
    graph = folder_graph(modules)
    rows = levels(graph)
    circular = {name for group in cycles(graph) for name in group}
    figure = matplotlib.figure.Figure(figsize=(16, 1.15 * len(rows) + 0.5), layout="constrained")
    axes = figure.add_subplot()
    places = {
        name: ((i + 1) / (len(row) + 1), level)
        for level, row in enumerate(rows)
        for i, name in enumerate(row)
    }
    for name, targets in graph.items():
        for target in targets:
            red = name in circular and target in circular
            if not red and any(target in _reached_from(other, graph) for other in targets):
                continue
            axes.add_patch(
                matplotlib.patches.FancyArrowPatch(
                    places[name],
                    places[target],
                    connectionstyle="arc3,rad=0.06",
                    arrowstyle="-|>",
                    mutation_scale=9,
                    shrinkA=12,
                    shrinkB=12,
                    color="tab:red" if red else "0.75",
                    linewidth=1.4 if red else 0.7,
                )
            )
    for name, (x, y) in places.items():
        edge = "tab:red" if name in circular else "0.3"
        box = {"boxstyle": "round", "facecolor": "white", "edgecolor": edge}
        axes.text(x, y, _short(name), ha="center", va="center", fontsize=9, bbox=box)
    axes.set(xlim=(0, 1), ylim=(-0.6, len(rows) - 0.4))
    axes.set_axis_off()
    figure.savefig(path, dpi=110)


def _reached_from(start: str, graph: Mapping[str, set[str]]) -> set[str]:
    found, waiting = set(), [start]
    while waiting:
        for target in graph[waiting.pop()] - found:
            found.add(target)
            waiting.append(target)
    return found


def _short(name: str) -> str:
    return name.removeprefix("llmos_tf.")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).resolve().parents[2]
    parser.add_argument("checkout", nargs="?", type=Path, default=here, help="default: this one")
    parser.add_argument("--picture", type=Path, help="also write a PNG or SVG file")
    arguments = parser.parse_args()
    modules = read_modules(arguments.checkout)
    if not modules:
        parser.error(f"No sources found in {arguments.checkout}: expected {list(FOLDERS.values())}")
    print(describe(modules))
    if arguments.picture:
        draw(modules, arguments.picture)
        print(f"wrote {arguments.picture}")
    return 1 if cycles(folder_graph(modules)) else 0


if __name__ == "__main__":
    sys.exit(main())
