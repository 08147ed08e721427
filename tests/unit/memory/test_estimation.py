"""What an estimate refuses."""

import pytest

from llmos_tf import Mesh, memory
from llmos_tf.config import GPTConfig, ModelConfig

pytestmark = pytest.mark.fast

CONFIG = GPTConfig(
    vocab_size=64, max_positions=16, hidden_size=16, num_heads=2, num_layers=2, dropout=0.0
)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"global_batch": 3}, "global_batch=3"),
        ({"dtype_policy": "int8"}, "Received: 'int8'"),
        ({"rematerialise": "some"}, "selective. Received: 'some'"),
        ({"optimizer": "adafactor"}, "Received: adafactor"),
        ({"mesh": Mesh(tensor=4)}, "axis tensor of size 4"),
        ({"mesh": Mesh(context=3)}, "context axis of 3"),
        ({"config": ModelConfig()}, "LlamaConfig or MixtralConfig"),
    ],
)
def test_what_it_refuses(changed, words):
    """Fails if nonsense gives a number, or an error does not say what was received."""
    values = {"config": CONFIG, "mesh": Mesh(data=2), "global_batch": 4, **changed}
    with pytest.raises(ValueError, match=words):
        memory.estimate(values.pop("config"), values.pop("mesh"), **values)
