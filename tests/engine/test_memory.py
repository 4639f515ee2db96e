"""The choice: fastest of what fits, honest about what does not, and always smaller after running out."""

from dataclasses import replace

import pytest

from local_tinker.engine.cost import time_per_token
from local_tinker.engine.footprint import GIB, Choice, TrainSettings, host_bytes, layer_wide_bytes, total_bytes
from local_tinker.engine.memory import (
    HEAD_ROWS,
    PIECES,
    TOKENS,
    USABLE,
    choose,
    describe,
    least_bytes,
    plan_training,
    sampler_tokens,
    smaller_limit,
    status,
    usable_bytes,
)
from local_tinker.model.levels import LEVELS
from tests.engine.shapes import LLAMA_3B, LLAMA_8B, QWEN_7B, SMOL

MODELS = pytest.mark.parametrize("dims", [LLAMA_3B, LLAMA_8B, QWEN_7B, SMOL], ids=["3B", "8B", "7B", "135M"])
SETTINGS = TrainSettings(started=True)


def test_memory_to_spare_gives_large_micro_batches_nothing_recomputed_and_everything_resident():
    plan = plan_training(LLAMA_3B, SETTINGS, 80 * GIB)
    assert plan.choice == Choice(tokens=8192, levels=("norms",) * 28, resident_layers=28, head_rows=2048)
    assert plan.fits and plan.host_bytes == 0


@MODELS
@pytest.mark.parametrize("free", [2, 4, 6, 8, 12, 16, 24, 48, 80, 141])
def test_a_plan_that_fits_fills_no_more_than_its_share_and_its_parts_add_up(dims, free):
    plan = plan_training(dims, SETTINGS, free * GIB)
    assert plan.total == sum(plan.parts.values()) == total_bytes(dims, SETTINGS, plan.choice)
    assert plan.fits == (plan.total <= 0.92 * free * GIB)
    assert all(size >= 0 for size in plan.parts.values())


