"""Two hundred turns of training and sampling through the public clients: nothing grows, and every answer is the newest weights'."""

import gc

import psutil
import pytest
import torch

from local_tinker import Datum, ModelInput, ServiceClient
from local_tinker.engine import planning
from local_tinker.engine.local import LocalEngine
from tests.test_training import ROWS

TURNS = 200
CHATS = [row["messages"][:1] for row in ROWS[:2]]


def held(engine):
    """What may not grow: live tensors and their bytes, objects, open files, snapshots, and the sampler's storage."""
    planning._choose.cache_clear()  # plans by the memory free at the time: at most 256 of them
    gc.collect()
    everything = gc.get_objects()
    tensors = [o for o in everything if issubclass(type(o), torch.Tensor)]
    return {
        "tensors": len(tensors),
        "bytes": sum({t.data_ptr(): t.nbytes for t in tensors}.values()),
        "files": psutil.Process().num_fds(),
        "snapshots": len(engine._snapshots),
        "kept": sum(sampler.kept_bytes for sampler in engine._samplers.values()),
    }, len(everything)


@pytest.mark.parametrize("quantize", [None, "4bit"])
def test_two_hundred_turns_of_training_and_sampling_hold_no_more_than_twenty(tiny_model, quantize):
    engine, seen, objects = LocalEngine("cpu"), [], []
    with ServiceClient(engine=engine, quiet=True) as service:
        trainer = service.create_lora_training_client(
            str(tiny_model), rank=4, quantize=quantize, dtype="float32", seed=1
        )
        versions, before = set(), None
        for turn in range(TURNS):
            trainer.forward_backward(ROWS[turn % 3 : turn % 3 + 1])
            trainer.optim_step(learning_rate=3e-3)
            sampler = trainer.save_weights_and_get_sampling_client()
            answers = sampler.sample_batch(CHATS, n=2, max_tokens=3, seed=turn % 2, stop=[])
            answer = answers[0][0]
            versions.add(answer.weights_version)
            if turn % 20 == 19:
                text = [*answer.prompt_tokens, *answer.tokens]
                (trained,) = trainer.forward(
                    [Datum(ModelInput.from_ints(text[:-1]), {"target_tokens": text[1:]})], "cross_entropy"
                ).logprobs
                assert list(answer.logprobs) == pytest.approx(trained[-3:].tolist(), abs=1e-4)
                score = sampler.compute_logprobs(CHATS[0])[1:]
                assert score != before
                before = score
                found, count = held(engine)
                seen.append(found)
                objects.append(count)
    assert len(versions) == TURNS
    assert all(found == seen[1] for found in seen[2:]), seen
    assert max(objects[2:]) <= objects[1] + 20, objects
    assert seen[-1]["snapshots"] <= 2
