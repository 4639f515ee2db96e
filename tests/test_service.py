"""ServiceClient: one engine a device, arguments checked before anything loads, closing."""

import gc

import pytest

from local_tinker import ServiceClient
from local_tinker.engine.local import LocalEngine
from local_tinker.errors import CheckpointError, ModelError, StateError, UsageError
from tests.test_training import ROWS, inner


def make(service, tiny_model, **options):
    return service.create_lora_training_client(
        str(tiny_model), **{"rank": 2, "quantize": None, "dtype": "float32", **options}
    )


def test_service_clients_of_a_process_share_one_engine_and_its_bases(tiny_model):
    first, second = ServiceClient(device="cpu", quiet=True), ServiceClient(device="cpu", quiet=True)
    a, b = make(first, tiny_model), make(second, tiny_model)
    assert a._engine is b._engine and inner(a).model is inner(b).model
    other = make(first, tiny_model, quantize="4bit")
    assert inner(other).model is not inner(a).model


def test_making_a_service_client_loads_nothing():
    import subprocess
    import sys

    code = "import sys; from local_tinker import ServiceClient; ServiceClient(); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_models_lists_names_memory_and_status(service):
    rows = service.models()
    assert len(rows) >= 25
    row = next(row for row in rows if row["name"] == "smollm2-135m")
    assert row["params"] == pytest.approx(134.5e6, rel=0.01) and row["status"] in ("ready", "tight", "OOM")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a whole number >= 1, got 0"),
        ({"rank": 2.5}, "rank must be a whole number >= 1, got 2.5"),
        ({"alpha": -1}, "alpha must be a number > 0, got -1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"quantize": "2bit"}, "quantize='2bit' is not known"),
        ({"dtype": "int8"}, "dtype='int8' is not known"),
        ({"overlong": "cut"}, "overlong must be one of 'drop', 'truncate_prompt', 'error', got 'cut'"),
        ({"max_length": 100_000}, "max_length=100000 is more than the model's context of 256"),
        ({"target_modules": ["q_prj"]}, "did you mean 'q_proj'"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens must be a whole number >= 1"),
        ({"seed": -1}, "seed must be a whole number >= 0"),
    ],
)
def test_arguments_that_cannot_be_meant_are_named(service, tiny_model, options, message):
    with pytest.raises(UsageError, match=message):
        make(service, tiny_model, **options)


def test_an_unknown_model_names_the_nearest(service):
    with pytest.raises(ModelError, match="smollm2-135m"):
        service.create_lora_training_client("smolm2-135m")


def test_a_folder_without_weights_says_what_is_missing(service, tmp_path):
    with pytest.raises(ModelError, match="config.json"):
        service.create_lora_training_client(str(tmp_path))


def test_an_unknown_device_is_refused():
    with pytest.raises(UsageError, match="device must be 'cuda', 'cpu' or None, got 'tpu'"):
        ServiceClient(device="tpu")


def test_what_save_adapter_wrote_is_no_training_state(service, tiny_model, tmp_path):
    folder = make(service, tiny_model).save_adapter(tmp_path / "a")
    with pytest.raises(CheckpointError, match="is a saved adapter, not a training state"):
        service.create_training_client_from_state(folder)


def test_a_client_that_is_garbage_collected_frees_its_adapter_and_snapshots(service, tiny_model):
    trainer = make(service, tiny_model)
    engine = trainer._engine
    gc.collect()  # what other tests left in cycles
    trainer.step  # noqa: B018  (what was let go of is freed with the next verb)
    before = len(engine._trainers), len(engine._snapshots)
    other = make(service, tiny_model)
    samplers = [other.save_weights_and_get_sampling_client() for _ in range(3)]
    assert (len(engine._trainers), len(engine._snapshots)) == (before[0] + 1, before[1] + 3)
    del other, samplers
    gc.collect()
    trainer.step  # noqa: B018
    assert (len(engine._trainers), len(engine._snapshots)) == before


def test_a_closed_trainer_says_so_and_its_samplers_go_on(service, tiny_model):
    trainer = make(service, tiny_model)
    sampler = trainer.save_weights_and_get_sampling_client()
    trainer.close()
    with pytest.raises(StateError, match="this training client was closed"):
        trainer.forward_backward(ROWS)
    assert len(sampler.sample("one", max_tokens=2).tokens) <= 2


def test_closing_the_service_releases_its_models(tmp_path):
    from tests import tiny

    folder = tiny.save(tmp_path / "model")
    with ServiceClient(device="cpu", quiet=True) as service:
        trainer = make(service, folder)
    with pytest.raises(StateError):
        trainer.forward_backward(ROWS)


def test_an_engine_of_ones_own_shares_nothing_and_may_keep_to_the_plain_road(service, tiny_model):
    with ServiceClient(engine=LocalEngine("cpu", plain_road=True), quiet=True) as other:
        plain, fast = (s.create_lora_training_client(str(tiny_model), rank=4, quantize=None) for s in (other, service))
        assert (inner(plain).model.road.name, inner(fast).model.road.name) == ("plain", "fast")
        assert inner(plain).model is not inner(fast).model
        assert float(plain.forward_backward(ROWS)) == pytest.approx(float(fast.forward_backward(ROWS)), rel=1e-5)
    with pytest.raises(StateError):
        plain.forward_backward(ROWS)
    fast.optim_step()
    with pytest.raises(UsageError, match="owns 'cpu' and device='cuda'"):
        ServiceClient(device="cuda", engine=LocalEngine("cpu"))


def test_sampling_from_threads_while_training_gives_each_snapshots_own_answers(service, tiny_model):
    from concurrent.futures import ThreadPoolExecutor

    trainer = make(service, tiny_model, rank=4)
    prompt, snapshots = ROWS[1]["messages"][:1], []
    for _ in range(3):
        snapshots.append(trainer.save_weights_and_get_sampling_client())
        trainer.forward_backward(ROWS)
        trainer.optim_step(learning_rate=0.02)
    serial = [s.sample(prompt, max_tokens=10, seed=1) for s in snapshots]

    def train():
        return [float(trainer.forward_backward(ROWS)) for _ in range(4)]

    with ThreadPoolExecutor(4) as pool:
        losses = pool.submit(train)
        answers = [pool.submit(s.sample, prompt, max_tokens=10, seed=1) for s in snapshots for _ in range(3)]
        found = [a.result() for a in answers]
    for i, answer in enumerate(found):
        assert answer.tokens == serial[i // 3].tokens
        assert answer.logprobs == pytest.approx(serial[i // 3].logprobs, abs=1e-5)
    assert len(set(losses.result())) == 1
