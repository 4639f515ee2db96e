"""The plan's predicted peak against what the passes allocate, counted on fake CUDA tensors."""

from dataclasses import replace

import pytest

from local_tinker.engine.footprint import Choice, TrainSettings, deepest_moment, standing_parts
from local_tinker.model.levels import LEVELS
from tests.engine.allocations import traced_peak
from tests.engine.shapes import LLAMA_3B, LLAMA_8B, QWEN_7B


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
