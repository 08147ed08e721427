"""The closed formulas of what a step sends, against those of the papers, written out by hand."""

import dataclasses

import pytest

from llmos_tf.config import GPTConfig, LlamaConfig, MixtralConfig, ModelConfig
from llmos_tf.mesh import Mesh
from llmos_tf.planning import TrainingStep, step_traffic, wire_bytes
from llmos_tf.planning.weights import weights_of

pytestmark = pytest.mark.fast

# Sizes that 4 divides, so that nothing is padded.
GPT = GPTConfig(vocab_size=512, max_positions=64, hidden_size=64, num_heads=4, num_layers=4)
LLAMA = LlamaConfig(
    vocab_size=512,
    max_positions=64,
    hidden_size=64,
    num_heads=8,
    num_kv_heads=4,
    num_layers=4,
    feed_forward_size=128,
)
MIXTRAL = MixtralConfig(
    vocab_size=512,
    max_positions=64,
    hidden_size=64,
    num_heads=4,
    num_layers=2,
    feed_forward_size=128,
    num_experts=8,
    num_experts_per_token=2,
)
ROWS, LENGTH = 8, 64
STREAM = ROWS * LENGTH * 64 * 4


def sent(config, mesh, stage=None, **options):
    step = TrainingStep(
        config=config, mesh=mesh, global_batch=ROWS, sequence_length=LENGTH, **options
    )
    return {(row["axis"], row["kind"]): row["bytes"] for row in step_traffic(step, stage)}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("all_reduce", 1500),
        ("all_gather", 750),
        ("reduce_scatter", 750),
        ("all_to_all", 750),
        ("permute", 1000),
        ("send", 1000),
    ],
)
def test_shares(kind, expected):
    """Fails for the share of another collective, or N in place of N - 1."""
    assert wire_bytes(kind, 4, 1000) == expected


@pytest.mark.parametrize(
    "config",
    [GPT, LLAMA, MIXTRAL, dataclasses.replace(LLAMA, tie_embeddings=True, num_kv_heads=8)],
    ids=["gpt", "llama", "mixtral", "tied"],
)
def test_the_weights_are_those_of_the_model(config):
    """Fails if a weight is missing, is there twice, or has another shape."""
    mesh = Mesh()
    weights = weights_of(config, mesh)
    assert sum(w.slice_elements(mesh) for w in weights) == config.num_parameters()


def test_zero():
    """ZeRO, section 7: 2Ψ for stages 0 to 2 and 3Ψ for stage 3, Ψ parameters of 4 bytes, of which
    each rank keeps a part of its own. Fails if a stage sends as another one."""
    psi = LLAMA.num_parameters() * 4 * 3 // 4
    assert sent(LLAMA, Mesh(data=4)) == {("data", "all_reduce"): 2 * psi}
    for stage in (1, 2):
        halves = {("data", "all_gather"): psi, ("data", "reduce_scatter"): psi}
        assert sent(LLAMA, Mesh(data=4), zero_stage=stage) == halves
    kept = {("fsdp", "all_gather"): psi, ("fsdp", "reduce_scatter"): psi}
    assert sent(LLAMA, Mesh(fsdp=4), zero_stage=3) == kept
    # A tied table counts once.
    assert sent(GPT, Mesh(fsdp=4))["fsdp", "all_gather"] == GPT.num_parameters() * 4 * 3 // 4
    # Embedding, last norm and logits are no blocks, and stay as they are gathered.
    outside = (2 * LLAMA.vocab_size + 1) * LLAMA.hidden_size * 4 * 3 // 4
    again = {("fsdp", "all_gather"): 2 * psi - outside, ("fsdp", "reduce_scatter"): psi}
    assert sent(LLAMA, Mesh(fsdp=4), zero_stage=3, reshard_after_forward=True) == again


