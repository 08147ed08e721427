"""The strategies: the columns of the matrix."""

import dataclasses
from collections.abc import Callable

import tensorflow as tf

from llmos_tf import Mesh, devices
from llmos_tf.strategies import DataParallelStrategy, MeshStrategy, ZeroStrategy

# How the plain Keras layers of `data.mlp` are cut: Megatron's pair.
PAIR = {
    ".*hidden/kernel": (None, "tensor"),
    ".*hidden/bias": ("tensor",),
    ".*out/kernel": ("tensor", None),
}


@dataclasses.dataclass(frozen=True)
class Column:
    """A strategy.

    Attributes:
        title: what the document calls it.
        make: makes it anew, without sharing anything with another cell.
        explanation: for the legend.
    """

    title: str
    make: Callable[[], tf.distribute.Strategy]
    explanation: str


def _first(count: int) -> tuple[str, ...]:
    return devices.visible_devices()[:count]


COLUMNS = (
    Column(
        "data=2",
        lambda: DataParallelStrategy(_first(2)),
        "`DataParallelStrategy` on two devices",
    ),
    Column(
        "data=4",
        lambda: DataParallelStrategy(_first(4)),
        "the same on four",
    ),
    Column(
        "data=8",
        lambda: DataParallelStrategy(_first(8)),
        "the same on eight, for batches that leave most of them without rows",
    ),
    Column(
        "ZeRO 1",
        lambda: ZeroStrategy(stage=1, devices=_first(2)),
        "`ZeroStrategy(1)` on two devices: optimizer state is cut",
    ),
    Column(
        "ZeRO 2",
        lambda: ZeroStrategy(stage=2, devices=_first(4)),
        "`ZeroStrategy(2)` on four: accumulated gradients too",
    ),
    Column(
        "ZeRO 3",
        lambda: ZeroStrategy(stage=3, devices=_first(2)),
        "`ZeroStrategy(3)` on two: parameters too",
    ),
    Column(
        "data=2,fsdp=2",
        lambda: MeshStrategy(Mesh(data=2, fsdp=2, devices=_first(4))),
        "`MeshStrategy(Mesh(data=2, fsdp=2))`: the batch is split four ways, parameters are cut "
        "in two",
    ),
    Column(
        "data=2,tensor=2",
        lambda: MeshStrategy(Mesh(data=2, tensor=2, devices=_first(4)), layout_map=PAIR),
        "`MeshStrategy(Mesh(data=2, tensor=2), layout_map=...)`: the kernels of plain `Dense` "
        "layers are cut, the first by columns and the second by rows",
    ),
    Column(
        "pipe=2",
        lambda: MeshStrategy(Mesh(pipe=2, devices=_first(2)), num_microbatches=2),
        "`MeshStrategy(Mesh(pipe=2), num_microbatches=2)`: the layers are on two devices, and the "
        "batch goes through them in two parts; `·` where a script's model has one layer only, or "
        "one that has to see the whole batch",
    ),
)
TITLES = tuple(column.title for column in COLUMNS)

# Every change runs two columns of each feature: this one, in which both the batch and the
# parameters are split, and one of the others in turn. The rest is nightly.
ALWAYS = "data=2,fsdp=2"
# Only of features whose model has layers for two stages.
PIPE = "pipe=2"
# What needs no model of `data.mlp`.
ANY_MODEL = ("data=2", "data=4", "ZeRO 1", "ZeRO 2", "ZeRO 3", ALWAYS)
# What has one.
PAIR_MODEL = (*ANY_MODEL, "data=2,tensor=2")


def column(title: str) -> Column:
    """Returns the column of a title."""
    return COLUMNS[TITLES.index(title)]
