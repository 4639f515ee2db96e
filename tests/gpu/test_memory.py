"""Memory on a card: real exhaustion, parked moments, copies beside the computation. Run by hand: pytest -m gpu tests."""

import gc
from dataclasses import replace

import pytest
import torch

from local_tinker import Datum, ModelInput, ServiceClient, out_of_memory
from local_tinker.engine.optimiser import FlatAdamW, GradientWindow, clip
from local_tinker.errors import DeviceMemoryError
from local_tinker.model.levels import LEVELS
from local_tinker.types import AdamParams
from tests.test_training import ROWS, everything, inner, relative, same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card"),
]
MIB = 2**20


@pytest.fixture
def cap():
    """Limits this process to what it has reserved and some MiB more; the limit is lifted afterwards."""

    def to(more_mib):
        gc.collect()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more_mib * MIB) / total)

    yield to
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Wide enough for megabytes: 4 layers of 256, 32,000 words."""
    from tests import tiny

    return tiny.save(
        tmp_path_factory.mktemp("models") / "wide",
        vocab_size=32000,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=65536,
    )


def trainer_on(folder, **options):
    service = ServiceClient(device="cuda", quiet=True)
    trainer = service.create_lora_training_client(str(folder), **{"rank": 8, "seed": 1, "quantize": "4bit", **options})
    assert inner(trainer).model.fast is not None  # or offload and tiles would not be tested
    return trainer


def allocated():
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def test_a_call_too_large_for_the_card_is_repeated_smaller_and_memory_comes_back_twenty_times(folder, cap):
    trainer = trainer_on(folder)
    state, plan = inner(trainer), inner(trainer).budget
    trainer.try_longest([64])
    before, start = everything(trainer), allocated()
    for _ in range(20):
        state.budget = plan  # made for the whole card
        cap(300)
        trainer.try_longest([1024] * 8)
        assert state.budget.total < plan.total, "the card was never short"
        assert same(before, everything(trainer))
        assert allocated() - start < MIB  # a smaller plan may hold less
    trainer.forward_backward(ROWS)
    assert trainer.optim_step().step == 1


def test_a_document_that_fits_in_no_way_is_a_typed_error_and_the_next_request_succeeds_twenty_times(folder, cap):
    trainer = trainer_on(folder)
    trainer.forward_backward(ROWS)
    before, start = everything(trainer), allocated()
    for _ in range(20):
        cap(200)
        with pytest.raises(DeviceMemoryError, match="no smaller plan is left"):
            trainer.try_longest([60_000])
        assert same(before, everything(trainer))
        assert allocated() - start < MIB
        trainer.try_longest([64])
    assert trainer.optim_step().step == 1


def test_the_longest_document_takes_a_deeper_plan_before_it_fails(folder, cap):
    trainer = trainer_on(folder)
    cap(20_000)
    state = inner(trainer)
    state.budget = state.budget.within(state.budget.total)
    longest = 2 * state.budget.micro_batch_tokens
    choice = state.budget.choice_for(longest)
    assert set(choice.levels) != {"norms"}
    trainer.try_longest([longest])
    assert state.budget.choice_for(longest) == choice


def test_parked_moments_give_the_bits_of_resident_ones_on_the_card(monkeypatch):
    from local_tinker.engine import optimiser as module

    monkeypatch.setattr(module, "MOMENT_SLICE", 2**16)
    torch.manual_seed(0)
    masters = [torch.randn(1_000_003, device="cuda")]
    masters.append(masters[0].clone())
    optimisers = [FlatAdamW(masters[0]), FlatAdamW(masters[1], parked=True)]
    for i in range(10):
        window = GradientWindow(1_000_003, torch.float32, torch.device("cuda"))
        window.buffer("sft").normal_()
        if i == 4:
            window.buffer("sft")[7] = float("nan")
        window.add_weight("sft", torch.tensor(3.0, device="cuda"))
        factor, _, bad = clip([window.norm()], 1.0)
        for optimiser in optimisers:
            optimiser.prepare(window, AdamParams(learning_rate=1e-2), factor=factor, bad=bad)()
    assert optimisers[1].m.device.type == "cpu" and optimisers[1].m.is_pinned()
    assert torch.equal(masters[0], masters[1]) and int(optimisers[1].count) == 9
    assert torch.equal(optimisers[0].m.cpu(), optimisers[1].m) and torch.equal(optimisers[0].v.cpu(), optimisers[1].v)


def test_a_backup_taken_beside_the_computation_is_what_was_there():
    window = GradientWindow(5_000_000, torch.float32, torch.device("cuda"))
    for i in range(20):
        window.buffer("sft").fill_(float(i))
        window.calls = 1
        before = torch.cuda.memory_allocated()
        backup = window.backup()
        assert torch.cuda.memory_allocated() == before  # nothing on the card
        torch.mm(torch.randn(2048, 2048, device="cuda"), torch.randn(2048, 2048, device="cuda"))
        backup.wait()
        window.buffer("sft").add_(100.0)
        window.restore(backup)
        window.buffer("sft").add_(0.5)  # goes on before the host looks
        assert float(window.buffer("sft")[0]) == float(window.buffer("sft")[-1]) == i + 0.5


def test_giving_back_returns_what_a_failed_attempt_held():
    start, held = allocated(), []

    def attempt():
        held.append(1)
        block = torch.empty(256 * MIB, dtype=torch.uint8, device="cuda")
        cycle = [block]
        cycle.append(cycle)
        if len(held) < 3:
            raise torch.OutOfMemoryError("no memory")
        del block, cycle
        return torch.cuda.memory_allocated()

    out_of_memory.until_it_fits(attempt, step_down=lambda: abs(allocated() - start) < MIB)
    assert len(held) == 3 and abs(allocated() - start) < MIB


def long_rows(count, tokens):
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(0, 32000, (count, tokens + 1), generator=generator).tolist()
    return [Datum(ModelInput.from_ints(row[:-1]), {"target_tokens": row[1:]}) for row in rows]


@pytest.mark.parametrize("quantize", ["4bit", None])
def test_what_layers_keep_and_tiles_change_rounding_at_most_and_parking_not_even_that(folder, quantize):
    trainer, found = trainer_on(folder, quantize=quantize, dtype="bfloat16", micro_batch_tokens=8192), {}
    state = inner(trainer)
    state.adapter.master.normal_(generator=torch.Generator("cuda").manual_seed(5), std=0.02)
    state.adapter.refresh()
    batch, budget = long_rows(8, 2000), state.budget
    for level in LEVELS:
        for tile in (8192, 2048):
            choice = replace(budget.choice, levels=(level,) * 4, tile=tile, resident_layers=0)
            state.budget = replace(budget, choice=choice)
            for attempt in range(3):  # the host is far ahead by the third
                trainer.forward_backward(batch)
                gradient = state.window.gradient().clone()
                state.discard_gradients()
                assert attempt == 0 or torch.equal(gradient, found[level, tile])
                found[level, tile] = gradient
    want = found["norms", 8192]
    assert all(relative(gradient, want) < 2e-2 for gradient in found.values())
    assert torch.equal(found["layer", 2048], found["offload", 2048])
    assert torch.equal(found["layer", 8192], found["offload", 8192])
