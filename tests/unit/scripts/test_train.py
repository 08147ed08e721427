"""What llmos-train writes for each step."""

import numpy as np
import pytest
import tensorflow as tf

from llmos_tf.models import GPT, GPTConfig, Mixtral, MixtralConfig
from llmos_tf.scripts.programs import train

pytestmark = pytest.mark.fast

SIZES = {"vocab_size": 11, "max_positions": 8, "hidden_size": 8, "num_heads": 2, "num_layers": 1}


def test_the_load_of_experts_is_among_the_metrics():
    """Fails if the metrics of a mixture do not show how busy its experts are, or another model's
    have a row of it."""
    mixture = {"num_kv_heads": 1, "num_experts": 4, "num_experts_per_token": 2}
    model = Mixtral(MixtralConfig(**SIZES, **mixture, feed_forward_size=8))
    model(tf.constant(np.arange(16).reshape(2, 8) % 11, tf.int32), training=True)
    routing = train._routing(model)
    assert 0 <= routing["moe_load_min"] <= 1 / 4 <= routing["moe_load_max"] <= 1 / 2
    assert all(isinstance(value, float) for value in routing.values())
    assert train._routing(GPT(GPTConfig(**SIZES))) == {}
