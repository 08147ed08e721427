"""Tests of Keras whose results say nothing about a mesh strategy."""

import fnmatch

# Pattern of a test id -> the reason. Only two kinds belong here: tests that inspect internals, and
# tests whose result on one device is wrong by a bug of Keras. A test that sees another value, or an
# error, is a defect or a documented refusal, and is counted as a failure.
EXCEPTIONS: dict[str, str] = {
    "optimizers/schedule_free_adamw_test.py::ScheduleFreeAdamWTest::test_with_model": (
        "On one device, fit builds the optimizer while it traces and loses the initial momentum, "
        "which run_eagerly=True and optimizer.build before fit keep. A strategy keeps it too."
    ),
}


def exception_for(test: str, exceptions: dict[str, str] | None = None) -> str | None:
    """Returns the reason why a test may fail.

    Args:
        test: its id, such as "trainers/trainer_test.py::TestTrainer::test_fit".
        exceptions: pattern to reason; None for `EXCEPTIONS`.

    Returns:
        The reason of the first pattern that matches, or None.
    """
    table = EXCEPTIONS if exceptions is None else exceptions
    return next((why for pattern, why in table.items() if fnmatch.fnmatchcase(test, pattern)), None)
