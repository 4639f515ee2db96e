"""Train twice on a card in two processes and compare bits: 4-bit, bf16, SFT, DPO and PPO, sampling between them.

`pytest -m gpu tests/gpu/test_determinism.py -s` prints, with and without `deterministic=True`, the first part that differs:
the stored base, its dequantised weights, a forward's log-probs, a gradient by module, the weights after a step, samples.
`python tests/gpu/test_determinism.py DEVICE FOLDER MODE QUANTIZE STEPS` is one of those processes; it runs on a CPU too.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SIZES = dict(
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=4,
    num_attention_heads=16,
    num_key_value_heads=8,
    max_position_embeddings=2048,
)


def train(device: str, folder: str, mode: str, quantize: str, steps: int) -> list[tuple[str, str]]:
    """(part, hash of its bits) in the order in which they come to be."""
    import torch

    from local_tinker import ServiceClient
    from tests.state_machine import PAIRS
    from tests.test_training import ROWS, inner

    def bits(tensor) -> str:
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]

    service = ServiceClient(device=device, quiet=True, deterministic=mode == "deterministic")
    options = {"rank": 8, "quantize": None if quantize == "none" else quantize, "dtype": "bfloat16", "seed": 1}
    trainer = service.create_lora_training_client(folder, **options)
    state, found = inner(trainer), []
    for path, linear in state.model.projections.items():
        found.append((f"stored base {path}", linear.digest().hex()[:16]))
        found.append((f"dequantised {path}", bits(linear.dense())))
    rows = ROWS * 12
    for step in range(steps):
        sampler = trainer.save_weights_and_get_sampling_client()
        answers = sampler.sample_batch([row["messages"][:1] for row in ROWS], max_tokens=24, seed=step)
        found.append(
            (f"step {step}: sampled tokens", hashlib.sha256(repr([a.tokens for a in answers]).encode()).hexdigest())
        )
        found.append(
            (
                f"step {step}: sampled log-probs",
                hashlib.sha256(repr([a.logprobs for a in answers]).encode()).hexdigest(),
            )
        )
        trainer.forward(answers, [float(len(a) % 5) for a in answers], loss_fn="ppo")
        for name, call in {
            "sft": lambda: trainer.forward_backward(rows),
            "dpo": lambda: trainer.forward_backward(PAIRS * 8, loss_fn="dpo"),
            "ppo": lambda answers=answers: trainer.forward_backward(answers, loss_fn="ppo"),
        }.items():
            result = call()
            flat = b"".join(values.tobytes() for values in result.logprobs)
            found.append((f"step {step}: {name} log-probs", hashlib.sha256(flat).hexdigest()[:16]))
            for path, (a, b) in state.adapter.views(state.window.gradient()).items():
                found.append((f"step {step}: {name} gradient of {path}.A", bits(a)))
                found.append((f"step {step}: {name} gradient of {path}.B", bits(b)))
        trainer.optim_step(learning_rate=1e-3)
        found.append((f"step {step}: weights", bits(state.adapter.master)))
        found.append((f"step {step}: moments", bits(state.optimiser.v)))
    return found


def in_a_process(device: str, folder: Path, mode: str, quantize: str, steps: int) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("CUBLAS_WORKSPACE_CONFIG", None)
    command = [sys.executable, __file__, device, str(folder), mode, quantize, str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(device: str, folder: Path, mode: str, quantize: str, steps: int) -> list[str]:
    """The parts that differ between two processes, first come first."""
    first, second = (in_a_process(device, folder, mode, quantize, steps) for _ in range(2))
    assert list(first) == list(second)
    differing = [name for name in first if first[name] != second[name]]
    print(f"\n{device} {quantize} {mode}: {len(differing)} of {len(first)} parts differ")
    for name in differing[:12]:
        print(f"  {name}")
    return differing


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tests import tiny

    return tiny.save(tmp_path_factory.mktemp("models") / "wide", **SIZES)


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", ["4bit", "8bit", "none"])
def test_two_runs_are_bit_equal_in_the_deterministic_mode(model, quantize):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA card")
    assert compare("cuda", model, "deterministic", quantize, 5) == []


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", ["4bit", "none"])
def test_what_differs_without_the_mode_is_printed(model, quantize):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA card")
    compare("cuda", model, "as it comes", quantize, 5)


if __name__ == "__main__":
    print(json.dumps(train(*sys.argv[1:5], int(sys.argv[5]))))
