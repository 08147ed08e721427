"""All features, by theme, in the order of the document."""

from equivalence import (
    blocks,
    callbacks,
    coupled,
    inputs,
    lookups,
    objectives,
    optimizers,
    precision,
    saving,
    states,
    steps,
)

THEMES = {
    "What stock Keras gets wrong in a step": steps.FEATURES,
    "Steps that are not row by row": coupled.FEATURES,
    "Batches: where they come from, and what is in them": inputs.FEATURES,
    "Lookups in tables": lookups.FEATURES,
    "Compiled, and computed again": blocks.FEATURES,
    "Mixed precision": precision.FEATURES,
    "Losses, weights, metrics, steps of one's own": objectives.FEATURES,
    "Layers with state, random numbers": states.FEATURES,
    "Callbacks, schedules, fine-tuning": callbacks.FEATURES,
    "Optimizers": optimizers.FEATURES,
    "Saving and loading": saving.FEATURES,
}
