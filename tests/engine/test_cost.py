"""Predicted time: its factors against tables worked from operation counts, its order against what is known."""

from dataclasses import replace

import pytest

from local_tinker.engine.cost import time_per_token
from local_tinker.engine.footprint import Choice, TrainSettings
from tests.engine.shapes import LLAMA_3B, LLAMA_8B, QWEN_7B

BASE = Choice(tokens=8192, levels=("norms",) * 28)


@pytest.mark.parametrize(
    "dims, rank, gflop",
    [
        # table, sequences of 2,048: nothing, gate/up, qkv and gate/up, the layer without down_proj computed again
        (LLAMA_3B, 32, (14.38, 17.19, 18.08, 18.98)),
        (LLAMA_8B, 32, (32.40, 39.92, 41.53, 43.31)),
        (QWEN_7B, 16, (29.96, 37.57, 38.49, 39.71)),
    ],
    ids=["3B", "8B", "7B"],
)
def test_recomputation_costs_what_its_operations_cost(dims, rank, gflop):
    settings = TrainSettings(rank=rank, quantize="none")
    for level, expected in zip(("norms", "mlp", "attention_mlp", "layer"), gflop, strict=True):
        only_operations = Choice(tokens=2**40, levels=(level,) * dims.layers, head_rows=2**30, tile=2**40)
        found = time_per_token(dims, settings, only_operations, context=2048)
        assert found == pytest.approx(expected * 1e9, rel=0.01), level


@pytest.mark.parametrize(
    "worse",
    [
        dict(levels=("mlp",) + ("norms",) * 27),
        dict(tokens=4096),
        dict(parked_moments=True),
        dict(resident_layers=14),
        dict(head_rows=256),
    ],
)
def test_every_way_to_save_memory_takes_time(worse):
    full = replace(BASE, resident_layers=28)
    assert time_per_token(LLAMA_3B, TrainSettings(), replace(full, **worse)) > time_per_token(
        LLAMA_3B, TrainSettings(), full
    )


def test_dequantisation_is_two_percent_of_a_step_of_8192_tokens():
    # 3B: 7.1 GB a pass (table) are 1.5 ms at 4.8 TB/s, twice, of 149 ms at 790 TFLOP/s
    settings = TrainSettings()
    every = time_per_token(LLAMA_3B, settings, replace(BASE, resident_layers=28))
    none = time_per_token(LLAMA_3B, settings, BASE)
    assert (none - every) / every == pytest.approx(0.02, abs=0.003)
    short = replace(BASE, tokens=1024)
    assert time_per_token(LLAMA_3B, settings, short) - time_per_token(
        LLAMA_3B, settings, replace(short, resident_layers=28)
    ) == pytest.approx(8 * (none - every))
    unquantised = [
        time_per_token(LLAMA_3B, TrainSettings(quantize="none"), replace(BASE, resident_layers=n)) for n in (0, 28)
    ]
    assert unquantised[0] == unquantised[1]


def test_resident_layers_spare_what_they_would_have_computed_with():
    # a recomputed layer dequantises gate and up once more, so keeping that one resident gains more
    settings, deep = TrainSettings(), replace(BASE, levels=("mlp",) + ("norms",) * 27)
    plain_gain = time_per_token(LLAMA_3B, settings, BASE) - time_per_token(
        LLAMA_3B, settings, replace(BASE, resident_layers=1)
    )
    deep_gain = time_per_token(LLAMA_3B, settings, deep) - time_per_token(
        LLAMA_3B, settings, replace(deep, resident_layers=1)
    )
    weights = 2 * 100_663_296 + 2 * 3072 * 8192  # twice 100.7M weights a layer, and gate and up again
    assert deep_gain / plain_gain == pytest.approx(weights / (2 * 100_663_296))


def test_products_of_8_bit_floats_take_less_time_unless_they_are_many_and_small():
    dense, eight = TrainSettings(), TrainSettings(fp8=True)
    held = replace(BASE, resident_layers=28)
    assert 0.6 < time_per_token(LLAMA_3B, eight, held) / time_per_token(LLAMA_3B, dense, held) < 0.95
    small = replace(held, tokens=1024)
    assert time_per_token(LLAMA_3B, eight, small) > time_per_token(LLAMA_3B, dense, small)
    # making them costs more than dequantising alone
    cost = [time_per_token(LLAMA_3B, s, BASE) - time_per_token(LLAMA_3B, s, held) for s in (dense, eight)]
    assert cost[1] > 3 * cost[0] > 0
