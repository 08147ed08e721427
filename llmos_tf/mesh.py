"""The mesh: devices in a grid with named axes. numpy only.

A *rank* is a device's index in the mesh, a *coordinate* is its position on each axis, a *group*
along some axes is the set of ranks that differ only on them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

# Outermost first. The order is the order on the devices: ranks that are neighbours on `tensor` are
# neighbours in the device list, because tensor and context groups exchange most and belong on the
# fastest links; pipeline stages exchange least and may sit furthest apart.
AXES = ("pipe", "data", "fsdp", "expert", "context", "tensor")

# The axes that split the rows of a batch: together they count the "replicas in sync".
BATCH_AXES = ("data", "fsdp")

# Names of the axes in other frameworks.
_OTHER_NAMES = {
    "dp": "data",
    "batch": "data",
    "zero": "fsdp",
    "pp": "pipe",
    "pipeline": "pipe",
    "stage": "pipe",
    "cp": "context",
    "sp": "context",
    "sequence": "context",
    "ep": "expert",
    "experts": "expert",
    "tp": "tensor",
    "mp": "tensor",
    "model": "tensor",
}


class Mesh:
    """Devices in a grid with named axes.

    Every axis defaults to 1. Two meshes are equal when their sizes and devices are.

    Args:
        data: ways to split the batch, weights replicated.
        fsdp: ways to split the batch, weights sharded and gathered on use (ZeRO stage 3).
        pipe: pipeline stages.
        context: ways to split sequence positions.
        expert: ways to split the experts of a mixture layer.
        tensor: ways to split heads, feed-forward columns and vocabulary.
        devices: device names in rank order, or None to take the first `size` visible devices when
            a strategy is made.
        **unknown: refused, with the names that there are.

    Raises:
        TypeError: an axis that does not exist.
        ValueError: an axis is not a positive integer, or `devices` has another length than the
            product of the axes, or repeats a device.

    Example:
        >>> mesh = Mesh(data=2, tensor=4)
        >>> mesh.size, mesh.coordinate(5)["data"], mesh.coordinate(5)["tensor"]
        (8, 1, 1)
        >>> mesh.group(5, "data")
        (1, 5)
    """

    def __init__(
        self,
        *,
        data: int = 1,
        fsdp: int = 1,
        pipe: int = 1,
        context: int = 1,
        expert: int = 1,
        tensor: int = 1,
        devices: Sequence[str] | None = None,
        **unknown: Any,
    ):
        if unknown:
            raise TypeError(_unknown_axes(unknown))
        sizes = {
            "pipe": pipe,
            "data": data,
            "fsdp": fsdp,
            "expert": expert,
            "context": context,
            "tensor": tensor,
        }
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
                raise ValueError(
                    f"A mesh axis is a positive integer. Received: {name}={size!r}. "
                    "Leave an axis out, or give 1, for no split along it."
                )
        self._sizes = {name: int(size) for name, size in sizes.items()}
        if devices is not None:
            devices = tuple(str(device) for device in devices)
            if len(devices) != self.size:
                raise ValueError(
                    f"The mesh {self} needs {self.size} devices. "
                    f"Received: devices={list(devices)} ({len(devices)} of them). Give as many "
                    "devices as the product of the axes, or change the axes."
                )
            if len(set(devices)) != len(devices):
                raise ValueError(
                    f"A device can be in a mesh only once. Received: devices={list(devices)}."
                )
        self._devices = devices

    @classmethod
    def from_string(cls, text: str) -> "Mesh":
        """Makes a mesh from ``"data=2,tensor=4"``, as the scripts' ``--mesh`` flag is written.

        Args:
            text: comma-separated ``axis=size`` pairs; empty, or 1 as it is printed, for one device.

        Returns:
            The mesh, without devices.

        Raises:
            ValueError: an unknown axis, a repeated one, or a size that is not a positive integer.

        Example:
            >>> Mesh.from_string("data=2,tensor=4").size
            8
        """
        sizes: dict[str, int] = {}
        if text.strip() == str(cls()):
            return cls()
        for item in filter(None, (part.strip() for part in text.split(","))):
            name, _, size = (part.strip() for part in item.partition("="))
            if name not in AXES or not size.isdecimal() or name in sizes:
                raise ValueError(
                    f"A mesh is written as axis=size pairs, such as data=2,tensor=4, with each of "
                    f"the axes {', '.join(AXES)} at most once. Received: {text!r}, "
                    f"where {item!r} does not fit."
                )
            sizes[name] = int(size)
        return cls(**sizes)

    @property
    def sizes(self) -> Mapping[str, int]:
        """Size of every axis, outermost first."""
        return dict(self._sizes)

    @property
    def size(self) -> int:
        """Number of ranks: the product of the axes."""
        return math.prod(self._sizes.values())

    @property
    def devices(self) -> tuple[str, ...] | None:
        """Device names in rank order, or None where none were given."""
        return self._devices

    @property
    def batch_ways(self) -> int:
        """Number of ways the batch is split: data × fsdp."""
        return self.axis_size(BATCH_AXES)

    def with_devices(self, devices: Sequence[str]) -> "Mesh":
        """Returns the same axes over `devices`.

        Args:
            devices: device names in rank order.

        Returns:
            A new mesh.
        """
        return Mesh(**self._sizes, devices=devices)

    def axis_size(self, axes: str | Iterable[str]) -> int:
        """Returns the product of the sizes of `axes`.

        Args:
            axes: an axis name or several.

        Returns:
            The number of ranks in a group along `axes`.
        """
        if isinstance(axes, str) and axes in self._sizes:
            # Plans of large models ask a million times.
            return self._sizes[axes]
        return math.prod(self._sizes[axis] for axis in self.canonical_axes(axes))

    def canonical_axes(self, axes: str | Iterable[str]) -> tuple[str, ...]:
        """Returns `axes` without repetition, in mesh order.

        Args:
            axes: an axis name or several.

        Returns:
            The names, outermost first.

        Raises:
            ValueError: a name is not a mesh axis.
        """
        names = (axes,) if isinstance(axes, str) else tuple(axes)
        unknown = [name for name in names if name not in AXES]
        if unknown:
            raise ValueError(f"The mesh axes are {', '.join(AXES)}. Received: {axes!r}.")
        return tuple(axis for axis in AXES if axis in names)

    def coordinate(self, rank: int) -> Mapping[str, int]:
        """Returns the position of `rank` on every axis.

        Args:
            rank: 0 <= rank < size.

        Returns:
            Axis name to position.

        Raises:
            ValueError: `rank` is outside the mesh.
        """  # noqa: DOC502
        self._check_rank(rank)
        return dict(zip(AXES, self.coordinates()[rank].tolist(), strict=True))

    def coordinates(self) -> np.ndarray:
        """Returns the positions of all ranks, int32 of shape ``[size, axes]``, in rank order."""
        shape = tuple(self._sizes.values())
        return np.stack(np.unravel_index(np.arange(self.size), shape), axis=1).astype(np.int32)

    def rank(self, **position: int) -> int:
        """Returns the rank at a position; axes left out are at 0.

        Args:
            **position: axis name to position on it.

        Returns:
            The rank.

        Raises:
            ValueError: an unknown axis, or a position outside it.
        """
        for name, index in position.items():
            if not 0 <= index < self.axis_size(name):
                raise ValueError(
                    f"The axis {name} of the mesh {self} has positions 0 to "
                    f"{self.axis_size(name) - 1}. Received: {name}={index}."
                )
        where = tuple(position.get(axis, 0) for axis in AXES)
        return int(np.ravel_multi_index(where, tuple(self._sizes.values())))

    def index_along(self, rank: int, axes: str | Iterable[str]) -> int:
        """Returns the position of `rank` in its group along `axes`.

        Args:
            rank: a rank of the mesh.
            axes: an axis name or several; the first in mesh order varies slowest.

        Returns:
            An index in ``range(axis_size(axes))``.
        """
        where = self.coordinate(rank)
        index = 0
        for axis in self.canonical_axes(axes):
            index = index * self._sizes[axis] + where[axis]
        return index

    def group(self, rank: int, axes: str | Iterable[str]) -> tuple[int, ...]:
        """Returns the ranks that differ from `rank` only on `axes`, itself included, in order.

        Args:
            rank: a rank of the mesh.
            axes: an axis name or several.

        Returns:
            Ranks in increasing order, which is the order of `index_along`.

        Raises:
            ValueError: `rank` is outside the mesh, or a name is not a mesh axis.
        """  # noqa: DOC502
        self._check_rank(rank)
        moving = [AXES.index(axis) for axis in self.canonical_axes(axes)]
        coordinates = self.coordinates()
        fixed = np.delete(coordinates, moving, axis=1)
        same = (fixed == fixed[rank]).all(axis=1)
        return tuple(np.flatnonzero(same).tolist())

    def groups(self, axes: str | Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """Returns all groups along `axes`, ordered by their first rank.

        Args:
            axes: an axis name or several.

        Returns:
            A partition of the ranks.
        """
        return tuple(sorted({self.group(rank, axes) for rank in range(self.size)}))

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.size:
            raise ValueError(f"The mesh {self} has ranks 0 to {self.size - 1}. Received: {rank}.")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mesh):
            return NotImplemented
        return self._sizes == other._sizes and self._devices == other._devices

    def __hash__(self) -> int:
        return hash((tuple(self._sizes.items()), self._devices))

    def __str__(self) -> str:
        return ",".join(f"{axis}={size}" for axis, size in self._sizes.items() if size > 1) or "1"

    def __repr__(self) -> str:
        arguments = [f"{axis}={size}" for axis, size in self._sizes.items() if size > 1]
        if self._devices is not None:
            arguments.append(f"devices={list(self._devices)}")
        return f"Mesh({', '.join(arguments)})"


def _unknown_axes(received: Mapping[str, Any]) -> str:
    names = ", ".join(f"{name}={size!r}" for name, size in received.items())
    meant = ", ".join(
        f"{_OTHER_NAMES[name]}={size!r}" for name, size in received.items() if name in _OTHER_NAMES
    )
    hint = f" Did you mean Mesh({meant})?" if meant else ""
    return f"The axes of a mesh are {', '.join(AXES)}. Received: {names}.{hint}"