@MODELS
def test_more_memory_never_gives_a_slower_plan(dims):
    last = float("inf")
    for quarter in range(4, 200, 7):
        plan = plan_training(dims, SETTINGS, quarter * GIB // 4)
        if plan.fits:
            time = time_per_token(dims, SETTINGS, plan.choice) + 1e15 * (plan.choice.tokens < 2048)
            assert time <= last, quarter
            last = time


def every_choice(dims):
    """Plain search over whole levels, micro-batches, head rows and places of the moments."""
    for level in LEVELS:
        for tokens in TOKENS:
            for rows in HEAD_ROWS:
                for parked in (False, True):
                    yield Choice(tokens=tokens, levels=(level,) * dims.layers, head_rows=rows, parked_moments=parked)


@pytest.mark.parametrize("free", [4, 6, 9, 14])
def test_no_plain_choice_that_fits_is_faster(free):
    found = plan_training(LLAMA_3B, SETTINGS, free * GIB).choice
    within = [
        c for c in every_choice(LLAMA_3B) if total_bytes(LLAMA_3B, SETTINGS, c) <= usable_bytes(SETTINGS, free * GIB)
    ]
    assert len(within) > 20
    assert found.tokens >= 2048
    assert time_per_token(LLAMA_3B, SETTINGS, found) <= min(time_per_token(LLAMA_3B, SETTINGS, c) for c in within)


def test_two_neighbouring_levels_fill_the_memory_the_deeper_one_first():
    seen = set()
    for free in range(16, 40):
        plan = plan_training(LLAMA_8B, TrainSettings(started=True, tokens=8192), free * GIB // 2)
        levels = plan.choice.levels
        depths = [LEVELS.index(level) for level in levels]
        assert depths == sorted(depths, reverse=True) and max(depths) - min(depths) <= 1
        if len(set(levels)) == 2 and plan.choice.resident_layers == 0:
            seen.add(levels[0])
            shallower = (levels[0],) * (levels.count(levels[0]) - 1) + (levels[-1],) * (levels.count(levels[-1]) + 1)
            assert total_bytes(LLAMA_8B, SETTINGS, replace(plan.choice, levels=shallower)) > 0.92 * free * GIB / 2
    assert seen >= {"mlp", "attention_mlp", "layer"}


def test_left_over_memory_holds_dequantised_layers():
    some = plan_training(LLAMA_8B, SETTINGS, 40 * GIB)
    assert 0 < some.choice.resident_layers < 32 and set(some.choice.levels) == {"norms"}
    spare = usable_bytes(SETTINGS, 40 * GIB) - some.total
    assert 0 <= spare < layer_wide_bytes(LLAMA_8B, SETTINGS)
    assert plan_training(LLAMA_8B, TrainSettings(quantize="none"), 80 * GIB).choice.resident_layers == 0


def test_micro_batches_under_2048_tokens_are_the_last_resort():
    for free in range(24, 60, 3):
        plan = plan_training(QWEN_7B, SETTINGS, free * GIB // 4)
        if plan.choice.tokens < 2048 and plan.fits:
            smallest = Choice(tokens=2048, levels=("offload",) * 28, head_rows=256, parked_moments=True)
            assert total_bytes(QWEN_7B, SETTINGS, smallest) > usable_bytes(SETTINGS, free * GIB // 4)


def test_a_long_sequence_is_never_cut():
    plan = plan_training(LLAMA_3B, TrainSettings(seq_len=20_000), 24 * GIB)
    assert plan.choice.tokens >= 20_000 and plan.fits
    assert LEVELS.index(plan.choice.levels[0]) > LEVELS.index("norms")
    assert not plan_training(LLAMA_3B, TrainSettings(seq_len=800_000), 24 * GIB).fits


def test_longest_context_of_the_8b_on_a_24_gb_card():
    # published for a peer that offloads layer inputs and does not tile: 78,475 tokens on 24 GB
    settings = TrainSettings(started=True, seq_len=80_000)
    plan = plan_training(LLAMA_8B, settings, int(22.5 * GIB))
    assert plan.fits and plan.choice.levels.count("offload") > 0
    assert plan.host_bytes == host_bytes(LLAMA_8B, settings, plan.choice)


def test_a_chosen_token_budget_is_kept_to_and_cpus_have_a_lower_one():
    for free in (1, 24):
        assert plan_training(SMOL, TrainSettings(tokens=1000), free * GIB).choice.tokens == 1000
    assert plan_training(SMOL, SETTINGS, 24 * GIB).choice.tokens == 8192
    on_cpu = plan_training(SMOL, TrainSettings(kind="cpu"), 24 * GIB).choice
    assert on_cpu.tokens == 4096


def test_a_cpu_parks_nothing_on_itself():
    for mib in range(300, 3000, 300):
        choice = plan_training(SMOL, TrainSettings(kind="cpu"), mib * 2**20).choice
        assert not choice.parked_moments and "offload" not in choice.levels


def test_the_host_must_have_room_for_what_is_parked():
    tight = replace(SETTINGS, host_bytes=0)
    for free in (4, 5, 8):
        choice = plan_training(LLAMA_3B, tight, free * GIB).choice
        assert not choice.parked_moments and "offload" not in choice.levels
    assert plan_training(LLAMA_3B, SETTINGS, 4 * GIB).host_bytes > 0


def test_only_levels_the_road_has_are_chosen():
    plan = plan_training(LLAMA_3B, TrainSettings(levels=("norms", "layer"), plain=True), 8 * GIB)
    assert set(plan.choice.levels) <= {"norms", "layer"} and "layer" in plan.choice.levels


@MODELS
@pytest.mark.parametrize("start", [5, 12, 40])
def test_running_out_steps_down_to_the_smallest_plan_and_then_to_none(dims, start):
    """Each next choice needs less, none asks for more than the limit, and the last one is the least there is."""
    choice, steps = plan_training(dims, SETTINGS, start * GIB).choice, 0
    settings = replace(SETTINGS, fewer=True)
    while (limit := smaller_limit(dims, settings, choice)) is not None:
        before = total_bytes(dims, settings, choice)
        choice, _ = choose(dims, settings, limit)
        assert total_bytes(dims, settings, choice) < before
        steps += 1
    assert total_bytes(dims, settings, choice) == least_bytes(dims, settings, 512)
    assert steps <= 25


def test_a_first_step_down_keeps_most_of_the_speed():
    choice = plan_training(LLAMA_3B, SETTINGS, 24 * GIB).choice
    limit = smaller_limit(LLAMA_3B, SETTINGS, choice)
    smaller, fits = choose(LLAMA_3B, SETTINGS, limit)
    assert fits and time_per_token(LLAMA_3B, SETTINGS, smaller) < 1.1 * time_per_token(LLAMA_3B, SETTINGS, choice)


def test_the_users_tokens_shrink_only_after_running_out():
    settings = TrainSettings(started=True, tokens=6000)
    limit = least_bytes(LLAMA_3B, settings, 2048)
    kept, fits = choose(LLAMA_3B, settings, limit)
    assert kept.tokens == 6000 and not fits
    fewer, fits = choose(LLAMA_3B, replace(settings, fewer=True), limit)
    assert fewer.tokens <= 2048 and fits
    assert choose(LLAMA_3B, replace(settings, fewer=True), 80 * GIB)[0].tokens == 6000


def test_status_turns_where_a_step_of_4096_and_one_of_512_tokens_stop_fitting():
    ready, tight = (least_bytes(QWEN_7B, SETTINGS, n) / USABLE["cuda"] for n in (4096, 512))
    found = [status(QWEN_7B, int(b), SETTINGS) for b in (ready + 4, ready - 4, tight + 4, tight - 4)]
    assert found == ["ready", "tight", "tight", "OOM"]


@MODELS
def test_status_agrees_with_the_plan(dims):
    for free in range(1, 50, 4):
        fits = plan_training(dims, SETTINGS, free * GIB // 4).fits
        assert (status(dims, free * GIB // 4, SETTINGS) == "OOM") == (not fits), free


def test_everyday_pairs_of_model_and_card():
    # 8B QLoRA on 24 GB and 3B on 8 GB are common practice; 8B in 6 GB is not
    assert status(LLAMA_8B, 24 * GIB) == status(LLAMA_3B, 8 * GIB) == "ready"
    assert status(LLAMA_8B, 6 * GIB) == "OOM"


def test_levers_save_what_they_say_cheapest_first():
    plan = plan_training(LLAMA_8B, SETTINGS, 44 * GIB)
    assert [lever.change for lever in plan.levers] == [
        "no dequantised weights kept",
        "micro-batches of 4,096 tokens",
        "every layer at recompute level 'mlp'",
    ]
    choices = [replace(plan.choice, resident_layers=0), replace(plan.choice, tokens=4096)]
    choices.append(replace(plan.choice, levels=("mlp",) * 32))
    for lever, other in zip(plan.levers, choices, strict=True):
        assert lever.saves == plan.total - total_bytes(LLAMA_8B, SETTINGS, other) > 0
        ratio = time_per_token(LLAMA_8B, SETTINGS, other) / time_per_token(LLAMA_8B, SETTINGS, plan.choice)
        assert lever.slower == pytest.approx(ratio - 1)
    assert plan.levers == tuple(sorted(plan.levers, key=lambda lever: lever.slower / lever.saves))


def test_what_only_the_user_can_give_up_comes_last():
    plan = plan_training(LLAMA_8B, TrainSettings(quantize="8bit", seq_len=60_000), 10 * GIB)
    assert not plan.fits
    found = {lever.change: lever for lever in plan.levers}
    assert list(found) == ['quantize="4bit"', "max_length=30000", "rank=16"]
    assert all(lever.slower is None and lever.saves > 0 for lever in plan.levers)
    short = TrainSettings(quantize="8bit", seq_len=30_000)
    expected = plan.total - total_bytes(LLAMA_8B, short, replace(plan.choice, tokens=30_000))
    assert found["max_length=30000"].saves == expected


def test_the_choice_in_words():
    choice = Choice(tokens=4096, levels=("mlp",) * 2 + ("norms",) * 3, resident_layers=1, parked_moments=True)
    assert describe(choice, TrainSettings()) == (
        "micro-batches of 4,096 tokens, recompute levels 'mlp' (2 layers), 'norms' (3 layers), "
        "1 of 5 layers held dequantised, moments in host memory"
    )
    kept = Choice(tokens=512, levels=("norms",) * 2)
    assert describe(kept, TrainSettings(quantize="none")) == "micro-batches of 512 tokens, activations kept"
    eight = describe(kept, TrainSettings(quantize="none", fp8=True))
    assert eight.endswith("activations kept, 0 of 2 layers held in 8-bit floats")


def test_the_samplers_cache_takes_two_fifths_of_what_the_weights_leave():
    # 8B: 128 KiB a position; 20 GiB less 3.35 and 1.96 of weights
    weights = plan_training(LLAMA_8B, SETTINGS, 20 * GIB).parts
    spare = 20 * GIB - weights["base weights"] - weights["embeddings and head"]
    assert sampler_tokens(LLAMA_8B, SETTINGS, 20 * GIB, most=10**9) == int(0.4 * spare) // (128 * 1024)
    assert sampler_tokens(LLAMA_8B, SETTINGS, 20 * GIB, most=5000) == 5000
    assert sampler_tokens(LLAMA_8B, SETTINGS, 0, most=10**9) == 4096


def test_a_plan_leaves_a_card_what_lies_between_tensors_however_little_is_free():
    counted = [usable_bytes(SETTINGS, free) for free in (8 * GIB, 2 * GIB, GIB, GIB // 8)]
    assert counted == [int(0.92 * 8 * GIB), 2 * GIB - PIECES, GIB - PIECES, GIB // 16]
    on_a_cpu = replace(SETTINGS, kind="cpu")
    assert usable_bytes(on_a_cpu, GIB // 8) == int(USABLE["cpu"] * GIB / 8)
