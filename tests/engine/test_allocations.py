"""The plan's predicted peak against what the passes allocate, counted on fake CUDA tensors."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaModel

from local_tinker.engine.footprint import Choice, TrainSettings, deepest_moment, standing_parts
from local_tinker.model.levels import LEVELS
from tests.engine.allocations import Counter, traced_peak
from tests.engine.shapes import LLAMA_3B, LLAMA_8B, QWEN_7B, SMOL


def predicted(dims, settings, choice):
    return (
        sum(deepest_moment(dims, settings, choice).values()) + standing_parts(dims, settings, choice)["dequantisation"]
    )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "dims, rank, documents",
    [(LLAMA_3B, 32, (500,) * 16), (QWEN_7B, 16, (500,) * 16), (LLAMA_8B, 32, (32768,))],
    ids=["3B", "7B", "8B long"],
)
def test_the_predicted_peak_is_what_is_allocated(dims, rank, documents, level):
    dims, settings = replace(dims, layers=6), TrainSettings(rank=rank)
    choice = Choice(tokens=sum(documents), levels=(level,) * dims.layers, head_rows=1024)
    assert predicted(dims, settings, choice) == pytest.approx(traced_peak(dims, settings, choice, documents), rel=0.1)


@pytest.mark.parametrize("level", ["layer", "offload"])
@pytest.mark.parametrize("tokens, tile", [(6000, 2048), (8000, 2048), (16000, 4096)])
def test_tiles_of_the_mlp(level, tokens, tile):
    dims, settings = replace(LLAMA_3B, layers=6), TrainSettings(rank=32)
    choice = Choice(tokens=tokens, levels=(level,) * 6, head_rows=512, tile=tile)
    traced = traced_peak(dims, settings, choice, (tokens,))
    assert traced < 0.9 * traced_peak(dims, settings, replace(choice, tile=tokens), (tokens,))
    assert predicted(dims, settings, choice) == pytest.approx(traced, rel=0.1)


@pytest.mark.parametrize("resident", [0, 3, 6])
def test_mixed_levels_and_weights_held(resident):
    dims, settings = replace(LLAMA_3B, layers=6), TrainSettings(rank=32)
    levels = ("attention_mlp",) * 3 + ("mlp",) * 3
    choice = Choice(tokens=5000, levels=levels, head_rows=512, resident_layers=resident)
    traced = traced_peak(dims, settings, choice, (1000,) * 5)
    assert predicted(dims, settings, choice) == pytest.approx(traced, rel=0.1)


def eager_peak(dims, tokens, again):
    """Of one document in transformers' layers with their own attention."""
    config = LlamaConfig(
        hidden_size=dims.hidden, intermediate_size=dims.intermediate, num_hidden_layers=dims.layers,
        num_attention_heads=dims.heads, num_key_value_heads=dims.kv_heads, vocab_size=dims.vocab,
    )  # fmt: skip
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = LlamaModel(config).to(torch.bfloat16).eval().requires_grad_(False)
        hidden = torch.empty(1, tokens, dims.hidden, dtype=torch.bfloat16, requires_grad=True)
        mask, positions = torch.empty(1, 1, tokens, tokens, dtype=torch.bfloat16), torch.arange(tokens)[None]
    for layer in model.layers if again else ():
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    with Counter() as counter:
        out = model(inputs_embeds=hidden, position_ids=positions, attention_mask=mask, use_cache=False)
        out.last_hidden_state.sum().backward()
    return counter.peak


@pytest.mark.parametrize("level", ["norms", "layer"])
@pytest.mark.parametrize("layers", [1, 3])
def test_scores_of_documents_that_run_alone(level, layers):
    dims, settings = replace(SMOL, layers=layers, vocab=64), TrainSettings(rank=0, plain=True, alone=True)

    def ours(tokens):
        choice = Choice(tokens=tokens, levels=(level,) * layers, head_rows=256)
        return sum(deepest_moment(dims, settings, choice).values())

    def square(peak):  # what grows with the length itself goes
        return peak(16384) - 2 * peak(8192)

    assert square(ours) == pytest.approx(square(lambda n: eager_peak(dims, n, level == "layer")), rel=0.02)