def test_padding():
    """Fails if a part is rounded down, or the sum of the parameters is padded in place of each."""
    config = GPTConfig(vocab_size=5, max_positions=1, hidden_size=2, num_heads=1, num_layers=1)
    # Elements by weight; each is filled up to a multiple of 3.
    block = [2, 2, 2, 2, 12, 6, 4, 2, 16, 8, 16, 2]
    padded = sum(-(-n // 3) * 3 for n in [*block, 10, 2, 2, 2])
    rows = step_traffic(
        TrainingStep(
            config=config, mesh=Mesh(data=3), global_batch=3, sequence_length=1, zero_stage=1
        )
    )
    assert [row["bytes"] for row in rows] == [padded * 4 * 2 // 3] * 2


def test_tensor_and_sequence():
    """Megatron-LM: four all-reduces of the stream in a block, two for embedding and logits, and
    three numbers for each token's loss. Sequence parallelism: halves of them, and the gradients of
    what is between the regions. Fails if one is missing."""
    losses = 3 * ROWS * LENGTH * 4
    stream = (4 * 4 + 2) * STREAM
    assert sent(LLAMA, Mesh(tensor=2)) == {("tensor", "all_reduce"): stream + losses}
    norms = (2 * 4 + 1) * 64 * 4
    assert sent(LLAMA, Mesh(tensor=2), sequence_parallel=True) == {
        ("tensor", "all_gather"): stream // 2,
        ("tensor", "reduce_scatter"): stream // 2,
        ("tensor", "all_reduce"): losses + norms,
    }


def test_context():
    """Ring attention: keys and values p - 1 times forward and backward, their gradients p times.
    Ulysses: queries, keys, values and results, forward and backward. Fails if one is missing, or
    if grouped heads travel as many as there are queries."""
    # Half as many key-value heads as query heads; each rank has a quarter of the positions.
    keys = STREAM // 4 // 2
    ring = sent(LLAMA, Mesh(context=4))
    assert ring["context", "permute"] == 4 * 2 * keys * (2 * 3 + 4)
    losses = ROWS * LENGTH * 4 * 3 // 4
    assert ring["context", "all_gather"] == losses
    assert ring["context", "all_reduce"] == LLAMA.num_parameters() * 4 * 2 * 3 // 4
    heads = sent(LLAMA, Mesh(context=4), context_method="ulysses")
    assert heads["context", "all_to_all"] == 4 * 2 * (2 * STREAM // 4 + 2 * keys) * 3 // 4


def test_experts():
    """GShard: the chosen rows to their experts and back, forward and backward. Fails if a choice
    travels once for all of a token's experts, or experts' gradients are summed over the axis."""
    found = sent(MIXTRAL, Mesh(expert=4))
    # Two choices for each of a quarter of the tokens, four times in each of two blocks.
    assert found["expert", "all_to_all"] == 2 * 4 * (2 * STREAM // 4) * 3 // 4
    experts = 2 * 8 * 3 * 64 * 128
    rest = MIXTRAL.num_parameters() - experts
    assert found["expert", "all_reduce"] == rest * 4 * 2 * 3 // 4


def test_pipeline():
    """Activations over each cut of a stage, and gradients back, once for each microbatch. Fails if
    a stage sends over cuts that it does not have, or the tied table is not added up."""
    table = 512 * 64 * 4
    mesh = Mesh(pipe=4)
    by_stage = [sent(GPT, mesh, stage)["pipe", "send"] for stage in range(4)]
    assert by_stage == [STREAM + table, 2 * STREAM, 2 * STREAM, STREAM + table]
    assert sent(GPT, mesh)["pipe", "send"] == max(by_stage)
    # Seven cuts of eight parts, of which a stage in the middle has four.
    many = dataclasses.replace(GPT, num_layers=8)
    chunks = {"schedule": "interleaved", "num_chunks": 2, "num_microbatches": 8}
    assert sent(many, mesh, 1, **chunks)["pipe", "send"] == 4 * STREAM
    assert sent(LLAMA, Mesh(pipe=4), 0)["pipe", "send"] == STREAM
    # Of the shares of the blocks that lie there.
    uneven = sent(LLAMA, Mesh(pipe=2, data=2), 0, blocks_of_part=[3, 1])
    block = sum(w.slice_elements(mesh) for w in weights_of(LLAMA, mesh) if w.units == (0,))
    assert uneven["data", "all_reduce"] == (3 * block + 512 * 64) * 4


def test_what_does_not_go_up():
    """Fails if a plan is made of what cannot run."""
    with pytest.raises(ValueError, match="8 rows is no multiple of 3"):
        sent(GPT, Mesh(data=3))
    with pytest.raises(ValueError, match="a multiple of 6"):
        sent(GPT, Mesh(context=3))
    with pytest.raises(ValueError, match="4 blocks lie in 2 part"):
        sent(GPT, Mesh(pipe=2), blocks_of_part=[4])
    with pytest.raises(ValueError, match="Received: 'gossip'"):
        wire_bytes("gossip", 2, 1)
    with pytest.raises(ValueError, match="Received: ModelConfig"):
        weights_of(ModelConfig(), Mesh())
