"""Sampling configurations: what they refuse, and that they need no TensorFlow."""

import subprocess
import sys
from dataclasses import FrozenInstanceError

import pytest

from llmos_tf.inference import SamplingConfig

pytestmark = pytest.mark.fast

# Field, wrong value, and words of the answer.
WRONG = [
    ("temperature", -0.1, "positive number"),
    ("temperature", float("inf"), "positive number"),
    ("temperature", float("nan"), "positive number"),
    ("temperature", "hot", "positive number"),
    ("temperature", True, "positive number"),
    ("top_k", 0, "positive number of tokens, or None"),
    ("top_k", -1, "positive number of tokens, or None"),
    ("top_k", 2.0, "positive number of tokens, or None"),
    ("top_k", True, "positive number of tokens, or None"),
    ("top_p", 0.0, "(0, 1], or None"),
    ("top_p", 1.01, "(0, 1], or None"),
    ("top_p", float("nan"), "(0, 1], or None"),
    ("top_p", True, "(0, 1], or None"),
    ("seed", -1, "from 0 to 2147483647"),
    ("seed", 2**31, "from 0 to 2147483647"),
    ("seed", 0.5, "from 0 to 2147483647"),
    ("seed", None, "from 0 to 2147483647"),
    ("vocab_size", 0, "positive number of tokens, or None"),
    ("vocab_size", 1.5, "positive number of tokens, or None"),
]


def test_a_wrong_value_is_named():
    """Fails if a value is taken that no draw can have, or the answer lacks what was received."""
    for field, value, words in WRONG:
        with pytest.raises(ValueError, match="Received") as error:
            SamplingConfig(**{field: value})
        assert f"{field}={value!r}" in str(error.value)
        assert words in str(error.value)


def test_the_ends_of_the_ranges_are_taken():
    """Fails if a range is a step too narrow."""
    SamplingConfig(temperature=0, top_k=1, top_p=1.0, seed=0, vocab_size=1)
    SamplingConfig(temperature=1e300, top_k=10**9, top_p=1e-300, seed=2**31 - 1)
    SamplingConfig(temperature=1, top_p=1)


def test_it_is_frozen_and_takes_keywords_only():
    """Fails if a configuration can change after it was checked, or two values be swapped."""
    config = SamplingConfig()
    with pytest.raises(FrozenInstanceError):
        config.top_k = 0
    with pytest.raises(TypeError):
        SamplingConfig(0.7, 40)


def test_it_needs_no_tensorflow():
    """Fails if a configuration is made only after TensorFlow has started, which takes seconds."""
    code = (
        "import sys, llmos_tf.inference; llmos_tf.inference.SamplingConfig(top_k=2); "
        "sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
