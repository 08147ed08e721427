"""Every optimizer that Keras has, each in an unmodified `fit`."""

import inspect

import keras
from keras import layers, optimizers

from equivalence.columns import ALWAYS, ANY_MODEL
from equivalence.data import LABELS, TOKENS, fit, mlp
from equivalence.features import Feature, parity

# Titles are the class's name and what is set. Muon and the optimizers with factored moments or
# norms of whole variables need the whole matrix where ranks store parts of it.
OPTIMIZERS = {
    "SGD": lambda: optimizers.SGD(0.1),
    "SGD, momentum": lambda: optimizers.SGD(0.1, momentum=0.9),
    "SGD, nesterov": lambda: optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    "RMSprop": lambda: optimizers.RMSprop(0.01, weight_decay=0.01),
    "RMSprop, centered": lambda: optimizers.RMSprop(0.01, momentum=0.9, centered=True),
    "Adam": lambda: optimizers.Adam(0.01),
    "Adam, amsgrad": lambda: optimizers.Adam(0.01, amsgrad=True),
    "AdamW": lambda: optimizers.AdamW(0.01, weight_decay=0.1),
    "Adadelta": lambda: optimizers.Adadelta(1.0),
    "Adagrad": lambda: optimizers.Adagrad(0.1),
    "Adamax": lambda: optimizers.Adamax(0.01),
    "Adafactor": lambda: optimizers.Adafactor(0.01),
    "Nadam": lambda: optimizers.Nadam(0.01),
    "Ftrl": lambda: optimizers.Ftrl(
        0.1, l1_regularization_strength=0.01, l2_regularization_strength=0.01
    ),
    "Lion": lambda: optimizers.Lion(0.01),
    "Lamb": lambda: optimizers.Lamb(0.01),
    "Muon": lambda: optimizers.Muon(0.01, exclude_layers=["out"]),
    "ScheduleFreeAdamW": lambda: optimizers.ScheduleFreeAdamW(0.01, warmup_steps=3),
    "LossScaleOptimizer": lambda: optimizers.LossScaleOptimizer(optimizers.Adam(0.01)),
    "MultiOptimizer": lambda: optimizers.MultiOptimizer(
        optimizers.OptimizerMap(optimizers.SGD(0.1), {".*hidden.*": optimizers.Adam(0.01)})
    ),
}
NOTES = {
    "ScheduleFreeAdamW": "Built before `fit`. On one device Keras 3.15 otherwise builds it while a "
    "step is traced, its momentum begins with zeros instead of the weights, and the first step "
    "overwrites the weights. Under a strategy it begins with the weights either way."
}
# Their compiled updates are compared on data=2 and with ZeRO 1 in test_fused_update.py.
COMPILED = {
    "SGD, nesterov",
    "RMSprop, centered",
    "Adam, amsgrad",
    "AdamW",
    "Adadelta",
    "Adagrad",
    "Adamax",
    "Nadam",
    "Ftrl",
    "Lion",
}
# The base class, and the table that `MultiOptimizer` takes.
NO_OPTIMIZERS = {"Optimizer", "OptimizerMap"}


def public_optimizers() -> set[str]:
    """Returns the names of the optimizers of the installed Keras."""
    found = {name for name, value in vars(optimizers).items() if inspect.isclass(value)}
    return found - NO_OPTIMIZERS


def trained_by(title):
    """Fails if an optimizer gets a part of a gradient and needs all of it, or its state is cut
    otherwise than the weights."""

    def script():
        model = mlp()
        optimizer = OPTIMIZERS[title]()
        if title == "ScheduleFreeAdamW":
            # See its note.
            optimizer.build(model.trainable_variables)
        model.compile(optimizer, "mse")
        return model, lambda: fit(model)

    return script


def sparse_rows(optimizer):
    """Fails if rows that an embedding looked up are summed before an adaptive optimizer sees them,
    or rows that were not looked up are updated."""

    def script():
        model = keras.Sequential([layers.Embedding(12, 3), layers.Flatten(), layers.Dense(2)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer(), loss)
        return model, lambda: fit(model, 1, TOKENS, LABELS)

    return script


SPARSE = {
    "SGD with momentum": lambda: optimizers.SGD(0.1, momentum=0.9),
    "Adagrad": lambda: optimizers.Adagrad(0.1),
    "Adam and `global_clipnorm`": lambda: optimizers.Adam(0.01, global_clipnorm=0.05),
    "Lamb": lambda: optimizers.Lamb(0.01),
}

FEATURES = [
    *(
        Feature(
            title,
            parity(trained_by(title)),
            note=NOTES.get(title, ""),
            every_change=(ALWAYS,) if title in COMPILED else (),
        )
        for title in OPTIMIZERS
    ),
    *(
        Feature(f"embedding, {title}", parity(sparse_rows(optimizer)), ANY_MODEL)
        for title, optimizer in SPARSE.items()
    ),
]
