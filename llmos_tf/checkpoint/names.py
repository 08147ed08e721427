"""Names of variables that are the same each time the same code makes the same model.

Keras numbers what has no name of its own, over the whole process: a second GPT is ``gpt_1``, the
first `Dense` of a second model may be ``dense_2``, and optimizer slots spell these paths out. A
checkpoint needs names that do not depend on what else the process has made.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import keras

# The last part of the path of a seed generator's variable.
_SEED_STATE = "seed_generator_state"
# What Keras calls a variable that was given no name, before the number.
_NAMELESS = "variable"


def named_model_variables(model: keras.Model) -> dict[str, keras.Variable]:
    """Returns all variables of a model by stable names, in the model's order.

    The name is the Keras path without the model's own name, in which the names that Keras made up
    are counted anew from the first.

    Args:
        model: a built Keras model.

    Returns:
        Name to variable, the states of seed generators among them, metrics not.

    Example:
        >>> model = keras.Sequential([keras.Input([3]), keras.layers.Dense(4)], name="tower")
        >>> list(named_model_variables(model))
        ['dense/kernel', 'dense/bias']
    """
    variables = list({id(variable): variable for variable in model.variables}.values())
    paths = [_below(model.name, variable.path.split("/")) for variable in variables]
    renamed = _renumbered(paths, _made_up_names(model))
    named: dict[str, keras.Variable] = {}
    for path, variable in zip(paths, variables, strict=True):
        name = base = "/".join(renamed.get(part, part) for part in path)
        count = 1
        while name in named:
            # Two layers of one name; the model's order tells them apart.
            count += 1
            name = f"{base}#{count}"
        named[name] = variable
    return named


def named_optimizer_variables(
    optimizer: keras.optimizers.Optimizer, model_variables: Mapping[str, keras.Variable]
) -> dict[str, keras.Variable]:
    """Returns all variables of an optimizer by stable names, in the optimizer's order.

    Args:
        optimizer: a built optimizer; of a `keras.optimizers.LossScaleOptimizer` both its own
            variables and those of the optimizer inside are meant.
        model_variables: what `named_model_variables` returned.

    Returns:
        Name to variable: ``00000/iteration``, or for a slot ``00002/dense/kernel/momentum``.
    """
    # A slot is named "{path of the model's variable, / as _}_{slot}". The longest path that fits
    # is meant: there may be "block_1" beside "block_1_norm".
    prefixes = {v.path.replace("/", "_") + "_": name for name, v in model_variables.items()}
    by_length = sorted(prefixes, key=len, reverse=True)
    named = {}
    for index, variable in enumerate(optimizer.variables):
        name = variable.name
        prefix = next((prefix for prefix in by_length if name.startswith(prefix)), None)
        if prefix is not None:
            name = f"{prefixes[prefix]}/{name.removeprefix(prefix)}"
        elif _without_number(name) == _NAMELESS:
            name = _NAMELESS
        named[f"{index:05d}/{name}"] = variable
    return named


def optimizer_kind(optimizer: keras.optimizers.Optimizer) -> str:
    """Returns the class of an optimizer, and of the one inside it.

    Args:
        optimizer: any Keras optimizer.

    Returns:
        Such as ``AdamW`` or ``LossScaleOptimizer(AdamW)``.
    """
    kind = type(optimizer).__name__
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return f"{kind}({optimizer_kind(optimizer.inner_optimizer)})"
    return kind


def _below(root: str, path: list[str]) -> list[str]:
    """The path without the model's name; paths in a Functional model have none."""
    return path[1:] if len(path) > 1 and path[0] == root else path


def _made_up_names(model: keras.Model) -> set[str]:
    """Names of layers which are, but for a number, the name of their class."""
    return {
        layer.name
        for layer in model._flatten_layers(include_self=False)
        if _without_number(layer.name).replace("_", "") == type(layer).__name__.lower()
    }


def _without_number(name: str) -> str:
    return re.sub(r"_\d+$", "", name)


def _renumbered(paths: Iterable[list[str]], made_up: set[str]) -> dict[str, Any]:
    """Made-up name to one that is counted in the order of the variables, as Keras counts."""
    counts: dict[str, int] = {}
    renamed: dict[str, str] = {}
    for path in paths:
        for part, following in zip(path, [*path[1:], ""], strict=True):
            base = _without_number(part)
            is_seed = following == _SEED_STATE and base == "seed_generator"
            is_nameless = not following and base == _NAMELESS
            if part in renamed or not (is_seed or is_nameless or part in made_up):
                continue
            count = counts[base] = counts.get(base, -1) + 1
            renamed[part] = f"{base}_{count}" if count else base
    return renamed
