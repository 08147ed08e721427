"""The tests of this folder need neither Keras nor TensorFlow."""

import pytest


@pytest.fixture(autouse=True)
def _fresh_keras():
    """Stands in for the fixture of all tests, whose clean-up costs more than these tests do."""
