"""Captures that come to nothing, and what makes the host wait, on a real card. Run by hand: pytest -m gpu tests."""

import gc

import pytest
import torch

from local_tinker import ServiceClient
from local_tinker.model.kernels import dependent, nf4_rows
from local_tinker.sampler.workspace import Workspace, record
from tests.gpu.test_sampler import on_card, requests
from tests.test_training import ROWS, inner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card"),
]
MIB = 2**20


def returned() -> bool:
    """Whether the allocator gives unused memory back to the device."""
    big = torch.empty(512 * MIB, dtype=torch.uint8, device="cuda")
    before = torch.cuda.memory_reserved()
    del big
    torch.cuda.empty_cache()
    return before - torch.cuda.memory_reserved() >= 512 * MIB


@pytest.fixture
def side():
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        yield stream
    torch.cuda.current_stream().wait_stream(stream)


def test_after_a_capture_that_became_invalid_memory_is_returned_and_captures_work(side):
    def waits():
        return (torch.ones(1000, device="cuda") * 2).sum().item()

    def counts():
        held.add_(1)

    held = torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="captur"):
        record(torch.cuda.CUDAGraph(), waits, pool=torch.cuda.graph_pool_handle())
    gc.collect()
    assert returned()
    graph = torch.cuda.CUDAGraph()
    record(graph, counts, pool=torch.cuda.graph_pool_handle())
    for _ in range(3):
        graph.replay()
    assert held.item() == 3


def test_a_first_capture_that_finds_no_memory_is_repeated(monkeypatch):
    sampler, _ = on_card("llama")
    expected = sampler.collect(requests(), pairs={}, scale=1.0)
    sampler.drop_idle()
    step, failed = Workspace._step, []

    def short(self, kind):
        step(self, kind)
        if torch.cuda.is_current_stream_capturing() and not failed:
            failed.append(kind)
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Workspace, "_step", short)
    found = sampler.collect(requests(), pairs={}, scale=1.0)
    assert failed and [[f.tokens for f in g] for g in found] == [[f.tokens for f in g] for g in expected]
    assert returned()


def test_neither_a_step_nor_a_rollout_waits_for_the_device(tmp_path):
    from tests import tiny

    folder = tiny.save(tmp_path / "model", hidden_size=256, num_attention_heads=4, intermediate_size=512)
    service = ServiceClient(device="cuda", quiet=True)
    trainer = service.create_lora_training_client(str(folder), rank=8, quantize="4bit")
    assert inner(trainer).model.fast is not None
    prompts = [[5 + i, 6, 7, 8] for i in range(6)]

    def step():
        trainer.forward_backward(ROWS)
        trainer.optim_step(learning_rate=1e-4)

    def rollout():
        return sampler.sample_batch(prompts, 4, max_tokens=40, stop=[], seed=1)

    for _ in range(2):
        step()
    sampler = trainer.save_weights_and_get_sampling_client()
    expected = rollout()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        found = rollout()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [c.tokens for g in found for c in g] == [c.tokens for g in expected for c in g]


@pytest.mark.parametrize("quantize", [None, "4bit"])
def test_kernels_that_are_sent_out_early_change_no_bit(quantize, tmp_path, monkeypatch):
    """Recorded steps in which a kernel takes its place while the one before it runs, against one after the other."""
    from tests import tiny

    if not dependent.launches_early("cuda"):
        pytest.skip("this card sends no kernel out early")
    folder = tiny.save(tmp_path / "model", hidden_size=256, num_attention_heads=4, intermediate_size=512)
    with ServiceClient(device="cuda", quiet=True) as service:
        trainer = service.create_lora_training_client(str(folder), rank=8, quantize=quantize, dtype="bfloat16")
        trainer.forward_backward(ROWS)
        trainer.optim_step(learning_rate=1e-2)
        trainer.save_state(tmp_path / "state")
    capture, captured = Workspace._capture, []
    monkeypatch.setattr(Workspace, "_capture", lambda self, kind: captured.append(kind) or capture(self, kind))

    def drawn(n):
        """In a service of its own, which records its steps anew."""
        before = len(captured)
        with ServiceClient(device="cuda", quiet=True) as service:
            trainer = service.create_training_client_from_state(tmp_path / "state")
            sampler = trainer.save_weights_and_get_sampling_client()
            runs = [sampler.sample_batch([[5, 6, 7], [8, 9]], n, max_tokens=60, stop=[], seed=1) for _ in range(4)]
        assert len(captured) > before
        return [[(c.tokens, c.logprobs) for g in run for c in g] for run in runs]

    for n in (1, 2, 7, 80):
        early = drawn(n)
        with monkeypatch.context() as patch:
            for module in (dependent, nf4_rows):
                patch.setattr(module, "launches_early", lambda device: False)
            late = drawn(n)
        assert all(run == late[0] for run in early + late), f"{n} a prompt"
