"""The whole loop on a card against the same loop on the CPU. Run by hand: pytest -m gpu tests."""

import numpy as np
import pytest
import torch

from local_tinker import ServiceClient
from tests.test_training import ROWS, inner, relative

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card"),
]


def trainer_on(device, folder, **options):
    service = ServiceClient(device=device, quiet=True)
    trainer = service.create_lora_training_client(str(folder), **{"rank": 4, "alpha": 8, "seed": 1, **options})
    state = inner(trainer)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        noise = torch.randn(state.adapter.master.shape, generator=generator)
        state.adapter.master.add_(noise.to(state.adapter.master) * 0.05)
        state.adapter.refresh()
    return trainer


@pytest.mark.parametrize("quantize", [None, "4bit", "8bit"])
def test_loss_gradient_and_step_equal_the_cpus_in_fp32(tiny_model, quantize):
    clients = [trainer_on(d, tiny_model, quantize=quantize, dtype="float32") for d in ("cpu", "cuda")]
    losses = [float(c.forward_backward(ROWS)) for c in clients]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    gradients = [inner(c).window.gradient().cpu() for c in clients]
    assert relative(gradients[1], gradients[0]) < 1e-3
    for c in clients:
        c.optim_step(learning_rate=1e-2)
    masters = [inner(c).adapter.master.cpu() for c in clients]
    assert relative(masters[1], masters[0]) < 1e-2


def test_a_bf16_gradient_is_near_the_fp32_one_and_packing_changes_only_rounding(tiny_model):
    exact = trainer_on("cuda", tiny_model, quantize=None, dtype="float32")
    packed = trainer_on("cuda", tiny_model, quantize=None, dtype="bfloat16")
    alone = trainer_on("cuda", tiny_model, quantize=None, dtype="bfloat16", micro_batch_tokens=1)
    for c in (exact, packed, alone):
        c.forward_backward(ROWS)
    want = inner(exact).window.gradient()
    assert relative(inner(packed).window.gradient(), want) < 5e-2
    assert relative(inner(alone).window.gradient(), want) < 5e-2


def test_an_infinite_gradient_is_skipped_on_the_card(tiny_model):
    trainer = trainer_on("cuda", tiny_model, quantize="4bit", dtype="bfloat16")
    trainer.forward_backward(ROWS)
    before = inner(trainer).adapter.master.clone()
    inner(trainer).window.buffer("sft")[0] = float("inf")
    assert trainer.optim_step().skipped
    assert torch.equal(inner(trainer).adapter.master, before)


def test_samples_have_the_trainers_log_probs_and_memory_stays_flat(tiny_model):
    trainer = trainer_on("cuda", tiny_model, quantize="4bit", dtype="float32")
    prompt, seen = ROWS[1]["messages"][:1], []
    for _ in range(8):
        trainer.forward_backward(ROWS)
        trainer.optim_step(learning_rate=1e-3)
        sampler = trainer.save_weights_and_get_sampling_client()
        completion = sampler.sample(prompt, max_tokens=12, seed=3)
        scored = sampler.compute_logprobs([*completion.prompt_tokens, *completion.tokens])
        assert np.allclose(scored[len(completion.prompt_tokens) :], completion.logprobs, atol=1e-4)
        del sampler
        seen.append(torch.cuda.memory_allocated())
    assert max(seen[2:]) - min(seen[2:]) < 2**20


def test_the_card_learns_what_the_cpu_learns(tiny_model):
    trainer = ServiceClient(device="cuda", quiet=True).create_lora_training_client(str(tiny_model), rank=8)
    for _ in range(80):
        loss = trainer.forward_backward(ROWS)
        trainer.optim_step(learning_rate=5e-3)
    assert float(loss) < 0.05
    question = ROWS[1]["messages"][:1]
    answer = trainer.save_weights_and_get_sampling_client().sample(question, temperature=0, max_tokens=20)
    assert answer == "Three." and answer.stop_reason == "stop"
