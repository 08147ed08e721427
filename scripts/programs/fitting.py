"""Which flags of llmos-plan make a run fit a device. No TensorFlow."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from llmos_tf.mesh import AXES, Mesh
from llmos_tf.planning.memory_model import KINDS, memory_of
from llmos_tf.scripts.plan_options import PlanOptions

# What an allocator of TensorFlow keeps for itself and loses between blocks, at most, as measured on
# CPU devices.
ALLOCATOR_SHARE = 0.14


def memory_by_stage(options: PlanOptions) -> list[dict[str, int]]:
    """Returns the bytes of a device of each stage, by kind.

    Args:
        options: of the plan.

    Returns:
        A dict for each stage of the pipeline, or the only one.

    Raises:
        ValueError: options that do not fit the mesh or the model.
    """  # noqa: DOC502
    return memory_of(options.plan())


def needed(options: PlanOptions) -> int:
    """Returns the memory that a device of the fullest stage must have.

    Args:
        options: of the plan.

    Returns:
        Bytes, with `ALLOCATOR_SHARE`.

    Raises:
        ValueError: options that do not fit the mesh or the model.
    """  # noqa: DOC502
    rows = memory_by_stage(options)
    return round(max(sum(row[kind] for kind in KINDS) for row in rows) * (1 + ALLOCATOR_SHARE))


def changes_that_fit(options: PlanOptions, room: int) -> list[tuple[str, int]]:
    """Returns flags that make a run fit.

    Args:
        options: of the plan, which does not fit.
        room: bytes of a device.

    Returns:
        Flags as they are written, and the bytes then needed: each flag that is enough by itself,
        or else the fewest found that are enough together; and a larger mesh. Empty where nothing
        that is tried is enough.
    """
    found = []
    for change in _changes(options):
        # Of smaller batches the largest one.
        is_smaller = "global_batch" in change and any("global_batch" in text for text, _ in found)
        total = None if is_smaller else _needed_with(options, change)
        if total is not None and total <= room:
            found.append((_as_flags(change), total))
    if found:
        return [*found, *_more_devices(options, {}, room)]
    together = _together(options, room)
    if _is_enough(options, together, room):
        return [(_as_flags(together), _needed_with(options, together))]
    return _more_devices(options, together, room)


def _together(options: PlanOptions, room: int) -> dict[str, Any]:
    """Changes that are enough together, each of them needed; all where they are not enough."""
    chosen: list[dict[str, Any]] = []
    for change in _changes(options):
        total = _needed_with(options, _joined([*chosen, change]))
        if total is not None:
            chosen.append(change)
            if total <= room:
                break
    else:
        return _joined(chosen)
    # The last one is needed; earlier ones may not be.
    for change in list(chosen[:-1]):
        others = [one for one in chosen if one is not change]
        if _is_enough(options, _joined(others), room):
            chosen = others
    return _joined(chosen)


def _is_enough(options: PlanOptions, change: dict[str, Any], room: int) -> bool:
    total = _needed_with(options, change)
    return total is not None and total <= room


def _joined(changes: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: value for change in changes for name, value in change.items()}


def _changes(options: PlanOptions) -> Iterator[dict[str, Any]]:
    """Changes on the same devices, those that cost least time first."""
    mesh = options.parsed_mesh
    sizes = {axis: mesh.axis_size(axis) for axis in AXES}
    if options.dtype == "float32":
        yield {"dtype": "mixed_bfloat16"}
    if sizes["data"] > 1 and options.zero_stage == 0:
        yield {"zero_stage": 1}
    if sizes["data"] > 1:
        sharded = Mesh(**sizes | {"data": 1, "fsdp": sizes["data"] * sizes["fsdp"]})
        yield {"mesh": str(sharded), **({"zero_stage": 0} if options.zero_stage else {})}
    if sizes["tensor"] > 1 and not options.sequence_parallel:
        yield {"sequence_parallel": True}
    if sizes["pipe"] > 1:
        rows = options.global_batch // mesh.batch_ways
        if rows > (options.microbatches or sizes["pipe"]):
            yield {"microbatches": rows}
    if options.rematerialise == "none":
        yield {"rematerialise": "selective"}
        yield {"rematerialise": "block"}
    if sizes["fsdp"] > 1 and sizes["pipe"] == 1 and not options.reshard_after_forward:
        yield {"reshard_after_forward": True}
    parts = mesh.batch_ways * (options.microbatches or sizes["pipe"])
    batch = options.global_batch
    while batch % (2 * parts) == 0:
        batch //= 2
        yield {"global_batch": batch}
    if not options.offload:
        yield {"offload": "optimizer"}


def _more_devices(options: PlanOptions, change: dict[str, Any], room: int) -> list[tuple[str, int]]:
    """The same run, or a changed one, on the shortest fsdp axis that is enough, if there is one."""
    mesh = replace(options, **change).parsed_mesh
    sizes = {axis: mesh.axis_size(axis) for axis in AXES}
    ways = options.global_batch // mesh.batch_ways
    factors = [2**k for k in range(1, 16) if ways % 2**k == 0]
    for factor in factors:
        larger = {**change, "mesh": str(Mesh(**sizes | {"fsdp": sizes["fsdp"] * factor}))}
        total = _needed_with(options, larger)
        if total is not None and total <= room:
            return [(_as_flags(larger), total)]
    return []


def _needed_with(options: PlanOptions, change: dict[str, Any]) -> int | None:
    """The bytes that a changed run needs, or None where the change does not fit its mesh."""
    try:
        return needed(replace(options, **change))
    except ValueError:
        return None


def _as_flags(change: dict[str, Any]) -> str:
    return " ".join(
        f"--{name}" if value is True else f"--{name}={value}" for name, value in change.items()
    )
